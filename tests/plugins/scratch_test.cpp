// Calls plugins/onnxruntime_cuda/scratch.h on a function table that writes down what is called; run by
// tests/plugins/test_onnxruntime_cuda_library.py.
//
//   scratch_test STREAM BYTES FAILS
//
// STREAM: handle of the stream of the call, 0 for none. FAILS: slot of the function that fails, or -1. Prints the calls in
// order, and what is thrown.
#include "scratch.h"

#include <cstdio>
#include <cstdlib>

namespace {

using namespace umv2::ort;

int failing = -1;

// Handles; what they point to is never looked at.
template <typename T>
T* handle(uintptr_t number) {
  return reinterpret_cast<T*>(number);
}

Status* said(int slot, const char* text) {
  std::printf("%s\n", text);
  return failing == slot ? handle<Status>(1) : nullptr;
}

}  // namespace

int main(int, char** arguments) {
  const auto stream = handle<void>(std::strtoull(arguments[1], nullptr, 10));
  const int64_t bytes = std::atoll(arguments[2]);
  failing = std::atoi(arguments[3]);

  const void* table[279] = {};
  const auto slot = [&](size_t number, auto* function) { table[number] = reinterpret_cast<const void*>(function); };
  slot(2, +[](const Status*) { return "it fails"; });
  slot(93, +[](Status*) { std::printf("release status\n"); });
  slot(75, +[](Allocator*, size_t size, void** memory) {
    *memory = handle<void>(16);
    std::printf("%zu bytes: ", size);
    return said(75, "allocate");
  });
  slot(76, +[](Allocator*, void* memory) {
    std::printf("%p: ", memory);
    return said(76, "free");
  });
  slot(77, +[](const Allocator*, const MemoryInfo** info) {
    *info = handle<const MemoryInfo>(5);
    return said(77, "info");
  });
  slot(132, +[](Allocator*) { std::printf("release allocator\n"); });
  slot(277, +[](const KernelContext*, const MemoryInfo* info, size_t size, void** memory) {
    *memory = handle<void>(32);
    std::printf("%zu bytes of %p: ", size, static_cast<const void*>(info));
    return said(277, "scratch buffer");
  });
  slot(278, +[](const KernelInfo*, int type, Allocator** allocator) {
    *allocator = handle<Allocator>(7);
    std::printf("memory type %d: ", type);
    return said(278, "allocator");
  });

  const Api api(table);
  try {
    const DeviceMemory memory(api, nullptr);
    const Scratch scratch(memory, nullptr, stream, bytes);
    std::printf("used: %p\n", scratch.data());
  } catch (const umv2::Error& error) {
    std::printf("%s\n", error.what());
  }
  return 0;
}
