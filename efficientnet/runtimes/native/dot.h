// Sums by vpdpbusd (four products and their sum in each lane of 32 bits). Included inside each file's own namespace.
//
// A step takes one word of four values from each of N pixels, by broadcast, and two registers of weights. 2 N sums are in flight, which
// hides the instruction's latency (4 or 5 cycles, two a cycle) from N = 5 on; the more pixels, the fewer loads a product.

struct Products {
  static constexpr int MOST_PIXELS = Lanes::BYTES == 64 ? 12 : 6;

  // Whether sums become bytes where they are, in registers: where one holds a tile of sums.
  static constexpr bool FINISHES = Lanes::BYTES == 64;

  static int steps(const Packed&) { return 1; }

  template <bool IS_BF16, class Pending>
  static void compute(const Packed& p, const uint8_t* from, int64_t pixel, int64_t kernel_row, int count, const uint8_t* weights,
                      const int32_t* bias, int32_t* sums, Pending& pending) {
    pending.prefetch.take(8 * p.row_blocks * p.layer->kernel);
    // AVX2 takes one tile at a time.
    for (int tile = 0; tile < (Lanes::BYTES == 64 ? 1 : 2); tile++, weights += 1024, bias += 16, sums += 16) {
      // In shares as equal as they can be: a last one of a pixel or two would wait for its own sums.
      int x = 0;
      for (int shares = (count + MOST_PIXELS - 1) / MOST_PIXELS; shares > 0; shares--) {
        const int n = (count - x + shares - 1) / shares;
        of_pixels<IS_BF16>(n, std::make_index_sequence<MOST_PIXELS>())(p, from + x * pixel, pixel, kernel_row, weights, bias, sums + x * CONV_GROUP);
        x += n;
      }
    }
  }

  // `count` pixels side by side, in shares as equal as they can be; of pixels by twos, but for a last one, or by fours.
  template <class E>
  static void finish(const Packed& p, const uint8_t* from, int64_t pixel, int64_t kernel_row, int count, const uint8_t* weights, const int32_t* bias,
                     const E& epilogue, Target& target, Prefetch& prefetch) {
    const bool is_half = is_half_group(epilogue.columns, false);
    const int unit = is_half ? 4 : 2;
    for (int shares = (count + MOST_PIXELS - 1) / MOST_PIXELS; count > 0; shares--) {
      const int equal = ((count + shares - 1) / shares + unit - 1) / unit * unit, n = equal < count ? equal : count;
      prefetch.take((p.row_blocks * p.layer->kernel * n + 3) / 4);
      if (is_half) (n > 8 ? finished_half<12, E> : n > 4 ? finished_half<8, E> : finished_half<4, E>)(p, from, pixel, kernel_row, weights, bias, epilogue, target, n);
      else finished<E>(n, std::make_index_sequence<MOST_PIXELS>())(p, from, pixel, kernel_row, weights, bias, epilogue, target);
      from += n * pixel;
      count -= n;
    }
  }

 private:
  using Pixels = void (*)(const Packed&, const uint8_t*, int64_t, int64_t, const uint8_t*, const int32_t*, int32_t*);

  template <bool IS_BF16>
  static inline __attribute__((always_inline)) Lanes::V dot(Lanes::V acc, Lanes::V q, Lanes::V w) {
    return IS_BF16 ? Lanes::bits(Lanes::dot_bf16(Lanes::floats(acc), q, w)) : Lanes::dot(acc, q, w);
  }

