// umv2::MemoryLookup: one pass over each row. Four rows are read side by side, so that four cache misses are in flight
// where one row alone has one, and the next four are prefetched meanwhile.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace umv2::UMV2_TARGET {
namespace {

constexpr int kRows = 4;
constexpr int64_t kCacheLine = 64;

template <typename T>
const T* row_of(const LookupArgs& args, int64_t index) {
  const int64_t shard = index / args.rows_per_shard;
  const int64_t local = index - shard * args.rows_per_shard;
  return static_cast<const T*>(args.shards[shard]) + local * (args.pre_value_dim + args.value_dim);
}

template <typename T>
void prefetch_row(const T* row, int64_t size) {
  const char* byte = reinterpret_cast<const char*>(row);
  for (int64_t offset = 0; offset < size * static_cast<int64_t>(sizeof(T)); offset += kCacheLine) {
    __builtin_prefetch(byte + offset, 0, 0);
  }
}

// Dot products of N rows with one query.
template <int N, typename T>
void dots(const T* const* rows, const float* query, int64_t size, float* result) {
  Vec sums[N];
  for (int n = 0; n < N; ++n) sums[n] = Vec::zero();
  int64_t x = 0;
  for (; x + Vec::kWidth <= size; x += Vec::kWidth) {
    const Vec q = Vec::load(query + x);
    for (int n = 0; n < N; ++n) sums[n] = fma(Vec::load(rows[n] + x), q, sums[n]);
  }
  for (int n = 0; n < N; ++n) result[n] = sums[n].sum();
  for (; x < size; ++x) {
    for (int n = 0; n < N; ++n) result[n] += to_float(rows[n][x]) * query[x];
  }
}

// output[x] += sum over N rows of weights[n] * rows[n][x].
template <int N, typename T>
void accumulate(const T* const* rows, const float* weights, int64_t begin, int64_t end, float* output) {
  Vec weight[N];
  for (int n = 0; n < N; ++n) weight[n] = Vec::broadcast(weights[n]);
  int64_t x = begin;
  for (; x + Vec::kWidth <= end; x += Vec::kWidth) {
    Vec sum = Vec::load(output + x);
    for (int n = 0; n < N; ++n) sum = fma(Vec::load(rows[n] + x), weight[n], sum);
    sum.store(output + x);
  }
  for (; x < end; ++x) {
    for (int n = 0; n < N; ++n) output[x] += to_float(rows[n][x]) * weights[n];
  }
}

float activate(const LookupArgs& args, float x) {
  return args.gelu ? 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)) : x;
}

// Hits hit .. hit + N - 1 of a token.
template <int N, typename T>
void add_hits(const LookupArgs& args, int64_t token, int64_t hit, const T* const* rows, float* output) {
  const int64_t first = token * args.hits + hit;
  float strength[N];
  for (int n = 0; n < N; ++n) strength[n] = 1.0f;
  if (args.pre_value_dim > 0) {
    dots<N>(rows, args.query + token * args.pre_value_dim, args.pre_value_dim, strength);
    for (int n = 0; n < N; ++n) {
      if (args.row_scales) strength[n] *= args.row_scales[2 * args.indices[first + n]];
      strength[n] = activate(args, strength[n]);
    }
  }
  if (args.row_scales) {
    for (int n = 0; n < N; ++n) strength[n] *= args.row_scales[2 * args.indices[first + n] + 1];
  }
  const T* values[N];
  for (int n = 0; n < N; ++n) values[n] = rows[n] + args.pre_value_dim;
  const int64_t part = args.value_dim / args.cores;
  for (int64_t c = 0; c < args.cores; ++c) {
    float weights[N];
    for (int n = 0; n < N; ++n) weights[n] = strength[n] * args.scores[(first + n) * args.cores + c];
    accumulate<N>(values, weights, c * part, (c + 1) * part, output);
  }
}

template <typename T>
void lookup(const LookupArgs& args, int64_t token, int64_t first, int64_t last, float* output) {
  std::memset(output, 0, sizeof(float) * static_cast<size_t>(args.groups * args.value_dim));
  const int64_t size = args.pre_value_dim + args.value_dim;
  const int64_t* indices = args.indices + token * args.hits;
  int64_t hit = first;
  if (args.groups == 1) {
    for (int64_t ahead = hit; ahead < last && ahead < hit + kRows; ++ahead) {
      prefetch_row(row_of<T>(args, indices[ahead]), size);
    }
    for (; hit + kRows <= last; hit += kRows) {
      const T* rows[kRows];
      for (int n = 0; n < kRows; ++n) {
        rows[n] = row_of<T>(args, indices[hit + n]);
        if (hit + kRows + n < last) prefetch_row(row_of<T>(args, indices[hit + kRows + n]), size);
      }
      add_hits<kRows>(args, token, hit, rows, output);
    }
  }
  for (; hit < last; ++hit) {
    const T* row = row_of<T>(args, indices[hit]);
    if (hit + 1 < last) prefetch_row(row_of<T>(args, indices[hit + 1]), size);
    const int64_t group = args.group ? args.group[token * args.hits + hit] : 0;
    add_hits<1>(args, token, hit, &row, output + group * args.value_dim);
  }
}

}  // namespace

void memory_lookup(const LookupArgs& args, int64_t token, int64_t first, int64_t last, float* output) {
  switch (args.row_type) {
    case RowType::kFloat32:
      return lookup<float>(args, token, first, last, output);
    case RowType::kFloat16:
      return lookup<Half>(args, token, first, last, output);
    case RowType::kBFloat16:
      return lookup<BFloat16>(args, token, first, last, output);
    case RowType::kInt8:
      return lookup<int8_t>(args, token, first, last, output);
  }
}

}  // namespace umv2::UMV2_TARGET
