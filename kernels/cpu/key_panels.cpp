// Keys in the order in which KeyScores reads them. The same panels serve every target.
#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace umv2 {

void pack_panels(const void* keys, int64_t element_size, int64_t key_dim, int64_t key_count, void* panels) {
  const char* from = static_cast<const char*>(keys);
  char* to = static_cast<char*>(panels);
  const size_t row = static_cast<size_t>(kPanelKeys * element_size);
  for (int64_t first = 0; first < key_count; first += kPanelKeys) {
    const size_t held = static_cast<size_t>(std::min(kPanelKeys, key_count - first) * element_size);
    for (int64_t k = 0; k < key_dim; ++k, to += row) {
      std::memcpy(to, from + (k * key_count + first) * element_size, held);
      std::memset(to + held, 0, row - held);
    }
  }
}

}  // namespace umv2
