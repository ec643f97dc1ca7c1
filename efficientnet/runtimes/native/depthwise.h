// Depthwise convolution of u8 maps, 64 channels at a time, from a buffer [rows][width + margins][64]. Included inside each file's own
// namespace.
//
// vpdpbusd adds four neighboring bytes up, and a channel's neighbors lie in other rows: so the bytes of four rows of a column are
// interleaved once (8 unpacks for 64 channels) and every output that sees the column takes one product of it. At stride 1 two output
// rows share the four rows: with weights (w0 w1 w2 0) and (0 w0 w1 w2). A strip of columns waits in L1.

constexpr int STRIP = 24;  // outputs; (24 - 1) * 2 + 5 columns of 512 bytes at most

struct DepthwiseScratch {
  alignas(64) uint8_t columns[(STRIP * 2 + 5) * 512];
};

// Interleaves `FOURS` fours of rows of columns [0, count): to[column][four][chunk][4 registers].
template <int ROWS, int FOURS>
static inline void interleave(const uint8_t* from, int64_t row_bytes, int count, uint8_t* to) {
  using V = Lanes::V;
  const uint8_t* rows[FOURS * 4];
  // Weights of rows past the last are zero: any row does.
  for (int i = 0; i < FOURS * 4; i++) rows[i] = from + row_bytes * (i < ROWS ? i : ROWS - 1);
  for (int x = 0; x < count; x++)
    for (int f = 0; f < FOURS; f++)
      for (int c = 0; c < 64 / Lanes::BYTES; c++, to += 4 * Lanes::BYTES) {
        const int64_t at = int64_t(x) * 64 + c * Lanes::BYTES;
        const V a = Lanes::load(rows[f * 4] + at), b = Lanes::load(rows[f * 4 + 1] + at), d = Lanes::load(rows[f * 4 + 2] + at),
                e = Lanes::load(rows[f * 4 + 3] + at);
        const V low = Lanes::low8(a, b), high = Lanes::high8(a, b), low2 = Lanes::low8(d, e), high2 = Lanes::high8(d, e);
        Lanes::store(to, Lanes::low16(low, low2));
        Lanes::store(to + Lanes::BYTES, Lanes::high16(low, low2));
        Lanes::store(to + 2 * Lanes::BYTES, Lanes::low16(high, high2));
        Lanes::store(to + 3 * Lanes::BYTES, Lanes::high16(high, high2));
      }
}

// `rows` output rows of `target.width`; `from` is the first row and column that the first output sees. The bytes written are summed up
// by channel into totals[64], which is overwritten.
template <int K, int S>
static void depthwise_group(const Packed& p, int group, const uint8_t* from, int64_t row_bytes, int rows, Target target, int32_t* totals,
                            DepthwiseScratch& scratch) {
  using V = Lanes::V;
  using F = Lanes::F;
  constexpr int OUT_ROWS = S == 1 ? 2 : 1, ROWS = K + (OUT_ROWS - 1) * S, FOURS = (ROWS + 3) / 4, CHUNKS = 64 / Lanes::BYTES;
  const Epilogue<TABLE> table(p, group * GROUP, nullptr);
  const Epilogue<LINE> line(p, group * GROUP, nullptr);
  const uint8_t* weights = p.weights + size_t(group) * p.group_bytes;
  const int32_t* bias = reinterpret_cast<const int32_t*>(p.bias) + group * GROUP;
  const int width = target.width, columns = table.columns;
  const bool is_active = p.layer->activation != NONE;
  for (int i = 0; i < 64; i++) totals[i] = 0;
  for (int y = 0; y < rows; y += OUT_ROWS) {
    const int count = rows - y < OUT_ROWS ? rows - y : OUT_ROWS;
    for (int x0 = 0; x0 < width; x0 += STRIP) {
      const int strip = width - x0 < STRIP ? width - x0 : STRIP, num_columns = (strip - 1) * S + K;
      const uint8_t* start = from + int64_t(y) * S * row_bytes + int64_t(x0) * S * 64;
      if (count == OUT_ROWS) interleave<ROWS, FOURS>(start, row_bytes, num_columns, scratch.columns);
      else interleave<K, FOURS>(start, row_bytes, num_columns, scratch.columns);
      for (int c = 0; c < CHUNKS; c++) {
        const Lanes::Mask mask(columns - c * Lanes::BYTES);
        const float* scales = table.scales + c * Lanes::WORDS;
        V low_sum = Lanes::zero(), high_sum = Lanes::zero();
        uint8_t* out = target.out + int64_t(y) * (target.pixel * width + target.skip) + int64_t(x0) * target.pixel + c * Lanes::BYTES;
        const int64_t out_row = target.pixel * width + target.skip;
        for (int x = 0; x < strip; x++, out += target.pixel) {
          V sums[OUT_ROWS][4];
          for (int r = 0; r < OUT_ROWS; r++)
            for (int j = 0; j < 4; j++) sums[r][j] = Lanes::load(bias + j * 16 + c * Lanes::WORDS);
          for (int kx = 0; kx < K; kx++)
            for (int f = 0; f < FOURS; f++) {
              const uint8_t* column = scratch.columns + (((x * S + kx) * FOURS + f) * CHUNKS + c) * 4 * Lanes::BYTES;
              for (int j = 0; j < 4; j++) {
                const V bytes = Lanes::load(column + j * Lanes::BYTES);
                for (int r = 0; r < OUT_ROWS; r++)
                  sums[r][j] = Lanes::dot(sums[r][j], bytes, Lanes::load(weights + ((r * K + kx) * FOURS + f) * 256 + j * 64 + c * Lanes::BYTES));
              }
            }
          for (int r = 0; r < OUT_ROWS; r++) {
            if (r >= count) break;
            const F s0 = Lanes::loadf(scales), s1 = Lanes::loadf(scales + 16), s2 = Lanes::loadf(scales + 32), s3 = Lanes::loadf(scales + 48);
            const V* v = sums[r];
            const V q = is_active ? table.finish(v[0], v[1], v[2], v[3], s0, s1, s2, s3, Lanes::zero())
                                  : line.finish(v[0], v[1], v[2], v[3], s0, s1, s2, s3, Lanes::zero());
            Lanes::store(out + r * out_row, mask, q);
            low_sum = Lanes::add16(low_sum, Lanes::low8(q, Lanes::zero()));
            high_sum = Lanes::add16(high_sum, Lanes::high8(q, Lanes::zero()));
          }
        }
        // 48 bytes at most were added: far from the end of 16 bits.
        alignas(64) uint16_t lows[Lanes::BYTES / 2], highs[Lanes::BYTES / 2];
        Lanes::store(lows, low_sum);
        Lanes::store(highs, high_sum);
        for (int i = 0; i < Lanes::BYTES / 2; i++) {
          const int channel = c * Lanes::BYTES + i / 8 * 16 + i % 8;
          totals[channel] += lows[i];
          totals[channel + 8] += highs[i];
        }
      }
    }
  }
}
