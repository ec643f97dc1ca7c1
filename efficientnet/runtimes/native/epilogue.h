// Sums -> bytes of a map, which is where most of the time goes: 31 million values a call of V2-S at 384 px. Included inside each
// file's own namespace, after its Lanes.
//
// A group is 64 channels, whose sums lie in four tiles of 16. Packing 32 -> 16 -> 8 bits works within 128 bits, so tile t's lane
// 4 l + i holds channel 16 l + 4 t + i: then four registers of sums come out as 64 bytes in order with three packs and no permute. The
// last 32 channels or fewer of a layer are a small group: two tiles, lane 4 l + i holds channel 8 l + 4 t + i.

enum Mode { TABLE, LINE, RESIDUAL, SUMS };  // activation; none; none and residual; activation, and only the sums over pixels are kept

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

template <int MODE>
struct Epilogue {
  using V = Lanes::V;
  using F = Lanes::F;
  const float* scales;
  Lanes::Table table;
  Lanes::Shift shift;
  V offset, multiplier;
  int columns;        // channels of the group that exist
  int32_t* totals;    // SUMS: of the group's 64 channels

  Epilogue(const Packed& p, int group, void* group_totals)
      : scales(p.scales + group * GROUP), table(MODE == TABLE || MODE == SUMS ? p.table : EMPTY_TABLE), shift(p.layer->fraction_bits),
        offset(Lanes::set16(p.layer->output_offset)), multiplier(Lanes::set16(p.layer->residual_multiplier)),
        columns(p.outputs - group * GROUP), totals(static_cast<int32_t*>(group_totals)) {}

  static inline __attribute__((always_inline)) V line(V x, V residual8, V offset, V multiplier) {
    if (MODE == RESIDUAL) x = Lanes::adds16(x, Lanes::mulhrs16(Lanes::half16(residual8), multiplier));
    return Lanes::adds16(x, offset);
  }

  // Four registers of sums, their scales and residual -> bytes.
  inline __attribute__((always_inline)) V finish(V a, V b, V c, V d, F sa, F sb, F sc, F sd, V residual) const {
    V x = Lanes::pack32(Lanes::scaled(a, sa), Lanes::scaled(b, sb)), y = Lanes::pack32(Lanes::scaled(c, sc), Lanes::scaled(d, sd));
    if (MODE == TABLE || MODE == SUMS) {
      x = table.at(x);
      y = table.at(y);
    } else {
      // A byte in the upper half of 16 bits is 256 times its value; half of that is what the multiplier wants.
      x = line(x, Lanes::low8(Lanes::zero(), residual), offset, multiplier);
      y = line(y, Lanes::high8(Lanes::zero(), residual), offset, multiplier);
    }
    return Lanes::pack16(shift.right(x), shift.right(y));
  }

  inline __attribute__((always_inline)) void row(const int32_t* sums, Target& t) const {
    for (int c = 0; c < 64 / Lanes::BYTES; c++) {
      const int32_t* s = sums + c * Lanes::WORDS;
      const float* f = scales + c * Lanes::WORDS;
      const Lanes::Mask mask(columns - c * Lanes::BYTES);
      const V r = MODE == RESIDUAL ? Lanes::load(t.residual + c * Lanes::BYTES, mask) : Lanes::zero();
      const V q = finish(Lanes::load(s), Lanes::load(s + 16), Lanes::load(s + 32), Lanes::load(s + 48), Lanes::loadf(f),
                         Lanes::loadf(f + 16), Lanes::loadf(f + 32), Lanes::loadf(f + 48), r);
      if (MODE == SUMS) add(q, c);
      else Lanes::store(t.out + c * Lanes::BYTES, mask, q);
    }
    t.next();
  }

