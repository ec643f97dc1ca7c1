// Weights of the file -> blocks for tiles and dot products. Included inside each file's own namespace.
//
// A kernel row of a channels-last map is kernel * channels values that lie side by side, so a convolution is `kernel` products of
// such rows, each cut in blocks of 64 bytes (the last filled up with zero weights; the map's bytes there belong to the next pixel and
// do not matter). A group's weights are [half][kernel row][block][2 tiles][16 words of 4 bytes][16 channels][4 bytes]: a half is 32 channels.

static inline int channel_of(int tile, int lane, bool is_small, bool is_bf16) {
  if (is_bf16) return tile * 16 + lane;
  return is_small ? lane / 4 * 8 + tile * 4 + lane % 4 : lane / 4 * 16 + tile * 4 + lane % 4;
}

static inline bool is_small_group(int outputs, int group) { return outputs - group * GROUP <= GROUP / 2; }
static inline int row_bytes_of(const Layer& l, const Map& in) { return l.kernel * int(in.pixel_bytes); }
static inline size_t align64(size_t bytes) { return (bytes + 63) / 64 * 64; }

static size_t conv_group_bytes(const Layer& l, const Map& in) {
  return size_t(l.kernel) * size_t((row_bytes_of(l, in) + 63) / 64) * 4096;
}

// Depthwise: kernel rows in fours, for one output row or two (see depthwise.h).
static int depthwise_rows(const Layer& l) { return l.stride == 1 ? 2 : 1; }
static int depthwise_fours(const Layer& l) { return (l.kernel + (depthwise_rows(l) - 1) + 3) / 4; }
static size_t depthwise_group_bytes(const Layer& l, bool is_bf16) {
  if (is_bf16) return size_t(l.kernel) * size_t(l.kernel) * GROUP * 4;
  return size_t(depthwise_rows(l)) * size_t(l.kernel) * size_t(depthwise_fours(l)) * 256;
}

static size_t packed_bytes(const Program& program, const Layer& l, const Map& in, const Map& out) {
  const size_t groups = size_t(out.channels + GROUP - 1) / GROUP;
  if (l.kind == CONV) return groups * (conv_group_bytes(l, in) + GROUP * 8) + 256 + 64;
  if (l.kind == DEPTHWISE) return groups * (depthwise_group_bytes(l, in.is_bf16) + GROUP * 8) + 256 + 64;
  if (l.kind == SQUEEZE_EXCITE)
    return 2 * align64(size_t(l.squeeze_channels) * size_t(in.channels) * 2) + align64(size_t(l.squeeze_channels) * 4) +
           align64(size_t(in.channels) * 4);
  if (l.kind == CLASSIFIER) return align64(size_t(program.num_classes) * size_t(in.channels) * 2) + size_t(program.num_classes) * 4;
  return 64;  // the input's multipliers
}

static void pack_conv(const Layer& l, const Map& in, int outputs, const uint8_t* from, uint8_t* to) {
  const int value = in.is_bf16 ? 2 : 1, per_word = 4 / value;
  const int channels = in.channels, stride = int(in.pixel_bytes) / value;  // the input's pixels have a fourth channel
  const int row = l.kernel * stride, words = (row + per_word - 1) / per_word, blocks = (row_bytes_of(l, in) + 63) / 64;
  const int64_t filter = int64_t(l.kernel) * l.kernel * channels * value;
  for (int g = 0; g * GROUP < outputs; g++, to += conv_group_bytes(l, in)) {
    const bool is_small = is_small_group(outputs, g);
    for (int tile = 0; tile < (is_small ? 2 : 4); tile++)
      for (int lane = 0; lane < 16; lane++) {
        const int n = g * GROUP + channel_of(tile, lane, is_small, in.is_bf16);
        if (n >= outputs) continue;
        for (int ky = 0; ky < l.kernel; ky++) {
          const uint8_t* source = from + n * filter + int64_t(ky) * l.kernel * channels * value;
          uint8_t* half = to + int64_t(tile / 2 * l.kernel + ky) * blocks * 2048 + tile % 2 * 1024 + lane * 4;
          if (stride == channels) {
            const int whole = row / per_word;
            for (int w = 0; w < whole; w++) __builtin_memcpy(half + int64_t(w / 16) * 2048 + w % 16 * 64, source + w * 4, 4);
            if (whole < words)
              __builtin_memcpy(half + int64_t(whole / 16) * 2048 + whole % 16 * 64, source + whole * 4, size_t(row * value - whole * 4));
          } else {
            for (int kx = 0; kx < l.kernel; kx++)
              for (int c = 0; c < channels; c++) {
                const int at = (kx * stride + c) * value;
                __builtin_memcpy(half + int64_t(at / 64) * 2048 + at / 4 % 16 * 64 + at % 4, source + (kx * channels + c) * value, size_t(value));
              }
          }
        }
      }
  }
}

