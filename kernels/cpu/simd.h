// The vector type of one target. Every kernel is compiled once a target, each time in a namespace of its own, with the
// compiler flags of that target (see CMakeLists.txt); dispatch.cpp picks one when it runs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef UMV2_TARGET
#error "UMV2_TARGET names the namespace of the target: portable, avx2 or avx512"
#endif

namespace umv2::UMV2_TARGET {

// Storage types of rows; arithmetic is in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  float value;
  if (magnitude < 0x0400u) {  // zero and subnormals: a multiple of 2^-24
    value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // Exponents are rebased from 15 to 127; 31, infinity and NaN, becomes 255.
  const uint32_t rebased = magnitude >= 0x7c00u ? (magnitude << 13) + (224u << 23) : (magnitude << 13) + (112u << 23);
  const uint32_t bits = sign | rebased;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Rounded to nearest even.
inline Half to_half(float value) {
#if defined(__F16C__)
  return {_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)};
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const auto half = [sign](uint32_t rest) { return Half{static_cast<uint16_t>(sign | rest)}; };
  // NaN keeps the upper bits of its payload, made quiet: as processors with the instruction do.
  if (magnitude > 0x7f800000u) return half(0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return half(0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                       // below 2^-14: subnormal, a multiple of 2^-24
    float absolute;
    std::memcpy(&absolute, &magnitude, sizeof absolute);
    // Adding 0.5 leaves in the last bits of the sum the multiple, rounded to nearest even by the addition itself.
    const float sum = absolute + 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &sum, sizeof rounded);
    return half(rounded - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
  return half((rounded - (112u << 23)) >> 13);
#endif
}

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load(const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vec load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
// Bit i is set where a[i] >= b[i].
inline uint32_t at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load(const int8_t* p) {
    int64_t eight;
    std::memcpy(&eight, p, sizeof eight);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight)))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline uint32_t at_least(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}

#else

// Four floats by the compiler's own vectors: SSE2 on x86-64, NEON on aarch64.
struct Vec {
  static constexpr int kWidth = 4;
  typedef float Floats __attribute__((vector_size(16)));
  Floats v;

  static Vec zero() { return broadcast(0.0f); }
  static Vec broadcast(float x) { return {Floats{x, x, x, x}}; }
  template <typename T>
  static Vec load(const T* p) {
    return {Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  static Vec load(const float* p) {
    Vec result;
    std::memcpy(&result.v, p, sizeof result.v);
    return result;
  }
  void store(float* p) const { std::memcpy(p, &v, sizeof v); }
  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline uint32_t at_least(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int i = 0; i < Vec::kWidth; ++i) mask |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
  return mask;
}

#endif

}  // namespace umv2::UMV2_TARGET
