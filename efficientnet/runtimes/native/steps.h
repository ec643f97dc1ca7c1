// A thread's part of each step of a plan. Included inside each file's own namespace, after the kernels.

struct Scratch {
  ConvScratch conv;
  DepthwiseScratch depthwise;
  alignas(64) uint8_t buffer[1];  // as large as scratch_bytes says
};

// Bytes of the expanded map that a thread works on: a good part of L2 for depthwise, of L1 for a projection.
constexpr int64_t DEPTHWISE_BUFFER = 512 << 10, PROJECT_BUFFER = 40 << 10;

// Bytes of the map that both halves of a depthwise group are expanded from.
constexpr int64_t EXPAND_PIECE = 24 << 10;

static Scratch& scratch_of(const Call& call) { return *reinterpret_cast<Scratch*>(call.scratch); }

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t value_bytes(const Map& map) { return map.is_bf16 ? 2 : 1; }

static uint8_t* pixel_of(const Map& map, const Call& call, int64_t y, int64_t x) {
  return call.arena + map.start + y * int64_t(map.row_bytes) + x * int64_t(map.pixel_bytes);
}

// The cursor over a map (and a residual) from pixel number `at` and a channel on.
static Target target_at(const Step& step, const Call& call, int64_t at, int channel, bool has_residual) {
  const Map &out = step.out, &residual = step.residual;
  const int64_t y = at / out.width, x = at % out.width, channels = channel * value_bytes(out);
  Target t;
  t.out = pixel_of(out, call, y, x) + channels;
  t.pixel = int64_t(out.pixel_bytes);
  t.skip = int64_t(out.row_bytes) - out.width * t.pixel;
  if (has_residual) {
    t.residual = pixel_of(residual, call, y, x) + channels;
    t.residual_pixel = int64_t(residual.pixel_bytes);
    t.residual_skip = int64_t(residual.row_bytes) - out.width * t.residual_pixel;
  }
  t.x = int(x);
  t.width = out.width;
  return t;
}

static bool is_flat(const Layer& l, const Map& in) { return l.kernel == 1 && l.stride == 1 && in.is_contiguous(); }

// The rows [first, end) of a convolution's output, or its pixels if it is flat.
static Source source_at(const Layer& l, const Map& in, int width, const Call& call, int64_t first, int64_t end) {
  Source s;
  const int64_t pixel = int64_t(in.pixel_bytes), row = int64_t(in.row_bytes);
  s.kernel_row = row;
  s.pixel = l.stride * pixel;
  s.segment = l.stride * row;
  if (is_flat(l, in)) {
    s.start = call.arena + in.start + first * pixel;
    s.segments = 1;
    s.length = int(end - first);
  } else {
    s.start = call.arena + in.start + (first * l.stride - l.pad_top) * row - l.pad_left * pixel;
    s.segments = int(end - first);
    s.length = width;
  }
  return s;
}

// Sums of channels, which are floats where the map is bf16.
static void add_sums(int32_t* to, const int32_t* from, int count, bool is_bf16) {
  if (is_bf16) {
    float* sums = reinterpret_cast<float*>(to);
    for (int i = 0; i < count; i++) sums[i] += reinterpret_cast<const float*>(from)[i];
  } else {
    for (int i = 0; i < count; i++) to[i] += from[i];
  }
}

static void run_conv(const Step& step, const Call& call) {
  const Packed& p = step.packed;
  const Map& out = step.out;
  const bool flat = is_flat(*step.main, step.in);
  auto group_pixels = [&](int group, int64_t from, int64_t to) {
    const Source source = source_at(*step.main, step.in, out.width, call, flat ? from : from / out.width, flat ? to : to / out.width);
    const Target target = target_at(step, call, from, group * CONV_GROUP, step.has_residual);
    if (step.keeps_sums) {
      int32_t* sums = call.sums + size_t(call.part) * call.sums_stride + group * CONV_GROUP;
      for (int i = 0; i < CONV_GROUP; i++) sums[i] = 0;
      conv_group<SUMS>(p, group, source, target, sums, scratch_of(call).conv, *call.prefetch);
    } else {
      conv_group(p, group, source, target, step.has_residual, scratch_of(call).conv, *call.prefetch);
    }
  };
  if (!step.keeps_sums && is_split_by_rows(out, call.parts)) {
    for (int g = 0; g < p.groups; g++)
      group_pixels(g, share_start(out.height, call.part, call.parts) * out.width, share_start(out.height, call.part + 1, call.parts) * out.width);
    return;
  }
  // Numbered group by group, in each by runs of pixels or row by row.
  const int64_t pixels = int64_t(out.height) * out.width, unit = flat ? RUN : out.width, units = (pixels + unit - 1) / unit;
  const int64_t end = conv_share(out.channels, out.is_bf16, units, call.part + 1, call.parts);
  for (int64_t at = conv_share(out.channels, out.is_bf16, units, call.part, call.parts); at < end;) {
    const int64_t first = at % units, last = smaller(units, first + end - at);
    group_pixels(int(at / units), first * unit, smaller(last * unit, pixels));
    at += last - first;
  }
}

