#include "ops.h"

#include <cstring>

#include "kernel_io.h"

namespace umv2::ort {

std::vector<const CustomOp*> custom_ops(const Api& api) {
  if (select_kernels() == nullptr) {
    throw Error("UMV2_CPU_TARGET names kernels that this processor does not run; leave it unset");
  }
  // Once an op is registered the runtime no longer falls back to its body: every dtype of the contract has a kernel.
  return {key_scores_op(api, kFloat),  key_scores_op(api, kFloat16), tucker_topk_op(api, kFloat),
          tucker_topk_op(api, kFloat16), memory_lookup_op(api, kFloat), memory_lookup_op(api, kFloat16)};
}

Storage storage(ElementType type, const char* name) {
  switch (type) {
    case kFloat:
      return Storage::kFloat32;
    case kFloat16:
      return Storage::kFloat16;
    case kBFloat16:
      return Storage::kBFloat16;
    case kInt8:
      return Storage::kInt8;
    default:
      throw Error(std::string(name) + " must be float, float16, bfloat16 or int8, got element type " + std::to_string(type));
  }
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  uint32_t result;
  if (magnitude < 0x0400u) {
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&result, &value, sizeof result);
  } else {
    result = (magnitude << 13) + (magnitude >= 0x7c00u ? 224u << 23 : 112u << 23);
  }
  result |= sign;
  float value;
  std::memcpy(&value, &result, sizeof value);
  return value;
}

uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                        // below 2^-14: subnormal, a multiple of 2^-24
    float absolute;
    std::memcpy(&absolute, &magnitude, sizeof absolute);
    // Adding 0.5 leaves in the last bits of the sum the multiple, rounded to nearest even by the addition itself.
    const float sum = absolute + 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &sum, sizeof rounded);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

}  // namespace umv2::ort
