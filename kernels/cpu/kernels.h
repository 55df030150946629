// CPU kernels of the custom ops. Arithmetic only: no runtime in sight, and no threads of their own. What the ops mean is said in
// umv2_export/ops; here T is tokens, K hits per token, C Tucker cores, P and V the sizes of a pre-value and a value,
// H heads, N keys per side, R Tucker rank, M row top-k. Sizes are checked by who calls; what a kernel reads, it checks in
// the pass in which it reads it, and returns false where that does not hold.
#pragma once

#include <cstdint>

namespace umv2 {

// How rows and keys are stored; arithmetic is in float.
enum class Storage { kFloat32, kFloat16, kBFloat16, kInt8 };

struct LookupArgs {
  const float* row_scales;    // [rows, 2], or null unless the rows are int8
  const void* const* shards;  // pointers to [R_s, P + V]
  int64_t rows;               // of all shards
  int64_t rows_per_shard;
  int64_t hits;               // K
  int64_t cores;              // C
  int64_t pre_value_dim;      // P
  int64_t value_dim;          // V, a multiple of C
  int64_t groups;             // G
  bool gelu;
  Storage row_type;
};

// What belongs to one token.
struct LookupToken {
  const int64_t* indices;  // [K]
  const float* scores;     // [K, C]
  const int64_t* group;    // [K], or null when groups == 1
  const float* query;      // [P], or null when P == 0
};

struct TuckerArgs {
  const float* u;      // [H, R]
  const float* v;      // [H, R]
  const float* cores;  // [C, H, R, R]
  int64_t heads;
  int64_t keys_per_side;  // N
  int64_t ranks;          // R
  int64_t core_count;     // C
  int64_t row_topk;       // M, at most N
  int64_t topk;           // K, at most M * M
};

// Keys lie in panels of so many, [N / 16][D][16]: what is multiplied with one element of a query lies side by side, and a
// panel is one stretch of memory. Keys that the last panel lacks are zero.
constexpr int64_t kPanelKeys = 16;

// Scores of the matrices that are joined into one side, one for each rank, or of one matrix:
// scores[t, n * joined + r] = sum over D of queries_r[t, D] * keys_r[D, n].
struct KeyScoresArgs {
  const float* const* queries;  // first element of token 0, normalised, for each; a token's next query_size elements on
  const void* const* panels;    // of float, half or bfloat16, each
  float* scores;                // of token 0; token t scores_size * t further
  int64_t joined;
  int64_t query_size;
  int64_t key_dim;
  int64_t key_count;
  int64_t scores_size;
  Storage key_type;
};

// Hits first .. last of a token, summed into output [G * V], which is overwritten. False, with no row read that the table
// lacks, where an index or a group is out of range or a score is NaN.
using LookupFn = bool (*)(const LookupArgs&, const LookupToken&, int64_t first, int64_t last, float* output);

// One token and head, from its row keys and column keys [N, R]: addresses [K] in ascending order, scores [K, C]. Of equal
// scores, -0 and +0 among them, those of the lowest addresses are kept. False where a key is NaN; NaN that infinite keys
// give ranks as minus infinity.
using TuckerFn = bool (*)(const TuckerArgs&, int64_t head, const float* row_keys, const float* col_keys,
                          int64_t* addresses, float* scores);

// Divides by the root of the mean square, plus epsilon under the root.
using NormalizeFn = void (*)(const float* values, int64_t size, float epsilon, float* result);

// Tokens first_token .. last_token with the keys of panels first_panel .. last_panel.
using KeyScoresFn = void (*)(const KeyScoresArgs&, int64_t first_token, int64_t last_token, int64_t first_panel,
                             int64_t last_panel);

// IEEE half precision to float, and back, rounded to nearest even.
using WidenFn = void (*)(const uint16_t* halves, int64_t count, float* result);
using NarrowFn = void (*)(const float* values, int64_t count, uint16_t* result);

// Reads `count` rows of `row_size` floats in full and returns their sum: the plain gather that benchmarks compare with.
using GatherFn = float (*)(const float* table, int64_t row_size, const int64_t* indices, int64_t count);

struct Kernels {
  const char* name;
  LookupFn memory_lookup;
  TuckerFn tucker_topk;
  NormalizeFn normalize;
  KeyScoresFn key_scores;
  WidenFn widen;
  NarrowFn narrow;
  GatherFn gather;
};

// The elements of all panels of a matrix.
constexpr int64_t panel_elements(int64_t key_dim, int64_t key_count) {
  return (key_count + kPanelKeys - 1) / kPanelKeys * kPanelKeys * key_dim;
}

// Puts keys [key_dim, key_count] of 4 or 2 bytes each into panels.
void pack_panels(const void* keys, int64_t element_size, int64_t key_dim, int64_t key_count, void* panels);

// The kernels of a target (portable, avx2, avx512) that this library holds, or null.
const Kernels* compiled_kernels(const char* target);

// The same where this processor runs them, else null; of no target in particular (null), the fastest.
const Kernels* find_kernels(const char* target);

// The fastest kernels that this processor runs, or those that the environment variable UMV2_CPU_TARGET names; null when
// those do not run. Reads the environment: to be called once, when a node is created.
const Kernels* select_kernels();

}  // namespace umv2
