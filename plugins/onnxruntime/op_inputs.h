// What the ops are on any provider: their signatures, and their inputs by name once shapes and attributes are found to
// agree. No element is read, wherever the tensors lie.
#pragma once

#include <optional>
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

// The square of row_topk is a number of cells that 32 bits count.
inline constexpr int64_t kMostRowTopk = 1 << 15;

struct TopkAttributes {
  int64_t row_topk, topk;

  TopkAttributes(const Api& api, const KernelInfo* info);
};

// The weights of a retrieval: part of the model, as a rule.
struct TopkWeights {
  Tensor u, v, cores;
};

struct TopkInputs {
  Tensor row_scores, col_scores, u, v, cores;
  int64_t tokens = 0, heads = 0, keys_per_side = 0, ranks = 0, core_count = 0;
};

// The weights, where all of them are constants of the model: they need not be asked for at each call.
std::optional<TopkWeights> constant_weights(const Api& api, const KernelInfo* info);

TopkInputs topk_inputs(const Api& api, const KernelContext* context, const TopkAttributes& attributes,
                       const std::optional<TopkWeights>& constants = std::nullopt);

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

  // Of the first shard, or of the row_scales before it.
  size_t first_table() const { return 2 + (groups > 1 ? 1 : 0) + (pre_value_dim > 0 ? 1 : 0); }
};

// The shards of a table with their scales: part of the model, as a rule. Without int8 rows `row_scales` has no data.
struct LookupTable {
  Tensor row_scales{};
  std::vector<const void*> shards{};
  ElementType row_type = kUndefined;
  int64_t rows = 0, row_size = 0;
};

// Without groups or pre-values, `group` or `query` has no data.
struct LookupInputs {
  Tensor indices, scores;
  Tensor group{}, query{}, row_scales{};
  std::vector<const void*> shards{};
  ElementType row_type = kUndefined;
  int64_t tokens = 0, hits = 0, cores = 0, rows = 0, value_dim = 0;
  int64_t width = 0;  // groups * value_dim, of one token of the output
};

// The table, where all of it is constant: a model of 16 shards asks for 16 tensors less at each call.
std::optional<LookupTable> constant_table(const Api& api, const KernelInfo* info, const LookupAttributes& attributes);

LookupInputs lookup_inputs(const Api& api, const KernelContext* context, const LookupAttributes& attributes,
                           const std::optional<LookupTable>& constants = std::nullopt);

}  // namespace umv2::ort
