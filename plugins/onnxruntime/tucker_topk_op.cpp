// umv2::TuckerTopK for ONNX Runtime on a CPU: hands one token and head to each task, which converts its own part of fp16.
#include "kernels.h"
#include "op_inputs.h"
#include "ops.h"
#include "registration.h"
#include "tasks.h"

namespace umv2::ort {
namespace {

// Of row scores and column scores: fewer are searched sooner than another thread wakes.
constexpr int64_t kScoresWorthThreads = 1 << 12;

class TuckerTopK : public TopkSignature {
 public:
  static constexpr const char* kProvider = kExecutionProvider;

  TuckerTopK(const Api& api, const KernelInfo* info)
      : api_(api), kernels_(runnable_kernels()), attributes_(api, info), weights_(constant_weights(api, info)) {}

  const Api& api() const { return api_; }

  void compute(KernelContext* context) {
    const TopkInputs inputs = topk_inputs(api_, context, attributes_, weights_);
    const int64_t topk = attributes_.topk, cores = inputs.core_count, keys = inputs.keys_per_side * inputs.ranks;
    const int64_t tasks = inputs.tokens * inputs.heads, hits = inputs.heads * topk;
    int64_t* addresses = output<int64_t>(api_, context, 0, {inputs.tokens, hits});
    const FloatOutput scores(api_, context, 1, inputs.row_scores.type, {inputs.tokens, hits, cores});
    const TuckerArgs args{floats<0>(kernels_, inputs.u, 0, inputs.u.count()),
                          floats<1>(kernels_, inputs.v, 0, inputs.v.count()),
                          floats<2>(kernels_, inputs.cores, 0, inputs.cores.count()),
                          inputs.heads,
                          inputs.keys_per_side,
                          inputs.ranks,
                          cores,
                          attributes_.row_topk,
                          topk};
    parallel_for(api_, context, 2 * tasks * keys >= kScoresWorthThreads, tasks, [&](int64_t task) {
      const float* rows = floats<3>(kernels_, inputs.row_scores, task * keys, keys);
      const float* cols = floats<4>(kernels_, inputs.col_scores, task * keys, keys);
      float* piece = scores.piece(task * topk * cores, topk * cores);
      if (!kernels_.tucker_topk(args, task % inputs.heads, rows, cols, addresses + task * topk, piece)) {
        require_no_nan(rows, task * keys, keys, "row_scores");
        require_no_nan(cols, task * keys, keys, "col_scores");
        throw Error("the kernel refused its inputs");
      }
      scores.done(kernels_, piece, task * topk * cores, topk * cores);
    });
  }

 private:
  const Api& api_;
  const Kernels& kernels_;
  TopkAttributes attributes_;
  std::optional<TopkWeights> weights_;
};

}  // namespace

const CustomOp* tucker_topk_op(const Api& api, ElementType scores) {
  return new Registration<TuckerTopK>(api, scores);
}

}  // namespace umv2::ort