// Fused-MBConv: some rows of the expanded map at a time, which the projection reads from L1.
static int64_t expanded_pixel(const Step& step) { return int64_t(align64(size_t(step.expanded * value_bytes(step.in)))); }

static int64_t project_rows(const Step& step) {
  return larger(1, smaller(step.out.height, PROJECT_BUFFER / (step.out.width * expanded_pixel(step))));
}

static void run_conv_and_project(const Step& step, const Call& call) {
  const Packed &p = step.packed, &project = step.project;
  const Map& out = step.out;
  Scratch& scratch = scratch_of(call);
  const int64_t band = project_rows(step), end = share_start(out.height, call.part + 1, call.parts);
  const int64_t value = value_bytes(step.in), pixel = expanded_pixel(step);
  const int width = out.width;
  // What is read past the last channel meets zero weights, but must be a number.
  if (p.is_bf16) __builtin_memset(scratch.buffer, 0, size_t(band * width * pixel));
  for (int64_t y = share_start(out.height, call.part, call.parts); y < end; y += band) {
    const int64_t last = smaller(end, y + band);
    const Source source = source_at(*step.main, step.in, width, call, y, last);
    Target expanded;
    expanded.pixel = pixel;
    expanded.width = width;
    for (int g = 0; g < p.groups; g++) {
      expanded.out = scratch.buffer + g * CONV_GROUP * value;
      conv_group(p, g, source, expanded, false, scratch.conv, *call.prefetch);
    }
    const Source from{scratch.buffer, pixel, 0, 0, 1, int(last - y) * width};
    for (int g = 0; g < project.groups; g++)
      conv_group(project, g, from, target_at(step, call, y * width, g * CONV_GROUP, step.has_residual), step.has_residual, scratch.conv, *call.prefetch);
  }
}

static int depthwise_input_rows(const Layer& l, int64_t rows) { return int((rows - 1) * l.stride + l.kernel); }

// A depthwise step's buffer: [rows][left margin, the input's pixels, right margin][64].
static int64_t buffer_width(const Step& step) {
  return larger(step.seen.width + step.main->pad_left, (step.out.width - 1) * step.main->stride + step.main->kernel);
}

static int64_t depthwise_rows_at_once(const Step& step) {
  const int64_t row = buffer_width(step) * GROUP * value_bytes(step.in), fit = (DEPTHWISE_BUFFER / row - step.main->kernel) / step.main->stride;
  return smaller(step.out.height, larger(8, fit / 2 * 2));
}

// Copies a group's channels of some rows of a map: what a depthwise convolution without expansion reads.
static void copy_rows(const Map& in, const Call& call, int group, int64_t y, int64_t end, uint8_t* to, int64_t row_bytes) {
  const int64_t value = value_bytes(in), pixel = GROUP * value, bytes = smaller(pixel, (in.channels - group * GROUP) * value);
  for (; y < end; y++, to += row_bytes) {
    const uint8_t* from = pixel_of(in, call, y, 0) + group * pixel;
    uint8_t* out = to;
    for (int x = 0; x < in.width; x++, from += in.pixel_bytes, out += pixel)
      for (int64_t at = 0; at < bytes; at += Lanes::BYTES) Lanes::store(out + at, Lanes::Mask(int(bytes - at)), Lanes::load(from + at));
  }
}

