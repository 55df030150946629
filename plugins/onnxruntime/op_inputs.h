// What the ops are on any provider: their signatures, and their inputs by name once shapes and attributes are found to
// agree. No element is read, wherever the tensors lie.
#pragma once

#include <vector>

#include "kernel_io.h"

namespace umv2::ort {

struct TopkSignature {
  static constexpr const char* kName = "TuckerTopK";
  static constexpr size_t kInputs = 5, kOutputs = 2;

  static ElementType input_type(size_t, ElementType scores) { return scores; }
  static ElementType output_type(size_t index, ElementType scores) { return index == 0 ? kInt64 : scores; }
  static Characteristic input_characteristic(size_t) { return kRequired; }
};

struct TopkAttributes {
  int64_t row_topk, topk;

  TopkAttributes(const Api& api, const KernelInfo* info);
};

struct TopkInputs {
  Tensor row_scores, col_scores, u, v, cores;
  int64_t tokens = 0, heads = 0, keys_per_side = 0, ranks = 0, core_count = 0;
};

TopkInputs topk_inputs(const Api& api, const KernelContext* context, const TopkAttributes& attributes);

struct LookupSignature {
  static constexpr const char* kName = "MemoryLookup";
  static constexpr size_t kInputs = 3, kOutputs = 1;

  // indices, scores, and all that follows: group, query, row_scales where the attributes say so, then the shards.
  static ElementType input_type(size_t index, ElementType scores) {
    return index == 0 ? kInt64 : index == 1 ? scores : kUndefined;
  }
  static ElementType output_type(size_t, ElementType scores) { return scores; }
  static Characteristic input_characteristic(size_t index) { return index == 2 ? kVariadic : kRequired; }
};

struct LookupAttributes {
  int64_t pre_value_dim, rows_per_shard, groups;
  bool gelu;

  LookupAttributes(const Api& api, const KernelInfo* info);
};

// Without groups, pre-values or int8 rows, `group`, `query` or `row_scales` have no data.
struct LookupInputs {
  Tensor indices, scores;
  Tensor group{}, query{}, row_scales{};
  std::vector<const void*> shards{};
  ElementType row_type = kUndefined;
  int64_t tokens = 0, hits = 0, cores = 0, rows = 0, value_dim = 0;
};

LookupInputs lookup_inputs(const Api& api, const KernelContext* context, const LookupAttributes& attributes);

}  // namespace umv2::ort