  // Sums of N pixels: a[N] of the group's first tile, b[N] of its second.
  template <int N, bool IS_BF16, int TILES = 2>
  static inline __attribute__((always_inline)) void sum(const Packed& p, const uint8_t* from, int64_t pixel, int64_t kernel_row, const uint8_t* weights,
                                                        const int32_t* bias, Lanes::V* a, Lanes::V* b) {
    using V = Lanes::V;
    constexpr int NEXT = Lanes::BYTES == 64 ? 1024 : 32;  // from a register of weights to the one beside it
    for (int i = 0; i < N; i++) {
      a[i] = Lanes::load(bias);
      if (TILES == 2) b[i] = Lanes::load(bias + Lanes::WORDS);
    }
    const int words = p.row_words, rows = p.layer->kernel;
    const int64_t blocks_bytes = int64_t(p.row_blocks) * 2048;
    for (int ky = 0; ky < rows; ky++, from += kernel_row, weights += blocks_bytes) {
      for (int w = 0; w < words; w += 16) {
        const uint8_t* block = weights + w * 128;
        const uint8_t* in = from + w * 4;
        for (int j = 0; j < (words - w < 16 ? words - w : 16); j++, block += 64, in += 4) {
          const V w0 = Lanes::load(block), w1 = TILES == 2 ? Lanes::load(block + NEXT) : w0;
          for (int i = 0; i < N; i++) {
            const V q = Lanes::broadcast32(in + i * pixel);
            a[i] = dot<IS_BF16>(a[i], q, w0);
            if (TILES == 2) b[i] = dot<IS_BF16>(b[i], q, w1);
          }
        }
      }
    }
  }

  // Never inlined: beside an epilogue's constants, compilers keep a sum in memory, and each step waits for it.
  template <int N, bool IS_BF16>
  static __attribute__((noinline)) void pixels(const Packed& p, const uint8_t* from, int64_t pixel, int64_t kernel_row, const uint8_t* weights,
                                               const int32_t* bias, int32_t* sums) {
    Lanes::V a[N], b[N];
    sum<N, IS_BF16>(p, from, pixel, kernel_row, weights, bias, a, b);
    for (int i = 0; i < N; i++) {
      Lanes::store(sums + i * CONV_GROUP, a[i]);
      Lanes::store(sums + i * CONV_GROUP + Lanes::WORDS, b[i]);
    }
  }

  template <class E>
  using Finished = void (*)(const Packed&, const uint8_t*, int64_t, int64_t, const uint8_t*, const int32_t*, const E&, Target&);

  template <int N, class E>
  static __attribute__((noinline)) void finished_pixels(const Packed& p, const uint8_t* from, int64_t pixel, int64_t kernel_row, const uint8_t* weights,
                                                        const int32_t* bias, const E& shared, Target& target) {
    Lanes::V a[N], b[N];
    sum<N, false>(p, from, pixel, kernel_row, weights, bias, a, b);
    const E epilogue = shared;
    Target t = target;
    pairs<0, N>(epilogue, a, b, t);
    target = t;
  }

  // The first `count` of N pixels of a half group: what is read behind them is not used.
  template <int N, class E>
  static __attribute__((noinline)) void finished_half(const Packed& p, const uint8_t* from, int64_t pixel, int64_t kernel_row, const uint8_t* weights,
                                                      const int32_t* bias, const E& shared, Target& target, int count) {
    Lanes::V a[N];
    sum<N, false, 1>(p, from, pixel, kernel_row, weights, bias, a, nullptr);
    const E epilogue = shared;
    Target t = target;
    fours<0, N>(epilogue, a, count, t);
    target = t;
  }

  template <int I, int N, class E>
  static inline __attribute__((always_inline)) void fours(const E& epilogue, const Lanes::V* a, int count, Target& t) {
    epilogue.four(a[I], a[I + 1], a[I + 2], a[I + 3], I + 4 < N ? 4 : count - I, t);
    if constexpr (I + 4 < N) fours<I + 4, N>(epilogue, a, count, t);
  }

  // Unrolled, so that sums stay in registers.
  template <int I, int N, class E>
  static inline __attribute__((always_inline)) void pairs(const E& epilogue, const Lanes::V* a, const Lanes::V* b, Target& t) {
    constexpr bool HAS_TWO = I + 1 < N;
    epilogue.pair(a[I], b[I], a[I + HAS_TWO], b[I + HAS_TWO], HAS_TWO, t);
    if constexpr (I + 2 < N) pairs<I + 2, N>(epilogue, a, b, t);
  }

  template <class E, size_t... LESS>
  static Finished<E> finished(int n, std::index_sequence<LESS...>) {
    static constexpr Finished<E> all[] = {finished_pixels<int(LESS) + 1, E>...};
    return all[n - 1];
  }

  template <bool IS_BF16, size_t... LESS>
  static Pixels of_pixels(int n, std::index_sequence<LESS...>) {
    static constexpr Pixels all[] = {pixels<int(LESS) + 1, IS_BF16>...};
    return all[n - 1];
  }
};