template <int K, int S>
static void depthwise_rows_of(const Packed& p, int group, const uint8_t* from, int64_t row_bytes, int rows, const Target& target, const Bands& bands,
                              bool keeps_sums, int32_t* totals, DepthwiseScratch& scratch) {
  if (p.is_bf16) depthwise_group_bf16<K, S>(p, group, from, row_bytes, rows, target, reinterpret_cast<float*>(totals), scratch);
  else if (p.is_ramp) depthwise_group<K, S, RAMP>(p, group, from, row_bytes, rows, target, bands, keeps_sums, totals, scratch);
  else if (p.layer->activation != NONE) depthwise_group<K, S, TABLE>(p, group, from, row_bytes, rows, target, bands, keeps_sums, totals, scratch);
  else depthwise_group<K, S, LINE>(p, group, from, row_bytes, rows, target, bands, keeps_sums, totals, scratch);
}

static void depthwise_rows_of(const Packed& p, int group, const uint8_t* from, int64_t row_bytes, int rows, const Target& target, const Bands& bands,
                              bool keeps_sums, int32_t* totals, DepthwiseScratch& scratch) {
  const Layer& l = *p.layer;
  if (l.kernel == 3 && l.stride == 1) depthwise_rows_of<3, 1>(p, group, from, row_bytes, rows, target, bands, keeps_sums, totals, scratch);
  else if (l.kernel == 3) depthwise_rows_of<3, 2>(p, group, from, row_bytes, rows, target, bands, keeps_sums, totals, scratch);
  else if (l.stride == 1) depthwise_rows_of<5, 1>(p, group, from, row_bytes, rows, target, bands, keeps_sums, totals, scratch);
  else depthwise_rows_of<5, 2>(p, group, from, row_bytes, rows, target, bands, keeps_sums, totals, scratch);
}

// A group's expansion's rows [y, end), or the input's own, into a buffer's pixels.
static void fill_rows(const Step& step, const Call& call, int group, int64_t y, int64_t end, uint8_t* to, int64_t row_bytes) {
  const Packed& expand = step.expand;
  const Map& in = step.in;
  if (!expand.layer) return copy_rows(in, call, group, y, end, to, row_bytes);
  // Pixels by pieces that stay in L1 for both halves of the group.
  const int64_t width = step.seen.width, pixel = GROUP * value_bytes(in);
  const int64_t rows = larger(1, larger(RUN, EXPAND_PIECE / int64_t(in.pixel_bytes) / RUN * RUN) / width);
  const bool flat = is_flat(*expand.layer, in);
  for (int64_t from = y; from < end; from += rows) {
    const int64_t until = smaller(end, from + rows);
    const Source source = source_at(*expand.layer, in, int(width), call, flat ? from * width : from, flat ? until * width : until);
    Target target;
    target.out = to + (from - y) * row_bytes;
    target.pixel = pixel;
    target.skip = row_bytes - width * pixel;
    target.width = int(width);
    for (int g = group * 2; g < group * 2 + 2 && g < expand.groups; g++, target.out += CONV_GROUP * value_bytes(in))
      conv_group(expand, g, source, target, false, scratch_of(call).conv, *call.prefetch);
  }
}

