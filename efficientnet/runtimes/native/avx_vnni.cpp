// AVX-VNNI: `vpdpbusd` on 32 bytes (Intel's processors for clients from Alder Lake, AMD from Zen 5).
#include <immintrin.h>

#include "kernels.h"
#include "numerics.h"

namespace native {
namespace {

#include "lanes256.h"
#include "pack.h"
#include "epilogue.h"
#include "dot.h"
#include "conv.h"
#include "depthwise.h"
#include "depthwise_bf16.h"
#include "steps.h"
#include "peak.h"

}  // namespace

const Kernels AVX_VNNI = {"avx_vnni", true, 4, packed_bytes, pack, scratch_bytes, run, needs, [] {}, [] {}, peak};

}  // namespace native
