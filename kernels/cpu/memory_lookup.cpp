// umv2::MemoryLookup: one pass over each row. Four rows are read side by side, so that four cache misses are in flight
// where one row alone has one, and the next four are prefetched meanwhile.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace umv2::UMV2_TARGET {
namespace {

constexpr int kRows = 4;
constexpr int64_t kCacheLine = 64;

// Rows of up to 16 bits an element are fetched all at once where together they have no more bytes: to convert them keeps the
// processor from running ahead of four rows. 64 rows of 1 KiB of int8 take 15.0 us instead of 16.9 on one thread, 512 bytes
// of bf16 8.3 instead of 11.2; with 128 KiB they take longer, and fp32 gains nothing.
constexpr int64_t kBytesAtOnce = 1 << 16;
constexpr int64_t kHitsAtOnce = 32;

// Row `index`, or null where the table has none.
template <typename T>
const T* row_of(const LookupArgs& args, int64_t index) {
  if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(args.rows)) return nullptr;
  // A division takes as long as a quarter of a row of 1 KiB: one shard does without.
  const int64_t shard = args.rows <= args.rows_per_shard ? 0 : index / args.rows_per_shard;
  const int64_t local = index - shard * args.rows_per_shard;
  return static_cast<const T*>(args.shards[shard]) + local * (args.pre_value_dim + args.value_dim);
}

// Into the second-level cache. What bypasses it (a hint of 0) has few places in the first-level cache of an Intel processor,
// and four rows of 4 KiB are thrown out before they are read: 64 rows took 55 us on one thread, and take 25 us.
inline void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// Calls step(x) for each whole vector in [begin, end), and prefetches what lies at the same place in the rows `ahead`, one
// line of each at a time: 64 prefetches at once, four rows of 1 KiB, keep the loads of this row waiting (int8: 0.7 of
// the plain gather). Returns where the last vector ends.
template <int N, typename T, typename Step>
int64_t each_vector(const T* const* ahead, int64_t begin, int64_t end, const Step& step) {
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(T));
  int64_t x = begin;
  for (; x + kLine <= end; x += kLine) {
    for (int n = 0; n < N; ++n) prefetch(ahead[n] + x);
    for (int64_t y = x; y < x + kLine; y += Vec::kWidth) step(y);
  }
  if (x < end) {
    for (int n = 0; n < N; ++n) prefetch(ahead[n] + x);
  }
  for (; x + Vec::kWidth <= end; x += Vec::kWidth) step(x);
  return x;
}

// Dot products of N rows with one query.
template <int N, typename T>
void dots(const T* const* rows, const T* const* ahead, const float* query, int64_t size, float* result) {
  Vec sums[N];
  for (int n = 0; n < N; ++n) sums[n] = Vec::zero();
  int64_t x = each_vector<N>(ahead, 0, size, [&](int64_t y) {
    const Vec q = Vec::load(query + y);
    for (int n = 0; n < N; ++n) sums[n] = fma(Vec::load(rows[n] + y), q, sums[n]);
  });
  for (int n = 0; n < N; ++n) result[n] = sums[n].sum();
  for (; x < size; ++x) {
    for (int n = 0; n < N; ++n) result[n] += to_float(rows[n][x]) * query[x];
  }
}

// output[x] += sum over N rows of weights[n] * rows[n][x], for x in [begin, end); with FRESH, what output held is ignored.
template <int N, bool FRESH, typename T>
void accumulate(const T* const* rows, const T* const* ahead, const float* weights, int64_t begin, int64_t end,
                float* output) {
  Vec weight[N];
  for (int n = 0; n < N; ++n) weight[n] = Vec::broadcast(weights[n]);
  int64_t x = each_vector<N>(ahead, begin, end, [&](int64_t y) {
    Vec sum = FRESH ? Vec::zero() : Vec::load(output + y);
    for (int n = 0; n < N; ++n) sum = fma(Vec::load(rows[n] + y), weight[n], sum);
    sum.store(output + y);
  });
  for (; x < end; ++x) {
    if (FRESH) output[x] = 0.0f;
    for (int n = 0; n < N; ++n) output[x] += to_float(rows[n][x]) * weights[n];
  }
}

float activate(const LookupArgs& args, float x) {
  return args.gelu ? 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)) : x;
}

