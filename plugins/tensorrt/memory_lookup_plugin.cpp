// umv2::MemoryLookup for TensorRT: finds its inputs by the attributes; shapes and dtypes; the kernel does the rest.
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

class MemoryLookup {
 public:
  static constexpr const char* kName = "MemoryLookup";
  static constexpr int32_t kOutputs = 1;

  static std::vector<PluginField> field_names() {
    return {{"pre_value_dim", nullptr, PluginFieldType::kINT32, 1},
            {"activation", nullptr, PluginFieldType::kCHAR, 1},
            {"rows_per_shard", nullptr, PluginFieldType::kINT32, 1},
            {"groups", nullptr, PluginFieldType::kINT32, 1}};
  }

  explicit MemoryLookup(const Fields& fields)
      : pre_value_dim_(fields.integer("pre_value_dim")),
        activation_(fields.text("activation")),
        rows_per_shard_(fields.integer("rows_per_shard")),
        groups_(fields.integer("groups", 1)) {
    require(activation_ == "none" || activation_ == "gelu", "activation must be none or gelu, got ", activation_);
    require(within(pre_value_dim_, 0), "pre_value_dim must be from 0 to ", kMostOfAnAxis, ", got ", pre_value_dim_);
    require(rows_per_shard_ >= 1, "rows_per_shard must be 1 or more, got ", rows_per_shard_);
    require(within(groups_, 1), "groups must be from 1 to ", kMostOfAnAxis, ", got ", groups_);
  }

  std::vector<PluginField> fields() const {
    return {{"pre_value_dim", &pre_value_dim_, PluginFieldType::kINT32, 1},
            {"activation", activation_.data(), PluginFieldType::kCHAR, static_cast<int32_t>(activation_.size())},
            {"rows_per_shard", &rows_per_shard_, PluginFieldType::kINT32, 1},
            {"groups", &groups_, PluginFieldType::kINT32, 1}};
  }
  std::string identity() const {
    return "pre_value_dim=" + std::to_string(pre_value_dim_) + " activation=" + activation_ +
           " rows_per_shard=" + std::to_string(rows_per_shard_) + " groups=" + std::to_string(groups_);
  }

  void output_types(const DataType* inputs, int32_t count, DataType* outputs) const {
    check_types(inputs, count);
    outputs[0] = inputs[1];
  }

  void output_shapes(const nvinfer1::DimsExprs* inputs, int32_t count, nvinfer1::DimsExprs* outputs,
                     nvinfer1::IExprBuilder& build) const {
    require(count > first_table(), "no rows are given");
    for (int32_t i = 0; i < count; ++i) {
      const int32_t rank = i == 1 ? 3 : 2;
      require(inputs[i].nbDims == rank, "input ", i, " must have ", rank, " dimensions, got ", inputs[i].nbDims);
    }
    // The last input is a shard, whether row_scales are given or not.
    const auto* width = inputs[count - 1].d[1];
    require(!width->isConstant() || within(width->getConstantValue(), int64_t{pre_value_dim_} + 1), "rows of ",
            width->getConstantValue(), " elements hold no value beside a pre-value of ", pre_value_dim_,
            ", or are longer than ", kMostOfAnAxis);
    const auto* value_dim = build.operation(DimensionOperation::kSUB, *width, *build.constant(pre_value_dim_));
    outputs[0] = {2,
                  {inputs[0].d[0], build.operation(DimensionOperation::kPROD, *value_dim, *build.constant(groups_))}};
  }

  bool supports(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs) const {
    const DataType type = tensors[position].desc.type;
    const int32_t table = first_table();
    if (position == 0 || (position == 2 && grouped())) return type == DataType::kINT64;
    if (position == 1 || position == table) return is_floating(type);
    if (position < table || position == inputs) return type == tensors[1].desc.type;
    if (position == table + 1 && type == DataType::kINT8) return may_be_scales(tensors[table].desc);
    return type == tensors[position == table + 1 ? table : table + 1].desc.type;
  }

  // For the sums of splits. Without inputs, as little as can be: then no hits are split.
  int64_t workspace_bytes(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count) const {
    if (inputs == nullptr || count < 1 || inputs[count - 1].max.nbDims != 2) return 0;
    const int64_t width = inputs[count - 1].max.d[1];
    return width > pre_value_dim_ ? cuda::most_scratch_bytes(groups_, width - pre_value_dim_) : 0;
  }

