// umv2::KeyScores for ONNX Runtime: normalises the queries, and hands a block of keys and tokens to each task.
#include <algorithm>

#include "kernels.h"
#include "ops.h"
#include "registration.h"

namespace umv2::ort {
namespace {

// 32 keys of up to 256 elements as floats fill the first-level cache; 64 tokens pay for copying them there.
constexpr int64_t kBlockKeys = 32;
constexpr int64_t kBlockTokens = 64;

// Of heads and of ranks: their product cannot overflow.
constexpr int64_t kMost = 1 << 20;

// Fewer elements than this are normalised sooner than other threads wake.
constexpr int64_t kElementsWorthThreads = 1 << 14;

class KeyScores {
 public:
  static constexpr const char* kName = "KeyScores";
  static constexpr const char* kProvider = kExecutionProvider;
  static constexpr size_t kInputs = 2, kOutputs = 2;

  // queries, then the matrices of row keys and those of column keys.
  static ElementType input_type(size_t index, ElementType scores) { return index == 0 ? scores : kUndefined; }
  static ElementType output_type(size_t, ElementType) { return kFloat; }
  static Characteristic input_characteristic(size_t index) { return index == 1 ? kVariadic : kRequired; }

  KeyScores(const Api& api, const KernelInfo* info)
      : api_(api),
        key_dim_(attribute(api, info, "key_dim")),
        heads_(attribute(api, info, "heads")),
        ranks_(attribute(api, info, "ranks")),
        row_matrices_(attribute(api, info, "row_matrices")),
        by_rank_(attribute(api, info, "by_rank") != 0),
        epsilon_(float_attribute(api, info, "epsilon")),
        chunks_(list_attribute(api, info, "chunks")) {
    const int64_t count = static_cast<int64_t>(chunks_.size());
    require(key_dim_ >= 1 && heads_ >= 1 && heads_ <= kMost && ranks_ >= 1 && ranks_ <= kMost && row_matrices_ >= 1 &&
                row_matrices_ < count,
            "an attribute is out of range");
    require(!by_rank_ || (row_matrices_ == ranks_ && count == 2 * ranks_), "by_rank needs a matrix for each rank and side");
  }

  const Api& api() const { return api_; }

  void compute(KernelContext* context) {
    const Tensor queries = input(api_, context, 0);
    require(queries.sizes.size() == 2 && queries.sizes[1] % key_dim_ == 0,
            "queries must be [T, chunks * key_dim], got ", queries);
    const int64_t tokens = queries.sizes[0], query_size = queries.sizes[1];
    const std::vector<KeyScoresArgs> matrices = read_matrices(context, query_size);
    const int64_t keys_per_side = keys_per_side_of(matrices, 0, row_matrices_);
    require(keys_per_side == keys_per_side_of(matrices, row_matrices_, static_cast<int64_t>(matrices.size())),
            "row keys and column keys differ in number");

    std::vector<float> buffer;
    const std::vector<float> normalized = normalize(context, floats(queries, buffer, "queries"), tokens, query_size);
    const std::vector<int64_t> sizes{tokens, heads_, keys_per_side, ranks_};
    float* sides[2] = {output<float>(api_, context, 0, sizes), output<float>(api_, context, 1, sizes)};
    run(context, matrices, normalized.data(), sides, tokens, heads_ * keys_per_side * ranks_);
  }

 private:
  // All but the pointers to queries and scores.
  std::vector<KeyScoresArgs> read_matrices(const KernelContext* context, int64_t query_size) const {
    size_t count = 0;
    check(api_, api_.input_count(context, &count), "input count");
    require(count == chunks_.size() + 1, chunks_.size(), " matrices of keys expected, got ", count - 1);
    std::vector<KeyScoresArgs> matrices;
    for (size_t i = 0; i < chunks_.size(); ++i) {
      const Tensor keys = input(api_, context, i + 1);
      require(keys.sizes.size() == 2 && keys.sizes[0] == key_dim_ && keys.sizes[1] > 0,
              "keys must be [key_dim, keys], got ", keys);
      require(keys.type != kInt8, "keys must be float, float16 or bfloat16: int8 keys would need scales");
      require(chunks_[i] >= 0 && chunks_[i] < query_size / key_dim_,
              "chunk ", chunks_[i], " lies outside the queries");
      matrices.push_back(
          {nullptr, keys.data, nullptr, query_size, key_dim_, keys.sizes[1], 0, by_rank_ ? ranks_ : 1, storage(keys.type, "keys")});
    }
    return matrices;
  }

