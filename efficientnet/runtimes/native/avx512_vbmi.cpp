// AVX-512 VNNI with VBMI, whose look-ups of bytes make activations cheaper (Intel from Ice Lake); bf16 in float products.
#include <immintrin.h>

#include "kernels.h"
#include "numerics.h"

namespace native {
namespace {

#include "lanes512.h"
#include "pack.h"
#include "epilogue.h"
#include "dot.h"
#include "conv.h"
#include "depthwise512.h"
#include "depthwise_bf16.h"
#include "steps.h"
#include "peak.h"

}  // namespace

const Kernels AVX512_VBMI = {"avx512_vbmi", true, 4, packed_bytes, pack, scratch_bytes, run, needs, [] {}, [] {}, peak};

}  // namespace native
