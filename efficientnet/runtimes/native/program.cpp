// Checks a program file; see program.h. Sizes are computed in 64 bits from fields that were bounded first.
#include "program.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>

namespace native {
namespace {

constexpr int MAX_SIDE = 16384;
constexpr int MAX_TABLE = 4096;
constexpr uint64_t MAX_MAP_BYTES = uint64_t(1) << 31;

struct Header {
  char magic[8];
  uint32_t version, num_tensors, num_layers, num_classes;
  uint64_t tensors_offset, layers_offset, blob_offset, blob_bytes, zero;
};
static_assert(sizeof(Header) == 64);

[[noreturn]] void fail(const std::string& what) {
  throw Error("the program file is damaged or not of this version: " + what + "; export it again");
}

std::string text(int64_t value) { return std::to_string(value); }

[[noreturn]] void fail_layer(int index, const std::string& what) {
  fail("layer " + text(index) + " " + what);
}

void require_range(int index, const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    fail_layer(index, std::string("has ") + name + " " + text(value) + ", expected " + text(least) +
                          " to " + text(most));
}

void require_positive(int index, const char* name, float value) {
  if (!(value > 0) || !std::isfinite(value))
    fail_layer(index, std::string("has a ") + name + " that is no positive number");
}

}  // namespace

Program::Program(const void* file, size_t file_bytes, bool keeps, bool takes)
    : file_(static_cast<const char*>(file)), file_bytes_(file_bytes), takes_(takes && !keeps), released_(reinterpret_cast<uintptr_t>(file)) {
  if (keeps) {
    own_.assign(file_, file_ + file_bytes);
    file_ = own_.data();
  }
  read_tables();
  for (int i = 0; i < int(tensors.size()); i++) check_tensor(i);
  std::vector<char> is_written(tensors.size(), 0);
  for (int i = 0; i < int(layers.size()); i++) check_layer(i, is_written);
}

void Program::release(int64_t offset) {
  // In steps of 2 MB: pages of that size are given back whole or not at all.
  const uintptr_t end = reinterpret_cast<uintptr_t>(blob_ + offset) >> 21 << 21;
  if (!takes_ || end <= released_) return;
  madvise(reinterpret_cast<void*>(released_), end - released_, MADV_DONTNEED);
  released_ = end;
}

void Program::read_tables() {
  Header header;
  if (file_bytes_ < sizeof header) fail("it has " + text(int64_t(file_bytes_)) + " bytes, a header has 64");
  if (reinterpret_cast<uintptr_t>(file_) % 16) throw Error("the program's bytes do not start at a multiple of 16");
  std::memcpy(&header, file_, sizeof header);
  if (std::memcmp(header.magic, "EFFNATIV", 8) != 0) fail("it does not start with EFFNATIV");
  if (header.version != 1) fail("version " + text(header.version) + ", this engine reads 1");
  if (header.num_tensors < 1 || header.num_tensors > MAX_TABLE || header.num_layers < 2 ||
      header.num_layers > MAX_TABLE || header.num_classes < 1 || header.num_classes > (1 << 20))
    fail("impossible numbers of tensors, layers or classes");
  if (header.zero != 0) fail("a reserved field of the header is not zero");
  auto require_inside = [&](const char* name, uint64_t offset, uint64_t bytes) {
    if (offset % 64 || offset > file_bytes_ || bytes > file_bytes_ - offset)
      fail(std::string(name) + " reach past the end of the file (truncated?) or are not aligned");
  };
  require_inside("tensors", header.tensors_offset, header.num_tensors * sizeof(Tensor));
  require_inside("layers", header.layers_offset, header.num_layers * sizeof(Layer));
  require_inside("weights", header.blob_offset, header.blob_bytes);
  if (header.blob_offset + header.blob_bytes != file_bytes_) fail("bytes follow its end");
  tensors.resize(header.num_tensors);
  layers.resize(header.num_layers);
  std::memcpy(tensors.data(), file_ + header.tensors_offset, tensors.size() * sizeof(Tensor));
  std::memcpy(layers.data(), file_ + header.layers_offset, layers.size() * sizeof(Layer));
  num_classes = int(header.num_classes);
  blob_ = file_ + header.blob_offset;
  blob_bytes_ = header.blob_bytes;
}

void Program::check_tensor(int index) const {
  const Tensor& t = tensors[size_t(index)];
  auto bad = [&](const std::string& what) { fail("tensor " + text(index) + " " + what); };
  for (int side : {t.height, t.width, t.channels})
    if (side < 1 || side > MAX_SIDE) bad("has a side of " + text(side) + ", expected 1 to 16384");
  // With margins and alignment; halves of it are multiplied below in 64 bits.
  if (uint64_t(t.height + 8) * uint64_t(t.width + 8) * uint64_t(t.channels) * 2 > MAX_MAP_BYTES)
    bad("is larger than 2 GB");
  if (t.type != U8 && t.type != BF16) bad("has the type " + text(t.type) + ", expected 0 or 1");
  if (t.zero != 0) bad("has a reserved field that is not zero");
  if (t.type == U8 && (!(t.scale > 0) || !std::isfinite(t.scale) || t.zero_point < 0 || t.zero_point > 255))
    bad("has a scale that is not positive or a zero point outside 0 to 255");
  if (t.type == BF16 && (t.scale != 0 || t.zero_point != 0)) bad("is bf16 and has a scale");
}

void Program::check_array(int index, const char* name, int64_t offset, uint64_t bytes) const {
  if (offset < 0 || offset % 64 || uint64_t(offset) > blob_bytes_ || bytes > blob_bytes_ - uint64_t(offset))
    fail_layer(index, std::string("has ") + name + " outside of the file or not aligned");
}

void Program::check_window(int index) const {
  const Layer& l = layers[size_t(index)];
  const Tensor &in = tensors[size_t(l.input)], &out = tensors[size_t(l.output)];
  if (l.kernel != 1 && l.kernel != 3 && l.kernel != 5) fail_layer(index, "has a kernel of " + text(l.kernel));
  require_range(index, "stride", l.stride, 1, 2);
  require_range(index, "pad_top", l.pad_top, 0, l.kernel / 2);
  require_range(index, "pad_left", l.pad_left, 0, l.kernel / 2);
  auto after = [&](int size, int outputs, int before) { return (outputs - 1) * l.stride + l.kernel - size - before; };
  for (int margin : {after(in.height, out.height, l.pad_top), after(in.width, out.width, l.pad_left)})
    if (margin <= -l.stride || margin > l.kernel / 2)
      fail_layer(index, "makes " + text(out.height) + " x " + text(out.width) + " of " + text(in.height) +
                            " x " + text(in.width) + ", which its kernel, stride and padding do not");
}

// No sum of products may leave 31 bits, before and after its scale.
void Program::check_sums(int index) const {
  const Layer& l = layers[size_t(index)];
  const Tensor &in = tensors[size_t(l.input)], &out = tensors[size_t(l.output)];
  const int64_t length = int64_t(l.kernel) * l.kernel * (l.kind == CONV ? in.channels : 1);
  const int8_t* weights = blob<int8_t>(l.weights);
  const int32_t* bias = blob<int32_t>(l.bias);
  const float* scales = blob<float>(l.scales);
  for (int n = 0; n < out.channels; n++, weights += length) {
    auto is_held = [&](int64_t weight) {
      const int64_t most = std::llabs(int64_t(bias[n])) + 255 * weight;
      return most < (int64_t(1) << 31) && scales[n] >= 0 && double(most) * scales[n] < 2147483648.0;
    };
    // The weights need not be read where even the largest would do.
    if (is_held(128 * length)) continue;
    int64_t total = 0;
    for (int64_t i = 0; i < length; i++) total += weights[i] < 0 ? -weights[i] : weights[i];
    if (!is_held(total))
      fail_layer(index, "has sums in channel " + text(n) + " that may leave 32 bits, or a scale that is no number");
  }
}

void Program::check_layer(int index, std::vector<char>& is_written) const {
  const Layer& l = layers[size_t(index)];
  const int last = int(layers.size()) - 1, num_tensors = int(tensors.size());
  require_range(index, "kind", l.kind, INPUT, CLASSIFIER);
  if ((l.kind == INPUT) != (index == 0)) fail_layer(index, "is an input, and the first layer alone must be");
  if ((l.kind == CLASSIFIER) != (index == last)) fail_layer(index, "is a classifier, and the last layer alone must be");
  for (int64_t value : l.zeros)
    if (value) fail_layer(index, "has a reserved field that is not zero");
  auto require_written = [&](int tensor) {
    require_range(index, "tensor", tensor, 0, num_tensors - 1);
    if (!is_written[size_t(tensor)]) fail_layer(index, "reads tensor " + text(tensor) + " before it is written");
  };
  if (l.kind != INPUT) require_written(l.input);
  else if (l.input != -1) fail_layer(index, "is the input and reads a tensor");
  if (l.residual != -1) require_written(l.residual);
  if (l.kind != CLASSIFIER) {
    require_range(index, "output", l.output, 0, num_tensors - 1);
    if (is_written[size_t(l.output)]) fail_layer(index, "writes tensor " + text(l.output) + " for the second time");
    is_written[size_t(l.output)] = 1;
  }
  const Tensor& in = tensors[size_t(l.kind == INPUT ? l.output : l.input)];
  const Tensor& out = tensors[size_t(l.kind == CLASSIFIER ? l.input : l.output)];
  const bool is_u8 = in.type == U8;
  if (l.kind == CONVERT ? in.type == out.type : in.type != out.type)
    fail_layer(index, "has types of input and output that do not fit its kind");
  if (l.kind != CONV && l.residual != -1) fail_layer(index, "has a residual, which convolutions alone have");
  // Their means are sums of bytes in 32 bits.
  if ((l.kind == SQUEEZE_EXCITE || l.kind == CLASSIFIER) && int64_t(in.height) * in.width > (1 << 22))
    fail_layer(index, "takes the mean of more than 4194304 pixels");
  const uint64_t inputs = uint64_t(in.channels), outputs = uint64_t(out.channels), squeeze = uint64_t(l.squeeze_channels);
  auto same_shape = [&](const Tensor& other) {
    return other.height == out.height && other.width == out.width && other.channels == out.channels;
  };
  switch (l.kind) {
    case INPUT: {
      if (out.channels != 3) fail_layer(index, "makes " + text(out.channels) + " channels, expected 3");
      check_array(index, "scales", l.scales, 12 * 4);
      check_array(index, "table", l.table, 3 * 4);
      for (int i = 0; i < 12; i++)
        if (!std::isfinite(blob<float>(l.scales)[i])) fail_layer(index, "has a multiplier that is no number");
      for (int c = 0; c < 3; c++)
        require_range(index, "padding value", blob<int32_t>(l.table)[c], 0, is_u8 ? 255 : 0);
      break;
    }
    case CONV:
    case DEPTHWISE: {
      check_window(index);
      require_range(index, "activation", l.activation, NONE, RELU6);
      if (l.kind == DEPTHWISE) {
        if (l.kernel == 1 || in.channels != out.channels) fail_layer(index, "is depthwise with a kernel of 1 or other channels");
      }
      const uint64_t length = uint64_t(l.kernel) * uint64_t(l.kernel) * (l.kind == CONV ? inputs : 1);
      if (length > 65536) fail_layer(index, "has more than 65536 products in a sum");
      check_array(index, "weights", l.weights, outputs * length * (is_u8 ? 1 : 2));
      check_array(index, "bias", l.bias, outputs * 4);
      if (l.residual != -1) {
        const Tensor& residual = tensors[size_t(l.residual)];
        if (residual.type != out.type || !same_shape(residual)) fail_layer(index, "adds a residual of another shape or type");
      }
      if (!is_u8) break;
      check_array(index, "scales", l.scales, outputs * 4);
      require_range(index, "fraction_bits", l.fraction_bits, 0, 7);
      require_range(index, "output_offset", l.output_offset, -32767, 32767);
      require_range(index, "residual_multiplier", l.residual_multiplier, 0, 32767);
      if (l.activation != NONE) {
        check_array(index, "table", l.table, 2 * 64 * 2);
        for (int i = 0; i < 128; i++)
          if (blob<int16_t>(l.table)[i] == -32768) fail_layer(index, "has -32768 in its table");
      }
      check_sums(index);
      break;
    }
    case SQUEEZE_EXCITE: {
      if (!same_shape(in)) fail_layer(index, "changes the shape");
      require_range(index, "squeeze_channels", l.squeeze_channels, 1, 4096);
      require_range(index, "shift", l.fraction_bits, 0, 6);
      require_positive(index, "multiplier", l.multiplier);
      require_positive(index, "mean_multiplier", l.mean_multiplier);
      if (is_u8 && l.multiplier > 32767) fail_layer(index, "has a multiplier above 32767");
      check_array(index, "squeeze_weights", l.squeeze_weights, squeeze * inputs * 2);
      check_array(index, "squeeze_bias", l.squeeze_bias, squeeze * 4);
      check_array(index, "excite_weights", l.excite_weights, squeeze * inputs * 2);
      check_array(index, "excite_bias", l.excite_bias, inputs * 4);
      break;
    }
    case CONVERT:
      if (!same_shape(in)) fail_layer(index, "changes the shape");
      require_positive(index, "multiplier", l.multiplier);
      break;
    case CLASSIFIER:
      require_positive(index, "mean_multiplier", l.mean_multiplier);
      check_array(index, "weights", l.weights, uint64_t(num_classes) * inputs * 2);
      check_array(index, "bias", l.bias, uint64_t(num_classes) * 4);
      break;
  }
}

}  // namespace native
