// Arithmetic on sizes that a model file or a caller gives: attributes and shapes. Each is an int64 of any value until it is
// checked; a product of two that wraps around is a write outside a buffer later on.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace umv2 {

// The most elements that any tensor, buffer or offset of this project may have. Eight bytes each are 2^49 bytes, more than
// any machine has, and less than int64 by so much that sums of several, and bytes instead of elements, do not overflow.
constexpr int64_t kMostElements = int64_t{1} << 46;

// The most that one attribute, or one axis that does not count tokens or rows, may be. The square of it is in range.
constexpr int64_t kMostOfAnAxis = int64_t{1} << 23;

// True, and the product in `result`, where no size is negative and the product is at most `most`. A zero makes the product
// zero, whatever the other sizes are. Throws nothing: for interfaces that no exception may cross.
inline bool try_product(std::initializer_list<int64_t> sizes, int64_t* result, int64_t most = kMostElements) noexcept {
  int64_t product = 1;
  bool any_zero = false, too_large = false;
  for (const int64_t size : sizes) {
    if (size < 0) return false;
    any_zero |= size == 0;
    // Once too large it stays so: a later zero is the only thing that still matters.
    too_large |= size != 0 && (__builtin_mul_overflow(product, size, &product) || product > most);
  }
  if (too_large && !any_zero) return false;
  *result = any_zero ? 0 : product;
  return true;
}

// The same, as a value; throws std::length_error, whose message says `what` is too large and names the sizes.
inline int64_t product_of(std::initializer_list<int64_t> sizes, const char* what, int64_t most = kMostElements) {
  int64_t result = 0;
  if (try_product(sizes, &result, most)) return result;
  std::string message = std::string(what) + " is out of range: ";
  const char* separator = "";
  for (const int64_t size : sizes) {
    message += separator + std::to_string(size);
    separator = " * ";
  }
  throw std::length_error(message + ", at most " + std::to_string(most) + " is served");
}

// True where `value` lies from `least` to `most`: the check of one attribute or axis.
constexpr bool within(int64_t value, int64_t least, int64_t most = kMostOfAnAxis) noexcept {
  return value >= least && value <= most;
}

}  // namespace umv2