  int64_t keys_per_side_of(const std::vector<KeyScoresArgs>& matrices, int64_t first, int64_t last) const {
    int64_t columns = 0;
    for (int64_t i = first; i < last; ++i) {
      require(!by_rank_ || matrices[i].key_count == matrices[first].key_count, "the ranks differ in their number of keys");
      columns += matrices[i].key_count;
    }
    const int64_t keys_per_side = columns / (heads_ * ranks_);
    for (int64_t i = first; i < last; ++i) {
      const int64_t of_one_head = by_rank_ ? heads_ * keys_per_side : keys_per_side * ranks_;
      require(keys_per_side > 0 && matrices[i].key_count % of_one_head == 0 && columns % (heads_ * ranks_) == 0,
              "a matrix of ", matrices[i].key_count, " keys does not divide into heads and ranks");
    }
    return keys_per_side;
  }

  std::vector<float> normalize(const KernelContext* context, const float* queries, int64_t tokens, int64_t query_size) {
    const Kernels& kernels = *select_kernels();
    std::vector<float> result(static_cast<size_t>(tokens * query_size));
    const auto body = [&](int64_t chunk) {
      kernels.normalize(queries + chunk * key_dim_, key_dim_, epsilon_, result.data() + chunk * key_dim_);
    };
    const int64_t chunks = tokens * query_size / key_dim_;
    if (tokens * query_size < kElementsWorthThreads) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
    } else {
      parallel_for(api_, context, chunks, body);
    }
    return result;
  }

  // A task is a block of tokens and a block of keys of one matrix, or, joined by rank, of all matrices of a side: their
  // scores lie side by side, and two threads must not write to one cache line.
  void run(const KernelContext* context, std::vector<KeyScoresArgs> matrices, const float* queries, float* const* sides,
           int64_t tokens, int64_t scores_size) const {
    std::vector<std::pair<size_t, int64_t>> blocks;  // first matrix, first key
    for (size_t i = 0; i < matrices.size(); ++i) {
      KeyScoresArgs& matrix = matrices[i];
      const bool column_side = static_cast<int64_t>(i) >= row_matrices_;
      const size_t first_of_side = column_side ? static_cast<size_t>(row_matrices_) : 0;
      const bool first = i == first_of_side;
      matrix.queries = queries + chunks_[i] * key_dim_;
      matrix.scores_size = scores_size;
      matrix.scores = first ? sides[column_side]
                            : matrices[i - 1].scores + (by_rank_ ? 1 : matrices[i - 1].key_count);
      if (by_rank_ && !first) continue;
      for (int64_t key = 0; key < matrix.key_count; key += kBlockKeys) blocks.emplace_back(i, key);
    }
    const int64_t token_blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
    const size_t joined = by_rank_ ? static_cast<size_t>(ranks_) : 1;
    const Kernels& kernels = *select_kernels();
    parallel_for(api_, context, token_blocks * static_cast<int64_t>(blocks.size()), [&](int64_t task) {
      const auto [matrix, key] = blocks[static_cast<size_t>(task / token_blocks)];
      const int64_t token = task % token_blocks * kBlockTokens;
      for (size_t i = matrix; i < matrix + joined; ++i) {
        kernels.key_scores(matrices[i], token, std::min(tokens, token + kBlockTokens), key,
                           std::min(matrices[i].key_count, key + kBlockKeys));
      }
    });
  }

  const Api& api_;
  int64_t key_dim_, heads_, ranks_, row_matrices_;
  bool by_rank_;
  float epsilon_;
  std::vector<int64_t> chunks_;
};

}  // namespace

const CustomOp* key_scores_op(const Api& api, ElementType scores) { return new Registration<KeyScores>(api, scores); }

}  // namespace umv2::ort
