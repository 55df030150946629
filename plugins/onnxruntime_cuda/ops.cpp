#include "ops.h"

#include "kernel_io.h"

namespace umv2::ort {

std::vector<const CustomOp*> custom_ops(const Api& api) {
  std::vector<const CustomOp*> ops;
  for (const ElementType scores : {kFloat, kFloat16, kBFloat16}) {
    ops.push_back(tucker_topk_op(api, scores));
    ops.push_back(memory_lookup_op(api, scores));
  }
  return ops;
}

cuda::ElementType element_type(ElementType type, const char* name) {
  switch (type) {
    case kFloat:
      return cuda::ElementType::kFloat32;
    case kFloat16:
      return cuda::ElementType::kFloat16;
    case kBFloat16:
      return cuda::ElementType::kBFloat16;
    case kInt8:
      return cuda::ElementType::kInt8;
    default:
      throw Error(std::string(name) + " must be float, float16, bfloat16 or int8, got element type " + std::to_string(type));
  }
}

cuda::Stream stream_of(const Api& api, const KernelContext* context) {
  cuda::Stream stream = nullptr;
  check(api, api.gpu_stream(context, &stream), "stream");
  return stream;
}

}  // namespace umv2::ort
