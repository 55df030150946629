// umv2::TuckerTopK for ONNX Runtime on a CPU: converts fp16, and hands one token and head to each task.
#include "kernels.h"
#include "op_inputs.h"
#include "ops.h"
#include "registration.h"

namespace umv2::ort {
namespace {

class TuckerTopK : public TopkSignature {
 public:
  static constexpr const char* kProvider = kExecutionProvider;

  TuckerTopK(const Api& api, const KernelInfo* info) : api_(api), attributes_(api, info) {}

  const Api& api() const { return api_; }

  void compute(KernelContext* context) {
    const TopkInputs inputs = topk_inputs(api_, context, attributes_);
    const int64_t tokens = inputs.tokens, heads = inputs.heads, topk = attributes_.topk;
    std::vector<float> buffers[5];
    const TuckerArgs args{floats(inputs.row_scores, buffers[0], "row_scores"),
                          floats(inputs.col_scores, buffers[1], "col_scores"),
                          floats(inputs.u, buffers[2], "u"),
                          floats(inputs.v, buffers[3], "v"),
                          floats(inputs.cores, buffers[4], "cores"),
                          heads,
                          inputs.keys_per_side,
                          inputs.ranks,
                          inputs.core_count,
                          attributes_.row_topk,
                          topk};
    require_no_nan(args.row_scores, inputs.row_scores.count(), "row_scores");
    require_no_nan(args.col_scores, inputs.col_scores.count(), "col_scores");

    int64_t* addresses = output<int64_t>(api_, context, 0, {tokens, heads * topk});
    const std::vector<int64_t> score_sizes{tokens, heads * topk, args.core_count};
    const int64_t count = tokens * heads * topk * args.core_count;
    std::vector<float> converted;
    float* scores = nullptr;
    uint16_t* halves = nullptr;
    if (inputs.row_scores.type == kFloat) {
      scores = output<float>(api_, context, 1, score_sizes);
    } else {
      halves = output<uint16_t>(api_, context, 1, score_sizes);
      converted.resize(static_cast<size_t>(count));
      scores = converted.data();
    }
    const Kernels& kernels = *select_kernels();
    parallel_for(api_, context, tokens * heads, [&](int64_t task) {
      kernels.tucker_topk(args, task / heads, task % heads, addresses + task * topk,
                          scores + task * topk * args.core_count);
    });
    for (int64_t i = 0; halves != nullptr && i < count; ++i) halves[i] = float_to_half(scores[i]);
  }

 private:
  const Api& api_;
  TopkAttributes attributes_;
};

}  // namespace

const CustomOp* tucker_topk_op(const Api& api, ElementType scores) {
  return new Registration<TuckerTopK>(api, scores);
}

}  // namespace umv2::ort
