// umv2::MemoryLookup for ONNX Runtime on a CPU: cuts the work, and says what was wrong where a kernel found something.
#include <algorithm>

#include "kernels.h"
#include "memory_advice.h"
#include "op_inputs.h"
#include "ops.h"
#include "registration.h"
#include "tasks.h"

namespace umv2::ort {
namespace {

// Below this many tokens the hits of a token are cut into blocks too, so that one token keeps all threads busy. The cut
// depends on the shape alone: results are the same for any number of threads.
constexpr int64_t kFewTokens = 8;
constexpr int64_t kBlockHits = 16;

// Less than this is read by one thread in 7 us, about as long as another takes to wake up and be waited for.
constexpr int64_t kBytesWorthThreads = 1 << 15;

int64_t element_size(ElementType type) { return type == kFloat ? 4 : type == kInt8 ? 1 : 2; }

void require_range(const int64_t* values, int64_t first, int64_t count, int64_t end, const char* name) {
  for (int64_t i = first; i < first + count; ++i) {
    require(within(values[i], 0, end - 1), name, " holds ", values[i], " at element ", i, ", valid are 0 to ", end - 1);
  }
}

class MemoryLookup : public LookupSignature {
 public:
  static constexpr const char* kProvider = kExecutionProvider;

  MemoryLookup(const Api& api, const KernelInfo* info)
      : api_(api), kernels_(runnable_kernels()), attributes_(api, info), table_(constant_table(api, info, attributes_)) {
    if (table_) advise_on(*table_);
  }

  const Api& api() const { return api_; }

  void compute(KernelContext* context) {
    const LookupInputs inputs = lookup_inputs(api_, context, attributes_, table_);
    const LookupArgs args{inputs.row_scales.as<float>(),
                          inputs.shards.data(),
                          inputs.rows,
                          attributes_.rows_per_shard,
                          inputs.hits,
                          inputs.cores,
                          attributes_.pre_value_dim,
                          inputs.value_dim,
                          attributes_.groups,
                          attributes_.gelu,
                          storage(inputs.row_type, "rows")};
    const FloatOutput output(api_, context, 0, inputs.scores.type, {inputs.tokens, inputs.width});
    const int64_t row_bytes = (attributes_.pre_value_dim + inputs.value_dim) * element_size(inputs.row_type);
    const bool worth_threads = inputs.indices.count() >= kBytesWorthThreads / row_bytes;
    const int64_t blocks =
        worth_threads && inputs.tokens < kFewTokens ? std::max<int64_t>(1, inputs.hits / kBlockHits) : 1;
    if (blocks > 1) return in_blocks(context, inputs, args, output, blocks);
    parallel_for(api_, context, worth_threads, inputs.tokens, [&](int64_t token) {
      float* piece = output.piece(token * inputs.width, inputs.width);
      look_up(inputs, args, token, 0, inputs.hits, piece);
      output.done(kernels_, piece, token * inputs.width, inputs.width);
    });
  }

 private:
  // Tables that are part of the model; memory that a caller passes in is the caller's to advise on.
  void advise_on(const LookupTable& table) const {
    const int64_t row_bytes = table.row_size * element_size(table.row_type);
    int64_t left = table.rows;
    for (const void* shard : table.shards) {
      const int64_t rows = std::min(left, attributes_.rows_per_shard);
      advise_random(shard, static_cast<size_t>(rows * row_bytes));
      left -= rows;
    }
    const Tensor& scales = table.row_scales;
    if (scales.data != nullptr) advise_random(scales.data, static_cast<size_t>(scales.count()) * sizeof(float));
  }

  // The hits of a token in several blocks, each a task with a sum of its own; added in order.
  void in_blocks(KernelContext* context, const LookupInputs& inputs, const LookupArgs& args, const FloatOutput& output,
                 int64_t blocks) const {
    const int64_t width = inputs.width;
    const std::unique_ptr<float[]> partial =
        unfilled(product_of({inputs.tokens, blocks, width}, "the sums of blocks of hits"));
    parallel_for(api_, context, true, inputs.tokens * blocks, [&](int64_t task) {
      const int64_t token = task / blocks, block = task % blocks;
      look_up(inputs, args, token, block * inputs.hits / blocks, (block + 1) * inputs.hits / blocks,
              partial.get() + task * width);
    });
    for (int64_t token = 0; token < inputs.tokens; ++token) {
      float* piece = output.piece(token * width, width);
      const float* first = partial.get() + token * blocks * width;
      std::copy(first, first + width, piece);
      for (int64_t block = 1; block < blocks; ++block) {
        for (int64_t x = 0; x < width; ++x) piece[x] += first[block * width + x];
      }
      output.done(kernels_, piece, token * width, width);
    }
  }

  // Hits first .. last of one token; what the kernel refuses becomes an error that names it.
  void look_up(const LookupInputs& inputs, const LookupArgs& args, int64_t token, int64_t first, int64_t last,
               float* result) const {
    const int64_t hits = inputs.hits, hit = token * hits, scores = hits * inputs.cores;
    const bool grouped = attributes_.groups > 1, pre_values = attributes_.pre_value_dim > 0;
    const LookupToken one{inputs.indices.as<int64_t>() + hit,
                          floats<0>(kernels_, inputs.scores, token * scores, scores),
                          grouped ? inputs.group.as<int64_t>() + hit : nullptr,
                          pre_values ? floats<1>(kernels_, inputs.query, token * attributes_.pre_value_dim,
                                                 attributes_.pre_value_dim)
                                     : nullptr};
    if (kernels_.memory_lookup(args, one, first, last, result)) return;
    require_range(inputs.indices.as<int64_t>(), hit, hits, inputs.rows, "indices");
    if (grouped) require_range(inputs.group.as<int64_t>(), hit, hits, attributes_.groups, "group");
    require_no_nan(one.scores, token * scores, scores, "scores");
    throw Error("the kernel refused its inputs");
  }

  const Api& api_;
  const Kernels& kernels_;
  LookupAttributes attributes_;
  std::optional<LookupTable> table_;
};

}  // namespace

const CustomOp* memory_lookup_op(const Api& api, ElementType scores) {
  return new Registration<MemoryLookup>(api, scores);
}

}  // namespace umv2::ort
