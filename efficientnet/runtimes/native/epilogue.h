// Sums -> values of a map, which is where much of the time goes: 31 million values a call of V2-S at 384 px. Included inside each file's
// own namespace, after its Lanes.
//
// Packing 32 -> 16 -> 8 bits works within 128 bits. So that bytes come out in order, sums stand in an order of their own: a convolution's
// group of 32 channels is two tiles of 16, tile t's lane 4 l + i is channel 8 l + 4 t + i (two pixels side by side fill 64 bytes, and one
// permute parts them), a half group's one tile is in order (four pixels fill 64 bytes); a depthwise group of 64 is four tiles, tile t's lane 4 l + i is channel 16 l + 4 t + i.

// What follows a sum: an activation (or none), a residual (or none); or an activation of which only the sums over pixels are kept.
// A ramp is a table of one line.
enum Mode { LINE, RAMP, TABLE, LINE_RESIDUAL, TABLE_RESIDUAL, SUMS };

constexpr bool has_table(int mode) { return mode == TABLE || mode == TABLE_RESIDUAL || mode == SUMS; }
constexpr bool has_residual(int mode) { return mode == LINE_RESIDUAL || mode == TABLE_RESIDUAL; }

// Walks over the pixels of an output map (and of a residual) in rows of `width`.
struct Target {
  uint8_t* out = nullptr;
  int64_t pixel = 0, skip = 0;
  const uint8_t* residual = nullptr;
  int64_t residual_pixel = 0, residual_skip = 0;
  int x = 0, width = 0;

  inline __attribute__((always_inline)) void next() {
    out += pixel;
    residual += residual_pixel;
    if (++x == width) {
      x = 0;
      out += skip;
      residual += residual_skip;
    }
  }
};

static constexpr int16_t EMPTY_TABLE[128] = {};

// Of u8 maps.
template <int MODE>
struct Epilogue {
  using V = Lanes::V;
  using F = Lanes::F;
  const float* scales;
  Lanes::Table table;
  Lanes::Shift shift;
  V offset, multiplier;
  int columns;      // channels from the first on that exist
  int32_t* totals;  // SUMS: of 32 channels

  Epilogue(const Packed& p, int first_channel, void* channel_totals)
      : scales(p.scales + first_channel), table(has_table(MODE) && p.table ? p.table : EMPTY_TABLE), shift(p.layer->fraction_bits),
        offset(Lanes::set16(MODE == RAMP ? p.offset : p.layer->output_offset)),
        multiplier(Lanes::set16(MODE == RAMP ? p.slope : p.layer->residual_multiplier)),
        columns(p.outputs - first_channel), totals(static_cast<int32_t*>(channel_totals)) {}

  inline __attribute__((always_inline)) V line(V x, V residual8) const {
    if (has_residual(MODE)) x = Lanes::adds16(x, Lanes::mulhrs16(Lanes::half16(residual8), multiplier));
    return Lanes::adds16(x, offset);
  }

  // Two registers of sums and their scales (and a residual, widened) -> bytes that are words yet.
  inline __attribute__((always_inline)) V words(V a, V b, F sa, F sb, V residual) const {
    V x = Lanes::pack32(Lanes::scaled(a, sa), Lanes::scaled(b, sb));
    if (has_table(MODE)) x = table.at(x);
    if (MODE == RAMP) x = Lanes::adds16(Lanes::mulhrs16(x, multiplier), offset);
    else if (!has_table(MODE) || has_residual(MODE)) x = line(x, residual);
    return shift.right(x);
  }

  // Four registers of sums, their scales and residual -> bytes.
  inline __attribute__((always_inline)) V finish(V a, V b, V c, V d, F sa, F sb, F sc, F sd, V residual) const {
    // A byte in the upper half of 16 bits is 256 times its value; half of that is what the multiplier wants.
    return Lanes::pack16(words(a, b, sa, sb, Lanes::low8(Lanes::zero(), residual)), words(c, d, sc, sd, Lanes::high8(Lanes::zero(), residual)));
  }

  // Two pixels (or one) of a convolution's group: at once in 64 bytes, or one after the other.
  inline __attribute__((always_inline)) void pixels(const int32_t* sums, bool has_two, Target& t) const {
    if (Lanes::BYTES == 64) {
      const int32_t* second = has_two ? sums + 32 : sums;
      return pair(Lanes::load(sums), Lanes::load(sums + 16), Lanes::load(second), Lanes::load(second + 16), has_two, t);
    }
    for (int i = 0; i < (has_two ? 2 : 1); i++, sums += 32)
      registers(Lanes::load(sums), Lanes::load(sums + 16), Lanes::load(sums + 8), Lanes::load(sums + 24), scales + 8, false, t);
  }

  // The same from registers of 16 sums.
  inline __attribute__((always_inline)) void pair(V a, V b, V c, V d, bool has_two, Target& t) const { registers(a, b, c, d, scales, has_two, t); }

  // Up to four pixels of a half group.
  template <class L = Lanes>
  inline __attribute__((always_inline)) void four(V a, V b, V c, V d, int count, Target& t) const {
    const typename L::Mask mask(columns);
    const F s = Lanes::loadf(scales);
    void* out[4];
    const void* residual[4];
    for (int i = 0; i < 4; i++) {
      out[i] = t.out;
      residual[i] = t.residual;
      if (i + 1 < count) t.next();
    }
    t.next();
    const V q = finish(a, b, c, d, s, s, s, s, has_residual(MODE) ? L::load_four(residual, mask) : Lanes::zero());
    if (MODE == SUMS) {
      alignas(64) uint8_t bytes[4][16];
      void* rows[4] = {bytes[0], bytes[1], bytes[2], bytes[3]};
      L::store_four(rows, 4, typename L::Mask(16), q);
      for (int i = 0; i < count; i++)
        for (int c = 0; c < 16; c++) totals[c] += bytes[i][c];
    } else {
      L::store_four(out, count, mask, q);
    }
  }

