// AVX-512 VNNI: `vpdpbusd` on 64 bytes (Intel from Ice Lake, AMD from Zen 4).
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
#include "depthwise.h"
#include "steps.h"

static void run_convert(const Step&, const Call&) {}

}  // namespace

const Kernels AVX512_VNNI = {"avx512_vnni", true, packed_bytes, pack, scratch_bytes, run, [] {}, [] {}};

}  // namespace native
