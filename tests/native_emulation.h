// Instructions that this processor may lack, as loops: `vpdpbusd`, `vdpbf16ps`, and the tiles of AMX. Put in front of a file of kernels by
// tests/test_native_sanitizers.py, which compiles it without these instruction sets, so that every level is tested on a processor with AVX-512.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Threads whose tiles are configured now: none may be left when the program ends.
void count_tiles(int change);

namespace {
namespace emulated {

// Four products of u8 by s8 and their sum, modulo 2^32.
inline int32_t dot4(int32_t sum, const uint8_t* bytes, const int8_t* weights) {
  uint32_t total = uint32_t(sum);
  for (int i = 0; i < 4; i++) total += uint32_t(int32_t(bytes[i]) * weights[i]);
  return int32_t(total);
}

inline float widen(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// To nearest even; of what is no number, one that stays none.
inline uint16_t narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float dot2(float sum, const uint16_t* a, const uint16_t* b) {
  return std::fma(widen(a[0]), widen(b[0]), std::fma(widen(a[1]), widen(b[1]), sum));
}

template <class V>
inline V dpbusd(V sums, V bytes, V weights) {
  int32_t s[sizeof(V) / 4];
  uint8_t b[sizeof(V)];
  int8_t w[sizeof(V)];
  memcpy(s, &sums, sizeof s);
  memcpy(b, &bytes, sizeof b);
  memcpy(w, &weights, sizeof w);
  for (size_t i = 0; i < sizeof(V) / 4; i++) s[i] = dot4(s[i], b + 4 * i, w + 4 * i);
  memcpy(&sums, s, sizeof s);
  return sums;
}

#ifdef EMULATES_BF16
template <class Pairs>
inline __m512 dpbf16(__m512 sums, Pairs left, Pairs right) {
  float s[16];
  uint16_t a[32], b[32];
  memcpy(s, &sums, sizeof s);
  memcpy(a, &left, sizeof a);
  memcpy(b, &right, sizeof b);
  for (int i = 0; i < 16; i++) s[i] = dot2(s[i], a + 2 * i, b + 2 * i);
  memcpy(&sums, s, sizeof s);
  return sums;
}

inline __m256i to_bf16(__m512 values) {
  float from[16];
  uint16_t to[16];
  memcpy(from, &values, sizeof from);
  for (int i = 0; i < 16; i++) to[i] = narrow(from[i]);
  __m256i words;
  memcpy(&words, to, sizeof to);
  return words;
}
#endif

// All tiles are 16 rows of 64 bytes, as the kernels configure them.
struct Tiles {
  uint8_t of[8][16][64];
  bool are_configured;
};
thread_local Tiles tiles;

inline uint8_t (*tile(int number))[64] {
  if (!tiles.are_configured) {
    fprintf(stderr, "a tile is used that is not configured\n");
    abort();
  }
  return tiles.of[number];
}

inline void configure(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  for (int i = 0; i < 8; i++)
    if (bytes[0] != 1 || bytes[16 + 2 * i] != 64 || bytes[17 + 2 * i] != 0 || bytes[48 + i] != 16) abort();
  if (!tiles.are_configured) count_tiles(1);
  tiles.are_configured = true;
  memset(tiles.of, 0, sizeof tiles.of);
}

inline void release() {
  if (tiles.are_configured) count_tiles(-1);
  tiles.are_configured = false;
}

inline void load(int number, const void* from, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy(tile(number)[r], static_cast<const char*>(from) + r * stride, 64);
}

inline void store(int number, void* to, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy(static_cast<char*>(to) + r * stride, tile(number)[r], 64);
}

// Row m, word n of the sums gets the products of row m with what stands in column n of all sixteen rows.
template <class Sum, class Left, class Right, class Dot>
inline void multiply(int sums, int left, int right, const Dot& dot) {
  for (int m = 0; m < 16; m++) {
    Sum row[16];
    Left a[64 / sizeof(Left)];
    memcpy(row, tile(sums)[m], 64);
    memcpy(a, tile(left)[m], 64);
    for (int k = 0; k < 16; k++) {
      Right b[64 / sizeof(Right)];
      memcpy(b, tile(right)[k], 64);
      for (size_t n = 0; n < 16; n++) row[n] = dot(row[n], a + size_t(k) * 4 / sizeof(Left), b + n * 4 / sizeof(Right));
    }
    memcpy(tile(sums)[m], row, 64);
  }
}

}  // namespace emulated
}  // namespace

#define _mm256_dpbusd_avx_epi32(sums, bytes, weights) emulated::dpbusd(sums, bytes, weights)
#define _mm512_dpbusd_epi32(sums, bytes, weights) emulated::dpbusd(sums, bytes, weights)

#ifdef EMULATES_BF16
#define __AVX512BF16__ 1
#define _mm512_dpbf16_ps(sums, left, right) emulated::dpbf16(sums, left, right)
#define _mm512_cvtneps_pbh(values) emulated::to_bf16(values)
#endif

#ifdef EMULATES_TILES
#define __AMX_TILE__ 1
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_release() emulated::release()
#define _tile_zero(number) memset(emulated::tile(number), 0, 1024)
#define _tile_loadd(number, from, stride) emulated::load(number, from, int64_t(stride))
#define _tile_stored(number, to, stride) emulated::store(number, to, int64_t(stride))
#define _tile_dpbusd(sums, left, right) emulated::multiply<int32_t, uint8_t, int8_t>(sums, left, right, emulated::dot4)
#define _tile_dpbf16ps(sums, left, right) emulated::multiply<float, uint16_t, uint16_t>(sums, left, right, emulated::dot2)
#endif
