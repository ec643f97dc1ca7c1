// Depthwise convolution of u8 maps with registers of 32 bytes (of 64: depthwise512.h), 64 channels at a time, from a buffer
// [rows][width + margins][64]. Included inside each file's own namespace.
//
// vpdpbusd adds four neighboring bytes up, and a channel's neighbors lie in other rows: so the bytes of four rows of a column are
// interleaved once (8 unpacks for 64 channels) and every output that sees the column takes one product of it. At stride 1 two output
// rows share the four rows: with weights (w0 w1 w2 0) and (0 w0 w1 w2). A strip of columns waits in L1.

constexpr int STRIP = 24;  // outputs; (24 - 1) * 2 + 5 columns of 512 bytes at most

struct DepthwiseScratch {
  alignas(64) uint8_t columns[(STRIP * 2 + 5) * 512];
  alignas(64) int32_t sums[2][STRIP][64];
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

// `rows` output rows of `target.width`, of each of the bands; `from` is the first row and column that the first output sees. Where `keeps_sums`, the bytes
// written are summed up by channel into totals[64], which is overwritten.
template <int K, int S, int MODE>
static void depthwise_group(const Packed& p, int group, const uint8_t* from, int64_t row_bytes, int rows, Target target, const Bands& bands,
                            bool keeps_sums, int32_t* totals, DepthwiseScratch& scratch) {
  using V = Lanes::V;
  using F = Lanes::F;
  constexpr int OUT_ROWS = S == 1 ? 2 : 1, ROWS = K + (OUT_ROWS - 1) * S, FOURS = (ROWS + 3) / 4, CHUNKS = 64 / Lanes::BYTES;
  const Epilogue<MODE> epilogue(p, group * GROUP, nullptr);
  const uint8_t* weights = p.weights + size_t(group) * p.group_bytes;
  const int32_t* bias = reinterpret_cast<const int32_t*>(p.bias) + group * GROUP;
  const int width = target.width, columns = epilogue.columns;
  for (int i = 0; i < 64; i++) totals[i] = 0;
  for (int y = 0; y < rows; y += OUT_ROWS) {
    const int count = rows - y < OUT_ROWS ? rows - y : OUT_ROWS;
    for (int x0 = 0; x0 < width; x0 += STRIP) {
      const int strip = width - x0 < STRIP ? width - x0 : STRIP, num_columns = (strip - 1) * S + K;
      const uint8_t* start = from + int64_t(y) * S * row_bytes + int64_t(x0) * S * 64;
      if (count == OUT_ROWS) interleave<ROWS, FOURS>(start, row_bytes, num_columns, scratch.columns);
      else interleave<K, FOURS>(start, row_bytes, num_columns, scratch.columns);
      for (int c = 0; c < CHUNKS; c++) {
        for (int j = 0; j < 4; j++) {
          // A quarter's weights stay in registers (5x5 at stride 1: 20) while the strip passes: loaded for each output, they would
          // take two loads a product.
          V w[OUT_ROWS][K][FOURS];
          for (int r = 0; r < OUT_ROWS; r++)
            for (int kx = 0; kx < K; kx++)
              for (int f = 0; f < FOURS; f++) w[r][kx][f] = Lanes::load(weights + ((r * K + kx) * FOURS + f) * 256 + j * 64 + c * Lanes::BYTES);
          const V start = Lanes::load(bias + j * 16 + c * Lanes::WORDS);
          const uint8_t* column = scratch.columns + (c * 4 + j) * Lanes::BYTES;
          for (int x = 0; x < strip; x++, column += S * FOURS * 256) {
            V sums[OUT_ROWS];
            for (int r = 0; r < OUT_ROWS; r++) sums[r] = start;
            for (int kx = 0; kx < K; kx++)
              for (int f = 0; f < FOURS; f++) {
                const V bytes = Lanes::load(column + (kx * FOURS + f) * 256);
                for (int r = 0; r < OUT_ROWS; r++) sums[r] = Lanes::dot(sums[r], bytes, w[r][kx][f]);
              }
            for (int r = 0; r < OUT_ROWS; r++) Lanes::store(scratch.sums[r][x] + j * 16, sums[r]);
          }
        }
        const Lanes::Mask mask(bands.count == 1 ? columns - c * Lanes::BYTES : columns);
        const float* scales = epilogue.scales + c * Lanes::WORDS;
        const F s0 = Lanes::loadf(scales), s1 = Lanes::loadf(scales + 16), s2 = Lanes::loadf(scales + 32), s3 = Lanes::loadf(scales + 48);
        V low_sum = Lanes::zero(), high_sum = Lanes::zero();
        for (int r = 0; r < count; r++) {
          uint8_t* out = target.out + int64_t(y + r) * (target.pixel * width + target.skip) + int64_t(x0) * target.pixel;
          if (bands.count == 1) out += c * Lanes::BYTES;
          // The bands whose outputs are in this chunk, as far as they have this row; lanes of others count in no sum.
          const int band = 64 / bands.count, first_band = c * Lanes::BYTES / band;
          int end_band = first_band;
          while (bands.count > 1 && end_band < (c + 1) * Lanes::BYTES / band && y + r < bands.rows[end_band]) end_band++;
          alignas(64) uint8_t lanes[Lanes::BYTES];
          if (bands.count > 1)
            for (int i = 0; i < Lanes::BYTES; i++) lanes[i] = first_band + i / band < end_band ? 255 : 0;
          for (int x = 0; x < strip; x++, out += target.pixel) {
            const int32_t* v = scratch.sums[r][x];
            const V v0 = Lanes::load(v), v1 = Lanes::load(v + 16), v2 = Lanes::load(v + 32), v3 = Lanes::load(v + 48);
            V q = epilogue.finish(v0, v1, v2, v3, s0, s1, s2, s3, Lanes::zero());
            if (bands.count == 1) {
              Lanes::store(out, mask, q);
            } else {
              for (int b = first_band; b < end_band; b++) Lanes::store(out + b * bands.step, mask, Lanes::from_byte(q, b * band % Lanes::BYTES));
              q = Lanes::both(q, Lanes::load(lanes));
            }
            if (!keeps_sums) continue;
            low_sum = Lanes::add16(low_sum, Lanes::low8(q, Lanes::zero()));
            high_sum = Lanes::add16(high_sum, Lanes::high8(q, Lanes::zero()));
          }
        }
        if (!keeps_sums) continue;
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