  cuda::LookupCall call(const nvinfer1::PluginTensorDesc* inputs, int32_t count) const {
    std::vector<DataType> types(static_cast<size_t>(count));
    for (int32_t i = 0; i < count; ++i) types[static_cast<size_t>(i)] = inputs[i].type;
    check_types(types.data(), count);
    const Dims &indices = inputs[0].dims, &scores = inputs[1].dims;
    require(indices.nbDims == 2 && scores.nbDims == 3 && has_sizes(scores, {indices.d[0], indices.d[1], scores.d[2]}) &&
                scores.d[2] > 0,
            "indices [T, K] and scores [T, K, C] expected, got ", indices, " and ", scores);
    const int64_t tokens = indices.d[0], cores = scores.d[2];
    if (grouped()) require(same_sizes(inputs[2].dims, indices), "group must be like indices, got ", inputs[2].dims);
    if (pre_value_dim_ > 0) {
      const Dims& query = inputs[first_table() - 1].dims;
      require(has_sizes(query, {tokens, pre_value_dim_}), "query must be [T, P], got ", query);
    }
    const int32_t first = first_shard(types.data(), count);
    const int64_t rows = count_rows(inputs + first, count - first);
    if (first > first_table()) {
      const Dims& scales = inputs[first_table()].dims;
      require(has_sizes(scales, {rows, 2}), "row_scales must be [", rows, ", 2], got ", scales);
    }
    const int64_t width = inputs[first].dims.d[1];
    const int64_t value_dim = within(width, 0, 2 * kMostOfAnAxis) ? width - pre_value_dim_ : 0;
    require(within(value_dim, 1) && value_dim % cores == 0, "rows ", inputs[first].dims,
            " do not split into a pre-value and C equal parts");
    product_of({tokens, groups_, value_dim}, "the size of the output");
    product_of({tokens, indices.d[1], cores}, "the number of scores");
    cuda::LookupCall call{};
    call.node = {element_type(types[1]),
                 element_type(inputs[first].type),
                 count - first,
                 cores,
                 grouped(),
                 pre_value_dim_ > 0,
                 activation_ == "gelu",
                 pre_value_dim_,
                 value_dim};
    call.tokens = tokens;
    call.hits = indices.d[1];
    call.table_rows = rows;
    call.rows_per_shard = rows_per_shard_;
    call.groups = groups_;
    return call;
  }

  void bind(cuda::LookupCall& call, const void* const* inputs, void* const* outputs, void* workspace) const {
    call.indices = *inputs++;
    call.scores = *inputs++;
    if (call.node.grouped) call.group = *inputs++;
    if (call.node.pre_values) call.query = *inputs++;
    if (call.node.rows == cuda::ElementType::kInt8) call.row_scales = *inputs++;
    call.rows.assign(inputs, inputs + call.node.shards);
    call.output = outputs[0];
    call.scratch = cuda::most_scratch_bytes(groups_, call.node.value_dim) > 0 ? workspace : nullptr;
  }

 private:
  bool grouped() const { return groups_ > 1; }

  // The place of row_scales, or of the first shard.
  int32_t first_table() const { return 2 + (grouped() ? 1 : 0) + (pre_value_dim_ > 0 ? 1 : 0); }

  // row_scales come before rows of int8, and only before them.
  int32_t first_shard(const DataType* types, int32_t count) const {
    const int32_t table = first_table();
    return table + 1 < count && types[table + 1] == DataType::kINT8 ? table + 1 : table;
  }

  // Where TensorRT may choose types it must not take the first of several shards for row_scales.
  static bool may_be_scales(const nvinfer1::PluginTensorDesc& table) {
    const bool narrow = table.dims.nbDims != 2 || table.dims.d[1] < 0 || table.dims.d[1] == 2;
    return table.type == DataType::kFLOAT && narrow;
  }

  void check_types(const DataType* types, int32_t count) const {
    const int32_t table = first_table();
    require(count > table, "no rows are given");
    require(types[0] == DataType::kINT64, "indices must be int64, got ", name(types[0]));
    require(is_floating(types[1]), "scores must be fp32, fp16 or bf16, got ", name(types[1]));
    if (grouped()) require(types[2] == DataType::kINT64, "group must be int64, got ", name(types[2]));
    if (pre_value_dim_ > 0) {
      require(types[table - 1] == types[1], "query must be ", name(types[1]), " like scores, got ",
              name(types[table - 1]));
    }
    const int32_t first = first_shard(types, count);
    if (first > table) {
      require(types[table] == DataType::kFLOAT, "row_scales must be fp32, got ", name(types[table]));
    } else {
      require(types[table] != DataType::kINT8, "row_scales must come before rows of int8");
      require(is_floating(types[table]), "rows must be fp32, fp16, bf16 or int8, got ", name(types[table]));
    }
    for (int32_t i = first + 1; i < count; ++i) {
      require(types[i] == types[first], "shard ", i - first, " is ", name(types[i]), ", shard 0 ", name(types[first]));
    }
  }

  // Of all shards, which must fit each other.
  int64_t count_rows(const nvinfer1::PluginTensorDesc* shards, int32_t count) const {
    int64_t rows = 0;
    for (int32_t i = 0; i < count; ++i) {
      const Dims& shard = shards[i].dims;
      require(shard.nbDims == 2 && shard.d[1] == shards[0].dims.d[1] && shard.d[0] >= 1 &&
                  shard.d[0] <= rows_per_shard_ && (i + 1 == count || shard.d[0] == rows_per_shard_),
              "shard ", i, " is ", shard, ", which does not fit rows_per_shard ", rows_per_shard_);
      rows += shard.d[0];
    }
    return rows;
  }

  int32_t pre_value_dim_;
  std::string activation_;
  int32_t rows_per_shard_, groups_;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* memory_lookup_creator() {
  static Creator<MemoryLookup> creator;
  return &creator;
}

}  // namespace umv2::tensorrt
