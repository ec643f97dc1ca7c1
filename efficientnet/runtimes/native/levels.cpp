// Asks cpuid what the processor has, XCR0 what the system saves of its registers, and Linux for the tiles' state.
#include "levels.h"

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace native {

#ifdef __x86_64__
namespace {

struct Features {
  bool avx2 = false, avx_vnni = false, avx512 = false, avx512_vnni = false, avx512_vbmi = false, avx512_bf16 = false, amx = false;
  Features();
};

bool bit(unsigned word, int index) { return word >> index & 1; }

// Linux gives a process the tiles' 8 KB of state only when it asks (ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool ask_for_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

Features::Features() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return;
  const bool fma = bit(c, 12);
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool saves_256 = (low & 0x6) == 0x6, saves_512 = (low & 0xe6) == 0xe6, saves_tiles = (low & 0x60000) == 0x60000;
  unsigned b7, c7, d7, a71 = 0;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  avx2 = saves_256 && bit(b7, 5) && fma;
  avx_vnni = avx2 && bit(a71, 4);
  // F, DQ, BW and VL.
  avx512 = avx2 && saves_512 && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);
  avx512_vnni = avx512 && bit(c7, 11);
  avx512_vbmi = avx512_vnni && bit(c7, 1);
  avx512_bf16 = avx512_vbmi && bit(a71, 5);
  amx = avx512_bf16 && saves_tiles && bit(d7, 22) && bit(d7, 24) && bit(d7, 25) && ask_for_tiles();
}

const Features& features() {
  static const Features found;
  return found;
}

}  // namespace
#endif

const std::vector<const Kernels*>& levels() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> list;
#ifdef __x86_64__
    if (features().amx) list.push_back(&AMX);
    if (features().avx512_bf16) list.push_back(&AVX512_BF16);
    if (features().avx512_vbmi) list.push_back(&AVX512_VBMI);
    if (features().avx512_vnni) list.push_back(&AVX512_VNNI);
    if (features().avx_vnni) list.push_back(&AVX_VNNI);
#endif
    list.push_back(&PORTABLE);
    return list;
  }();
  return found;
}

}  // namespace native
