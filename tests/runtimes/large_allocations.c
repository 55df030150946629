// Counts allocations, and copies, of at least `umv2_large_bytes`; loaded in front of the C library.
#include <errno.h>
#include <stddef.h>

size_t umv2_large_bytes = (size_t)-1;
long umv2_allocations = 0;
long umv2_copies = 0;

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void* __memcpy_chk(void*, const void*, size_t, size_t);
void* __memmove_chk(void*, const void*, size_t, size_t);

static void count(size_t bytes, long* counter) {
  if (bytes >= umv2_large_bytes) __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

void* malloc(size_t bytes) {
  count(bytes, &umv2_allocations);
  return __libc_malloc(bytes);
}

void* calloc(size_t items, size_t bytes) {
  count(items * bytes, &umv2_allocations);
  return __libc_calloc(items, bytes);
}

void* realloc(void* memory, size_t bytes) {
  count(bytes, &umv2_allocations);
  return __libc_realloc(memory, bytes);
}

void* memalign(size_t alignment, size_t bytes) {
  count(bytes, &umv2_allocations);
  return __libc_memalign(alignment, bytes);
}

void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }

int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  *memory = memalign(alignment, bytes);
  return *memory ? 0 : ENOMEM;
}

void* memcpy(void* target, const void* source, size_t bytes) {
  count(bytes, &umv2_copies);
  return __memcpy_chk(target, source, bytes, bytes);
}

void* memmove(void* target, const void* source, size_t bytes) {
  count(bytes, &umv2_copies);
  return __memmove_chk(target, source, bytes, bytes);
}
