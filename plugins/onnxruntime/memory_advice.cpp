#include "memory_advice.h"

#include <cstdint>

#if defined(__unix__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace umv2::ort {

void advise_random(const void* data, size_t size) {
#if defined(__unix__)
  // Whole pages within the table: the rest of the first and last page may belong to others.
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_RANDOM);
#else
  (void)data;
  (void)size;
#endif
}

}  // namespace umv2::ort