// Hits hit .. hit + N - 1 of a token, from `rows`; `ahead` are the rows of the hits that come next. False on a NaN score.
template <int N, bool FRESH, typename T>
bool add_hits(const LookupArgs& args, const LookupToken& token, int64_t hit, const T* const* rows, const T* const* ahead,
              float* output) {
  const int64_t pre = args.pre_value_dim;
  float strength[N];
  for (int n = 0; n < N; ++n) strength[n] = 1.0f;
  if (pre > 0) {
    dots<N>(rows, ahead, token.query, pre, strength);
    for (int n = 0; n < N; ++n) {
      if (args.row_scales) strength[n] *= args.row_scales[2 * token.indices[hit + n]];
      strength[n] = activate(args, strength[n]);
    }
  }
  if (args.row_scales) {
    for (int n = 0; n < N; ++n) strength[n] *= args.row_scales[2 * token.indices[hit + n] + 1];
  }
  const T* values[N];
  const T* values_ahead[N];
  for (int n = 0; n < N; ++n) {
    values[n] = rows[n] + pre;
    values_ahead[n] = ahead[n] + pre;
  }
  const int64_t part = args.value_dim / args.cores;
  bool any_nan = false;
  for (int64_t c = 0; c < args.cores; ++c) {
    float weights[N];
    for (int n = 0; n < N; ++n) {
      const float score = token.scores[(hit + n) * args.cores + c];
      any_nan |= score != score;
      weights[n] = strength[n] * score;
    }
    accumulate<N, FRESH>(values, values_ahead, weights, c * part, (c + 1) * part, output);
  }
  return !any_nan;
}

// Fetches all rows of hits first .. last, and their scales. False where an index is out of range.
template <typename T>
bool prefetch_all(const LookupArgs& args, const int64_t* indices, int64_t first, int64_t last) {
  const int64_t size = args.pre_value_dim + args.value_dim;
  for (int64_t hit = first; hit < last; ++hit) {
    const T* row = row_of<T>(args, indices[hit]);
    if (row == nullptr) return false;
    if (args.row_scales) prefetch(args.row_scales + 2 * indices[hit]);
    for (int64_t x = 0; x < size; x += kCacheLine / static_cast<int64_t>(sizeof(T))) prefetch(row + x);
  }
  return true;
}

// Four hits at a time from `hit` on, as many as there are; all in one group, so that one pass writes one output.
template <typename T>
bool add_fours(const LookupArgs& args, const LookupToken& token, int64_t& hit, int64_t last, float* output) {
  const T* rows[kRows];
  const T* ahead[kRows];
  for (int n = 0; n < kRows; ++n) {
    ahead[n] = row_of<T>(args, token.indices[hit + n]);
    if (ahead[n] == nullptr) return false;
    // Their first lines; all of them, 256 of 4 KiB rows, would keep the first loads waiting.
    prefetch(ahead[n]);
  }
  const int64_t hits = last - hit, row_bytes = (args.pre_value_dim + args.value_dim) * static_cast<int64_t>(sizeof(T));
  if (sizeof(T) < sizeof(float) && hits >= kHitsAtOnce && hits * row_bytes <= kBytesAtOnce &&
      !prefetch_all<T>(args, token.indices, hit + kRows, last)) {
    return false;
  }
  bool fresh = true;
  for (; hit + kRows <= last; hit += kRows, fresh = false) {
    for (int n = 0; n < kRows; ++n) {
      rows[n] = ahead[n];
      // Past the end there is nothing to fetch: the current row, which is there already.
      const int64_t next = token.indices[std::min(hit + kRows + n, last - 1)];
      ahead[n] = row_of<T>(args, next);
      if (ahead[n] == nullptr) return false;
      if (args.row_scales) prefetch(args.row_scales + 2 * next);
    }
    const bool sound = fresh ? add_hits<kRows, true>(args, token, hit, rows, ahead, output)
                             : add_hits<kRows, false>(args, token, hit, rows, ahead, output);
    if (!sound) return false;
  }
  return true;
}

template <typename T>
bool lookup(const LookupArgs& args, const LookupToken& token, int64_t first, int64_t last, float* output) {
  int64_t hit = first;
  if (args.groups == 1 && hit + kRows <= last) {
    if (!add_fours<T>(args, token, hit, last, output)) return false;
  } else {
    std::memset(output, 0, sizeof(float) * static_cast<size_t>(args.groups * args.value_dim));
  }
  for (; hit < last; ++hit) {
    const T* row = row_of<T>(args, token.indices[hit]);
    const T* ahead = row_of<T>(args, token.indices[std::min(hit + 1, last - 1)]);
    const int64_t group = token.group ? token.group[hit] : 0;
    if (row == nullptr || ahead == nullptr || static_cast<uint64_t>(group) >= static_cast<uint64_t>(args.groups) ||
        !add_hits<1, false>(args, token, hit, &row, &ahead, output + group * args.value_dim)) {
      return false;
    }
  }
  return true;
}

}  // namespace

bool memory_lookup(const LookupArgs& args, const LookupToken& token, int64_t first, int64_t last, float* output) {
  switch (args.row_type) {
    case Storage::kFloat32:
      return lookup<float>(args, token, first, last, output);
    case Storage::kFloat16:
      return lookup<Half>(args, token, first, last, output);
    case Storage::kBFloat16:
      return lookup<BFloat16>(args, token, first, last, output);
    case Storage::kInt8:
      return lookup<int8_t>(args, token, first, last, output);
  }
  return false;
}

}  // namespace umv2::UMV2_TARGET
