// Depthwise convolution of u8 maps with registers of 64 bytes, 64 channels at a time, from a buffer [rows][width + margins][64]. Included
// inside each file's own namespace; depthwise.h says what it has in common with the one for 32 bytes.
//
// A window of the columns that an output sees slides along the row in registers: each step interleaves the columns that are new (shuffles,
// which have one port), multiplies all of the window (the other port) and makes bytes of the sums. Done one after the other for a strip,
// shuffles, products and epilogue took the sum of their times. A 5x5's two fours of rows leave room for half of the channels' registers:
// their words wait in L1 for the other half.

constexpr int STRIP = 32;  // outputs at most

struct DepthwiseScratch {
  alignas(64) uint8_t words[2][STRIP][64];
  alignas(64) uint8_t bytes[2][STRIP][64];
  alignas(64) uint8_t columns[53 * 512];  // widened, of bf16
};

// Where a strip's bytes go.
struct StripTarget {
  uint8_t* out;
  int64_t row, pixel;
  Lanes::Mask mask;
};

// `count` outputs of R rows; PASS: which part of the 64 channels' registers.
template <int K, int S, int R, int PASS, int MODE>
static __attribute__((noinline)) void depthwise_strip(const Epilogue<MODE>& shared, const uint8_t* from, int64_t row_bytes, int count,
                                                      const uint8_t* weights, const int32_t* bias, DepthwiseScratch& scratch, const StripTarget& target) {
  using V = Lanes::V;
  constexpr int ROWS = K + (R - 1) * S, FOURS = depthwise_fours(K, S), REGISTERS = 4 / FOURS, FIRST = PASS * REGISTERS;
  const Epilogue<MODE> epilogue = shared;
  const StripTarget to = target;
  uint8_t* out = to.out;
  V window[K][REGISTERS][FOURS];
  // Weights of rows past the last are zero: any row does, and the first ones again make less to shuffle.
  auto interleave = [&](V (*into)[FOURS], const uint8_t* column) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int f = 0; f < FOURS; f++) {
      constexpr int LEFT[2] = {ROWS < 4 ? ROWS : 4, ROWS - 4};
      V rows[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) rows[i] = Lanes::load(column + (f * 4 + (i < LEFT[f] ? i : i % 2 < LEFT[f] ? i % 2 : 0)) * row_bytes);
      if (FOURS == 1 || PASS == 0) {
        const V low = Lanes::low8(rows[0], rows[1]), low2 = Lanes::low8(rows[2], rows[3]);
        into[0][f] = Lanes::low16(low, low2);
        into[1][f] = Lanes::high16(low, low2);
      }
      if (FOURS == 1 || PASS == 1) {
        const V high = Lanes::high8(rows[0], rows[1]), high2 = Lanes::high8(rows[2], rows[3]);
        into[REGISTERS - 2][f] = Lanes::low16(high, high2);
        into[REGISTERS - 1][f] = Lanes::high16(high, high2);
      }
    }
  };
#pragma GCC unroll 8
  for (int kx = 0; kx < K - S; kx++) interleave(window[kx + S], from + kx * 64);
  from += (K - S) * 64;
  for (int x = 0; x < count; x++, from += S * 64, out += to.pixel) {
#pragma GCC unroll 8
    for (int kx = 0; kx < K - S; kx++)
#pragma GCC unroll 4
      for (int j = 0; j < REGISTERS; j++)
#pragma GCC unroll 2
        for (int f = 0; f < FOURS; f++) window[kx][j][f] = window[kx + S][j][f];
#pragma GCC unroll 2
    for (int kx = 0; kx < S; kx++) interleave(window[K - S + kx], from + kx * 64);
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
      V sums[REGISTERS];
#pragma GCC unroll 4
      for (int j = 0; j < REGISTERS; j++) {
        // Of each four by itself: a chain of all ten products of a 5x5 would wait for its own sums.
        V of_four[FOURS];
#pragma GCC unroll 2
        for (int f = 0; f < FOURS; f++) {
          of_four[f] = f == 0 ? Lanes::load(bias + (FIRST + j) * 16) : Lanes::zero();
#pragma GCC unroll 8
          for (int kx = 0; kx < K; kx++)
            of_four[f] = Lanes::dot(of_four[f], window[kx][j][f], Lanes::load(weights + ((r * K + kx) * FOURS + f) * 256 + (FIRST + j) * 64));
        }
        sums[j] = FOURS == 1 ? of_four[0] : Lanes::add32(of_four[0], of_four[FOURS - 1]);
      }
      const float* scales = epilogue.scales + FIRST * 16;
      const V words = epilogue.words(sums[0], sums[1], Lanes::loadf(scales), Lanes::loadf(scales + 16), Lanes::zero());
      if (FOURS == 2 && PASS == 0) {
        Lanes::store(scratch.words[r][x], words);
      } else {
        V q;
        if constexpr (FOURS == 1)
          q = Lanes::pack16(words, epilogue.words(sums[2], sums[3], Lanes::loadf(scales + 32), Lanes::loadf(scales + 48), Lanes::zero()));
        else q = Lanes::pack16(Lanes::load(scratch.words[r][x]), words);
        Lanes::store(out + r * to.row, to.mask, q);
      }
    }
  }
}

