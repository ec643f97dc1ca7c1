// What follows a mean over pixels: squeeze-excite and the classifier. Included by steps.h.

// A map's sums by channel into the first part's place, where no step before has made them.
static void run_sums(const Map& in, const Call& call) {
  const int64_t first = share_start(in.channels, call.part, call.parts), end = share_start(in.channels, call.part + 1, call.parts);
  for (int64_t c = first; c < end; c++) call.sums[c] = 0;
  for (int y = 0; y < in.height; y++)
    for (int x = 0; x < in.width; x++) {
      const uint8_t* p = pixel_of(in, call, y, x);
      if (in.is_bf16)
        for (int64_t c = first; c < end; c++) reinterpret_cast<float*>(call.sums)[c] += from_bf16(reinterpret_cast<const uint16_t*>(p)[c]);
      else
        for (int64_t c = first; c < end; c++) call.sums[c] += p[c];
    }
}

// The mean of each channel into this part's own array, from the sums of the parts that had a share of its group.
static float* means_of(const Step& step, const Call& call) {
  const Map& in = step.in;
  float* means = call.means + size_t(call.part) * call.sums_stride;
  const int32_t zeros = in.zero_point * in.height * in.width;
  const float multiplier = step.main->mean_multiplier;
  const int size = step.sums_group, groups = (in.channels + size - 1) / size;
  const int64_t units = step.sums_units;
  auto start = [&](int q) {
    return size == GROUP ? depthwise_share(in.channels, in.is_bf16, units, q, call.parts) : conv_share(in.channels, in.is_bf16, units, q, call.parts);
  };
  int part = 0;
  for (int g = 0; g < groups; g++) {
    alignas(64) int32_t sums[GROUP] = {};
    if (units && size == GROUP && is_split_by_rows(in, call.parts)) {
      for (int q = 0; q < call.parts; q++) add_sums(sums, call.sums + size_t(q) * call.sums_stride + g * size, size, in.is_bf16);
    } else if (units) {
      while (start(part + 1) <= g * units) part++;
      for (int q = part; q < call.parts && start(q) < (g + 1) * units; q++) {
        if (start(q) == start(q + 1)) continue;
        add_sums(sums, call.sums + size_t(q) * call.sums_stride + g * size, size, in.is_bf16);
      }
    } else {
      for (int i = 0; i < size; i++) sums[i] = call.sums[g * size + i];
    }
    for (int i = 0; i < size; i++)
      means[g * size + i] = (in.is_bf16 ? reinterpret_cast<const float*>(sums)[i] : float(sums[i] - zeros)) * multiplier;
  }
  return means;
}

// `rows` products of a row of weights with the values (dot16 of docs/native.md), four at a time so that additions do not wait for each other.
static void dot16_rows(const uint16_t* weights, const float* values, int count, int rows, const float* bias, float* to) {
  using F = Lanes::F;
  constexpr int REGISTERS = 16 / Lanes::WORDS;
  const int whole = count / 16 * 16;
  for (int r = 0; r < rows; r += 4) {
    const int n = rows - r < 4 ? rows - r : 4;
    alignas(64) float sums[4][16];
    const uint16_t* w[4];
    F acc[4][REGISTERS];
    for (int j = 0; j < 4; j++) {
      w[j] = weights + int64_t(r + (j < n ? j : 0)) * count;
      for (int k = 0; k < REGISTERS; k++) acc[j][k] = Lanes::zerof();
    }
    for (int i = 0; i < whole; i += 16) {
      // The next four rows come nearer meanwhile: a classifier's 2.6 MB are in L3 or memory at each call.
      if (i % 32 == 0)
        for (int j = 0; j < 4; j++) __builtin_prefetch(w[j] + 4 * count + i);
      for (int k = 0; k < REGISTERS; k++) {
        const F v = Lanes::loadf(values + i + k * Lanes::WORDS);
        for (int j = 0; j < 4; j++) acc[j][k] = Lanes::addf(acc[j][k], Lanes::mulf(Lanes::widen(w[j] + i + k * Lanes::WORDS), v));
      }
    }
    for (int j = 0; j < n; j++) {
      for (int k = 0; k < REGISTERS; k++) Lanes::storef(sums[j] + k * Lanes::WORDS, acc[j][k]);
      for (int l = 0; whole + l < count; l++) sums[j][l] += from_bf16(w[j][whole + l]) * values[whole + l];
      for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++) sums[j][l] += sums[j][l + half];
      to[r + j] = sums[j][0] + bias[r + j];
    }
  }
}

// Scales pixels of a group by their gates.
static void scale_pixels(const Step& step, const Call& call, int group, int64_t first, int64_t end, const int16_t* multipliers) {
  using V = Lanes::V;
  const Map &in = step.in, &out = step.out;
  const V zero_in = Lanes::set16(in.zero_point), zero_out = Lanes::set16(out.zero_point);
  const Lanes::Shift shift(step.main->fraction_bits);
  for (int c = 0; c < 64 / Lanes::BYTES; c++) {
    const int channel = group * GROUP + c * Lanes::BYTES;
    if (channel >= in.channels) break;
    const Lanes::Mask mask(in.channels - channel);
    // In the order of unpacking: eight channels of each sixteen.
    alignas(64) int16_t low[Lanes::BYTES / 2], high[Lanes::BYTES / 2];
    for (int i = 0; i < Lanes::BYTES / 2; i++) {
      low[i] = multipliers[c * Lanes::BYTES + i / 8 * 16 + i % 8];
      high[i] = multipliers[c * Lanes::BYTES + i / 8 * 16 + 8 + i % 8];
    }
    const V m0 = Lanes::load(low), m1 = Lanes::load(high);
    for (int64_t y = first; y < end; y++) {
      const uint8_t* from = pixel_of(in, call, y, 0) + channel;
      uint8_t* to = pixel_of(out, call, y, 0) + channel;
      V next = Lanes::load(from, mask);
      for (int x = 0; x < in.width; x++, to += out.pixel_bytes) {
        // A pixel is read before the one in front of it is written: a masked load whose unused bytes lie where a store is under way waits for it.
        const V q = next;
        next = Lanes::load(from += in.pixel_bytes, mask);
        const V a = Lanes::mulhrs16(shift.left(Lanes::sub16(Lanes::low8(q, Lanes::zero()), zero_in)), m0);
        const V b = Lanes::mulhrs16(shift.left(Lanes::sub16(Lanes::high8(q, Lanes::zero()), zero_in)), m1);
        Lanes::store(to, mask, Lanes::pack16(Lanes::add16(a, zero_out), Lanes::add16(b, zero_out)));
      }
    }
  }
}

