#include "op_inputs.h"

namespace umv2::ort {
namespace {

// Collects the shards from input `next` on, and row_scales before them when the rows are int8; counts their rows, and
// returns the elements of a row.
int64_t read_shards(const Api& api, const KernelContext* context, size_t next, int64_t rows_per_shard, LookupInputs& inputs) {
  size_t count = 0;
  check(api, api.input_count(context, &count), "input count");
  require(next < count, "no rows are given");
  Tensor first = input(api, context, next);
  if (next + 1 < count && input(api, context, next + 1).type == kInt8) {
    inputs.row_scales = first;
    first = input(api, context, ++next);
  }
  require((inputs.row_scales.data != nullptr) == (first.type == kInt8), "row_scales are given if and only if rows are int8");
  for (size_t i = next; i < count; ++i) {
    const Tensor shard = input(api, context, i);
    require(shard.type == first.type && shard.sizes.size() == 2 && shard.sizes[1] == first.sizes[1] &&
                shard.sizes[0] >= 1 && shard.sizes[0] <= rows_per_shard &&
                (i + 1 == count || shard.sizes[0] == rows_per_shard),
            "shard ", i - next, " is ", shard, ", which does not fit rows_per_shard ", rows_per_shard);
    inputs.shards.push_back(shard.data);
    inputs.rows += shard.sizes[0];
  }
  inputs.row_type = first.type;
  return first.sizes[1];
}

}  // namespace

TopkAttributes::TopkAttributes(const Api& api, const KernelInfo* info)
    : row_topk(attribute(api, info, "row_topk")), topk(attribute(api, info, "topk")) {}

TopkInputs topk_inputs(const Api& api, const KernelContext* context, const TopkAttributes& attributes) {
  TopkInputs inputs{input(api, context, 0), input(api, context, 1), input(api, context, 2), input(api, context, 3),
                    input(api, context, 4)};
  const Tensor &rows = inputs.row_scores, &cols = inputs.col_scores, &u = inputs.u, &v = inputs.v, &cores = inputs.cores;
  require(rows.sizes.size() == 4 && rows.sizes == cols.sizes,
          "row_scores and col_scores must both be [T, H, N, R], got ", rows, " and ", cols);
  const int64_t heads = inputs.heads = rows.sizes[1], ranks = inputs.ranks = rows.sizes[3];
  inputs.tokens = rows.sizes[0];
  inputs.keys_per_side = rows.sizes[2];
  const std::vector<int64_t> vector_sizes{heads, ranks};
  require(u.sizes == vector_sizes && v.sizes == vector_sizes, "u and v must be [H, R], got ", u, " and ", v);
  require(cores.sizes.size() == 4 && cores.sizes[0] > 0 && cores.sizes[1] == heads && cores.sizes[2] == ranks &&
              cores.sizes[3] == ranks && ranks > 0,
          "cores must be [C, H, R, R], got ", cores);
  inputs.core_count = cores.sizes[0];
  require(attributes.row_topk >= 1 && attributes.row_topk <= inputs.keys_per_side,
          "row_topk ", attributes.row_topk, " is not within the ", inputs.keys_per_side, " keys of a side");
  require(attributes.topk >= 1 && attributes.topk <= attributes.row_topk * attributes.row_topk,
          "topk must be from 1 to row_topk * row_topk");
  return inputs;
}

LookupAttributes::LookupAttributes(const Api& api, const KernelInfo* info)
    : pre_value_dim(attribute(api, info, "pre_value_dim")),
      rows_per_shard(attribute(api, info, "rows_per_shard")),
      groups(attribute(api, info, "groups")) {
  const std::string activation = text_attribute(api, info, "activation");
  require(activation == "none" || activation == "gelu", "activation must be none or gelu, got ", activation);
  gelu = activation == "gelu";
  require(pre_value_dim >= 0 && rows_per_shard >= 1 && groups >= 1, "an attribute is out of range");
}

LookupInputs lookup_inputs(const Api& api, const KernelContext* context, const LookupAttributes& attributes) {
  LookupInputs inputs{input(api, context, 0), input(api, context, 1)};
  const Tensor &indices = inputs.indices, &scores = inputs.scores;
  require(indices.sizes.size() == 2 && scores.sizes.size() == 3 && scores.sizes[0] == indices.sizes[0] &&
              scores.sizes[1] == indices.sizes[1] && scores.sizes[2] > 0,
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
    require(inputs.query.sizes == std::vector<int64_t>({inputs.tokens, attributes.pre_value_dim}),
            "query must be [T, P], got ", inputs.query);
  }
  const int64_t row_size = read_shards(api, context, next, attributes.rows_per_shard, inputs);
  if (inputs.row_scales.data != nullptr) {
    require(inputs.row_scales.type == kFloat && inputs.row_scales.sizes == std::vector<int64_t>({inputs.rows, 2}),
            "row_scales must be float [rows, 2], got ", inputs.row_scales);
  }
  inputs.value_dim = row_size - attributes.pre_value_dim;
  require(inputs.value_dim > 0 && inputs.value_dim % inputs.cores == 0, "rows of ", row_size,
          " elements do not split into a pre-value and C equal parts");
  return inputs;
}

}  // namespace umv2::ort
