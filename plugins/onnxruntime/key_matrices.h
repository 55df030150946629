// The matrices of keys of a KeyScores node, in panels, and how they divide into heads and ranks.
#pragma once

#include <memory>
#include <new>
#include <vector>

#include "kernel_io.h"
#include "kernels.h"

namespace umv2::ort {

struct KeyAttributes {
  int64_t key_dim, heads, ranks, row_matrices;
  bool by_rank;
  float epsilon;
  std::vector<int64_t> chunks;

  KeyAttributes(const Api& api, const KernelInfo* info);

  int64_t matrices() const { return static_cast<int64_t>(chunks.size()); }
  // Joined by rank, the matrices of a side are one: their scores lie side by side.
  int64_t joined() const { return by_rank ? ranks : 1; }
};

// One matrix, copied into panels that begin at a cache line.
class KeyMatrix {
 public:
  KeyMatrix(const Tensor& keys, int64_t key_dim);

  int64_t key_count() const { return key_count_; }
  Storage type() const { return type_; }
  const void* panels() const { return panels_.get(); }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kCacheLine); }
  };

  int64_t key_count_;
  Storage type_;
  std::unique_ptr<void, Free> panels_;
};

struct KeyMatrices {
  std::vector<KeyMatrix> matrices;
  int64_t keys_per_side;
};

// Packs the matrices, whose sizes must agree with each other and with the attributes.
KeyMatrices pack_matrices(const std::vector<Tensor>& keys, const KeyAttributes& attributes);

}  // namespace umv2::ort