// MBConv up to the mean's sums: of each group of channels the expansion into the buffer, and its depthwise convolution from there.
static void run_depthwise(const Step& step, const Call& call) {
  const Packed& p = step.packed;
  const Layer& l = *step.main;
  const Map &seen = step.seen, &out = step.out;
  Scratch& scratch = scratch_of(call);
  const int zero_point = step.program->tensors[size_t(l.input)].zero_point;
  const int64_t pixel = GROUP * value_bytes(seen), width = buffer_width(step), row_bytes = width * pixel, rows_at_once = depthwise_rows_at_once(step);
  // Margins left and right are never written again in this step.
  const int64_t buffer_rows = depthwise_input_rows(l, rows_at_once);
  for (int64_t y = 0; y < buffer_rows; y++) {
    uint8_t* row = scratch.buffer + y * row_bytes;
    __builtin_memset(row, zero_point, size_t(l.pad_left * pixel));
    __builtin_memset(row + (l.pad_left + seen.width) * pixel, zero_point, size_t((width - l.pad_left - seen.width) * pixel));
  }
  for_depthwise_share(out, call.part, call.parts, [&](int group, int64_t first, int64_t last) {
    int32_t* sums = call.sums + size_t(call.part) * call.sums_stride + group * GROUP;
    for (int i = 0; i < GROUP; i++) sums[i] = 0;
    const int num_bands = bands_of(out.channels - group * GROUP, out.is_bf16);
    const int64_t band_rows = (last - first + num_bands - 1) / num_bands, band_bytes = pixel / num_bands;
    int64_t have = 0;  // rows of each band, counted from the first that its first output sees, that are in the buffer or not needed any more
    for (int64_t y = 0; y < band_rows; y += rows_at_once) {
      const int64_t count = smaller(rows_at_once, band_rows - y), start = y * l.stride, stop = start + depthwise_input_rows(l, count);
      // Rows that the last ones of the round before saw as well are moved to the top.
      if (have > start) __builtin_memmove(scratch.buffer, scratch.buffer + rows_at_once * l.stride * row_bytes, size_t((have - start) * row_bytes));
      if (have < start) have = start;
      Bands bands;
      bands.count = num_bands;
      bands.step = band_rows * int64_t(out.row_bytes);
      for (int b = 0; b < num_bands; b++) {
        const int64_t first_output = first + b * band_rows, top = first_output * l.stride - l.pad_top;
        bands.rows[b] = int(larger(0, smaller(count, last - first_output - y)));
        if (!bands.rows[b]) break;  // what the buffer holds of it is not used
        uint8_t* to = scratch.buffer + b * band_bytes;
        auto pad = [&](int64_t row, int64_t until) {
          for (; row < until; row++) {
            uint8_t* pixels = to + (row - start) * row_bytes;
            if (num_bands == 1) __builtin_memset(pixels, zero_point, size_t(row_bytes));
            else for (int64_t x = 0; x < width; x++) __builtin_memset(pixels + x * pixel, zero_point, size_t(band_bytes));
          }
        };
        const int64_t inside = larger(have, smaller(stop, -top)), below = larger(inside, smaller(stop, seen.height - top));
        pad(have, inside);
        if (inside < below) fill_rows(step, call, group, top + inside, top + below, to + (inside - start) * row_bytes + l.pad_left * pixel, row_bytes);
        pad(below, stop);
      }
      have = stop;
      alignas(64) int32_t totals[GROUP];
      depthwise_rows_of(p, group, scratch.buffer, row_bytes, int(count), target_at(step, call, (first + y) * out.width, group * GROUP, false),
                        bands, step.keeps_sums, totals, scratch.depthwise);
      if (!step.keeps_sums) continue;
      for (int b = 0; b < num_bands; b++) add_sums(sums, totals + b * GROUP / num_bands, GROUP / num_bands, seen.is_bf16);
    }
  });
}

#include "means.h"

static void run_input(const Step& step, const Call& call) {
  const Map& out = step.out;
  const float* scales = step.packed.scales + (call.is_pixels ? 6 : 0);
  const size_t plane = size_t(out.height) * size_t(out.width);
  const int64_t end = share_start(out.height, call.part + 1, call.parts);
  // What a pixel's byte becomes, in its place in a word of four: an image has hundreds of pixels for each of the 256.
  uint32_t words[3][256];
  if (call.is_pixels && !out.is_bf16)
    for (int c = 0; c < 3; c++)
      for (int value = 0; value < 256; value++)
        words[c][value] = uint32_t(sat8(rint32(float(value) * scales[c] + scales[3 + c]))) << 8 * c;
  for (int64_t y = share_start(out.height, call.part, call.parts); y < end; y++) {
    uint8_t* to = pixel_of(out, call, y, 0);
    const size_t at = size_t(y) * size_t(out.width);
    if (out.is_bf16) {
      uint16_t* words = reinterpret_cast<uint16_t*>(to);
      const uint8_t* pixels = static_cast<const uint8_t*>(call.image) + at * 3;
      for (int c = 0; c < 3; c++) {
        const float scale = scales[c], offset = scales[3 + c];
        const float* from = static_cast<const float*>(call.image) + size_t(c) * plane + at;
        if (call.is_pixels)
          for (int x = 0; x < out.width; x++) words[x * 4 + c] = to_bf16(float(pixels[x * 3 + c]) * scale + offset);
        else
          for (int x = 0; x < out.width; x++) words[x * 4 + c] = to_bf16(from[x] * scale + offset);
      }
      for (int x = 0; x < out.width; x++) words[x * 4 + 3] = 0;
    } else if (call.is_pixels) {
      const uint8_t* from = static_cast<const uint8_t*>(call.image) + at * 3;
      uint32_t* pixels = reinterpret_cast<uint32_t*>(to);
      for (int x = 0; x < out.width; x++, from += 3) pixels[x] = words[0][from[0]] | words[1][from[1]] | words[2][from[2]];
    } else {
      const float* from = static_cast<const float*>(call.image) + at;
      Lanes::pixels(from, from + plane, from + 2 * plane, out.width, scales, to);
    }
  }
}

