// umv2::MemoryLookup for ONNX Runtime on a CPU: checks every index, and cuts the work.
#include <algorithm>

#include "kernels.h"
#include "memory_advice.h"
#include "op_inputs.h"
#include "ops.h"
#include "registration.h"

namespace umv2::ort {
namespace {

// Below this many tokens the hits of a token are cut into blocks too, so that one token keeps all threads busy. The cut
// depends on the shape alone: results are the same for any number of threads.
constexpr int64_t kFewTokens = 8;
constexpr int64_t kBlockHits = 16;

size_t element_size(ElementType type) { return type == kFloat ? 4 : type == kInt8 ? 1 : 2; }

class MemoryLookup : public LookupSignature {
 public:
  static constexpr const char* kProvider = kExecutionProvider;

  MemoryLookup(const Api& api, const KernelInfo* info) : api_(api), attributes_(api, info) { advise_on_tables(info); }

  const Api& api() const { return api_; }

  void compute(KernelContext* context) {
    const LookupInputs inputs = lookup_inputs(api_, context, attributes_);
    std::vector<float> score_buffer, query_buffer;
    LookupArgs args{};
    args.indices = inputs.indices.as<int64_t>();
    args.scores = floats(inputs.scores, score_buffer, "scores");
    require_no_nan(args.scores, inputs.scores.count(), "scores");
    require_range(args.indices, inputs.indices.count(), inputs.rows, "indices");
    if (attributes_.groups > 1) {
      args.group = inputs.group.as<int64_t>();
      require_range(args.group, inputs.group.count(), attributes_.groups, "group");
    }
    if (attributes_.pre_value_dim > 0) args.query = floats(inputs.query, query_buffer, "query");
    args.row_scales = inputs.row_scales.as<float>();
    args.shards = inputs.shards.data();
    args.rows_per_shard = attributes_.rows_per_shard;
    args.hits = inputs.hits;
    args.cores = inputs.cores;
    args.pre_value_dim = attributes_.pre_value_dim;
    args.value_dim = inputs.value_dim;
    args.groups = attributes_.groups;
    args.gelu = attributes_.gelu;
    args.row_type = storage(inputs.row_type, "rows");
    run(context, args, inputs.tokens, inputs.scores.type);
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
  LookupAttributes attributes_;
};

}  // namespace

const CustomOp* memory_lookup_op(const Api& api, ElementType scores) {
  return new Registration<MemoryLookup>(api, scores);
}

}  // namespace umv2::ort
