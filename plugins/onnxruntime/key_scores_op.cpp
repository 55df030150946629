// umv2::KeyScores for ONNX Runtime on a CPU: packs keys that are constants of the model once, normalises the queries, and
// hands a block of keys and tokens to each task.
#include <algorithm>

#include "key_matrices.h"
#include "ops.h"
#include "registration.h"
#include "tasks.h"

namespace umv2::ort {
namespace {

// A task scores 128 keys, as many as one token has sums for in registers, for up to 64 tokens.
constexpr int64_t kBlockPanels = 128 / kPanelKeys;
constexpr int64_t kBlockTokens = 64;

// Fewer elements are normalised, and fewer products are summed, sooner than another thread wakes.
constexpr int64_t kElementsWorthThreads = 1 << 14;
constexpr int64_t kProductsWorthThreads = 1 << 17;

class KeyScores {
 public:
  static constexpr const char* kName = "KeyScores";
  static constexpr const char* kProvider = kExecutionProvider;
  static constexpr size_t kInputs = 2, kOutputs = 2;

  // queries, then the matrices of row keys and those of column keys.
  static ElementType input_type(size_t index, ElementType scores) { return index == 0 ? scores : kUndefined; }
  static ElementType output_type(size_t, ElementType) { return kFloat; }
  static Characteristic input_characteristic(size_t index) { return index == 1 ? kVariadic : kRequired; }

  KeyScores(const Api& api, const KernelInfo* info) : api_(api), kernels_(runnable_kernels()), attributes_(api, info) {
    size_t count = 0;
    check(api, api.constant_input_count(info, &count), "input count");
    require_count(count);
    std::vector<Tensor> keys;
    for (size_t i = 1; i < count; ++i) {
      const std::optional<Tensor> matrix = constant_input(api, info, i);
      if (!matrix) return;
      keys.push_back(*matrix);
    }
    packed_ = pack_matrices(keys, attributes_);
  }

  const Api& api() const { return api_; }

  void compute(KernelContext* context) {
    const Tensor queries = input(api_, context, 0);
    require(queries.sizes.size() == 2 && queries.sizes[1] % attributes_.key_dim == 0,
            "queries must be [T, chunks * key_dim], got ", queries);
    for (const int64_t chunk : attributes_.chunks) {
      require(within(chunk, 0, queries.sizes[1] / attributes_.key_dim - 1), "chunk ", chunk, " lies outside the queries");
    }
    if (packed_) return score(context, queries, *packed_);
    size_t count = 0;
    check(api_, api_.input_count(context, &count), "input count");
    require_count(count);
    std::vector<Tensor> keys;
    for (size_t i = 1; i < count; ++i) keys.push_back(input(api_, context, i));
    score(context, queries, pack_matrices(keys, attributes_));
  }

 private:
  // Consecutive panels of a side: of one matrix, or of all of them where they are joined by rank.
  struct Block {
    KeyScoresArgs args;
    int64_t first, last;
  };

  void require_count(size_t inputs) const {
    require(inputs == attributes_.chunks.size() + 1, attributes_.chunks.size(), " matrices of keys expected, got ",
            inputs - 1);
  }

  void score(KernelContext* context, const Tensor& queries, const KeyMatrices& keys) const {
    const int64_t tokens = queries.sizes[0];
    const std::initializer_list<int64_t> sizes{tokens, attributes_.heads, keys.keys_per_side, attributes_.ranks};
    float* sides[2] = {output<float>(api_, context, 0, sizes), output<float>(api_, context, 1, sizes)};
    if (tokens == 0) return;
    const std::unique_ptr<float[]> normalized = normalize(context, queries);
    run(context, keys, normalized.get(), queries.sizes[1], sides, tokens);
  }

  std::unique_ptr<float[]> normalize(const KernelContext* context, const Tensor& queries) const {
    const int64_t size = attributes_.key_dim, total = queries.count();
    std::unique_ptr<float[]> result = unfilled(total);
    parallel_for(api_, context, total >= kElementsWorthThreads, queries.sizes[0], [&](int64_t token) {
      const int64_t width = queries.sizes[1], first = token * width;
      const float* values = floats<0>(kernels_, queries, first, width);
      for (int64_t x = 0; x < width; x += size) {
        kernels_.normalize(values + x, size, attributes_.epsilon, result.get() + first + x);
      }
    });
    return result;
  }

  void run(const KernelContext* context, const KeyMatrices& keys, const float* queries, int64_t query_size,
           float* const* sides, int64_t tokens) const {
    const int64_t joined = attributes_.joined(), count = attributes_.matrices();
    const int64_t scores_size = attributes_.heads * keys.keys_per_side * attributes_.ranks;
    std::vector<const float*> firsts;
    std::vector<const void*> panels;
    for (int64_t i = 0; i < count; ++i) {
      firsts.push_back(queries + attributes_.chunks[i] * attributes_.key_dim);
      panels.push_back(keys.matrices[i].panels());
    }
    std::vector<Block> blocks;
    float* scores = sides[0];
    for (int64_t i = 0; i < count; i += joined) {
      if (i == attributes_.row_matrices) scores = sides[1];
      const KeyMatrix& matrix = keys.matrices[i];
      const KeyScoresArgs args{&firsts[i], &panels[i], scores, joined, query_size, attributes_.key_dim, matrix.key_count(),
                               scores_size, matrix.type()};
      const int64_t end = (matrix.key_count() + kPanelKeys - 1) / kPanelKeys;
      for (int64_t panel = 0; panel < end; panel += kBlockPanels) {
        blocks.push_back({args, panel, std::min(end, panel + kBlockPanels)});
      }
      scores += matrix.key_count() * joined;
    }
    const int64_t token_blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
    const int64_t products = tokens * scores_size * 2 * attributes_.key_dim;
    parallel_for(api_, context, products >= kProductsWorthThreads,
                 token_blocks * static_cast<int64_t>(blocks.size()), [&](int64_t task) {
                   const Block& block = blocks[static_cast<size_t>(task / token_blocks)];
                   const int64_t token = task % token_blocks * kBlockTokens;
                   kernels_.key_scores(block.args, token, std::min(tokens, token + kBlockTokens), block.first, block.last);
                 });
  }

  const Api& api_;
  const Kernels& kernels_;
  KeyAttributes attributes_;
  std::optional<KeyMatrices> packed_;
};

}  // namespace

const CustomOp* key_scores_op(const Api& api, ElementType scores) { return new Registration<KeyScores>(api, scores); }

}  // namespace umv2::ort
