#include "op_inputs.h"

namespace umv2::ort {
namespace {

// Collects the shards from input `next` of `count` on, and row_scales before them when the rows are int8. `tensor(i)` is
// input i.
template <typename TensorAt>
LookupTable read_table(size_t next, size_t count, int64_t rows_per_shard, const TensorAt& tensor) {
  require(next < count, "no rows are given");
  LookupTable table;
  Tensor shard = tensor(next);
  if (next + 1 < count) {
    const Tensor second = tensor(next + 1);
    if (second.type == kInt8 && shard.type != kInt8) {
      table.row_scales = shard;
      shard = second;
      ++next;
    }
  }
  require((table.row_scales.data != nullptr) == (shard.type == kInt8),
          "row_scales are given if and only if rows are int8");
  require(shard.sizes.size() == 2 && within(shard.sizes[1], 1), "rows must be [rows, row size], got ", shard);
  table.row_type = shard.type;
  table.row_size = shard.sizes[1];
  table.shards.reserve(count - next);
  for (size_t i = next; i < count; ++i) {
    if (i > next) shard = tensor(i);
    require(shard.type == table.row_type && shard.sizes.size() == 2 && shard.sizes[1] == table.row_size &&
                within(shard.sizes[0], 1, rows_per_shard) && (i + 1 == count || shard.sizes[0] == rows_per_shard),
            "shard ", i - next, " is ", shard, ", which does not fit rows_per_shard ", rows_per_shard);
    table.shards.push_back(shard.data);
    table.rows += shard.sizes[0];
  }
  require(table.row_scales.data == nullptr ||
              (table.row_scales.type == kFloat && table.row_scales.sizes == Shape{table.rows, 2}),
          "row_scales must be float [rows, 2], got ", table.row_scales);
  return table;
}

size_t input_count(const Api& api, const KernelContext* context) {
  size_t count = 0;
  check(api, api.input_count(context, &count), "input count");
  return count;
}

}  // namespace

TopkAttributes::TopkAttributes(const Api& api, const KernelInfo* info)
    : row_topk(attribute(api, info, "row_topk")), topk(attribute(api, info, "topk")) {
  require(within(row_topk, 1, kMostRowTopk), "row_topk ", row_topk, " is out of range, 1 to ", kMostRowTopk,
          " are served");
  require(within(topk, 1, row_topk * row_topk), "topk must be from 1 to row_topk * row_topk, got ", topk);
}

std::optional<TopkWeights> constant_weights(const Api& api, const KernelInfo* info) {
  const std::optional<Tensor> u = constant_input(api, info, 2), v = constant_input(api, info, 3),
                              cores = constant_input(api, info, 4);
  if (!u || !v || !cores) return std::nullopt;
  return TopkWeights{*u, *v, *cores};
}

TopkInputs topk_inputs(const Api& api, const KernelContext* context, const TopkAttributes& attributes,
                       const std::optional<TopkWeights>& constants) {
  TopkInputs inputs{input(api, context, 0), input(api, context, 1),
                    constants ? constants->u : input(api, context, 2),
                    constants ? constants->v : input(api, context, 3),
                    constants ? constants->cores : input(api, context, 4)};
  const Tensor &rows = inputs.row_scores, &cols = inputs.col_scores, &u = inputs.u, &v = inputs.v, &cores = inputs.cores;
  require(rows.sizes.size() == 4 && rows.sizes == cols.sizes,
          "row_scores and col_scores must both be [T, H, N, R], got ", rows, " and ", cols);
  const int64_t heads = inputs.heads = rows.sizes[1], ranks = inputs.ranks = rows.sizes[3];
  inputs.tokens = rows.sizes[0];
  inputs.keys_per_side = rows.sizes[2];
  require(within(heads, 0) && within(ranks, 1) && within(inputs.keys_per_side, 0), "heads, keys and ranks of ", rows,
          " are out of range, up to ", kMostOfAnAxis, " are served");
  require(u.sizes == Shape{heads, ranks} && v.sizes == u.sizes, "u and v must be [H, R], got ", u, " and ", v);
  require(cores.sizes.size() == 4 && within(cores.sizes[0], 1) && cores.sizes[1] == heads && cores.sizes[2] == ranks &&
              cores.sizes[3] == ranks,
          "cores must be [C, H, R, R], got ", cores);
  inputs.core_count = cores.sizes[0];
  require(attributes.row_topk <= inputs.keys_per_side, "row_topk ", attributes.row_topk, " is not within the ",
          inputs.keys_per_side, " keys of a side");
  return inputs;
}

LookupAttributes::LookupAttributes(const Api& api, const KernelInfo* info)
    : pre_value_dim(attribute(api, info, "pre_value_dim")),
      rows_per_shard(attribute(api, info, "rows_per_shard")),
      groups(attribute(api, info, "groups", 1)) {
  const std::string activation = text_attribute(api, info, "activation");
  require(activation == "none" || activation == "gelu", "activation must be none or gelu, got ", activation);
  gelu = activation == "gelu";
  require(within(pre_value_dim, 0), "pre_value_dim ", pre_value_dim, " is out of range, 0 to ", kMostOfAnAxis,
          " are served");
  require(rows_per_shard >= 1, "rows_per_shard ", rows_per_shard, " is out of range, 1 and more are served");
  require(within(groups, 1), "groups ", groups, " is out of range, 1 to ", kMostOfAnAxis, " are served");
}

std::optional<LookupTable> constant_table(const Api& api, const KernelInfo* info, const LookupAttributes& attributes) {
  size_t count = 0;
  check(api, api.constant_input_count(info, &count), "input count");
  for (size_t i = attributes.first_table(); i < count; ++i) {
    if (!constant_input(api, info, i)) return std::nullopt;
  }
  return read_table(attributes.first_table(), count, attributes.rows_per_shard,
                    [&](size_t i) { return *constant_input(api, info, i); });
}

LookupInputs lookup_inputs(const Api& api, const KernelContext* context, const LookupAttributes& attributes,
                           const std::optional<LookupTable>& constants) {
  LookupInputs inputs{input(api, context, 0), input(api, context, 1)};
  const Tensor &indices = inputs.indices, &scores = inputs.scores;
  require(indices.sizes.size() == 2 && scores.sizes.size() == 3 && scores.sizes[0] == indices.sizes[0] &&
              scores.sizes[1] == indices.sizes[1] && within(scores.sizes[2], 1),
          "indices [T, K] and scores [T, K, C] expected, got ", indices, " and ", scores);
  inputs.tokens = indices.sizes[0];
  inputs.hits = indices.sizes[1];
  inputs.cores = scores.sizes[2];
  size_t next = 2;
  if (attributes.groups > 1) {
    inputs.group = input(api, context, next++);
    require(inputs.group.type == kInt64 && inputs.group.sizes == indices.sizes,
            "group must be int64 like indices, got ", inputs.group);
  }
  if (attributes.pre_value_dim > 0) {
    inputs.query = input(api, context, next++);
    require(inputs.query.sizes == Shape{inputs.tokens, attributes.pre_value_dim}, "query must be [T, P], got ",
            inputs.query);
  }
  std::optional<LookupTable> given;
  if (!constants) {
    given = read_table(next, input_count(api, context), attributes.rows_per_shard,
                       [&](size_t i) { return input(api, context, i); });
  }
  const LookupTable& table = constants ? *constants : *given;
  inputs.row_scales = table.row_scales;
  inputs.shards = table.shards;
  inputs.row_type = table.row_type;
  inputs.rows = table.rows;
  inputs.value_dim = table.row_size - attributes.pre_value_dim;
  require(inputs.value_dim > 0 && inputs.value_dim % inputs.cores == 0, "rows of ", table.row_size,
          " elements do not split into a pre-value and C equal parts");
  inputs.width = product_of({attributes.groups, inputs.value_dim}, "groups * value size");
  return inputs;
}

}  // namespace umv2::ort
