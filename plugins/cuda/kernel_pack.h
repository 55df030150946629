// The kernels that `umv2-export kernels` compiled, in the one file that umv2_export/gpu/pack.py lays out: which there are,
// and which one serves a node.
#pragma once

#include <cstdint>
#include <memory>
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

class KernelPack {
 public:
  // `bytes` outlive the pack; throws where they are not a whole file of kernels. `source` names them in messages.
  KernelPack(const uint8_t* bytes, size_t size, std::string source);

  // The kernel for a node on a device: of those that serve it, the one with the fewest shards and the smallest blocks.
  // Throws, naming what to compile, where there is none.
  const KernelRecord& find(const LookupTraits& node, ComputeCapability device) const;
  const KernelRecord& find(const TopkTraits& node, ComputeCapability device) const;

  // The same, but nullptr where there is none: a node can do without a lookup in splits and without a sum.
  const KernelRecord* look_for(const LookupTraits& node, ComputeCapability device) const { return closest(node, device); }
  const KernelRecord* look_for(const SumTraits& node, ComputeCapability device) const { return closest(node, device); }

  const void* cubin(const KernelRecord& record) const { return bytes_ + record.offset; }

 private:
  template <typename Traits>
  const KernelRecord* closest(const Traits& node, ComputeCapability device) const;
  template <typename Traits>
  const KernelRecord& best(const Traits& node, ComputeCapability device) const;

  const uint8_t* bytes_;
  std::vector<KernelRecord> records_;
  std::string source_;
};

// The pack that the environment variable UMV2_GPU_KERNELS names, else the one built into this library; it lives as long as
// the process. Throws where there is neither.
const KernelPack& kernel_pack();

}  // namespace umv2::cuda
