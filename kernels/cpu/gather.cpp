// The yardstick of the benchmarks: whole rows read one after the other, with nothing done but a sum.
#include "kernels.h"
#include "simd.h"

namespace umv2::UMV2_TARGET {

float gather(const float* table, int64_t row_size, const int64_t* indices, int64_t count) {
  constexpr int kSums = 4;
  Vec sums[kSums];
  for (Vec& sum : sums) sum = Vec::zero();
  float total = 0.0f;
  const Vec one = Vec::broadcast(1.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = table + indices[i] * row_size;
    int64_t x = 0;
    for (; x + kSums * Vec::kWidth <= row_size; x += kSums * Vec::kWidth) {
      for (int n = 0; n < kSums; ++n) sums[n] = fma(Vec::load(row + x + n * Vec::kWidth), one, sums[n]);
    }
    for (; x + Vec::kWidth <= row_size; x += Vec::kWidth) sums[0] = fma(Vec::load(row + x), one, sums[0]);
    for (; x < row_size; ++x) total += row[x];
  }
  for (const Vec& sum : sums) total += sum.sum();
  return total;
}

}  // namespace umv2::UMV2_TARGET