  // A small group: 64 bytes of register hold two pixels' (or one's twice), 32 bytes one's, eight channels of its first and of its second
  // sixteen in turns.
  inline __attribute__((always_inline)) void small_rows(const int32_t* sums, bool has_two, Target& t) const {
    constexpr bool IS_WIDE = Lanes::BYTES == 64;
    const Lanes::Mask mask(columns);
    for (int i = 0; i < (has_two && !IS_WIDE ? 2 : 1); i++, sums += 64) {
      const int32_t* second = !IS_WIDE ? sums + 8 : has_two ? sums + 64 : sums;
      const float* second_scales = IS_WIDE ? scales : scales + 8;
      Target u = t;
      if (IS_WIDE && has_two) u.next();
      const V r = MODE == RESIDUAL ? Lanes::load_small(t.residual, u.residual, mask) : Lanes::zero();
      const V q = finish(Lanes::load(sums), Lanes::load(sums + 16), Lanes::load(second), Lanes::load(second + 16), Lanes::loadf(scales),
                         Lanes::loadf(scales + 16), Lanes::loadf(second_scales), Lanes::loadf(second_scales + 16), r);
      if (MODE == SUMS) {
        alignas(64) uint8_t bytes[2][32];
        Lanes::store_small(bytes[0], bytes[1], Lanes::Mask(32), q);
        for (int c = 0; c < 32; c++) totals[c] += bytes[0][c] + (IS_WIDE && has_two ? bytes[1][c] : 0);
      } else {
        Lanes::store_small(t.out, u.out, mask, q);
      }
      t = u;
      t.next();
    }
  }

  // The head alone keeps sums this way: 1280 channels of 144 pixels.
  inline void add(V q, int c) const {
    alignas(64) uint8_t bytes[Lanes::BYTES];
    Lanes::store(bytes, q);
    for (int i = 0; i < Lanes::BYTES; i++) totals[c * Lanes::BYTES + i] += bytes[i];
  }

  static constexpr int16_t EMPTY_TABLE[128] = {};
};
template <int MODE>
constexpr int16_t Epilogue<MODE>::EMPTY_TABLE[128];

// Of bf16 maps: sums are floats, bias included; tile t's lane i holds channel 16 t + i.
static inline __attribute__((always_inline)) Lanes::F silu_of(Lanes::F x) {
  using F = Lanes::F;
  // 2^t for t = -x / ln 2: the whole part is in the low bits of t + MAGIC, the rest goes through a cubic (1e-4, bf16 keeps 4e-3).
  const F magic = Lanes::setf(12582912.0f);
  F t = Lanes::mulf(x, Lanes::setf(-1.44269502f));
  t = Lanes::minf(Lanes::maxf(t, Lanes::setf(-120.0f)), Lanes::setf(120.0f));
  const F whole = Lanes::addf(t, magic), rest = Lanes::addf(t, Lanes::mulf(Lanes::addf(whole, Lanes::setf(-12582912.0f)), Lanes::setf(-1.0f)));
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

  FloatEpilogue(const Packed& p, int group, void* group_totals)
      : activation(p.layer->activation), columns(p.outputs - group * GROUP), totals(static_cast<float*>(group_totals)) {}

  inline __attribute__((always_inline)) void values(const float* sums, int count, Target& t) const {
    for (int c = 0; c < count; c += Lanes::WORDS) {
      Lanes::F v = Lanes::loadf(sums + c);
      if (MODE == TABLE || MODE == SUMS) v = activated(v, activation);
      if (MODE == RESIDUAL) v = Lanes::addf(v, Lanes::widen(t.residual + c * 2));
      if (MODE == SUMS) Lanes::storef(totals + c, Lanes::addf(Lanes::loadf(totals + c), v));
      else Lanes::narrow(t.out + c * 2, columns - c, v);
    }
    t.next();
  }
  inline void row(const int32_t* sums, Target& t) const { values(reinterpret_cast<const float*>(sums), 64, t); }
  inline void small_rows(const int32_t* sums, bool has_two, Target& t) const {
    values(reinterpret_cast<const float*>(sums), 32, t);
    if (has_two) values(reinterpret_cast<const float*>(sums + 64), 32, t);
  }
};

// Rows of sums that wait for their epilogue. It is done some rows at a time between the products of the next unit, so that tile products
// and vector instructions run side by side.
template <class E, bool IS_SMALL>
struct Pending {
  const E& epilogue;
  Target target;
  const int32_t* sums = nullptr;
  int left = 0, per_step = 0;

  void begin(const int32_t* from, int rows, int steps) {
    sums = from;
    left = rows;
    per_step = (rows + steps - 1) / steps;
    if (IS_SMALL) per_step = (per_step + 1) / 2 * 2;
  }
  inline __attribute__((always_inline)) void step() { work(per_step < left ? per_step : left); }
  void flush() { work(left); }

  inline __attribute__((always_inline)) void work(int rows) {
    left -= rows;
    if (IS_SMALL) {
      for (; rows >= 2; rows -= 2, sums += 128) epilogue.small_rows(sums, true, target);
      if (rows) epilogue.small_rows(sums, false, target), sums += 64;
    } else {
      for (; rows; rows--, sums += 64) epilogue.row(sums, target);
    }
  }
};
