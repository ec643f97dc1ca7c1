// What a level's instructions do at most: from registers alone, on as many sums as hide their latency. Included inside each file's own
// namespace, after Products. The limit that times of layers are set beside, as the instruction set's own libraries stay below it.

#ifdef __AMX_TILE__
template <bool IS_BF16>
static int64_t peak_products(int64_t times) {
  for (int64_t i = 0; i < times; i++) {
    PRODUCT(0, 4, 6);
    PRODUCT(1, 4, 7);
    PRODUCT(2, 5, 6);
    PRODUCT(3, 5, 7);
  }
  return times * 4 * 16 * 16 * (IS_BF16 ? 32 : 64);
}
#else
template <bool IS_BF16>
static inline __attribute__((always_inline)) Lanes::V peak_dot(Lanes::V sum, Lanes::V bytes) {
  return IS_BF16 ? Lanes::bits(Lanes::dot_bf16(Lanes::floats(sum), bytes, bytes)) : Lanes::dot(sum, bytes, bytes);
}

template <bool IS_BF16>
static int64_t peak_products(int64_t times) {
  const Lanes::V bytes = Lanes::zero();
  Lanes::V a = bytes, b = a, c = a, d = a, e = a, f = a, g = a, h = a, j = a, k = a;
  for (int64_t i = 0; i < times; i++) {
    a = peak_dot<IS_BF16>(a, bytes);
    b = peak_dot<IS_BF16>(b, bytes);
    c = peak_dot<IS_BF16>(c, bytes);
    d = peak_dot<IS_BF16>(d, bytes);
    e = peak_dot<IS_BF16>(e, bytes);
    f = peak_dot<IS_BF16>(f, bytes);
    g = peak_dot<IS_BF16>(g, bytes);
    h = peak_dot<IS_BF16>(h, bytes);
    j = peak_dot<IS_BF16>(j, bytes);
    k = peak_dot<IS_BF16>(k, bytes);
    __asm__ volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(j), "+v"(k));
  }
  return times * 10 * Lanes::WORDS * (IS_BF16 ? 2 : 4);
}
#endif

// Additions, of which a processor does as many as of any instruction; some of an epilogue have only one of its ports.
static int64_t peak_instructions(int64_t times) {
  const Lanes::V one = Lanes::set16(1);
  Lanes::V a = one, b = one, c = one, d = one;
  for (int64_t i = 0; i < times; i++) {
    a = Lanes::add16(a, one);
    b = Lanes::add16(b, one);
    c = Lanes::add16(c, one);
    d = Lanes::add16(d, one);
    // Not folded into one addition of their sum.
    __asm__ volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d));
  }
  return times * 4;
}

// Multiply-adds of u8 (0) or bf16 (1) products, or vector instructions (2), that it did.
static int64_t peak(int what, int64_t times) {
  if (what == 2) return peak_instructions(times);
  return what ? peak_products<true>(times) : peak_products<false>(times);
}
