// Drives the native engine with random small networks: every level against the portable one, bit by bit in u8 and nearly in bf16, each
// layer by itself and fused; and with damaged files. tests/test_native_sanitizers.py builds it with AddressSanitizer and UBSan.
//
//     native_kernels NETWORKS SEED

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "engine.h"
#include "program.h"

using namespace native;

namespace {

std::mt19937 generator;
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
bool chance(int percent) { return pick(1, 100) <= percent; }

template <class T>
struct Values : std::vector<T> {
  explicit Values(int count) : std::vector<T>(size_t(count)) {}
};

uint16_t bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return uint16_t(bits >> 16);
}

// A program file in the making: layers are added at its end.
struct Network {
  std::vector<Tensor> tensors;
  std::vector<Layer> layers;
  std::vector<uint8_t> blob;
  bool is_bf16 = false;
  int at = 0;  // the tensor that the next layer reads

  template <class T>
  int64_t put(const std::vector<T>& values) {
    blob.resize((blob.size() + 63) / 64 * 64);
    const int64_t offset = int64_t(blob.size());
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(values.data());
    blob.insert(blob.end(), bytes, bytes + values.size() * sizeof(T));
    return offset;
  }
  Values<float> floats(int count, float low, float high) {
    Values<float> values(count);
    for (float& v : values) v = low + (high - low) * float(pick(0, 1000)) / 1000;
    return values;
  }
  Values<uint16_t> halves(int count, float size) {
    Values<uint16_t> values(count);
    for (uint16_t& v : values) v = bf16(float(pick(-100, 100)) * size / 100);
    return values;
  }
  int tensor(int height, int width, int channels) {
    Tensor t = {height, width, channels, is_bf16 ? BF16 : U8, is_bf16 ? 0.0f : 0.05f, is_bf16 ? 0 : pick(0, 255), 0};
    tensors.push_back(t);
    return int(tensors.size()) - 1;
  }
  Layer layer(Kind kind, int output) {
    Layer l = {};
    l.kind = kind;
    l.input = kind == INPUT ? -1 : at;
    l.residual = -1;
    l.output = output;
    l.weights = l.bias = l.scales = l.table = l.squeeze_weights = l.squeeze_bias = l.excite_weights = l.excite_bias = -1;
    return l;
  }
  void add(const Layer& l) {
    layers.push_back(l);
    if (l.output >= 0) at = l.output;
  }
  void input(int height, int width) {
    Layer l = layer(INPUT, tensor(height, width, 3));
    l.scales = put(Values<float>(floats(12, 0.5f, is_bf16 ? 1.0f : 60.0f)));
    Values<int32_t> padding(3);
    if (!is_bf16) for (int32_t& v : padding) v = pick(0, 255);
    l.table = put(padding);
    add(l);
  }
  void convolution(bool is_depthwise, int channels, int kernel, int stride, int activation, bool has_residual) {
    const Tensor in = tensors[size_t(at)];
    if (is_depthwise) channels = in.channels;
    // Half the kernel before, or one less at stride 2 as TensorFlow's SAME has for even sizes.
    auto before = [&](int size) { return stride == 2 && size % 2 == 0 && kernel > 1 && chance(50) ? kernel / 2 - 1 : kernel / 2; };
    const int top = before(in.height), left = before(in.width);
    auto outputs = [&](int size) { return (size + stride - 1) / stride; };
    const int source = at, output = tensor(outputs(in.height), outputs(in.width), channels);
    Layer l = layer(is_depthwise ? DEPTHWISE : CONV, output);
    l.kernel = kernel;
    l.stride = stride;
    l.pad_top = top;
    l.pad_left = left;
    l.activation = activation;
    if (has_residual && stride == 1 && channels == in.channels && !is_depthwise) l.residual = source;
    const int length = kernel * kernel * (is_depthwise ? 1 : in.channels);
    if (is_bf16) {
      l.weights = put(halves(channels * length, 2 / std::sqrt(float(length))));
      l.bias = put(floats(channels, -1, 1));
    } else {
      Values<int8_t> weights(channels * length);
      for (int8_t& w : weights) w = int8_t(pick(-128, 127));
      Values<int32_t> bias(channels);
      for (int32_t& b : bias) b = pick(-20000, 20000);
      l.weights = put(weights);
      l.bias = put(bias);
      l.scales = put(floats(channels, 0, 2 / std::sqrt(float(length))));
      l.fraction_bits = pick(0, 7);
      l.output_offset = pick(-9000, 9000);
      l.residual_multiplier = pick(0, 32767);
      Values<int16_t> table(128);
      for (int16_t& v : table) v = int16_t(pick(-32767, 32767));
      if (activation) l.table = put(table);
    }
    add(l);
  }
  void squeeze_excite(int squeeze) {
    const Tensor in = tensors[size_t(at)];
    Layer l = layer(SQUEEZE_EXCITE, tensor(in.height, in.width, in.channels));
    l.squeeze_channels = squeeze;
    l.fraction_bits = is_bf16 ? 0 : pick(0, 6);
    l.multiplier = is_bf16 ? 1 : float(pick(1, 32767));
    l.mean_multiplier = 0.01f / float(in.height * in.width);
    l.squeeze_weights = put(halves(squeeze * in.channels, 1));
    l.squeeze_bias = put(floats(squeeze, -1, 1));
    l.excite_weights = put(halves(squeeze * in.channels, 1));
    l.excite_bias = put(floats(in.channels, -1, 1));
    add(l);
  }
  void classifier(int classes) {
    const Tensor in = tensors[size_t(at)];
    Layer l = layer(CLASSIFIER, -1);
    l.mean_multiplier = 0.05f / float(in.height * in.width);
    l.weights = put(halves(classes * in.channels, 1));
    l.bias = put(floats(classes, -1, 1));
    add(l);
  }
  std::vector<uint8_t> file(int classes) {
    blob.resize((blob.size() + 63) / 64 * 64);
    const uint64_t tensors_at = 64, layers_at = (tensors_at + tensors.size() * 32 + 63) / 64 * 64;
    const uint64_t blob_at = (layers_at + layers.size() * 160 + 63) / 64 * 64;
    std::vector<uint8_t> bytes(blob_at);
    const uint32_t counts[4] = {1, uint32_t(tensors.size()), uint32_t(layers.size()), uint32_t(classes)};
    const uint64_t offsets[5] = {tensors_at, layers_at, blob_at, blob.size(), 0};
    memcpy(bytes.data(), "EFFNATIV", 8);
    memcpy(bytes.data() + 8, counts, 16);
    memcpy(bytes.data() + 24, offsets, 40);
    memcpy(bytes.data() + tensors_at, tensors.data(), tensors.size() * 32);
    memcpy(bytes.data() + layers_at, layers.data(), layers.size() * 160);
    bytes.insert(bytes.end(), blob.begin(), blob.end());
    return bytes;
  }
};

