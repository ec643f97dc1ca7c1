// Depthwise convolution of bf16 maps, 64 channels at a time, from a buffer [rows][width + margins][64]. Included inside each file's own
// namespace.
//
// A strip of columns of all rows that one or two output rows see is widened to floats once and waits in L1; then each output
// is one multiply-add a tap, with the column's values from memory and the weights in registers.

template <int K, int S>
static void depthwise_group_bf16(const Packed& p, int group, const uint8_t* from, int64_t row_bytes, int rows, Target target, float* totals,
                                 DepthwiseScratch& scratch) {
  using F = Lanes::F;
  constexpr int OUT_ROWS = S == 1 ? 2 : 1, ROWS = K + (OUT_ROWS - 1) * S, LANES = Lanes::WORDS, COLUMNS = (STRIP - 1) * S + K;
  static_assert(ROWS * COLUMNS * LANES * 4 <= int(sizeof(DepthwiseScratch::columns)));
  float* columns = reinterpret_cast<float*>(scratch.columns);
  const int activation = p.layer->activation, width = target.width, channels = p.outputs - group * GROUP;
  const int64_t out_row = target.pixel * width + target.skip;
  const bool is_silu = activation == SILU;
  for (int i = 0; i < GROUP; i++) totals[i] = 0;
  for (int c = 0; c < GROUP && c < channels; c += LANES) {
    const float* weights = reinterpret_cast<const float*>(p.weights + size_t(group) * p.group_bytes) + c;
    const F bias = Lanes::loadf(reinterpret_cast<const float*>(p.bias) + group * GROUP + c);
    F w[K * K], total = Lanes::zerof();
    for (int i = 0; i < K * K; i++) w[i] = Lanes::loadf(weights + i * GROUP);
    for (int y = 0; y < rows; y += OUT_ROWS) {
      const int count = rows - y < OUT_ROWS ? rows - y : OUT_ROWS, num_rows = (count - 1) * S + K;
      for (int x0 = 0; x0 < width; x0 += STRIP) {
        const int strip = width - x0 < STRIP ? width - x0 : STRIP, num_columns = (strip - 1) * S + K;
        const uint8_t* start = from + int64_t(y) * S * row_bytes + (int64_t(x0) * S * GROUP + c) * 2;
        for (int r = 0; r < num_rows; r++)
          for (int x = 0; x < num_columns; x++)
            Lanes::storef(columns + (r * COLUMNS + x) * LANES, Lanes::widen(start + r * row_bytes + int64_t(x) * GROUP * 2));
        for (int r = 0; r < count; r++) {
          uint8_t* out = target.out + (y + r) * out_row + int64_t(x0) * target.pixel + c * 2;
          const float* column = columns + r * S * COLUMNS * LANES;
          for (int x = 0; x < strip; x++, out += target.pixel, column += S * LANES) {
            F v = bias, u = Lanes::zerof();
            for (int ky = 0; ky < K; ky++)
              for (int kx = 0; kx < K; kx++) {
                const F value = Lanes::loadf(column + (ky * COLUMNS + kx) * LANES);
                if ((ky * K + kx) % 2) u = Lanes::fma(value, w[ky * K + kx], u);
                else v = Lanes::fma(value, w[ky * K + kx], v);
              }
            v = is_silu ? silu_of(Lanes::addf(v, u)) : activated(Lanes::addf(v, u), activation);
            Lanes::narrow(out, channels - c, v);
            total = Lanes::addf(total, v);
          }
        }
      }
    }
    Lanes::storef(totals + c, total);
  }
}