static size_t scratch_bytes(const Step& step) {
  size_t buffer = 0;
  if (step.kind == DEPTHWISE)
    buffer = size_t(depthwise_input_rows(*step.main, depthwise_rows_at_once(step)) + 2) * size_t(buffer_width(step)) * GROUP * size_t(value_bytes(step.in));
  if (step.kind == CONV && step.project.layer) buffer = size_t(project_rows(step) * step.out.width * expanded_pixel(step)) + 64;
  return sizeof(Scratch) + buffer;
}

// The weights that a part of a step reads, last first.
static void needs(const Step& step, int part, int parts, Prefetch& prefetch) {
  const Packed& p = step.packed;
  auto add_share = [&](const Packed& of, int groups, int scale) {
    if (is_split_by_rows(step.out, parts)) return prefetch.add(of.weights, of.group_bytes * size_t(of.groups));
    // A group that two parts share is wanted by both.
    const int64_t first = int64_t(groups) * part / parts * scale, last = smaller((int64_t(groups) * (part + 1) + parts - 1) / parts * scale, of.groups);
    if (first < last) prefetch.add(of.weights + size_t(first) * of.group_bytes, size_t(last - first) * of.group_bytes);
  };
  if (step.kind == DEPTHWISE) {
    add_share(p, p.groups, 1);
    if (step.expand.layer) add_share(step.expand, p.groups, 2);
  } else if (step.kind == CONV && step.project.layer) {
    prefetch.add(step.project.weights, step.project.group_bytes * size_t(step.project.groups));
    prefetch.add(p.weights, p.group_bytes * size_t(p.groups));
  } else if (step.kind == CONV) {
    add_share(p, p.groups, 1);
  } else if (step.kind == SQUEEZE_EXCITE) {
    // The second matrix has a part's channels in every row.
    const size_t bytes = align64(size_t(step.main->squeeze_channels) * size_t(step.in.channels) * 2);
    prefetch.add(p.weights + bytes, bytes);
    const size_t first = bytes * size_t(part) / size_t(parts) / 64 * 64;
    prefetch.add(p.weights + first, bytes * size_t(part + 1) / size_t(parts) - first);
  } else if (step.kind == CLASSIFIER) {
    const size_t bytes = size_t(step.program->num_classes) * size_t(step.in.channels) * 2, first = bytes * size_t(part) / size_t(parts) / 64 * 64;
    prefetch.add(p.weights + first, bytes * size_t(part + 1) / size_t(parts) - first);
  }
}

// The border between u8 and bf16 blocks.
static void run_convert(const Step& step, const Call& call) {
  const Map &in = step.in, &out = step.out;
  const float multiplier = step.main->multiplier;
  const int64_t end = share_start(in.height, call.part + 1, call.parts);
  for (int64_t y = share_start(in.height, call.part, call.parts); y < end; y++)
    for (int x = 0; x < in.width; x++) {
      const uint8_t* from = pixel_of(in, call, y, x);
      uint8_t* to = pixel_of(out, call, y, x);
      if (out.is_bf16) {
        const Lanes::F zero = Lanes::setf(float(-in.zero_point)), scale = Lanes::setf(multiplier);
        for (int c = 0; c < in.channels; c += Lanes::WORDS)
          Lanes::narrow(to + c * 2, in.channels - c, Lanes::mulf(Lanes::addf(Lanes::bytes_to_floats(from + c), zero), scale));
      } else {
        const uint16_t* values = reinterpret_cast<const uint16_t*>(from);
        for (int c = 0; c < in.channels; c++) to[c] = sat8(rint32(from_bf16(values[c]) * multiplier) + out.zero_point);
      }
    }
}

static void run(const Step& step, int phase, const Call& call) {
  switch (step.kind) {
    case INPUT: return run_input(step, call);
    case CONV: return step.project.layer ? run_conv_and_project(step, call) : run_conv(step, call);
    case DEPTHWISE: return run_depthwise(step, call);
    case SQUEEZE_EXCITE: return run_squeeze_excite(step, phase, call);
    case CONVERT: return run_convert(step, call);
    case CLASSIFIER: return run_classifier(step, phase, call);
  }
}