static void scale_pixels_bf16(const Step& step, const Call& call, int group, int64_t first, int64_t end, const float* gates) {
  const Map &in = step.in, &out = step.out;
  const int count = int(smaller(GROUP, in.channels - group * GROUP));
  for (int64_t y = first; y < end; y++) {
    const uint8_t* from = pixel_of(in, call, y, 0) + group * GROUP * 2;
    uint8_t* to = pixel_of(out, call, y, 0) + group * GROUP * 2;
    for (int x = 0; x < in.width; x++, from += in.pixel_bytes, to += out.pixel_bytes)
      for (int c = 0; c < count; c += Lanes::WORDS)
        Lanes::narrow(to + c * 2, count - c, Lanes::mulf(Lanes::widen(from + c * 2), Lanes::loadf(gates + c)));
  }
}

static void run_squeeze_excite(const Step& step, int phase, const Call& call) {
  const Layer& l = *step.main;
  const Map& in = step.in;
  if (phase == 0) return run_sums(in, call);
  const int squeeze = l.squeeze_channels;
  const size_t weights_bytes = align64(size_t(squeeze) * size_t(in.channels) * 2);
  const uint16_t* squeeze_weights = reinterpret_cast<const uint16_t*>(step.packed.weights);
  const uint16_t* excite_weights = reinterpret_cast<const uint16_t*>(step.packed.weights + weights_bytes);
  const float* squeeze_bias = reinterpret_cast<const float*>(step.packed.weights + 2 * weights_bytes);
  const float* excite_bias = reinterpret_cast<const float*>(step.packed.weights + 2 * weights_bytes + align64(size_t(squeeze) * 4));
  if (phase == 1) {
    const float* means = means_of(step, call);
    const int64_t first = share_start(squeeze, call.part, call.parts), end = share_start(squeeze, call.part + 1, call.parts);
    dot16_rows(squeeze_weights + first * in.channels, means, in.channels, int(end - first), squeeze_bias + first, call.hidden + first);
    for (int64_t s = first; s < end; s++) call.hidden[s] = silu(call.hidden[s]);
    return;
  }
  // The part scales what it wrote itself, in its own cache.
  for_depthwise_share(in, call.part, call.parts, [&](int group, int64_t first, int64_t last) {
    const int count = int(smaller(GROUP, in.channels - group * GROUP));
    alignas(64) float z[GROUP] = {};
    const float* bias = excite_bias + group * GROUP;
    const uint16_t* weights = excite_weights + group * GROUP;
    alignas(64) int16_t multipliers[GROUP] = {};
    for (int c = 0; c < count; c++) z[c] = bias[c];
    if (count == GROUP) {
      constexpr int REGISTERS = GROUP / Lanes::WORDS;
      Lanes::F acc[REGISTERS];
      for (int k = 0; k < REGISTERS; k++) acc[k] = Lanes::loadf(z + k * Lanes::WORDS);
      for (int s = 0; s < squeeze; s++) {
        const Lanes::F h = Lanes::setf(call.hidden[s]);
        const uint16_t* w = weights + int64_t(s) * in.channels;
        for (int k = 0; k < REGISTERS; k++) acc[k] = Lanes::addf(acc[k], Lanes::mulf(h, Lanes::widen(w + k * Lanes::WORDS)));
      }
      for (int k = 0; k < REGISTERS; k++) Lanes::storef(z + k * Lanes::WORDS, acc[k]);
    } else {
      for (int s = 0; s < squeeze; s++)
        for (int c = 0; c < count; c++) z[c] += call.hidden[s] * from_bf16(weights[int64_t(s) * in.channels + c]);
    }
    for (int c = 0; c < GROUP; c++) {
      z[c] = sigmoid(z[c]) * l.multiplier;
      if (!in.is_bf16) multipliers[c] = int16_t(int32_t(__builtin_rintf(z[c])));
    }
    if (in.is_bf16) scale_pixels_bf16(step, call, group, first, last, z);
    else scale_pixels(step, call, group, first, last, multipliers);
  });
}

static void run_classifier(const Step& step, int phase, const Call& call) {
  if (phase == 0) return run_sums(step.in, call);
  const int classes = step.program->num_classes, channels = step.in.channels;
  const float* means = means_of(step, call);
  const int64_t first = share_start(classes, call.part, call.parts), end = share_start(classes, call.part + 1, call.parts);
  dot16_rows(reinterpret_cast<const uint16_t*>(step.packed.weights) + first * channels, means, channels, int(end - first),
             reinterpret_cast<const float*>(step.packed.bias) + first, call.logits + first);
}
