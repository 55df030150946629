#include "key_matrices.h"

#include "ops.h"

namespace umv2::ort {
namespace {

int64_t keys_per_side_of(const std::vector<Tensor>& keys, const KeyAttributes& attributes, size_t first, size_t last) {
  const int64_t of_one_key = attributes.heads * attributes.ranks;
  int64_t columns = 0;
  for (size_t i = first; i < last; ++i) {
    require(!attributes.by_rank || keys[i].sizes[1] == keys[first].sizes[1], "the ranks differ in their number of keys");
    columns += keys[i].sizes[1];
  }
  const int64_t keys_per_side = columns / of_one_key;
  for (size_t i = first; i < last; ++i) {
    const int64_t of_one_head = keys_per_side * (attributes.by_rank ? attributes.heads : attributes.ranks);
    require(keys_per_side > 0 && keys[i].sizes[1] % of_one_head == 0 && columns % of_one_key == 0, "a matrix of ",
            keys[i].sizes[1], " keys does not divide into heads and ranks");
  }
  return keys_per_side;
}

}  // namespace

KeyAttributes::KeyAttributes(const Api& api, const KernelInfo* info)
    : key_dim(attribute(api, info, "key_dim")),
      heads(attribute(api, info, "heads")),
      ranks(attribute(api, info, "ranks")),
      row_matrices(attribute(api, info, "row_matrices")),
      by_rank(attribute(api, info, "by_rank") != 0),
      epsilon(float_attribute(api, info, "epsilon")),
      chunks(list_attribute(api, info, "chunks")) {
  require(within(key_dim, 1) && within(heads, 1) && within(ranks, 1) && within(row_matrices, 1, matrices() - 1),
          "an attribute is out of range: key_dim ", key_dim, ", heads ", heads, ", ranks ", ranks, ", row_matrices ",
          row_matrices, " of ", matrices());
  require(!by_rank || (row_matrices == ranks && matrices() == 2 * ranks), "by_rank needs a matrix for each rank and side");
}

KeyMatrix::KeyMatrix(const Tensor& keys, int64_t key_dim) : key_count_(keys.sizes[1]), type_(storage(keys.type, "keys")) {
  const int64_t size = type_ == Storage::kFloat32 ? 4 : 2;
  const int64_t padded = (key_count_ + kPanelKeys - 1) / kPanelKeys * kPanelKeys;
  panels_.reset(::operator new(static_cast<size_t>(product_of({padded, key_dim, size}, "a matrix of keys")), kCacheLine));
  pack_panels(keys.data, size, key_dim, key_count_, panels_.get());
}

KeyMatrices pack_matrices(const std::vector<Tensor>& keys, const KeyAttributes& attributes) {
  for (const Tensor& matrix : keys) {
    require(matrix.sizes.size() == 2 && matrix.sizes[0] == attributes.key_dim && within(matrix.sizes[1], 1, kMostElements),
            "keys must be [key_dim, keys], got ", matrix);
    require(matrix.type != kInt8, "keys must be float, float16 or bfloat16: int8 keys would need scales");
    storage(matrix.type, "keys");
    require(!attributes.by_rank || matrix.type == keys.front().type, "the ranks differ in the element type of their keys");
  }
  const size_t row_matrices = static_cast<size_t>(attributes.row_matrices);
  KeyMatrices result{{}, keys_per_side_of(keys, attributes, 0, row_matrices)};
  require(result.keys_per_side == keys_per_side_of(keys, attributes, row_matrices, keys.size()),
          "row keys and column keys differ in number");
  result.matrices.reserve(keys.size());
  for (const Tensor& matrix : keys) result.matrices.emplace_back(matrix, attributes.key_dim);
  return result;
}

}  // namespace umv2::ort