constexpr int CLASSES = 7;

Network random_network() {
  Network n;
  n.is_bf16 = chance(30);
  // Tall enough, at times, that threads split maps by rows.
  n.input(chance(30) ? pick(41, 90) : pick(1, 40), pick(1, 40));
  n.convolution(false, pick(1, 70), 3, pick(1, 2), pick(0, 2), false);
  for (int block = pick(0, 3); block > 0; block--) {
    const int activation = pick(0, 2), channels = pick(1, 70), stride = chance(30) ? 2 : 1;
    const int odd = chance(50) ? 3 : 5, same = n.tensors[size_t(n.at)].channels;
    switch (pick(0, 3)) {
      case 0:  // one convolution
        n.convolution(false, chance(50) ? same : channels, pick(0, 2) * 2 + 1, stride, activation, true);
        break;
      case 1:  // Fused-MBConv
        n.convolution(false, channels, odd, stride, activation, false);
        n.convolution(false, same, 1, 1, 0, false);
        break;
      default:  // MBConv
        if (chance(80)) n.convolution(false, channels + pick(0, 1) * 70, 1, 1, activation, false);
        n.convolution(true, 0, odd, stride, activation, false);
        if (chance(70)) n.squeeze_excite(pick(1, 20));
        n.convolution(false, pick(1, 70), 1, 1, 0, false);
    }
  }
  n.convolution(false, pick(1, 140), 1, 1, pick(0, 2), false);
  n.classifier(CLASSES);
  return n;
}

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "%s\n", what.c_str());
  exit(1);
}

struct Answers {
  std::vector<std::vector<uint8_t>> tensors;
  std::vector<float> logits;
};

Answers answers(const std::vector<uint8_t>& file, const std::string& level, int threads, int flags, const Network& n, const std::vector<float>& images,
                int batch) {
  char error[300] = "";
  engine* opened = engine_open(file.data(), file.size(), level.c_str(), threads, batch, flags, error, sizeof error);
  if (!opened) fail("refused at " + level + ": " + error);
  Answers a;
  a.logits.resize(size_t(batch * CLASSES));
  if (engine_infer(opened, images.data(), 0, batch, 1, a.logits.data(), error, sizeof error)) fail(error);
  if (flags & ENGINE_KEEP_TENSORS)
    for (size_t i = 0; i < n.tensors.size(); i++) {
      const Tensor& t = n.tensors[i];
      a.tensors.emplace_back(size_t(t.height) * size_t(t.width) * size_t(t.channels) * t.value_bytes());
      if (engine_read_tensor(opened, int(i), a.tensors.back().data(), a.tensors.back().size(), error, sizeof error)) fail(error);
    }
  engine_close(opened);
  return a;
}

