// AVX-512 registers as the kernels see them: 64 bytes, 32 values of 16 bits, 16 sums. Included inside each file's own namespace.
#pragma once

struct Lanes {
  using V = __m512i;
  using F = __m512;
  static constexpr int BYTES = 64;
  static constexpr int WORDS = 16;  // sums of 32 bits

  static V zero() { return _mm512_setzero_si512(); }
  static V load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, V v) { _mm512_storeu_si512(p, v); }
  static F loadf(const float* p) { return _mm512_loadu_ps(p); }
  static V broadcast32(const void* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }
  static V set16(int value) { return _mm512_set1_epi16(short(value)); }
  // acc += four bytes without sign times four with, in each lane of 32 bits.
  static V dot(V acc, V bytes, V weights) { return _mm512_dpbusd_epi32(acc, bytes, weights); }
  // Sums times scale, rounded.
  static V scaled(V sums, F scale) { return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale)); }

  static V pack32(V a, V b) { return _mm512_packs_epi32(a, b); }
  static V pack16(V a, V b) { return _mm512_packus_epi16(a, b); }
  static V adds16(V a, V b) { return _mm512_adds_epi16(a, b); }
  static V sub16(V a, V b) { return _mm512_sub_epi16(a, b); }
  static V mulhrs16(V a, V b) { return _mm512_mulhrs_epi16(a, b); }
  static V add16(V a, V b) { return _mm512_add_epi16(a, b); }
  static V add32(V a, V b) { return _mm512_add_epi32(a, b); }
  static V low8(V a, V b) { return _mm512_unpacklo_epi8(a, b); }
  static V high8(V a, V b) { return _mm512_unpackhi_epi8(a, b); }
  static V low16(V a, V b) { return _mm512_unpacklo_epi16(a, b); }
  static V high16(V a, V b) { return _mm512_unpackhi_epi16(a, b); }
  static V half16(V a) { return _mm512_srli_epi16(a, 1); }

  struct Shift {
    V count;
    explicit Shift(int bits) : count(_mm512_set1_epi16(short(bits))) {}
    V right(V v) const { return _mm512_srav_epi16(v, count); }
    V left(V v) const { return _mm512_sllv_epi16(v, count); }
  };

  // 64 linear pieces of 1024, numbered by a word's upper six bits.
#ifdef __AVX512VBMI__
  // Lookups of bytes take one instruction each for 64 entries (of words three for 32 lanes): the table's low and high bytes stand apart.
  struct Table {
    V slope_low, slope_high, offset_low, offset_high;
    explicit Table(const int16_t* t) {
      alignas(64) uint8_t bytes[4][64];
      for (int i = 0; i < 64; i++) {
        bytes[0][i] = uint8_t(t[i]);
        bytes[1][i] = uint8_t(t[i] >> 8);
        bytes[2][i] = uint8_t(t[64 + i]);
        bytes[3][i] = uint8_t(t[64 + i] >> 8);
      }
      slope_low = load(bytes[0]);
      slope_high = load(bytes[1]);
      offset_low = load(bytes[2]);
      offset_high = load(bytes[3]);
    }
    V at(V x) const {
      // Both bytes of a word get its bits from 10 on; a lookup takes the lower six of each.
      const V i = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x3a3a2a2a1a1a0a0a), x);
      constexpr __mmask64 UPPER = 0xaaaaaaaaaaaaaaaa;
      const V slope = _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(i, slope_low), UPPER, i, slope_high);
      const V offset = _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(i, offset_low), UPPER, i, offset_high);
      return adds16(mulhrs16(x, slope), offset);
    }
  };
#else
  struct Table {
    V slope0, slope1, offset0, offset1;
    explicit Table(const int16_t* t) : slope0(load(t)), slope1(load(t + 32)), offset0(load(t + 64)), offset1(load(t + 96)) {}
    V at(V x) const {
      const V i = _mm512_srai_epi16(x, 10);
      const V slope = _mm512_permutex2var_epi16(slope0, i, slope1), offset = _mm512_permutex2var_epi16(offset0, i, offset1);
      return adds16(mulhrs16(x, slope), offset);
    }
  };
