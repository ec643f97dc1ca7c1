// AVX-512 VNNI with BF16 and VBMI: `vpdpbusd` and `vdpbf16ps` on 64 bytes (Intel from Sapphire Rapids, AMD from Zen 4).
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

const Kernels AVX512_BF16 = {"avx512_bf16", true, 4, packed_bytes, pack, scratch_bytes, run, needs, [] {}, [] {}, peak};

}  // namespace native
