// Calls of the compiled kernels: arguments in the order that umv2_export/gpu/ gives them, grid, shared memory.
#pragma once

#include <vector>

#include "kernel_archive.h"

namespace umv2::cuda {

// A MemoryLookup node with its tensors, all in the memory of the device; inputs that its traits exclude are not read.
struct LookupCall {
  LookupTraits node;
  int64_t tokens, hits, table_rows, rows_per_shard, groups;
  const void *indices, *scores, *group, *query, *row_scales;
  std::vector<const void*> rows;
  void* output;
  // Of scratch_bytes() or more, or nullptr: then no hits are split.
  void* scratch;
};

// What splits of a lookup take at most, whatever the number of tokens is: few tokens are split, many need no splits.
int64_t most_scratch_bytes(int64_t groups, int64_t value_dim);

struct TopkCall {
  TopkTraits node;
  int64_t tokens, heads, keys_per_side;
  const void *row_scores, *col_scores, *u, *v, *cores;
  void *addresses, *scores;
};

// What the splits of this call take; 0 where no hits are split. Tensors are not looked at.
int64_t scratch_bytes(const KernelArchive& archive, const LookupCall& call);

// Load the kernel of a call into the current context, so that no launch has to; tensors are not looked at. Contexts must
// live as long as the process: one that takes the place of another would get functions of the other.
void prepare(const KernelArchive& archive, const LookupCall& call);
void prepare(const KernelArchive& archive, const TopkCall& call);

// Enqueue the kernel; all throw where none serves the call, or where a size is beyond what kernels take.
void launch(const KernelArchive& archive, const LookupCall& call, Stream stream);
void launch(const KernelArchive& archive, const TopkCall& call, Stream stream);

}  // namespace umv2::cuda
