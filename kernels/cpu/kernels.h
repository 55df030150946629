// CPU kernels of the custom ops. Arithmetic only: no runtime in sight, and no threads of their own. What the ops mean is said in
// umv2_export/ops; here T is tokens, K hits per token, C Tucker cores, P and V the sizes of a pre-value and a value,
// H heads, N keys per side, R Tucker rank, M row top-k.
#pragma once

#include <cstdint>

namespace umv2 {

// How rows and keys are stored; arithmetic is in float.
enum class Storage { kFloat32, kFloat16, kBFloat16, kInt8 };

struct LookupArgs {
  const int64_t* indices;    // [T, K], each in [0, rows)
  const float* scores;       // [T, K, C]
  const int64_t* group;      // [T, K], each in [0, groups), or null when groups == 1
  const float* query;        // [T, P], or null when P == 0
  const float* row_scales;   // [rows, 2], or null unless the rows are int8
  const void* const* shards;  // pointers to [R_s, P + V]
  int64_t rows_per_shard;
  int64_t hits;              // K
  int64_t cores;             // C
  int64_t pre_value_dim;     // P
  int64_t value_dim;         // V, a multiple of C
  int64_t groups;            // G
  bool gelu;
  Storage row_type;
};

struct TuckerArgs {
  const float* row_scores;  // [T, H, N, R], no NaN
  const float* col_scores;  // [T, H, N, R], no NaN
  const float* u;           // [H, R]
  const float* v;           // [H, R]
  const float* cores;       // [C, H, R, R]
  int64_t heads;
  int64_t keys_per_side;    // N
  int64_t ranks;            // R
  int64_t core_count;       // C
  int64_t row_topk;         // M, at most N
  int64_t topk;             // K, at most M * M
};

// Scores of one matrix of keys: scores[t, n] = sum over D of queries[t, D] * keys[D, n].
struct KeyScoresArgs {
  const float* queries;  // first element of token 0, normalised; a token's next query_size elements on
  const void* keys;      // [key_dim, key_count] of float, half or bfloat16
  float* scores;         // first element of token 0; key n is score_stride * n further, token t scores_size * t
  int64_t query_size;
  int64_t key_dim;
  int64_t key_count;
  int64_t scores_size;
  int64_t score_stride;
  Storage key_type;
};

// Hits first .. last of token `token`, summed into output [G * V], which is overwritten.
using LookupFn = void (*)(const LookupArgs&, int64_t token, int64_t first, int64_t last, float* output);

// One token and head: addresses [K], scores [K, C].
using TuckerFn = void (*)(const TuckerArgs&, int64_t token, int64_t head, int64_t* addresses, float* scores);

// Divides by the root of the mean square, plus epsilon under the root.
using NormalizeFn = void (*)(const float* values, int64_t size, float epsilon, float* result);

// Tokens first_token .. last_token with keys first_key .. last_key.
using KeyScoresFn = void (*)(const KeyScoresArgs&, int64_t first_token, int64_t last_token, int64_t first_key,
                             int64_t last_key);

// Reads `count` rows of `row_size` floats in full and returns their sum: the plain gather that benchmarks compare with.
using GatherFn = float (*)(const float* table, int64_t row_size, const int64_t* indices, int64_t count);

struct Kernels {
  const char* name;
  LookupFn memory_lookup;
  TuckerFn tucker_topk;
  NormalizeFn normalize;
  KeyScoresFn key_scores;
  GatherFn gather;
};

// The kernels of a target (portable, avx2, avx512), or null when this processor does not run them.
const Kernels* find_kernels(const char* target);

// The fastest kernels that this processor runs, or those that the environment variable UMV2_CPU_TARGET names; null when
// those do not run.
const Kernels* select_kernels();

}  // namespace umv2
