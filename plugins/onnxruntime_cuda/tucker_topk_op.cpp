// umv2::TuckerTopK for ONNX Runtime on a GPU: enqueues the kernel that serves the node.
#include "checked.h"
#include "launch.h"
#include "op_inputs.h"
#include "ops.h"
#include "registration.h"

namespace umv2::ort {
namespace {

class TuckerTopK : public TopkSignature {
 public:
  static constexpr const char* kProvider = kExecutionProvider;

  TuckerTopK(const Api& api, const KernelInfo* info)
      : api_(api), attributes_(api, info), archive_(cuda::kernel_archive()) {}

  const Api& api() const { return api_; }

  void compute(KernelContext* context) {
    const TopkInputs inputs = topk_inputs(api_, context, attributes_);
    const int64_t hits = product_of({inputs.heads, attributes_.topk}, "heads * topk");
    product_of({inputs.tokens, hits, inputs.core_count}, "the number of scores");
    cuda::TopkCall call{};
    call.node = {element_type(inputs.row_scores.type, "scores"), inputs.ranks, inputs.core_count, attributes_.row_topk,
                 attributes_.topk};
    call.tokens = inputs.tokens;
    call.heads = inputs.heads;
    call.keys_per_side = inputs.keys_per_side;
    call.row_scores = inputs.row_scores.data;
    call.col_scores = inputs.col_scores.data;
    call.u = inputs.u.data;
    call.v = inputs.v.data;
    call.cores = inputs.cores.data;
    call.addresses = output<void>(api_, context, 0, {inputs.tokens, hits});
    call.scores = output<void>(api_, context, 1, {inputs.tokens, hits, inputs.core_count});
    cuda::launch(archive_, call, stream_of(api_, context));
  }

 private:
  const Api& api_;
  TopkAttributes attributes_;
  const cuda::KernelArchive& archive_;
};

}  // namespace

const CustomOp* tucker_topk_op(const Api& api, ElementType scores) {
  return new Registration<TuckerTopK>(api, scores);
}

}  // namespace umv2::ort
