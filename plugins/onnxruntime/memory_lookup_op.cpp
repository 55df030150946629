// umv2::MemoryLookup for ONNX Runtime: finds its inputs by the attributes, checks every index, and cuts the work.
#include <algorithm>

#include "kernels.h"
#include "memory_advice.h"
#include "ops.h"
#include "registration.h"

namespace umv2::ort {
namespace {

// Below this many tokens the hits of a token are cut into blocks too, so that one token keeps all threads busy. The cut
// depends on the shape alone: results are the same for any number of threads.
constexpr int64_t kFewTokens = 8;
constexpr int64_t kBlockHits = 16;

size_t element_size(ElementType type) { return type == kFloat ? 4 : type == kInt8 ? 1 : 2; }

class MemoryLookup {
 public:
  static constexpr const char* kName = "MemoryLookup";
  static constexpr size_t kInputs = 3, kOutputs = 1;

  // indices, scores, and all that follows: group, query, row_scales where the attributes say so, then the shards.
  static ElementType input_type(size_t index, ElementType scores) {
    return index == 0 ? kInt64 : index == 1 ? scores : kUndefined;
  }
  static ElementType output_type(size_t, ElementType scores) { return scores; }
  static Characteristic input_characteristic(size_t index) { return index == 2 ? kVariadic : kRequired; }

  MemoryLookup(const Api& api, const KernelInfo* info)
      : api_(api),
        pre_value_dim_(attribute(api, info, "pre_value_dim")),
        rows_per_shard_(attribute(api, info, "rows_per_shard")),
        groups_(attribute(api, info, "groups")) {
    const std::string activation = text_attribute(api, info, "activation");
    require(activation == "none" || activation == "gelu", "activation must be none or gelu, got ", activation);
    gelu_ = activation == "gelu";
    require(pre_value_dim_ >= 0 && rows_per_shard_ >= 1 && groups_ >= 1, "an attribute is out of range");
    advise_on_tables(info);
  }

  const Api& api() const { return api_; }

  void compute(KernelContext* context) {
    const Tensor indices = input(api_, context, 0), scores = input(api_, context, 1);
    require(indices.sizes.size() == 2 && scores.sizes.size() == 3 && scores.sizes[0] == indices.sizes[0] &&
                scores.sizes[1] == indices.sizes[1] && scores.sizes[2] > 0,
            "indices [T, K] and scores [T, K, C] expected, got ", indices, " and ", scores);
    const int64_t tokens = indices.sizes[0], hits = indices.sizes[1], cores = scores.sizes[2];
    size_t next = 2;
    std::vector<float> score_buffer, query_buffer;
    LookupArgs args{};
    args.indices = indices.as<int64_t>();
    args.scores = floats(scores, score_buffer, "scores");
    require_no_nan(args.scores, scores.count(), "scores");
    if (groups_ > 1) {
      const Tensor group = input(api_, context, next++);
      require(group.type == kInt64 && group.sizes == indices.sizes, "group must be int64 like indices, got ", group);
      args.group = group.as<int64_t>();
      require_range(args.group, indices.count(), groups_, "group");
    }
    if (pre_value_dim_ > 0) {
      const Tensor query = input(api_, context, next++);
      require(query.sizes == std::vector<int64_t>({tokens, pre_value_dim_}), "query must be [T, P], got ", query);
      args.query = floats(query, query_buffer, "query");
    }
    Tensor row_scales{kUndefined, {}, nullptr};
    std::vector<const void*> shards;
    int64_t rows = 0;
    const Tensor first = read_shards(context, next, row_scales, shards, rows);
    require_range(args.indices, indices.count(), rows, "indices");
    if (row_scales.data != nullptr) {
      require(row_scales.type == kFloat && row_scales.sizes == std::vector<int64_t>({rows, 2}),
              "row_scales must be float [rows, 2], got ", row_scales);
    }
    args.row_scales = row_scales.as<float>();
    args.shards = shards.data();
    args.rows_per_shard = rows_per_shard_;
    args.hits = hits;
    args.cores = cores;
    args.pre_value_dim = pre_value_dim_;
    args.value_dim = first.sizes[1] - pre_value_dim_;
    args.groups = groups_;
    args.gelu = gelu_;
    args.row_type = storage(first.type, "rows");
    require(args.value_dim > 0 && args.value_dim % cores == 0,
            "rows ", first, " do not split into a pre-value and C equal parts");
    run(context, args, tokens, scores.type);
  }

