// Weights of the file -> blocks for tiles and dot products. Included inside each file's own namespace.
//
// A kernel row of a channels-last map is kernel * pixel bytes that lie side by side, so a convolution is `kernel` products of such rows, each
// cut in blocks of 64 bytes (weights are zero where a pixel is padded and behind the row's end: the map's bytes there do not
// matter). A group's weights are [kernel row][block][2 tiles][16 words of 4 bytes][16 channels][4 bytes].

static inline size_t align64(size_t bytes) { return (bytes + 63) / 64 * 64; }
static inline int row_bytes_of(const Layer& l, const Map& in) { return l.kernel * int(in.pixel_bytes); }

// The channel of a group whose sum is in a lane of a tile; see epilogue.h.
static inline int conv_channel(int tile, int lane, bool is_in_order) { return is_in_order ? tile * 16 + lane : lane / 4 * 8 + tile * 4 + lane % 4; }

// A last group of 16 channels or fewer is one tile, in order, where sums become bytes in registers: those of four pixels at once.
#ifdef __AMX_TILE__
constexpr bool HAS_HALF_GROUPS = false;
#else
constexpr bool HAS_HALF_GROUPS = Lanes::BYTES == 64;
#endif
static bool is_half_group(int channels, bool is_bf16) { return HAS_HALF_GROUPS && !is_bf16 && channels <= 16; }

// A last group of 32 channels or fewer takes as much of a register as 64 would: so rows of several bands of the map stand in it side by side.
static int bands_of(int channels, bool is_bf16) { return is_bf16 || channels > 32 ? 1 : channels > 16 ? 2 : 4; }

// Bands of output rows that stand side by side in a group's 64 bytes, each with the same channels: see bands_of.
struct Bands {
  int count = 1;
  int64_t step = 0;    // bytes from a band's outputs to the next one's
  int rows[4] = {};    // of each band that exist, from the first one on
};

// The same of a depthwise group of which so many channels exist; where it is computed in bands, each band has all of them.
static int depthwise_channel(int tile, int lane, int channels, bool is_bf16) {
  return is_bf16 ? tile * 16 + lane : (lane / 4 * 16 + tile * 4 + lane % 4) % (GROUP / bands_of(channels, is_bf16));
}

static size_t conv_group_bytes(const Layer& l, const Map& in) { return size_t(l.kernel) * size_t((row_bytes_of(l, in) + 63) / 64) * 2048; }
static int groups_of(const Layer& l, int channels) { return (channels + (l.kind == CONV ? CONV_GROUP : GROUP) - 1) / (l.kind == CONV ? CONV_GROUP : GROUP); }

// A part's first unit of a convolution's output (rows, or runs of pixels), numbered group by group; those of a half group cost half.
static int64_t conv_share(int channels, bool is_bf16, int64_t units, int part, int parts) {
  const int whole = (channels - 1) / CONV_GROUP, last = is_half_group(channels - whole * CONV_GROUP, is_bf16) ? 1 : 2;
  const int64_t before = whole * units, at = share_start(before * 2 + units * last, part, parts);
  return at < before * 2 ? at / 2 : before + (at - before * 2) / last;
}

// A part's first row of a depthwise convolution, numbered group by group. Where the last group is computed in bands, its rows cost less.
static int64_t depthwise_share(int channels, bool is_bf16, int64_t rows, int part, int parts) {
  const int64_t whole = (channels - 1) / GROUP, before = whole * rows;
  const int bands = bands_of(channels - int(whole) * GROUP, is_bf16);
  const int64_t at = share_start(before * 4 + rows * 4 / bands, part, parts);
  return at < before * 4 ? at / 4 : before + (at - before * 4) * bands / 4;
}

// Rows of a map from which on each part takes rows of all channels. What a part reads next it then wrote itself, but for the rows at the
// border, which both expand. Lower maps are split by channels, where each part reads its part of the weights only.
constexpr int ROWS_OF_PART = 14;
static bool is_split_by_rows(const Map& map, int parts) { return map.height >= ROWS_OF_PART * parts; }

// Calls work(group, first row, end) for all that a part does of a map that is computed in depthwise groups.
template <class Work>
static void for_depthwise_share(const Map& map, int part, int parts, const Work& work) {
  if (is_split_by_rows(map, parts)) {
    for (int g = 0; g * GROUP < map.channels; g++) work(g, share_start(map.height, part, parts), share_start(map.height, part + 1, parts));
    return;
  }
  const int64_t end = depthwise_share(map.channels, map.is_bf16, map.height, part + 1, parts);
  for (int64_t at = depthwise_share(map.channels, map.is_bf16, map.height, part, parts); at < end;) {
    const int64_t first = at % map.height, last = first + end - at < map.height ? first + end - at : map.height;
    work(int(at / map.height), first, last);
    at += last - first;
  }
}

// Depthwise: kernel rows in fours, for one output row or two (see depthwise.h).
constexpr int depthwise_rows(int stride) { return stride == 1 ? 2 : 1; }
constexpr int depthwise_fours(int kernel, int stride) { return (kernel + depthwise_rows(stride) - 1 + 3) / 4; }
static int depthwise_rows(const Layer& l) { return depthwise_rows(l.stride); }
static int depthwise_fours(const Layer& l) { return depthwise_fours(l.kernel, l.stride); }
static size_t depthwise_group_bytes(const Layer& l, bool is_bf16) {
  if (is_bf16) return size_t(l.kernel) * size_t(l.kernel) * GROUP * 4;
  return size_t(depthwise_rows(l)) * size_t(l.kernel) * size_t(depthwise_fours(l)) * 256;
}

