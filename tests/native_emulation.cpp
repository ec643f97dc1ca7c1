// In the place of levels.cpp, where instructions are emulated: every level whose other instructions this processor has.
#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "levels.h"

namespace {

struct Tiles {
  std::atomic<int> in_use{0};
  ~Tiles() {
    if (in_use == 0) return;
    fprintf(stderr, "threads whose tiles were not released: %d\n", in_use.load());
    abort();
  }
} tiles;

}  // namespace

void count_tiles(int change) { tiles.in_use += change; }

namespace native {

const std::vector<const Kernels*>& levels() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> list;
    const bool has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl");
    if (has_512 && __builtin_cpu_supports("avx512vbmi")) list = {&AMX, &AVX512_BF16, &AVX512_VBMI};
    if (has_512) list.push_back(&AVX512_VNNI);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(&AVX_VNNI);
    list.push_back(&PORTABLE);
    return list;
  }();
  return found;
}

}  // namespace native
