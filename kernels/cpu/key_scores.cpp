// umv2::KeyScores: queries normalised, then multiplied with constant keys of 16 or 32 bits, sums in float.
//
// Every sum runs over the key in order and in the same instructions, whatever the number of tokens: a token's scores, and
// hence its rows, do not depend on what else is in the batch.
#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace umv2::UMV2_TARGET {
namespace {

constexpr int kPanelVectors = static_cast<int>(kPanelKeys) / Vec::kWidth;

// The registers decide how many tokens a tile has at most, and how many sums it keeps when it has fewer: eight at least,
// for two multiplications of four cycles each begin in a cycle. AVX-512 has 32 registers, the others 16.
constexpr int kTokens = Vec::kWidth == 16 ? 12 : Vec::kWidth == 8 ? 6 : 2;
constexpr int kSums = Vec::kWidth == 16 ? 24 : Vec::kWidth == 8 ? 12 : 8;

// Panels side by side in a tile of so many tokens.
constexpr int panels_beside(int tokens) {
  int panels = 8;
  while (panels > 1 && panels * kPanelVectors * tokens > kSums) panels /= 2;
  return panels;
}

// Keys are fetched so many elements ahead, 4 KiB of a panel: while a tile multiplies, the processor's own prefetching does not
// keep the path to the third-level cache full. 8 tokens and 4 MB of keys take 232 us instead of 318 on one thread, 64
// tokens 1.21 ms instead of 1.40; one token, which does little else than read, is as fast without.
constexpr int64_t kElementsAhead = 64;

// Keys of 16 bits are converted once for all from this many tokens on.
constexpr int64_t kTokensWorthACopy = 8;

// Sums of TOKENS tokens with the keys of PANELS panels, to scores[t * stride].
template <int TOKENS, int PANELS, typename T>
void tile(const T* panels, int64_t key_dim, const float* queries, int64_t query_size, float* scores, int64_t stride) {
  constexpr int kVectors = PANELS * kPanelVectors;
  Vec sums[TOKENS][kVectors];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = Vec::zero();
  }
  for (int64_t k = 0; k < key_dim; ++k) {
    Vec key[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t panel = v / kPanelVectors, place = v % kPanelVectors * Vec::kWidth;
      const T* at = panels + (panel * key_dim + k) * kPanelKeys + place;
      key[v] = Vec::load(at);
      __builtin_prefetch(at + kElementsAhead * kPanelKeys);
    }
    for (int t = 0; t < TOKENS; ++t) {
      const Vec q = Vec::broadcast(queries[t * query_size + k]);
      for (int v = 0; v < kVectors; ++v) sums[t][v] = fma(key[v], q, sums[t][v]);
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int v = 0; v < kVectors; ++v) sums[t][v].store(scores + t * stride + v * Vec::kWidth);
  }
}

template <typename T>
using TileFn = void (*)(const T*, int64_t, const float*, int64_t, float*, int64_t);

// Tiles of 1 .. kTokens tokens, each with as many panels as it takes, half of that, and so on down to one.
template <typename T, int HALVINGS, size_t... TOKENS>
constexpr std::array<TileFn<T>, sizeof...(TOKENS)> tiles_of(std::index_sequence<TOKENS...>) {
  return {tile<TOKENS + 1, std::max(1, panels_beside(TOKENS + 1) >> HALVINGS), T>...};
}
template <typename T>
constexpr std::array<std::array<TileFn<T>, kTokens>, 4> kTiles{
    tiles_of<T, 0>(std::make_index_sequence<kTokens>()), tiles_of<T, 1>(std::make_index_sequence<kTokens>()),
    tiles_of<T, 2>(std::make_index_sequence<kTokens>()), tiles_of<T, 3>(std::make_index_sequence<kTokens>())};

