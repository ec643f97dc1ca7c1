// What a set of kernels is given and what it offers: the steps of a plan, the maps in the arena, and one function that runs a
// thread's part of a step. Every file of kernels (portable, AMX, AVX-512, AVX-VNNI) exports one `Kernels`.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

#include "program.h"

namespace native {

// Output channels of a convolution that are computed together: two tiles. Their weights for a 3x3 of 48 to 64 channels are 18 KB,
// which stay in L1 while the pixels pass.
constexpr int CONV_GROUP = 32;

// Channels of a depthwise convolution that are computed together: 64 bytes of u8, the widest register and a line of the cache.
constexpr int GROUP = 64;

// Kernels read past the end of a map: up to this many pixels that are not used, and in the last pixel values that meet weights of zero.
constexpr size_t SLACK_PIXELS = 64, SLACK = 4096;

// A map in the arena, channels last. `halo` pixels of padding stand above, below and left of it; the right one of a row is
// the left one of the next.
struct Map {
  int height = 0, width = 0, channels = 0, halo = 0;
  bool is_bf16 = false;
  int zero_point = 0;
  bool has_padding = false;   // the input's differs by channel
  int32_t padding[3] = {};
  size_t pixel_bytes = 0, row_bytes = 0;
  size_t start = 0;  // of pixel (0, 0) in the arena
  bool is_contiguous() const { return row_bytes == size_t(width) * pixel_bytes; }
  size_t bytes() const { return size_t(height + 2 * halo) * row_bytes + size_t(halo) * pixel_bytes + 128; }
  size_t start_in_block() const { return size_t(halo) * (row_bytes + pixel_bytes); }
};

// Weights as the kernels want them.
struct Packed {
  const Layer* layer = nullptr;
  int inputs = 0, outputs = 0, groups = 0;
  bool is_bf16 = false;
  int row_words = 0;           // words of four bytes in a kernel row
  int row_blocks = 0;          // blocks of 64 bytes
  const uint8_t* weights = nullptr;
  size_t group_bytes = 0;      // of a group's weights
  const uint8_t* bias = nullptr;  // i32 or f32 of all groups, in the order of the sums
  const float* scales = nullptr;  // f32, the same
  const int16_t* table = nullptr;
  bool is_ramp = false;        // whether one line of slope and offset, clamped to a byte, gives what the table gives: ReLU6
  int16_t slope = 0, offset = 0;
};

struct Step {
  Kind kind = INPUT;
  int layer = 0;               // the last of the file's layers that it computes
  const Layer* main = nullptr;
  Packed packed;               // of convolution or depthwise
  Packed expand, project;      // computed with it; layer == nullptr: none
  Map in, out, residual;       // of all that is computed together
  Map seen;                    // by a depthwise convolution: what is expanded of `in`, of which no map is made, or `in` itself
  bool has_residual = false;
  int expanded = 0;            // channels between a convolution and its projection
  bool keeps_sums = false;     // depthwise and head: its outputs' sums are kept, and the head writes no map
  int sums_units = 0;          // squeeze-excite and classifier: units a group's sums were split in; 0: not summed yet
  int sums_group = 0;          // channels of such a group
  int phases = 1;              // a barrier follows each
  int first_phase = 0;
  const Program* program = nullptr;
};

// Weights that a later step needs: they come from L3 or memory at each call, a few lines at a time while others are worked with.
struct Prefetch {
  struct Range {
    const uint8_t *at, *end;
  };
  Range ranges[4];
  int count = 0;

  void add(const uint8_t* start, size_t bytes) {
    if (count < 4 && bytes) ranges[count++] = {start, start + bytes};
  }
  inline __attribute__((always_inline)) void take(int lines) {
    if (!count) return;
    Range& range = ranges[count - 1];
    for (int i = 0; i < lines; i++, range.at += 64) __builtin_prefetch(range.at, 0, 2);
    if (range.at >= range.end) count--;
  }
};

// What a call's thread works on. Threads of a team share all but `scratch`.
struct Call {
  uint8_t* arena;
  const void* image;
  bool is_pixels;
  float* logits;
  int32_t* sums;   // [parts][sums_stride]
  size_t sums_stride;
  float* hidden;   // [4096]
  float* means;    // [parts][sums_stride]
  uint8_t* scratch;
  Prefetch* prefetch;
  int part, parts;
};

struct Kernels {
  const char* name;
  bool fuses;
  int block_bytes;  // of a kernel row that are multiplied at once
  size_t (*packed_bytes)(const Program& program, const Layer& layer, const Map& in, const Map& out);
  void (*pack)(const Program& program, const Layer& layer, const Map& in, const Map& out, uint8_t* to, Packed& packed);
  size_t (*scratch_bytes)(const Step& step);
  void (*run)(const Step& step, int phase, const Call& call);
  void (*needs)(const Step& step, int part, int parts, Prefetch& prefetch);  // the weights that a part of a step reads
  void (*enter)();  // before a thread's first step of a call
  void (*leave)();  // after its last
  int64_t (*peak)(int what, int64_t times);  // of this thread; none of the portable kernels
};

// Work is numbered group by group, `units` in each (rows, or runs of pixels); a thread takes a contiguous part of it.
static inline int64_t share_start(int64_t total, int part, int parts) { return total * part / parts; }

// Pixels of a run of a 1x1 convolution.
constexpr int RUN = 32;

extern const Kernels PORTABLE;
#ifdef __x86_64__
extern const Kernels AMX, AVX512_BF16, AVX512_VBMI, AVX512_VNNI, AVX_VNNI;
#endif

}  // namespace native