 private:
  // Tables that are part of the model; memory that a caller passes in is the caller's to advise on.
  void advise_on_tables(const KernelInfo* info) const {
    size_t count = 0;
    check(api_, api_.constant_input_count(info, &count), "input count");
    for (size_t i = 2; i < count; ++i) {
      int is_constant = 0;
      const Value* value = nullptr;
      check(api_, api_.constant_input(info, i, &is_constant, &value), "constant input");
      if (!is_constant || value == nullptr) continue;
      const Tensor table = tensor_of(api_, value);
      advise_random(table.data, static_cast<size_t>(table.count()) * element_size(table.type));
    }
  }

  // Collects the shards from input `next` on, and row_scales before them when the rows are int8; counts their rows, and
  // returns the first shard.
  Tensor read_shards(const KernelContext* context, size_t next, Tensor& row_scales, std::vector<const void*>& shards,
                     int64_t& rows) {
    size_t count = 0;
    check(api_, api_.input_count(context, &count), "input count");
    require(next < count, "no rows are given");
    Tensor first = input(api_, context, next);
    if (next + 1 < count && input(api_, context, next + 1).type == kInt8) {
      row_scales = first;
      first = input(api_, context, ++next);
    }
    require((row_scales.data != nullptr) == (first.type == kInt8), "row_scales are given if and only if rows are int8");
    for (size_t i = next; i < count; ++i) {
      const Tensor shard = input(api_, context, i);
      require(shard.type == first.type && shard.sizes.size() == 2 && shard.sizes[1] == first.sizes[1] &&
                  shard.sizes[0] >= 1 && shard.sizes[0] <= rows_per_shard_ &&
                  (i + 1 == count || shard.sizes[0] == rows_per_shard_),
              "shard ", i - next, " is ", shard, ", which does not fit rows_per_shard ", rows_per_shard_);
      shards.push_back(shard.data);
      rows += shard.sizes[0];
    }
    return first;
  }

  static void require_range(const int64_t* values, int64_t count, int64_t end, const char* name) {
    uint64_t largest = 0;  // negative values become the largest
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint64_t>(values[i]));
    if (count == 0 || largest < static_cast<uint64_t>(end)) return;
    for (int64_t i = 0; i < count; ++i) {
      require(values[i] >= 0 && values[i] < end, name, " holds ", values[i], " at element ", i, ", valid are 0 to ", end - 1);
    }
  }

  void run(KernelContext* context, const LookupArgs& args, int64_t tokens, ElementType type) {
    const int64_t width = args.groups * args.value_dim;
    std::vector<float> converted;
    float* result = nullptr;
    uint16_t* halves = nullptr;
    if (type == kFloat) {
      result = output<float>(api_, context, 0, {tokens, width});
    } else {
      halves = output<uint16_t>(api_, context, 0, {tokens, width});
      converted.resize(static_cast<size_t>(tokens * width));
      result = converted.data();
    }
    const Kernels& kernels = *select_kernels();
    const int64_t blocks = tokens < kFewTokens ? std::max<int64_t>(1, args.hits / kBlockHits) : 1;
    if (blocks == 1) {
      parallel_for(api_, context, tokens, [&](int64_t token) {
        kernels.memory_lookup(args, token, 0, args.hits, result + token * width);
      });
    } else {
      std::vector<float> partial(static_cast<size_t>(tokens * blocks * width));
      parallel_for(api_, context, tokens * blocks, [&](int64_t task) {
        const int64_t token = task / blocks, block = task % blocks;
        kernels.memory_lookup(args, token, block * args.hits / blocks, (block + 1) * args.hits / blocks,
                              partial.data() + task * width);
      });
      for (int64_t token = 0; token < tokens; ++token) {
        float* sum = result + token * width;
        const float* first = partial.data() + token * blocks * width;
        std::copy(first, first + width, sum);
        for (int64_t block = 1; block < blocks; ++block) {
          for (int64_t x = 0; x < width; ++x) sum[x] += first[block * width + x];
        }
      }
    }
    for (int64_t i = 0; halves != nullptr && i < tokens * width; ++i) halves[i] = float_to_half(result[i]);
  }

  const Api& api_;
  int64_t pre_value_dim_, rows_per_shard_, groups_;
  bool gelu_ = false;
};

}  // namespace

const CustomOp* memory_lookup_op(const Api& api, ElementType scores) {
  return new Registration<MemoryLookup>(api, scores);
}

}  // namespace umv2::ort