#endif

  // Which of the first bytes of a register are stored.
  struct Mask {
    __mmask64 bits;
    explicit Mask(int count) : bits(count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1) {}
  };
  static void store(void* p, Mask m, V v) { _mm512_mask_storeu_epi8(p, m.bits, v); }
  // Of the first 32 bytes: a store of 64 would reach into the next line, masked or not.
  static void store_half(void* p, Mask m, V v) { _mm256_mask_storeu_epi8(p, __mmask32(m.bits), _mm512_castsi512_si256(v)); }
  // From a byte (a multiple of 8) on, the first ones behind the last.
  static V from_byte(V v, int byte) {
    return _mm512_permutexvar_epi64(_mm512_add_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(byte / 8)), v);
  }
  static V both(V a, V b) { return _mm512_and_si512(a, b); }
  static V load(const void* p, Mask m) { return _mm512_maskz_loadu_epi8(m.bits, p); }

  // Two rows of 32 bytes in the order that packing leaves them in (eight of one, eight of the other), and back.
  static void store_pair(void* p0, void* p1, Mask m, V v) {
    v = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), v);
    if (__mmask32(m.bits) == 0xffffffff) {
      _mm256_storeu_si256(static_cast<__m256i*>(p0), _mm512_castsi512_si256(v));
      _mm256_storeu_si256(static_cast<__m256i*>(p1), _mm512_extracti64x4_epi64(v, 1));
      return;
    }
    _mm256_mask_storeu_epi8(p0, __mmask32(m.bits), _mm512_castsi512_si256(v));
    _mm256_mask_storeu_epi8(p1, __mmask32(m.bits), _mm512_extracti64x4_epi64(v, 1));
  }
  static V load_pair(const void* p0, const void* p1, Mask m) {
    const __m256i a = _mm256_maskz_loadu_epi8(__mmask32(m.bits), p0), b = _mm256_maskz_loadu_epi8(__mmask32(m.bits), p1);
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
  }

  // Four rows of 16 bytes in the order that packing leaves them in (four of each, four times), and back: a square turned over.
  static V turned(V v) { return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v); }
  static void store_four(void* const* to, int count, Mask m, V v) {
    v = turned(v);
    _mm_mask_storeu_epi8(to[0], __mmask16(m.bits), _mm512_castsi512_si128(v));
    if (count > 1) _mm_mask_storeu_epi8(to[1], __mmask16(m.bits), _mm512_extracti32x4_epi32(v, 1));
    if (count > 2) _mm_mask_storeu_epi8(to[2], __mmask16(m.bits), _mm512_extracti32x4_epi32(v, 2));
    if (count > 3) _mm_mask_storeu_epi8(to[3], __mmask16(m.bits), _mm512_extracti32x4_epi32(v, 3));
  }
  static V load_four(const void* const* from, Mask m) {
    const __mmask16 bits = __mmask16(m.bits);
    V v = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(bits, from[0]));
    v = _mm512_inserti32x4(v, _mm_maskz_loadu_epi8(bits, from[1]), 1);
    v = _mm512_inserti32x4(v, _mm_maskz_loadu_epi8(bits, from[2]), 2);
    return turned(_mm512_inserti32x4(v, _mm_maskz_loadu_epi8(bits, from[3]), 3));
  }

  // Three planes of floats -> u8 pixels of four bytes, the fourth zero.
  static void pixels(const float* red, const float* green, const float* blue, int count, const float* scales, uint8_t* to) {
    auto quantized = [&](const float* from, __mmask16 m, int c) {
      __m512 v = _mm512_add_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(m, from), _mm512_set1_ps(scales[c])), _mm512_set1_ps(scales[3 + c]));
      // What is no number becomes the second operand of max.
      v = _mm512_min_ps(_mm512_max_ps(v, _mm512_setzero_ps()), _mm512_set1_ps(255.0f));
      return _mm512_cvtps_epi32(v);
    };
    for (int x = 0; x < count; x += 16) {
      const __mmask16 m = count - x >= 16 ? __mmask16(0xffff) : __mmask16((1u << (count - x)) - 1);
      const V r = quantized(red + x, m, 0), g = quantized(green + x, m, 1), b = quantized(blue + x, m, 2);
      const V words = _mm512_or_si512(r, _mm512_or_si512(_mm512_slli_epi32(g, 8), _mm512_slli_epi32(b, 16)));
      _mm512_mask_storeu_epi32(to + x * 4, m, words);
    }
  }

  // Floats, of bf16 maps.
  static F zerof() { return _mm512_setzero_ps(); }
  static F setf(float value) { return _mm512_set1_ps(value); }
  static F addf(F a, F b) { return _mm512_add_ps(a, b); }
  static F subf(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mulf(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F minf(F a, F b) { return _mm512_min_ps(a, b); }
  static F maxf(F a, F b) { return _mm512_max_ps(a, b); }
  static void storef(float* p, F v) { _mm512_storeu_ps(p, v); }
  // To 14 bits, of which bf16 keeps 8.
  static F reciprocal(F v) { return _mm512_rcp14_ps(v); }
  // value * 2^exponent, for the whole number in the low bits of `exponent`.
  static F raise(F value, F exponent) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), _mm512_slli_epi32(_mm512_castps_si512(exponent), 23)));
  }
  // Sixteen bf16 as floats.
  static F widen(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16));
  }
  // The first `count` of sixteen floats as bf16.
  static void narrow(void* p, int count, F v) {
#ifdef __AVX512BF16__
    const __m256i words = (__m256i)_mm512_cvtneps_pbh(v);
#else
    const V bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
#endif
    if (count >= 16) _mm256_storeu_si256(static_cast<__m256i*>(p), words);
    else _mm256_mask_storeu_epi16(p, __mmask16(count <= 0 ? 0 : (1u << count) - 1), words);
  }
  // acc += two bf16 times two, in each lane.
  static F dot_bf16(F acc, V pairs, V weights) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)pairs, (__m512bh)weights);
#else
    const V high = _mm512_set1_epi32(int(0xffff0000));
    acc = fma(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)), acc);
    return fma(_mm512_castsi512_ps(_mm512_and_si512(pairs, high)), _mm512_castsi512_ps(_mm512_and_si512(weights, high)), acc);
#endif
  }
  static V bits(F v) { return _mm512_castps_si512(v); }
  static F floats(V v) { return _mm512_castsi512_ps(v); }
  // Bytes of a map as floats, and floats as bytes.
  static F bytes_to_floats(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
};
