// umv2::TuckerTopK for ONNX Runtime: checks shapes, converts fp16, and hands one token and head to each task.
#include "kernels.h"
#include "ops.h"
#include "registration.h"

namespace umv2::ort {
namespace {

class TuckerTopK {
 public:
  static constexpr const char* kName = "TuckerTopK";
  static constexpr size_t kInputs = 5, kOutputs = 2;

  static ElementType input_type(size_t, ElementType scores) { return scores; }
  static ElementType output_type(size_t index, ElementType scores) { return index == 0 ? kInt64 : scores; }
  static Characteristic input_characteristic(size_t) { return kRequired; }

  TuckerTopK(const Api& api, const KernelInfo* info)
      : api_(api), row_topk_(attribute(api, info, "row_topk")), topk_(attribute(api, info, "topk")) {}

  const Api& api() const { return api_; }

  void compute(KernelContext* context) {
    const Tensor rows = input(api_, context, 0), cols = input(api_, context, 1), u = input(api_, context, 2),
                 v = input(api_, context, 3), cores = input(api_, context, 4);
    require(rows.sizes.size() == 4 && rows.sizes == cols.sizes,
            "row_scores and col_scores must both be [T, H, N, R], got ", rows, " and ", cols);
    const int64_t tokens = rows.sizes[0], heads = rows.sizes[1], keys = rows.sizes[2], ranks = rows.sizes[3];
    const std::vector<int64_t> vector_sizes{heads, ranks};
    require(u.sizes == vector_sizes && v.sizes == vector_sizes,
            "u and v must be [H, R], got ", u, " and ", v);
    require(cores.sizes.size() == 4 && cores.sizes[0] > 0 && cores.sizes[1] == heads && cores.sizes[2] == ranks &&
                cores.sizes[3] == ranks && ranks > 0,
            "cores must be [C, H, R, R], got ", cores);
    require(row_topk_ >= 1 && row_topk_ <= keys,
            "row_topk ", row_topk_, " is not within the ", keys, " keys of a side");
    require(topk_ >= 1 && topk_ <= row_topk_ * row_topk_, "topk must be from 1 to row_topk * row_topk");

    std::vector<float> buffers[5];
    const TuckerArgs args{floats(rows, buffers[0], "row_scores"),
                          floats(cols, buffers[1], "col_scores"),
                          floats(u, buffers[2], "u"),
                          floats(v, buffers[3], "v"),
                          floats(cores, buffers[4], "cores"),
                          heads,
                          keys,
                          ranks,
                          cores.sizes[0],
                          row_topk_,
                          topk_};
    require_no_nan(args.row_scores, rows.count(), "row_scores");
    require_no_nan(args.col_scores, cols.count(), "col_scores");

    int64_t* addresses = output<int64_t>(api_, context, 0, {tokens, heads * topk_});
    const std::vector<int64_t> score_sizes{tokens, heads * topk_, args.core_count};
    const int64_t count = tokens * heads * topk_ * args.core_count;
    std::vector<float> converted;
    float* scores = nullptr;
    uint16_t* halves = nullptr;
    if (rows.type == kFloat) {
      scores = output<float>(api_, context, 1, score_sizes);
    } else {
      halves = output<uint16_t>(api_, context, 1, score_sizes);
      converted.resize(static_cast<size_t>(count));
      scores = converted.data();
    }
    const Kernels& kernels = *select_kernels();
    parallel_for(api_, context, tokens * heads, [&](int64_t task) {
      kernels.tucker_topk(args, task / heads, task % heads, addresses + task * topk_,
                          scores + task * topk_ * args.core_count);
    });
    for (int64_t i = 0; halves != nullptr && i < count; ++i) halves[i] = float_to_half(scores[i]);
  }

 private:
  const Api& api_;
  int64_t row_topk_, topk_;
};

}  // namespace

const CustomOp* tucker_topk_op(const Api& api, ElementType scores) {
  return new Registration<TuckerTopK>(api, scores);
}

}  // namespace umv2::ort