static void pack_depthwise(const Layer& l, int channels, const int8_t* from, uint8_t* to) {
  const int k = l.kernel, fours = depthwise_fours(l);
  for (int g = 0; g * GROUP < channels; g++, to += depthwise_group_bytes(l, false))
    for (int r = 0; r < depthwise_rows(l); r++)
      for (int kx = 0; kx < k; kx++)
        for (int ky = 0; ky < k; ky++) {
          const int row = ky + r;
          uint8_t* four = to + ((r * k + kx) * fours + row / 4) * 256 + row % 4;
          for (int tile = 0; tile < 4; tile++)
            for (int lane = 0; lane < 16; lane++) {
              const int n = g * GROUP + channel_of(tile, lane, false, false);
              if (n < channels) four[tile * 64 + lane * 4] = uint8_t(from[(n * k + ky) * k + kx]);
            }
        }
}

static void pack_depthwise_bf16(const Layer& l, int channels, const uint16_t* from, uint8_t* to) {
  const int taps = l.kernel * l.kernel;
  float* out = reinterpret_cast<float*>(to);
  for (int g = 0; g * GROUP < channels; g++, out += taps * GROUP)
    for (int tap = 0; tap < taps; tap++)
      for (int c = 0; c < GROUP && g * GROUP + c < channels; c++) out[tap * GROUP + c] = from_bf16(from[(g * GROUP + c) * taps + tap]);
}

static void pack(const Program& program, const Layer& l, const Map& in, const Map& out, uint8_t* to, Packed& p) {
  p.inputs = in.channels;
  p.outputs = out.channels;
  p.groups = (out.channels + GROUP - 1) / GROUP;
  p.weights = to;
  p.is_bf16 = in.is_bf16;
  if (l.kind == SQUEEZE_EXCITE) {
    // [squeeze weights][excite weights][squeeze bias][excite bias]
    const size_t weights = size_t(l.squeeze_channels) * size_t(in.channels) * 2;
    __builtin_memcpy(to, program.blob<uint8_t>(l.squeeze_weights), weights);
    __builtin_memcpy(to + align64(weights), program.blob<uint8_t>(l.excite_weights), weights);
    uint8_t* bias = to + 2 * align64(weights);
    __builtin_memcpy(bias, program.blob<uint8_t>(l.squeeze_bias), size_t(l.squeeze_channels) * 4);
    __builtin_memcpy(bias + align64(size_t(l.squeeze_channels) * 4), program.blob<uint8_t>(l.excite_bias), size_t(in.channels) * 4);
    return;
  }
  if (l.kind == CLASSIFIER) {
    const size_t weights = size_t(program.num_classes) * size_t(in.channels) * 2;
    __builtin_memcpy(to, program.blob<uint8_t>(l.weights), weights);
    __builtin_memcpy(to + align64(weights), program.blob<uint8_t>(l.bias), size_t(program.num_classes) * 4);
    p.bias = to + align64(weights);
    return;
  }
  if (l.kind == INPUT) {
    __builtin_memcpy(to, program.blob<uint8_t>(l.scales), 48);
    p.scales = reinterpret_cast<const float*>(to);
  }
  if (l.kind != CONV && l.kind != DEPTHWISE) return;
  const bool is_conv = l.kind == CONV;
  p.row_words = (row_bytes_of(l, in) + 3) / 4;
  p.row_blocks = (row_bytes_of(l, in) + 63) / 64;
  p.group_bytes = is_conv ? conv_group_bytes(l, in) : depthwise_group_bytes(l, in.is_bf16);
  if (is_conv) pack_conv(l, in, out.channels, program.blob<uint8_t>(l.weights), to);
  else if (in.is_bf16) pack_depthwise_bf16(l, out.channels, program.blob<uint16_t>(l.weights), to);
  else pack_depthwise(l, out.channels, program.blob<int8_t>(l.weights), to);
  uint8_t* bias = to + size_t(p.groups) * p.group_bytes;
  float* scales = reinterpret_cast<float*>(bias + size_t(p.groups) * GROUP * 4);
  for (int g = 0; g < p.groups; g++) {
    const bool is_small = is_conv && is_small_group(out.channels, g);
    for (int tile = 0; tile < (is_small ? 2 : 4); tile++)
      for (int lane = 0; lane < 16; lane++) {
        const int n = g * GROUP + channel_of(tile, lane, is_small, in.is_bf16), at = g * GROUP + tile * 16 + lane;
        if (n >= out.channels) continue;
        __builtin_memcpy(bias + at * 4, program.blob<uint8_t>(l.bias) + n * 4, 4);
        if (!in.is_bf16) scales[at] = program.blob<float>(l.scales)[n];
      }
  }
  p.bias = bias;
  p.scales = scales;
  if (!in.is_bf16 && l.activation != NONE) {
    uint8_t* table = reinterpret_cast<uint8_t*>(scales + size_t(p.groups) * GROUP);
    __builtin_memcpy(table, program.blob<uint8_t>(l.table), 256);
    p.table = reinterpret_cast<const int16_t*>(table);
  }
}