static size_t packed_bytes(const Program& program, const Layer& l, const Map& in, const Map& out) {
  const size_t groups = size_t(groups_of(l, out.channels));
  if (l.kind == CONV) return groups * (conv_group_bytes(l, in) + CONV_GROUP * 8) + 256 + 64;
  if (l.kind == DEPTHWISE) return groups * (depthwise_group_bytes(l, in.is_bf16) + GROUP * 8) + 256 + 64;
  if (l.kind == SQUEEZE_EXCITE)
    return 2 * align64(size_t(l.squeeze_channels) * size_t(in.channels) * 2) + align64(size_t(l.squeeze_channels) * 4) +
           align64(size_t(in.channels) * 4);
  if (l.kind == CLASSIFIER) return align64(size_t(program.num_classes) * size_t(in.channels) * 2) + size_t(program.num_classes) * 4;
  return 64;  // the input's multipliers
}

static void pack_conv(const Layer& l, const Map& in, int outputs, const uint8_t* from, uint8_t* to) {
  const int pixel = in.channels * (in.is_bf16 ? 2 : 1), blocks = (row_bytes_of(l, in) + 63) / 64;
  const int64_t filter = int64_t(l.kernel) * l.kernel * pixel;
  for (int g = 0; g < groups_of(l, outputs); g++, to += conv_group_bytes(l, in))
    for (int tile = 0; tile < 2; tile++) {
      const uint8_t* filters[16];
      for (int lane = 0; lane < 16; lane++) {
        const int n = g * CONV_GROUP + conv_channel(tile, lane, in.is_bf16 || is_half_group(outputs - g * CONV_GROUP, in.is_bf16));
        filters[lane] = n < outputs ? from + n * filter : nullptr;
      }
      for (int ky = 0; ky < l.kernel; ky++)
        for (int kx = 0; kx < l.kernel; kx++) {
          const int64_t source = int64_t(ky * l.kernel + kx) * pixel;
          uint8_t* row = to + int64_t(ky) * blocks * 2048 + tile * 1024;
          int at = kx * int(in.pixel_bytes), done = 0;
          // Word by word: a tile's row of 64 bytes is written at once, and the filters are read side by side.
          for (; done + 4 <= pixel; done += 4, at += 4) {
            uint8_t* words = row + int64_t(at / 64) * 2048 + at % 64 * 16;
            for (int lane = 0; lane < 16; lane++)
              if (filters[lane]) __builtin_memcpy(words + lane * 4, filters[lane] + source + done, 4);
          }
          for (; done < pixel; done++, at++)
            for (int lane = 0; lane < 16; lane++)
              if (filters[lane]) row[int64_t(at / 64) * 2048 + at / 4 % 16 * 64 + lane * 4 + at % 4] = filters[lane][source + done];
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
              const int n = g * GROUP + depthwise_channel(tile, lane, channels - g * GROUP, false);
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

// Bytes only grow with x on both ways, so a piece whose two ends agree agrees all along, if its line is the ramp's or its byte does not change.
static void find_ramp(Packed& p) {
  int line = 0;
  while (line < 63 && p.table[line] <= 0) line++;
  p.slope = p.table[line];
  p.offset = p.table[64 + line];
  p.is_ramp = p.slope > 0;
  auto by_table_byte = [&](int x) { return sat8(by_table(x, p.table) >> p.layer->fraction_bits); };
  auto by_ramp_byte = [&](int x) { return sat8(adds(mulhrs(x, p.slope), p.offset) >> p.layer->fraction_bits); };
  for (int i = 0; i < 64 && p.is_ramp; i++) {
    const int first = (i < 32 ? i : i - 64) * 1024, last = first + 1023;
    const bool is_its_line = p.table[i] == p.slope && p.table[64 + i] == p.offset;
    const bool is_constant = p.table[i] >= 0 && by_table_byte(first) == by_table_byte(last);
    p.is_ramp = (is_its_line || is_constant) && by_table_byte(first) == by_ramp_byte(first) && by_table_byte(last) == by_ramp_byte(last);
  }
}

static void pack(const Program& program, const Layer& l, const Map& in, const Map& out, uint8_t* to, Packed& p) {
  p.inputs = in.channels;
  p.outputs = out.channels;
  p.groups = groups_of(l, out.channels);
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
  const int channels = is_conv ? CONV_GROUP : GROUP;
  uint8_t* bias = to + size_t(p.groups) * p.group_bytes;
  float* scales = reinterpret_cast<float*>(bias + size_t(p.groups * channels) * 4);
  for (int at = 0; at < p.groups * channels; at++) {
    const int tile = at % channels / 16, lane = at % 16, first = at / channels * channels;
    const int n = first + (is_conv ? conv_channel(tile, lane, in.is_bf16 || is_half_group(out.channels - first, in.is_bf16)) : depthwise_channel(tile, lane, out.channels - first, in.is_bf16));
    if (n >= out.channels) continue;
    __builtin_memcpy(bias + at * 4, program.blob<uint8_t>(l.bias) + n * 4, 4);
    if (!in.is_bf16) scales[at] = program.blob<float>(l.scales)[n];
  }
  p.bias = bias;
  p.scales = scales;
  if (!in.is_bf16 && l.activation != NONE) {
    uint8_t* table = reinterpret_cast<uint8_t*>(scales + p.groups * channels);
    __builtin_memcpy(table, program.blob<uint8_t>(l.table), 256);
    p.table = reinterpret_cast<const int16_t*>(table);
    find_ramp(p);
  }
}
