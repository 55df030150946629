// umv2::TuckerTopK for TensorRT: shapes and dtypes; the kernel does the rest.
#include "checked.h"
#include "creators.h"
#include "plugin.h"

namespace umv2::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

class TuckerTopK {
 public:
  static constexpr const char* kName = "TuckerTopK";
  static constexpr int32_t kInputs = 5, kOutputs = 2;

  static std::vector<PluginField> field_names() {
    return {{"row_topk", nullptr, PluginFieldType::kINT32, 1}, {"topk", nullptr, PluginFieldType::kINT32, 1}};
  }

  explicit TuckerTopK(const Fields& fields) : row_topk_(fields.integer("row_topk")), topk_(fields.integer("topk")) {
    // Cells of the grid are counted in 32 bits.
    constexpr int64_t kMost = int64_t{1} << 15;
    require(within(row_topk_, 1, kMost), "row_topk must be from 1 to ", kMost, ", got ", row_topk_);
    require(topk_ >= 1 && topk_ <= int64_t{row_topk_} * row_topk_, "topk must be from 1 to row_topk * row_topk, got ",
            topk_);
  }

  std::vector<PluginField> fields() const {
    return {{"row_topk", &row_topk_, PluginFieldType::kINT32, 1}, {"topk", &topk_, PluginFieldType::kINT32, 1}};
  }
  std::string identity() const { return "row_topk=" + std::to_string(row_topk_) + " topk=" + std::to_string(topk_); }

  void output_types(const DataType* inputs, int32_t count, DataType* outputs) const {
    require(count == kInputs, "5 inputs expected, got ", count);
    require(is_floating(inputs[0]), "scores must be fp32, fp16 or bf16, got ", name(inputs[0]));
    for (int32_t i = 1; i < count; ++i) {
      require(inputs[i] == inputs[0], "inputs must be alike, got ", name(inputs[0]), " and ", name(inputs[i]));
    }
    outputs[0] = DataType::kINT64;
    outputs[1] = inputs[0];
  }

  void output_shapes(const nvinfer1::DimsExprs* inputs, int32_t count, nvinfer1::DimsExprs* outputs,
                     nvinfer1::IExprBuilder& build) const {
    require(count == kInputs, "5 inputs expected, got ", count);
    constexpr int32_t kRanks[kInputs] = {4, 4, 2, 2, 4};
    for (int32_t i = 0; i < count; ++i) {
      require(inputs[i].nbDims == kRanks[i], "input ", i, " must have ", kRanks[i], " dimensions, got ",
              inputs[i].nbDims);
    }
    const auto* tokens = inputs[0].d[0];
    const auto* hits = build.operation(DimensionOperation::kPROD, *inputs[0].d[1], *build.constant(topk_));
    outputs[0] = {2, {tokens, hits}};
    outputs[1] = {3, {tokens, hits, inputs[4].d[0]}};
  }

  bool supports(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs) const {
    const DataType type = tensors[position].desc.type;
    if (position == 0) return is_floating(type);
    if (position == inputs) return type == DataType::kINT64;
    return type == tensors[0].desc.type;
  }

  int64_t workspace_bytes(const nvinfer1::DynamicPluginTensorDesc*, int32_t) const { return 0; }

  cuda::TopkCall call(const nvinfer1::PluginTensorDesc* inputs, int32_t count) const {
    require(count == kInputs, "5 inputs expected, got ", count);
    const Dims &rows = inputs[0].dims, &cols = inputs[1].dims, &u = inputs[2].dims, &v = inputs[3].dims,
               &cores = inputs[4].dims;
    require(rows.nbDims == 4 && same_sizes(rows, cols), "row_scores and col_scores must both be [T, H, N, R], got ",
            rows, " and ", cols);
    const int64_t heads = rows.d[1], keys = rows.d[2], ranks = rows.d[3];
    require(has_sizes(u, {heads, ranks}) && same_sizes(u, v), "u and v must be [H, R], got ", u, " and ", v);
    require(cores.nbDims == 4 && cores.d[0] > 0 && has_sizes(cores, {cores.d[0], heads, ranks, ranks}),
            "cores must be [C, H, R, R], got ", cores);
    require(row_topk_ <= keys, "row_topk ", row_topk_, " is not within the ", keys, " keys of a side");
    const int64_t hits = product_of({heads, topk_}, "heads * topk");
    product_of({rows.d[0], hits, cores.d[0]}, "the number of scores");
    product_of({rows.d[0], heads, keys, ranks}, "the number of scores of keys");
    cuda::TopkCall call{};
    call.node = {element_type(inputs[0].type), ranks, cores.d[0], row_topk_, topk_};
    call.tokens = rows.d[0];
    call.heads = heads;
    call.keys_per_side = keys;
    return call;
  }

  void bind(cuda::TopkCall& call, const void* const* inputs, void* const* outputs, void*) const {
    call.row_scores = inputs[0];
    call.col_scores = inputs[1];
    call.u = inputs[2];
    call.v = inputs[3];
    call.cores = inputs[4];
    call.addresses = outputs[0];
    call.scores = outputs[1];
  }

 private:
  int32_t row_topk_, topk_;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* tucker_topk_creator() {
  static Creator<TuckerTopK> creator;
  return &creator;
}

}  // namespace umv2::tensorrt
