// AMX: tiles of 16 rows x 64 bytes; `tdpbusd` (u8 by s8) and `tdpbf16ps` multiply two of them in 16 cycles (7,140 GOP/s a core from
// registers in int8, half of it in bf16).
//
// A unit is 32 pixels x 32 channels at a time: four tiles of sums, two of pixels, two of weights, so that each loaded tile is used twice.
// Pixels are loaded from the map by their own stride, without im2col.
#include <immintrin.h>

#include "kernels.h"
#include "numerics.h"

namespace native {
namespace {

#include "lanes512.h"
#include "pack.h"
#include "epilogue.h"

// The tiles' numbers are part of the instruction.
#define PRODUCT(sums, pixels, weights)            \
  do {                                            \
    if (IS_BF16) _tile_dpbf16ps(sums, pixels, weights); \
    else _tile_dpbusd(sums, pixels, weights);     \
  } while (0)

struct Products {
  static constexpr bool FINISHES = false;

  // Blocks up to which the epilogue is done between the products of a block, too: at 3 blocks that takes 18 % off, at 15 it adds 4 %.
  static constexpr int SHORT = 4;
  static int steps(const Packed& p) {
    const int blocks = p.layer->kernel * p.row_blocks;
    return blocks <= SHORT ? 2 * blocks : blocks;
  }

  template <bool IS_BF16, class Pending>
  static inline __attribute__((always_inline)) void compute(const Packed& p, const uint8_t* from, int64_t pixel, int64_t kernel_row, int count,
                                                            const uint8_t* weights, const int32_t* bias, int32_t* sums, Pending& pending) {
    const int kernel = p.layer->kernel, blocks = p.row_blocks;
    const bool is_short = kernel * blocks <= SHORT;
    // A tile load with stride 0 is the same row sixteen times.
    _tile_loadd(0, bias, 0);
    _tile_loadd(1, bias + 16, 0);
    if (count > 16) {
      _tile_loadd(2, bias, 0);
      _tile_loadd(3, bias + 16, 0);
      for (int ky = 0; ky < kernel; ky++) {
        const uint8_t* in = from + ky * kernel_row;
        for (int b = 0; b < blocks; b++, in += 64, weights += 2048) {
          _tile_loadd(4, in, pixel);
          _tile_loadd(6, weights, 64);
          PRODUCT(0, 4, 6);
          _tile_loadd(7, weights + 1024, 64);
          PRODUCT(1, 4, 7);
          if (is_short) pending.step();
          _tile_loadd(5, in + 16 * pixel, pixel);
          PRODUCT(2, 5, 6);
          PRODUCT(3, 5, 7);
          pending.step();
        }
      }
      _tile_stored(2, sums + 16 * CONV_GROUP, CONV_GROUP * 4);
      _tile_stored(3, sums + 16 * CONV_GROUP + 16, CONV_GROUP * 4);
    } else {
      for (int ky = 0; ky < kernel; ky++) {
        const uint8_t* in = from + ky * kernel_row;
        for (int b = 0; b < blocks; b++, in += 64, weights += 2048) {
          _tile_loadd(4, in, pixel);
          _tile_loadd(6, weights, 64);
          PRODUCT(0, 4, 6);
          _tile_loadd(7, weights + 1024, 64);
          PRODUCT(1, 4, 7);
          pending.step();
        }
      }
    }
    _tile_stored(0, sums, CONV_GROUP * 4);
    _tile_stored(1, sums + 16, CONV_GROUP * 4);
  }
};

#include "conv.h"
#include "depthwise512.h"
#include "depthwise_bf16.h"
#include "steps.h"
#include "peak.h"

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void enter() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}

// The tiles' 8 KB are no part of a thread that sleeps.
void leave() { _tile_release(); }

}  // namespace

const Kernels AMX = {"amx", true, 64, packed_bytes, pack, scratch_bytes, run, needs, enter, leave, peak};

}  // namespace native