// `tokens` tokens with `panels` panels: tiles of tokens of almost one size, for a small rest would keep few sums.
template <typename T>
void multiply(const T* keys, int64_t panels, int64_t key_dim, const float* queries, int64_t query_size, int64_t tokens,
              float* scores, int64_t stride) {
  const int64_t rows = (tokens + kTokens - 1) / kTokens;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = row * tokens / rows, count = (row + 1) * tokens / rows - token;
    const float* query = queries + token * query_size;
    float* result = scores + token * stride;
    int64_t beside = panels_beside(static_cast<int>(count));
    int halvings = 0;
    for (int64_t panel = 0; panel < panels; panel += beside) {
      for (; panel + beside > panels; beside /= 2) ++halvings;
      kTiles<T>[halvings][count - 1](keys + panel * key_dim * kPanelKeys, key_dim, query, query_size,
                                     result + panel * kPanelKeys, stride);
    }
  }
}

struct Scratch {
  std::vector<float> keys, scores;
};

// Scores of `joined` matrices, [joined][tokens][width] in `scores`, to where they belong: those of one key side by side.
void join(const float* scores, int64_t joined, int64_t tokens, int64_t width, int64_t count, float* result,
          int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float* first = scores + t * width;
    float* to = result + t * stride;
    if (joined == 1) {
      std::copy(first, first + count, to);
    } else if (joined == 2) {
      const float* second = first + tokens * width;
      for (int64_t n = 0; n < count; ++n) {
        to[2 * n] = first[n];
        to[2 * n + 1] = second[n];
      }
    } else {
      for (int64_t r = 0; r < joined; ++r) {
        for (int64_t n = 0; n < count; ++n) to[n * joined + r] = first[r * tokens * width + n];
      }
    }
  }
}

template <typename T>
void block(const KeyScoresArgs& args, int64_t first_token, int64_t last_token, int64_t first_panel, int64_t last_panel) {
  thread_local Scratch scratch;
  const int64_t tokens = last_token - first_token;
  if (tokens == 0) return;
  // With more tokens than a tile has, the panels of a tile stay in the first-level cache for all of them.
  const int64_t step = panels_beside(static_cast<int>(std::min<int64_t>(tokens, kTokens)));
  const int64_t width = step * kPanelKeys;
  const bool copy = sizeof(T) != sizeof(float) && tokens >= kTokensWorthACopy;
  if (copy) scratch.keys.resize(static_cast<size_t>(width * args.key_dim));
  for (int64_t panel = first_panel; panel < last_panel; panel += step) {
    const int64_t panels = std::min(step, last_panel - panel);
    const int64_t key = panel * kPanelKeys, count = std::min(panels * kPanelKeys, args.key_count - key);
    float* result = args.scores + first_token * args.scores_size + key * args.joined;
    const bool in_place = args.joined == 1 && count == panels * kPanelKeys;
    if (!in_place) scratch.scores.resize(static_cast<size_t>(args.joined * tokens * width));
    for (int64_t r = 0; r < args.joined; ++r) {
      const T* keys = static_cast<const T*>(args.panels[r]) + panel * args.key_dim * kPanelKeys;
      const float* queries = args.queries[r] + first_token * args.query_size;
      float* scores = in_place ? result : scratch.scores.data() + r * tokens * width;
      const int64_t stride = in_place ? args.scores_size : width;
      if (copy) {
        float* wide = scratch.keys.data();
        const int64_t size = panels * kPanelKeys * args.key_dim;
        for (int64_t x = 0; x < size; x += Vec::kWidth) Vec::load(keys + x).store(wide + x);
        multiply<float>(wide, panels, args.key_dim, queries, args.query_size, tokens, scores, stride);
      } else {
        multiply<T>(keys, panels, args.key_dim, queries, args.query_size, tokens, scores, stride);
      }
    }
    if (!in_place) join(scratch.scores.data(), args.joined, tokens, width, count, result, args.scores_size);
  }
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

void key_scores(const KeyScoresArgs& args, int64_t first_token, int64_t last_token, int64_t first_panel,
                int64_t last_panel) {
  switch (args.key_type) {
    case Storage::kFloat32:
      return block<float>(args, first_token, last_token, first_panel, last_panel);
    case Storage::kFloat16:
      return block<Half>(args, first_token, last_token, first_panel, last_panel);
    case Storage::kBFloat16:
      return block<BFloat16>(args, first_token, last_token, first_panel, last_panel);
    case Storage::kInt8:
      return;  // the op refuses such keys
  }
}

}  // namespace umv2::UMV2_TARGET