template <int K, int S, int R, int MODE>
static void depthwise_strips(const Epilogue<MODE>& epilogue, const uint8_t* from, int64_t row_bytes, int count, const uint8_t* weights, const int32_t* bias,
                             DepthwiseScratch& scratch, const StripTarget& target) {
  depthwise_strip<K, S, R, 0>(epilogue, from, row_bytes, count, weights, bias, scratch, target);
  if constexpr (depthwise_fours(K, S) == 2) depthwise_strip<K, S, R, 1>(epilogue, from, row_bytes, count, weights, bias, scratch, target);
}

// `rows` output rows of `target.width`, of each of the bands; `from` is the first row and column that the first output sees. Where `keeps_sums`, the bytes
// written are summed up by channel into totals[64], which is overwritten.
template <int K, int S, int MODE>
static void depthwise_group(const Packed& p, int group, const uint8_t* from, int64_t row_bytes, int rows, Target target, const Bands& bands,
                            bool keeps_sums, int32_t* totals, DepthwiseScratch& scratch) {
  using V = Lanes::V;
  constexpr int OUT_ROWS = S == 1 ? 2 : 1;
  const Epilogue<MODE> epilogue(p, group * GROUP, nullptr);
  const uint8_t* weights = p.weights + size_t(group) * p.group_bytes;
  const int32_t* bias = reinterpret_cast<const int32_t*>(p.bias) + group * GROUP;
  const int width = target.width, band = 64 / bands.count;
  const int64_t out_row = target.pixel * width + target.skip;
  const Lanes::Mask mask(epilogue.columns);
  const bool is_direct = bands.count == 1 && !keeps_sums;
  for (int i = 0; i < 64; i++) totals[i] = 0;
  for (int y = 0; y < rows; y += OUT_ROWS) {
    const int count = rows - y < OUT_ROWS ? rows - y : OUT_ROWS;
    int x0 = 0;
    for (int shares = (width + STRIP - 1) / STRIP; shares > 0; shares--) {
      const int strip = (width - x0 + shares - 1) / shares;
      const uint8_t* start = from + int64_t(y) * S * row_bytes + int64_t(x0) * S * 64;
      uint8_t* out = target.out + y * out_row + x0 * target.pixel;
      const StripTarget to = is_direct ? StripTarget{out, out_row, target.pixel, mask} : StripTarget{scratch.bytes[0][0], STRIP * 64, 64, Lanes::Mask(64)};
      if (count == OUT_ROWS) depthwise_strips<K, S, OUT_ROWS>(epilogue, start, row_bytes, strip, weights, bias, scratch, to);
      else depthwise_strips<K, S, 1>(epilogue, start, row_bytes, strip, weights, bias, scratch, to);
      x0 += strip;
      if (is_direct) continue;
      V low_sum = Lanes::zero(), high_sum = Lanes::zero();
      for (int r = 0; r < count; r++, out += out_row) {
        // Of the bands as many as have this row; lanes of others count in no sum.
        int num_bands = bands.count == 1 ? 1 : 0;
        while (bands.count > 1 && num_bands < bands.count && y + r < bands.rows[num_bands]) num_bands++;
        for (int b = 0; b < num_bands; b++) {
          uint8_t* band_out = out + b * bands.step;
          if (bands.count == 1)
            for (int x = 0; x < strip; x++, band_out += target.pixel) Lanes::store(band_out, mask, Lanes::load(scratch.bytes[r][x]));
          else
            for (int x = 0; x < strip; x++, band_out += target.pixel) Lanes::store_half(band_out, mask, Lanes::from_byte(Lanes::load(scratch.bytes[r][x]), b * band));
        }
        if (!keeps_sums) continue;
        const Lanes::Mask in_bands(num_bands * band);
        for (int x = 0; x < strip; x++) {
          const V q = Lanes::load(scratch.bytes[r][x], in_bands);
          low_sum = Lanes::add16(low_sum, Lanes::low8(q, Lanes::zero()));
          high_sum = Lanes::add16(high_sum, Lanes::high8(q, Lanes::zero()));
        }
      }
      if (!keeps_sums) continue;
      // 64 bytes at most were added: far from the end of 16 bits.
      alignas(64) uint16_t lows[32], highs[32];
      Lanes::store(lows, low_sum);
      Lanes::store(highs, high_sum);
      for (int i = 0; i < 32; i++) {
        const int channel = i / 8 * 16 + i % 8;
        totals[channel] += lows[i];
        totals[channel + 8] += highs[i];
      }
    }
  }
}