 private:
  inline __attribute__((always_inline)) void registers(V a, V b, V c, V d, const float* second_scales, bool has_two, Target& t) const {
    const Lanes::Mask mask(columns < 32 ? columns : 32);
    Target u = t;
    if (has_two) u.next();
    const V r = has_residual(MODE) ? Lanes::load_pair(t.residual, u.residual, mask) : Lanes::zero();
    const V q = finish(a, b, c, d, Lanes::loadf(scales), Lanes::loadf(scales + 16), Lanes::loadf(second_scales), Lanes::loadf(second_scales + 16), r);
    if (MODE == SUMS) {
      alignas(64) uint8_t bytes[2][32];
      Lanes::store_pair(bytes[0], bytes[1], Lanes::Mask(32), q);
      for (int c = 0; c < 32; c++) totals[c] += bytes[0][c] + (has_two ? bytes[1][c] : 0);
    } else {
      Lanes::store_pair(t.out, u.out, mask, q);
    }
    t = u;
    t.next();
  }
};

// Of bf16 maps: sums are floats, bias included, in order.
static inline __attribute__((always_inline)) Lanes::F silu_of(Lanes::F x) {
  using F = Lanes::F;
  // 2^t for t = -x / ln 2: the whole part is in the low bits of t + 1.5 * 2^23, the rest goes through a cubic (1e-4, bf16 keeps 4e-3).
  const F magic = Lanes::setf(12582912.0f);
  F t = Lanes::mulf(x, Lanes::setf(-1.44269502f));
  t = Lanes::minf(Lanes::maxf(t, Lanes::setf(-120.0f)), Lanes::setf(120.0f));
  const F whole = Lanes::addf(t, magic), rest = Lanes::subf(t, Lanes::subf(whole, magic));
  F p = Lanes::fma(Lanes::setf(0.0558263180f), rest, Lanes::setf(0.240226507f));
  p = Lanes::fma(p, rest, Lanes::setf(0.693147182f));
  p = Lanes::fma(p, rest, Lanes::setf(1.0f));
  return Lanes::mulf(x, Lanes::reciprocal(Lanes::addf(Lanes::raise(p, whole), Lanes::setf(1.0f))));
}

static inline __attribute__((always_inline)) Lanes::F activated(Lanes::F x, int activation) {
  if (activation == SILU) return silu_of(x);
  if (activation == RELU6) return Lanes::minf(Lanes::maxf(x, Lanes::zerof()), Lanes::setf(6.0f));
  return x;
}

template <int MODE>
struct FloatEpilogue {
  int activation, columns;
  float* totals;

  FloatEpilogue(const Packed& p, int first_channel, void* channel_totals)
      : activation(p.layer->activation), columns(p.outputs - first_channel), totals(static_cast<float*>(channel_totals)) {}

  inline __attribute__((always_inline)) void pixels(const int32_t* sums, bool has_two, Target& t) const {
    if (activation == SILU) pixels_of<SILU>(sums, has_two, t);
    else if (activation == RELU6) pixels_of<RELU6>(sums, has_two, t);
    else pixels_of<NONE>(sums, has_two, t);
  }

  template <int ACTIVATION>
  inline __attribute__((always_inline)) void pixels_of(const int32_t* sums, bool has_two, Target& t) const {
    constexpr int REGISTERS = 32 / Lanes::WORDS;
    for (int i = 0; i < (has_two ? 2 : 1); i++, sums += 32) {
      Lanes::F v[REGISTERS];
      for (int k = 0; k < REGISTERS; k++) {
        v[k] = Lanes::loadf(reinterpret_cast<const float*>(sums) + k * Lanes::WORDS);
        if (has_table(MODE)) v[k] = activated(v[k], ACTIVATION);
        if (has_residual(MODE)) v[k] = Lanes::addf(v[k], Lanes::widen(t.residual + k * Lanes::WORDS * 2));
      }
      for (int k = 0; k < REGISTERS; k++) {
        float* total = totals + k * Lanes::WORDS;
        if (MODE == SUMS) Lanes::storef(total, Lanes::addf(Lanes::loadf(total), v[k]));
        else Lanes::narrow(t.out + k * Lanes::WORDS * 2, columns - k * Lanes::WORDS, v[k]);
      }
      t.next();
    }
  }
};

// Pixels whose sums wait for their epilogue. It is done some at a time between the products of the next unit, so that tile products and
// vector instructions run side by side.
template <class E>
struct Pending {
  const E& epilogue;
  Target target;
  Prefetch& prefetch;
  const int32_t* sums = nullptr;
  int left = 0, per_step = 0;

  void begin(const int32_t* from, int pixels, int steps) {
    sums = from;
    left = pixels;
    per_step = ((pixels + steps - 1) / steps + 1) / 2 * 2;
  }
  inline __attribute__((always_inline)) void step() {
    prefetch.take(8);
    work(per_step < left ? per_step : left);
  }
  void flush() { work(left); }

  inline __attribute__((always_inline)) void work(int pixels) {
    left -= pixels;
    for (; pixels >= 2; pixels -= 2, sums += 64) epilogue.pixels(sums, true, target);
    if (pixels) {
      epilogue.pixels(sums, false, target);
      sums += 32;
    }
  }
};
