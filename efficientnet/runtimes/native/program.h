// The bytes of a program file -> its tables, checked: every offset, shape, range and order that the kernels rely on.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace native {

// What is wrong, as the caller is told it.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum Kind : int32_t { INPUT, CONV, DEPTHWISE, SQUEEZE_EXCITE, CONVERT, CLASSIFIER };
enum Type : int32_t { U8, BF16 };
enum Activation : int32_t { NONE, SILU, RELU6 };

// The records of the file, as docs/native.md lists them.
struct Tensor {
  int32_t height, width, channels, type;
  float scale;
  int32_t zero_point;
  int64_t zero;
  size_t value_bytes() const { return type == BF16 ? 2 : 1; }
};
static_assert(sizeof(Tensor) == 32);

struct Layer {
  int32_t kind, input, residual, output;
  int32_t kernel, stride, pad_top, pad_left;
  int32_t activation, fraction_bits, output_offset, residual_multiplier;
  int32_t squeeze_channels;
  float multiplier, mean_multiplier;
  int32_t zero;
  int64_t weights, bias, scales, table;
  int64_t squeeze_weights, squeeze_bias, excite_weights, excite_bias;
  int64_t zeros[4];
};
static_assert(sizeof(Layer) == 160);

class Program {
 public:
  // Checks a file's bytes; throws Error before any of them is used. They are the caller's, and copied if they are to be kept.
  // `takes`: they are private pages, which may be given back.
  Program(const void* file, size_t file_bytes, bool keeps, bool takes);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  template <class T>
  const T* blob(int64_t offset) const {
    return reinterpret_cast<const T*>(blob_ + offset);
  }
  // Gives the pages in front of an offset into the blob back, if they were taken.
  void release(int64_t offset);
  int64_t blob_bytes() const { return int64_t(blob_bytes_); }

  std::vector<Tensor> tensors;
  std::vector<Layer> layers;
  int num_classes = 0;

 private:
  void read_tables();
  void check_tensor(int index) const;
  void check_layer(int index, std::vector<char>& is_written) const;
  void check_window(int index) const;
  void check_sums(int index) const;
  void check_array(int index, const char* name, int64_t offset, uint64_t bytes) const;

  std::vector<char> own_;
  const char* file_;
  size_t file_bytes_;
  const char* blob_ = nullptr;
  uint64_t blob_bytes_ = 0;
  bool takes_;
  uintptr_t released_;  // up to here
};

}  // namespace native
