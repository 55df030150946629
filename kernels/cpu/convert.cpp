// fp16 to float and back, a vector at a time.
#include "kernels.h"
#include "simd.h"

namespace umv2::UMV2_TARGET {

void widen(const uint16_t* halves, int64_t count, float* result) {
  const Half* values = reinterpret_cast<const Half*>(halves);
  int64_t x = 0;
  for (; x + Vec::kWidth <= count; x += Vec::kWidth) Vec::load(values + x).store(result + x);
  for (; x < count; ++x) result[x] = to_float(values[x]);
}

void narrow(const float* values, int64_t count, uint16_t* result) {
  int64_t x = 0;
#if defined(__F16C__)
  for (; x + 8 <= count; x += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(values + x), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(result + x), halves);
  }
#endif
  for (; x < count; ++x) result[x] = to_half(values[x]).bits;
}

}  // namespace umv2::UMV2_TARGET
