// umv2::TuckerTopK: two partial selections, no sort.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace umv2::UMV2_TARGET {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Candidate {
  float score;
  int32_t index;
};

// What one call needs, kept by each thread: an allocation a call would cost more than the selection.
struct Scratch {
  std::vector<float> scores;
  std::vector<float> maxima;
  std::vector<Candidate> candidates;

  void reserve(int64_t size) {
    const size_t padded = static_cast<size_t>(size + Vec::kWidth);
    if (scores.size() < padded) {
      scores.resize(padded);
      maxima.resize(padded);
      candidates.resize(padded);
    }
  }
};

// Floats in the order of integers: of two, the larger float has the larger number; -0 comes right before +0.
int64_t ordinal(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

float of_ordinal(int64_t number) {
  const int32_t ordered = static_cast<int32_t>(number), bits = ordered < 0 ? ordered ^ 0x7fffffff : ordered;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// A plain loop: the compiler makes vectors of it for every target.
int64_t count_at_least(const float* values, int64_t size, float bound) {
  int32_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += values[i] >= bound ? 1 : 0;
  return count;
}

// A bound that k values reach, or, where values equal to the k-th largest let more of them reach every bound that k do, the
// k-th largest itself. Halving takes 32 passes at most, about 15 as a rule, none of which waits for a branch that
// could not be foreseen: of 360 values it takes 0.4 us, where std::nth_element took 3 us.
float kth_largest(const float* values, int64_t size, int64_t k) {
  int64_t reached = ordinal(kLowest), missed = ordinal(-kLowest) + 1;
  while (missed - reached > 1) {
    const int64_t middle = reached + (missed - reached) / 2;
    const int64_t count = count_at_least(values, size, of_ordinal(middle));
    if (count == k) return of_ordinal(middle);
    (count > k ? reached : missed) = middle;
  }
  return of_ordinal(reached);
}

// The k best of the first `size` scores in `scratch` into `chosen`, in ascending order of their indices; of equal scores
// those of the lowest indices. No score is NaN: it has no order.
//
// The k-th largest of the maxima of disjoint blocks is no larger than the k-th best score, since k blocks hold a score
// of at least that. What lies below it is dropped by one vector comparison for a block.
void select_best(Scratch& scratch, int64_t size, int64_t k, Candidate* chosen) {
  float* scores = scratch.scores.data();
  float* maxima = scratch.maxima.data();
  const int64_t blocks = (size + Vec::kWidth - 1) / Vec::kWidth;
  std::fill(scores + size, scores + blocks * Vec::kWidth, kLowest);
  float bound;
  if (blocks < 4 * k) {
    bound = kth_largest(scores, size, k);
  } else {
    // Maxima of groups of blocks: selecting among 4 k of them is cheap, and few more candidates pass.
    const int64_t width = std::max<int64_t>(1, blocks / (4 * k));
    const int64_t groups = blocks / width;
    for (int64_t g = 0; g < groups; ++g) {
      Vec largest = Vec::load(scores + g * width * Vec::kWidth);
      for (int64_t i = 1; i < width; ++i) largest = max(largest, Vec::load(scores + (g * width + i) * Vec::kWidth));
      float lanes[Vec::kWidth];
      largest.store(lanes);
      maxima[g] = *std::max_element(lanes, lanes + Vec::kWidth);
    }
    bound = kth_largest(maxima, groups, k);
  }
  Candidate* candidates = scratch.candidates.data();
  int64_t count = 0;
  const Vec bounds = Vec::broadcast(bound);
  for (int64_t b = 0; b < blocks; ++b) {
    uint32_t mask = at_least(Vec::load(scores + b * Vec::kWidth), bounds);
    for (; mask; mask &= mask - 1) {
      const int64_t index = b * Vec::kWidth + __builtin_ctz(mask);
      if (index < size) candidates[count++] = {scores[index], static_cast<int32_t>(index)};
    }
  }
  if (count == k) {
    std::copy(candidates, candidates + k, chosen);
    return;
  }
  // The candidates stay in order, and those equal to the k-th best score fill the places left over.
  for (int64_t i = 0; i < count; ++i) maxima[i] = candidates[i].score;
  const float least = kth_largest(maxima, count, k);
  int64_t above = 0;
  for (int64_t i = 0; i < count; ++i) above += candidates[i].score > least ? 1 : 0;
  int64_t equal = k - above;
  for (int64_t i = 0, n = 0; n < k; ++i) {
    const float score = candidates[i].score;
    if (score < least || (score == least && equal-- <= 0)) continue;
    chosen[n++] = candidates[i];
  }
}

// scores[n] = sum over ranks of keys[n, r] * weights[r]. True where a score is NaN.
bool merge_ranks(const float* keys, const float* weights, int64_t size, int64_t ranks, float* scores) {
  if (ranks == 2) {
    const float first = weights[0], second = weights[1];
    for (int64_t n = 0; n < size; ++n) scores[n] = keys[2 * n] * first + keys[2 * n + 1] * second;
  } else {
    for (int64_t n = 0; n < size; ++n) {
      float sum = keys[n * ranks] * weights[0];
      for (int64_t r = 1; r < ranks; ++r) sum += keys[n * ranks + r] * weights[r];
      scores[n] = sum;
    }
  }
  // No early exit and no sum: the compiler makes vectors of it.
  unsigned any_nan = 0;
  for (int64_t n = 0; n < size; ++n) any_nan |= scores[n] != scores[n] ? 1u : 0u;
  return any_nan != 0;
}

// Infinite keys can give NaN, which has no order: it ranks with minus infinity.
void rank_nan_last(float* scores, int64_t size) {
  for (int64_t x = 0; x < size; ++x) scores[x] = scores[x] == scores[x] ? scores[x] : kLowest;
}

// The best keys of one side. False where a key is NaN, and so its merged score.
bool select_keys(Scratch& scratch, const TuckerArgs& args, const float* keys, const float* weights, Candidate* chosen) {
  if (merge_ranks(keys, weights, args.keys_per_side, args.ranks, scratch.scores.data())) {
    for (int64_t x = 0; x < args.keys_per_side * args.ranks; ++x) {
      if (keys[x] != keys[x]) return false;
    }
    rank_nan_last(scratch.scores.data(), args.keys_per_side);
  }
  select_best(scratch, args.keys_per_side, args.row_topk, chosen);
  return true;
}

}  // namespace

bool tucker_topk(const TuckerArgs& args, int64_t head, const float* row_keys, const float* col_keys, int64_t* addresses,
                 float* scores) {
  thread_local Scratch scratch;
  thread_local std::vector<Candidate> rows, cols, best;
  thread_local std::vector<float> columns, weights;
  const int64_t ranks = args.ranks, m = args.row_topk, n = args.keys_per_side;
  scratch.reserve(std::max(n, m * m));
  rows.resize(static_cast<size_t>(m));
  cols.resize(static_cast<size_t>(m));
  best.resize(static_cast<size_t>(args.topk));
  columns.resize(static_cast<size_t>(m * ranks));
  weights.resize(static_cast<size_t>(ranks));

  // Both in ascending order of their keys: cells of the grid then are in ascending order of their addresses.
  if (!select_keys(scratch, args, row_keys, args.u + head * ranks, rows.data()) ||
      !select_keys(scratch, args, col_keys, args.v + head * ranks, cols.data())) {
    return false;
  }

  // Rank-major, so that a row of the grid is a sum of scaled vectors.
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t r = 0; r < ranks; ++r) columns[r * m + j] = col_keys[cols[j].index * ranks + r];
  }
  const int64_t core_size = ranks * ranks;
  for (int64_t i = 0; i < m; ++i) {
    const float* row = row_keys + rows[i].index * ranks;
    std::fill(weights.begin(), weights.end(), 0.0f);
    for (int64_t c = 0; c < args.core_count; ++c) {
      const float* core = args.cores + (c * args.heads + head) * core_size;
      for (int64_t r = 0; r < ranks; ++r) {
        for (int64_t s = 0; s < ranks; ++s) weights[s] += row[r] * core[r * ranks + s];
      }
    }
    float* grid = scratch.scores.data() + i * m;
    for (int64_t j = 0; j < m; ++j) grid[j] = weights[0] * columns[j];
    for (int64_t s = 1; s < ranks; ++s) {
      for (int64_t j = 0; j < m; ++j) grid[j] += weights[s] * columns[s * m + j];
    }
  }
  rank_nan_last(scratch.scores.data(), m * m);
  select_best(scratch, m * m, args.topk, best.data());

  for (int64_t k = 0; k < args.topk; ++k) {
    const int64_t i = rows[best[k].index / m].index, j = cols[best[k].index % m].index;
    addresses[k] = i * n + j;
    const float* row = row_keys + i * ranks;
    const float* col = col_keys + j * ranks;
    for (int64_t c = 0; c < args.core_count; ++c) {
      const float* core = args.cores + (c * args.heads + head) * core_size;
      float sum = 0.0f;
      for (int64_t r = 0; r < ranks; ++r) {
        for (int64_t s = 0; s < ranks; ++s) sum += row[r] * core[r * ranks + s] * col[s];
      }
      scores[k * args.core_count + c] = sum;
    }
  }
  return true;
}

}  // namespace umv2::UMV2_TARGET