// bf16 kernels round in other places: as a fraction of the largest, and ever more from layer to layer.
void compare_logits(const std::vector<float>& a, const std::vector<float>& b, bool is_bf16, const std::string& where) {
  float most = 1;
  for (float v : a) most = std::max(most, std::fabs(v));
  for (size_t i = 0; i < a.size(); i++)
    if (is_bf16 ? !(std::fabs(a[i] - b[i]) <= 0.1f * most) : memcmp(&a[i], &b[i], 4) != 0)
      fail(where + ": logit " + std::to_string(i) + " is " + std::to_string(b[i]) + ", the portable kernels say " + std::to_string(a[i]));
}

std::string describe(const Network& n) {
  std::ostringstream text;
  for (const Layer& l : n.layers) {
    const Tensor& t = n.tensors[size_t(l.output >= 0 ? l.output : l.input)];
    text << "\n  kind " << l.kind << " kernel " << l.kernel << " stride " << l.stride << " pad " << l.pad_top << "," << l.pad_left << " act "
         << l.activation << " residual " << l.residual << " -> " << t.height << " x " << t.width << " x " << t.channels;
  }
  return text.str();
}

void check_levels(const std::vector<uint8_t>& file, const Network& n) {
  const Tensor& input = n.tensors[0];
  const int batch = pick(1, 3), pixels = input.height * input.width * 3;
  std::vector<float> images(size_t(batch * pixels));
  for (float& v : images) v = float(pick(-3000, 3000)) / 1000;
  const Answers expected = answers(file, "portable", 1, ENGINE_KEEP_TENSORS, n, images, 1);
  const Answers all = answers(file, "portable", pick(1, 3), 0, n, images, batch);
  std::istringstream levels(engine_levels());
  for (std::string level; levels >> level;) {
    if (level == "portable") continue;
    const int threads = pick(1, 5);
    const std::string where = level + ", " + std::to_string(threads) + " threads" + (n.is_bf16 ? ", bf16" : "");
    const Answers found = answers(file, level, threads, ENGINE_KEEP_TENSORS, n, images, 1);
    if (!n.is_bf16)
      for (size_t i = 0; i < n.tensors.size(); i++)
        if (expected.tensors[i] != found.tensors[i]) fail(where + ": tensor " + std::to_string(i) + " differs in" + describe(n));
    compare_logits(expected.logits, found.logits, n.is_bf16, where + ", by layers" + describe(n));
    compare_logits(all.logits, answers(file, level, threads, 0, n, images, batch).logits, n.is_bf16, where + ", fused" + describe(n));
  }
}

// What a damaged file says must be refused, or be harmless.
void check_damaged(std::vector<uint8_t> bytes, const Network& n) {
  const size_t tables = 64 + n.tensors.size() * 32 + n.layers.size() * 160;
  if (chance(30)) bytes.resize(size_t(pick(0, int(bytes.size()) - 1)));
  else
    for (int i = pick(1, 3); i > 0; i--) {
      const size_t at = size_t(pick(8, int(std::min(tables, bytes.size())) - 1));
      bytes[at] = chance(50) ? uint8_t(pick(0, 255)) : uint8_t(bytes[at] ^ (1 << pick(0, 7)));
    }
  bytes.shrink_to_fit();  // nothing lies behind its end
  std::istringstream levels(engine_levels());
  for (std::string level; levels >> level;) {
    char error[300] = "";
    engine* opened = engine_open(bytes.data(), bytes.size(), level.c_str(), 2, 1, 0, error, sizeof error);
    if (!opened) {
      if (!error[0]) fail("a damaged file was refused without a word");
      continue;
    }
    int info[8];
    engine_info(opened, info);
    const int64_t pixels = int64_t(info[0]) * info[1] * 3;
    if (pixels < 1 << 20) {
      std::vector<float> image(size_t(pixels), 0.5f);
      std::vector<float> logits(std::max(1, info[2]));
      if (engine_infer(opened, image.data(), 0, 1, 1, logits.data(), error, sizeof error)) fail(error);
    }
    engine_close(opened);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int networks = count > 1 ? atoi(arguments[1]) : 50, seed = count > 2 ? atoi(arguments[2]) : 0;
  for (int i = 0; i < networks; i++) {
    generator.seed(unsigned(seed + i));
    Network n = random_network();
    const std::vector<uint8_t> bytes = n.file(CLASSES);
    check_levels(bytes, n);
    for (int j = 0; j < 4; j++) check_damaged(bytes, n);
  }
  printf("%d networks at the levels: %s\n", networks, engine_levels());
}
