// AVX-512 VNNI: `vpdpbusd` on 64 bytes (Intel from Cascade Lake); bf16 in float products, as there is no `vdpbf16ps`.
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

const Kernels AVX512_VNNI = {"avx512_vnni", true, 4, packed_bytes, pack, scratch_bytes, run, needs, [] {}, [] {}, peak};

}  // namespace native
