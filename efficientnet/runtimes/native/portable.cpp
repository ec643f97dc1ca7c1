// The reference: every layer by itself, one value after the other, as docs/native.md writes it. No intrinsics; it runs anywhere, and
// all other kernels must give its bits for u8 maps. Threads take rows, or channels where there is one row.
#include "kernels.h"
#include "numerics.h"

namespace native {
namespace {

struct Range {
  int first, end;
};

Range share(int count, const Call& call) {
  return {int(int64_t(count) * call.part / call.parts), int(int64_t(count) * (call.part + 1) / call.parts)};
}

uint8_t* pixel(const Map& map, const Call& call, int y, int x) {
  return call.arena + map.start + int64_t(y) * int64_t(map.row_bytes) + int64_t(x) * int64_t(map.pixel_bytes);
}

// Padding is a branch here, so that halos cannot be wrong on both sides of a comparison.
bool is_inside(const Map& map, int y, int x) { return y >= 0 && y < map.height && x >= 0 && x < map.width; }

float value16(const uint8_t* p, int c) { return from_bf16(reinterpret_cast<const uint16_t*>(p)[c]); }

float activate(float x, int activation) {
  if (activation == SILU) return silu(x);
  if (activation == RELU6) return x < 0 ? 0 : x > 6 ? 6 : x;
  return x;
}

void run_input(const Step& step, const Call& call) {
  const Map& out = step.out;
  const float* scales = step.program->blob<float>(step.main->scales) + (call.is_pixels ? 6 : 0);
  const size_t plane = size_t(out.height) * size_t(out.width);
  const Range rows = share(out.height, call);
  for (int y = rows.first; y < rows.end; y++)
    for (int x = 0; x < out.width; x++)
      for (int c = 0; c < 3; c++) {
        const size_t at = size_t(y) * size_t(out.width) + size_t(x);
        const float in = call.is_pixels ? float(static_cast<const uint8_t*>(call.image)[at * 3 + size_t(c)])
                                        : static_cast<const float*>(call.image)[size_t(c) * plane + at];
        const float scaled = in * scales[c], value = scaled + scales[3 + c];
        if (out.is_bf16) reinterpret_cast<uint16_t*>(pixel(out, call, y, x))[c] = to_bf16(value);
        else pixel(out, call, y, x)[c] = sat8(rint32(value));
      }
}

uint8_t finish(const Step& step, int32_t sum, float scale, const uint8_t* residual, int n) {
  const Layer& l = *step.main;
  int32_t y = sat16(rint32(float(sum) * scale));
  if (l.activation != NONE) y = by_table(y, step.program->blob<int16_t>(l.table));
  if (residual) y = adds(y, mulhrs(residual[n] << 7, l.residual_multiplier));
  if (l.activation == NONE || residual) y = adds(y, l.output_offset);
  return sat8(y >> l.fraction_bits);
}

void run_convolution(const Step& step, const Call& call) {
  const Layer& l = *step.main;
  const Map &in = step.in, &out = step.out;
  const bool is_depthwise = l.kind == DEPTHWISE;
  const int inputs = is_depthwise ? 1 : in.channels, k = l.kernel;
  const Range rows = share(out.height, call);
  for (int y = rows.first; y < rows.end; y++)
    for (int x = 0; x < out.width; x++) {
      uint8_t* to = pixel(out, call, y, x);
      const uint8_t* residual = step.has_residual ? pixel(step.residual, call, y, x) : nullptr;
      for (int n = 0; n < out.channels; n++) {
        int32_t sum = 0;
        float total = 0;
        for (int ky = 0; ky < k; ky++)
          for (int kx = 0; kx < k; kx++) {
            const int iy = y * l.stride + ky - l.pad_top, ix = x * l.stride + kx - l.pad_left;
            const bool inside = is_inside(in, iy, ix);
            if (!inside && in.is_bf16) continue;
            const uint8_t* from = inside ? pixel(in, call, iy, ix) : nullptr;
            const int64_t at = ((int64_t(n) * k + ky) * k + kx) * inputs;
            if (inside && !in.is_bf16 && !is_depthwise) {  // most of the time, so in a loop of its own
              const int8_t* weights = step.program->blob<int8_t>(l.weights) + at;
              for (int c = 0; c < inputs; c++) sum += from[c] * weights[c];
              continue;
            }
            for (int c = 0; c < inputs; c++) {
              const int channel = is_depthwise ? n : c;
              if (in.is_bf16) {
                total += value16(from, channel) * from_bf16(step.program->blob<uint16_t>(l.weights)[at + c]);
              } else {
                const int32_t q = inside ? from[channel] : in.has_padding ? in.padding[channel] : in.zero_point;
                sum += q * step.program->blob<int8_t>(l.weights)[at + c];
              }
            }
          }
        if (in.is_bf16) {
          float value = activate(total + step.program->blob<float>(l.bias)[n], l.activation);
          if (residual) value += value16(residual, n);
          reinterpret_cast<uint16_t*>(to)[n] = to_bf16(value);
        } else {
          sum += step.program->blob<int32_t>(l.bias)[n];
          to[n] = finish(step, sum, step.program->blob<float>(l.scales)[n], residual, n);
        }
      }
    }
}

float mean_of(const Map& map, const Call& call, int c, float multiplier) {
  int32_t sum = 0;
  float total = 0;
  for (int y = 0; y < map.height; y++)
    for (int x = 0; x < map.width; x++)
      if (map.is_bf16) total += value16(pixel(map, call, y, x), c);
      else sum += pixel(map, call, y, x)[c];
  return (map.is_bf16 ? total : float(sum - map.zero_point * map.height * map.width)) * multiplier;
}

void run_squeeze_excite(const Step& step, int phase, const Call& call) {
  const Layer& l = *step.main;
  const Map &in = step.in, &out = step.out;
  if (phase == 0) {
    const Range channels = share(in.channels, call);
    for (int c = channels.first; c < channels.end; c++) call.means[c] = mean_of(in, call, c, l.mean_multiplier);
  } else if (phase == 1) {
    const Range units = share(l.squeeze_channels, call);
    for (int s = units.first; s < units.end; s++) {
      const uint16_t* weights = step.program->blob<uint16_t>(l.squeeze_weights) + int64_t(s) * in.channels;
      call.hidden[s] = silu(dot16(weights, call.means, in.channels) + step.program->blob<float>(l.squeeze_bias)[s]);
    }
  } else {
    const Range channels = share(in.channels, call);
    for (int c = channels.first; c < channels.end; c++) {
      float z = step.program->blob<float>(l.excite_bias)[c];
      for (int s = 0; s < l.squeeze_channels; s++)
        z += call.hidden[s] * from_bf16(step.program->blob<uint16_t>(l.excite_weights)[int64_t(s) * in.channels + c]);
      const float gate = sigmoid(z) * l.multiplier;
      const int32_t multiplier = rint32(gate);
      for (int y = 0; y < in.height; y++)
        for (int x = 0; x < in.width; x++) {
          const uint8_t* from = pixel(in, call, y, x);
          uint8_t* to = pixel(out, call, y, x);
          if (in.is_bf16) reinterpret_cast<uint16_t*>(to)[c] = to_bf16(value16(from, c) * gate);
          else to[c] = sat8(mulhrs((from[c] - in.zero_point) * (1 << l.fraction_bits), multiplier) + out.zero_point);
        }
    }
  }
}

void run_convert(const Step& step, const Call& call) {
  const Map &in = step.in, &out = step.out;
  const Range rows = share(in.height, call);
  for (int y = rows.first; y < rows.end; y++)
    for (int x = 0; x < in.width; x++)
      for (int c = 0; c < in.channels; c++) {
        const uint8_t* from = pixel(in, call, y, x);
        uint8_t* to = pixel(out, call, y, x);
        if (out.is_bf16) reinterpret_cast<uint16_t*>(to)[c] = to_bf16(float(from[c] - in.zero_point) * step.main->multiplier);
        else to[c] = sat8(rint32(value16(from, c) * step.main->multiplier) + out.zero_point);
      }
}

void run_classifier(const Step& step, int phase, const Call& call) {
  const Layer& l = *step.main;
  if (phase == 0) {
    const Range channels = share(step.in.channels, call);
    for (int c = channels.first; c < channels.end; c++) call.means[c] = mean_of(step.in, call, c, l.mean_multiplier);
  } else {
    const Range classes = share(step.program->num_classes, call);
    for (int k = classes.first; k < classes.end; k++) {
      const uint16_t* weights = step.program->blob<uint16_t>(l.weights) + int64_t(k) * step.in.channels;
      call.logits[k] = dot16(weights, call.means, step.in.channels) + step.program->blob<float>(l.bias)[k];
    }
  }
}

void run(const Step& step, int phase, const Call& call) {
  switch (step.kind) {
    case INPUT: return run_input(step, call);
    case CONV:
    case DEPTHWISE: return run_convolution(step, call);
    case SQUEEZE_EXCITE: return run_squeeze_excite(step, phase, call);
    case CONVERT: return run_convert(step, call);
    case CLASSIFIER: return run_classifier(step, phase, call);
  }
}

}  // namespace

const Kernels PORTABLE = {
    "portable", false, 4,
    [](const Program&, const Layer&, const Map&, const Map&) { return size_t(0); },
    [](const Program&, const Layer&, const Map&, const Map&, uint8_t*, Packed&) {},
    [](const Step&) { return size_t(0); },
    run,
    [](const Step&, int, int, Prefetch&) {},
    [] {}, [] {}, nullptr};

}  // namespace native
