// The kernels that `umv2-export kernels` compiled, in the one file that umv2_export/gpu/archive.py lays out: which
// there are, and which one serves a node.
#pragma once

#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "driver.h"

namespace umv2::cuda {

// As ONNX numbers them.
enum class ElementType : int32_t { kNone = 0, kFloat32 = 1, kInt8 = 3, kFloat16 = 10, kBFloat16 = 16 };

// What of a MemoryLookup node decides which kernel serves it.
struct LookupTraits {
  ElementType scores, rows;
  int64_t shards, cores;
  bool grouped, pre_values, gelu;
  int64_t pre_value_dim, value_dim;
  // Programs share the hits of a token, and a further kernel adds what they sum.
  bool split = false;
};

// The kernel that adds.
struct SumTraits {
  ElementType scores;
  int64_t value_dim;
};

// The same of a TuckerTopK node.
struct TopkTraits {
  ElementType scores;
  int64_t ranks, cores, row_topk, topk;
};

// The node, for messages.
std::ostream& operator<<(std::ostream& out, const LookupTraits& node);
std::ostream& operator<<(std::ostream& out, const TopkTraits& node);

// One kernel, field for field as the file has it.
struct KernelRecord {
  int32_t op, major, minor, one_architecture, threads, shared_bytes;
  ElementType scores, rows;
  int32_t shards, cores, grouped, pre_values, gelu, divisor, ranks, block_k, block_p, block_v, block_m;
  int32_t split;
  char entry[64];
  uint64_t offset, size;

  bool runs_on(ComputeCapability device) const;
  bool serves(const LookupTraits& node) const;
  bool serves(const SumTraits& node) const;
  bool serves(const TopkTraits& node) const;
};
static_assert(sizeof(KernelRecord) == 160);

class KernelArchive {
 public:
  // `bytes` outlive the archive; throws where they are not a whole file of kernels. `source` names them in messages.
  KernelArchive(const uint8_t* bytes, size_t size, std::string source);

  // The kernel for a node on a device: the first that serves it, for those of the least waste come first in the file.
  // Throws, naming what to compile, where there is none.
  template <typename Traits>
  const KernelRecord& find(const Traits& node, ComputeCapability device) const;

  // The same, but nullptr where there is none: a node can do without a lookup in splits and without a sum.
  template <typename Traits>
  const KernelRecord* look_for(const Traits& node, ComputeCapability device) const;

  const void* cubin(const KernelRecord& record) const { return bytes_ + record.offset; }

 private:
  const uint8_t* bytes_;
  std::vector<KernelRecord> records_;
  std::string source_;
};

// The archive that the environment variable UMV2_GPU_KERNELS names, else the one built into this library; it lives as
// long as the process. Throws where there is neither.
const KernelArchive& kernel_archive();

}  // namespace umv2::cuda
