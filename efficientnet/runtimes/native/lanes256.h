// AVX2 registers with AVX-VNNI as the kernels see them: 32 bytes, 16 values of 16 bits, 8 sums. Included inside a file's own namespace.

struct Lanes {
  using V = __m256i;
  using F = __m256;
  static constexpr int BYTES = 32;
  static constexpr int WORDS = 8;

  static V zero() { return _mm256_setzero_si256(); }
  static V load(const void* p) { return _mm256_loadu_si256(static_cast<const V*>(p)); }
  static void store(void* p, V v) { _mm256_storeu_si256(static_cast<V*>(p), v); }
  static F loadf(const float* p) { return _mm256_loadu_ps(p); }
  static V broadcast32(const void* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }
  static V set16(int value) { return _mm256_set1_epi16(short(value)); }
  static V dot(V acc, V bytes, V weights) { return _mm256_dpbusd_avx_epi32(acc, bytes, weights); }
  static V scaled(V sums, F scale) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(sums), scale)); }

  static V pack32(V a, V b) { return _mm256_packs_epi32(a, b); }
  static V pack16(V a, V b) { return _mm256_packus_epi16(a, b); }
  static V adds16(V a, V b) { return _mm256_adds_epi16(a, b); }
  static V sub16(V a, V b) { return _mm256_sub_epi16(a, b); }
  static V mulhrs16(V a, V b) { return _mm256_mulhrs_epi16(a, b); }
  static V add16(V a, V b) { return _mm256_add_epi16(a, b); }
  static V low8(V a, V b) { return _mm256_unpacklo_epi8(a, b); }
  static V high8(V a, V b) { return _mm256_unpackhi_epi8(a, b); }
  static V low16(V a, V b) { return _mm256_unpacklo_epi16(a, b); }
  static V high16(V a, V b) { return _mm256_unpackhi_epi16(a, b); }
  static V half16(V a) { return _mm256_srli_epi16(a, 1); }

  struct Shift {
    __m128i count;
    explicit Shift(int bits) : count(_mm_cvtsi32_si128(bits)) {}
    V right(V v) const { return _mm256_sra_epi16(v, count); }
    V left(V v) const { return _mm256_sll_epi16(v, count); }
  };

  // 64 linear pieces. Without a lookup of words across registers they are gathered, slope and offset side by side.
  struct Table {
    alignas(64) int32_t pieces[64];
    explicit Table(const int16_t* t) {
      for (int i = 0; i < 64; i++) pieces[i] = int32_t(uint16_t(t[i])) | int32_t(uint32_t(uint16_t(t[64 + i])) << 16);
    }
    V at(V x) const {
      const V i = _mm256_and_si256(_mm256_srai_epi16(x, 10), _mm256_set1_epi16(63));
      // Words of even and of odd lanes.
      const V even = _mm256_i32gather_epi32(pieces, _mm256_and_si256(i, _mm256_set1_epi32(0xffff)), 4);
      const V odd = _mm256_i32gather_epi32(pieces, _mm256_srli_epi32(i, 16), 4);
      const V slope = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
      const V offset = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
      return adds16(mulhrs16(x, slope), offset);
    }
  };

  struct Mask {
    int count;
    explicit Mask(int bytes) : count(bytes >= 32 ? 32 : bytes < 0 ? 0 : bytes) {}
  };
  static void store(void* p, Mask m, V v) {
    if (m.count == 32) return store(p, v);
    alignas(32) uint8_t bytes[32];
    store(bytes, v);
    __builtin_memcpy(p, bytes, size_t(m.count));
  }
  // From a byte (a multiple of 4) on, the first ones behind the last.
  static V from_byte(V v, int byte) {
    return _mm256_permutevar8x32_epi32(v, _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(byte / 4)));
  }
  static V both(V a, V b) { return _mm256_and_si256(a, b); }
  static V load(const void* p, Mask m) {
    if (m.count == 32) return load(p);
    alignas(32) uint8_t bytes[32] = {};
    __builtin_memcpy(bytes, p, size_t(m.count));
    return load(bytes);
  }

  // A row of 32 bytes in the order that packing leaves it in.
  static void store_pair(void* p, void*, Mask m, V v) { store(p, m, _mm256_permute4x64_epi64(v, 0xd8)); }
  static V load_pair(const void* p, const void*, Mask m) { return _mm256_permute4x64_epi64(load(p, m), 0xd8); }

  static void pixels(const float* red, const float* green, const float* blue, int count, const float* scales, uint8_t* to) {
    const float* planes[3] = {red, green, blue};
    int x = 0;
    for (; x + 8 <= count; x += 8) {
      V words = zero();
      for (int c = 0; c < 3; c++) {
        F v = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(planes[c] + x), _mm256_set1_ps(scales[c])), _mm256_set1_ps(scales[3 + c]));
        v = _mm256_min_ps(_mm256_max_ps(v, _mm256_setzero_ps()), _mm256_set1_ps(255.0f));
        words = _mm256_or_si256(words, _mm256_slli_epi32(_mm256_cvtps_epi32(v), c * 8));
      }
      store(to + x * 4, words);
    }
    for (; x < count; x++) {
      for (int c = 0; c < 3; c++) {
        const float scaled = planes[c][x] * scales[c];
        to[x * 4 + c] = sat8(rint32(scaled + scales[3 + c]));
      }
      to[x * 4 + 3] = 0;
    }
  }

  // Floats, of bf16 maps.
  static F zerof() { return _mm256_setzero_ps(); }
  static F setf(float value) { return _mm256_set1_ps(value); }
  static F addf(F a, F b) { return _mm256_add_ps(a, b); }
  static F subf(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mulf(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F minf(F a, F b) { return _mm256_min_ps(a, b); }
  static F maxf(F a, F b) { return _mm256_max_ps(a, b); }
  static void storef(float* p, F v) { _mm256_storeu_ps(p, v); }
  // To 12 bits, of which bf16 keeps 8.
  static F reciprocal(F v) { return _mm256_rcp_ps(v); }
  // value * 2^exponent, for the whole number in the low bits of `exponent`.
  static F raise(F value, F exponent) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), _mm256_slli_epi32(_mm256_castps_si256(exponent), 23)));
  }
  // Eight bf16 as floats.
  static F widen(const void* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16));
  }
  // The first `count` of eight floats as bf16.
  static void narrow(void* p, int count, F v) {
    const V bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const V words = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m128i packed = _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0xd8));
    if (count >= 8) {
      _mm_storeu_si128(static_cast<__m128i*>(p), packed);
    } else if (count > 0) {
      alignas(16) uint16_t values[8];
      _mm_store_si128(reinterpret_cast<__m128i*>(values), packed);
      __builtin_memcpy(p, values, size_t(count) * 2);
    }
  }
  static F dot_bf16(F acc, V pairs, V weights) {
    const V high = _mm256_set1_epi32(int(0xffff0000));
    acc = fma(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(weights, 16)), acc);
    return fma(_mm256_castsi256_ps(_mm256_and_si256(pairs, high)), _mm256_castsi256_ps(_mm256_and_si256(weights, high)), acc);
  }
  static V bits(F v) { return _mm256_castps_si256(v); }
  static F floats(V v) { return _mm256_castsi256_ps(v); }
  static F bytes_to_floats(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
};
