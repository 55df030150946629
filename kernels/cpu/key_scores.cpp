// umv2::KeyScores: queries normalised, then multiplied with constant keys of 16 or 32 bits, sums in float.
//
// Every sum runs over the key in order and in the same instructions, whatever the number of tokens: a token's scores, and
// hence its rows, do not depend on what else is in the batch.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace umv2::UMV2_TARGET {
namespace {

// From this many tokens on, a block of keys is converted to a contiguous float copy first.
constexpr int64_t kTokensWorthACopy = 8;

// The first `count` elements, then zeros.
template <typename T>
Vec load_part(const T* values, int64_t count) {
  T padded[Vec::kWidth] = {};
  std::copy(values, values + count, padded);
  return Vec::load(static_cast<const T*>(padded));
}

// Scores of TOKENS tokens with `count` keys; `keys` [key_dim, stride] begins at the first of them. All keys of a vector but,
// in the PARTIAL form of one vector, those that the matrix lacks.
template <int TOKENS, int VECTORS, bool PARTIAL, typename T>
void tile(const KeyScoresArgs& args, const T* keys, int64_t stride, int64_t token, int64_t column,
          int64_t count = Vec::kWidth) {
  static_assert(!PARTIAL || VECTORS == 1);
  Vec sums[TOKENS][VECTORS];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = Vec::zero();
  }
  const float* query = args.queries + token * args.query_size;
  for (int64_t k = 0; k < args.key_dim; ++k) {
    Vec key[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      const T* first = keys + k * stride + v * Vec::kWidth;
      key[v] = PARTIAL ? load_part(first, count) : Vec::load(first);
    }
    for (int t = 0; t < TOKENS; ++t) {
      const Vec q = Vec::broadcast(query[t * args.query_size + k]);
      for (int v = 0; v < VECTORS; ++v) sums[t][v] = fma(key[v], q, sums[t][v]);
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    float* scores = args.scores + (token + t) * args.scores_size + column * args.score_stride;
    for (int v = 0; v < VECTORS; ++v, scores += Vec::kWidth * args.score_stride) {
      if (!PARTIAL && args.score_stride == 1) {
        sums[t][v].store(scores);
        continue;
      }
      float lanes[Vec::kWidth];
      sums[t][v].store(lanes);
      for (int64_t i = 0; i < (PARTIAL ? count : Vec::kWidth); ++i) scores[i * args.score_stride] = lanes[i];
    }
  }
}

// TOKENS tokens with all keys of a block; eight sums at a time keep the multipliers busy.
template <int TOKENS, typename T>
void columns(const KeyScoresArgs& args, const T* keys, int64_t stride, int64_t token, int64_t first, int64_t last) {
  constexpr int kVectors = 8 / TOKENS;
  int64_t column = first;
  for (; column + kVectors * Vec::kWidth <= last; column += kVectors * Vec::kWidth) {
    tile<TOKENS, kVectors, false>(args, keys + (column - first), stride, token, column);
  }
  for (; column + Vec::kWidth <= last; column += Vec::kWidth) {
    tile<TOKENS, 1, false>(args, keys + (column - first), stride, token, column);
  }
  if (column < last) tile<TOKENS, 1, true>(args, keys + (column - first), stride, token, column, last - column);
}

template <typename T>
void tokens(const KeyScoresArgs& args, const T* keys, int64_t stride, int64_t token, int64_t end, int64_t first,
            int64_t last) {
  for (; token + 4 <= end; token += 4) columns<4>(args, keys, stride, token, first, last);
  for (; token < end; ++token) columns<1>(args, keys, stride, token, first, last);
}

template <typename T>
void block(const KeyScoresArgs& args, int64_t first_token, int64_t last_token, int64_t first, int64_t last) {
  const T* keys = static_cast<const T*>(args.keys) + first;
  if (last_token - first_token < kTokensWorthACopy) {
    return tokens(args, keys, args.key_count, first_token, last_token, first, last);
  }
  thread_local std::vector<float> copy;
  const int64_t width = last - first;
  copy.resize(static_cast<size_t>(args.key_dim * width));
  for (int64_t k = 0; k < args.key_dim; ++k) {
    const T* from = keys + k * args.key_count;
    float* to = copy.data() + k * width;
    int64_t x = 0;
    for (; x + Vec::kWidth <= width; x += Vec::kWidth) Vec::load(from + x).store(to + x);
    for (; x < width; ++x) to[x] = to_float(from[x]);
  }
  tokens(args, static_cast<const float*>(copy.data()), width, first_token, last_token, first, last);
}

}  // namespace

void normalize(const float* values, int64_t size, float epsilon, float* result) {
  Vec sums = Vec::zero();
  int64_t x = 0;
  for (; x + Vec::kWidth <= size; x += Vec::kWidth) {
    const Vec value = Vec::load(values + x);
    sums = fma(value, value, sums);
  }
  float sum = sums.sum();
  for (; x < size; ++x) sum += values[x] * values[x];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(size) + epsilon);
  for (x = 0; x < size; ++x) result[x] = values[x] * scale;
}

void key_scores(const KeyScoresArgs& args, int64_t first_token, int64_t last_token, int64_t first_key,
                int64_t last_key) {
  switch (args.key_type) {
    case Storage::kFloat32:
      return block<float>(args, first_token, last_token, first_key, last_key);
    case Storage::kFloat16:
      return block<Half>(args, first_token, last_token, first_key, last_key);
    case Storage::kBFloat16:
      return block<BFloat16>(args, first_token, last_token, first_key, last_key);
    case Storage::kInt8:
      return;  // the op refuses such keys
  }
}

}  // namespace umv2::UMV2_TARGET
