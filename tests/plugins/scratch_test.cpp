// Calls plugins/onnxruntime_cuda/scratch.h on a function table that writes down what is called; run by
// tests/plugins/test_onnxruntime_cuda_library.py.
//
//   scratch_test STREAM BYTES FAILS
//
// STREAM: handle of the stream of the call, 0 for none. FAILS: what the function that fails prints, or none. Prints the calls in
// order, and what is thrown.
#include "scratch.h"

#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

using namespace umv2::ort;

std::string failing;

// Handles; what they point to is never looked at.
template <typename T>
T* handle(uintptr_t number) {
  return reinterpret_cast<T*>(number);
}

Status* said(const char* text) {
  std::printf("%s\n", text);
  return failing == text ? handle<Status>(1) : nullptr;
}

}  // namespace

int main(int, char** arguments) {
  const auto stream = handle<void>(std::strtoull(arguments[1], nullptr, 10));
  const int64_t bytes = std::atoll(arguments[2]);
  failing = arguments[3];

  const void* table[kKernelAllocator + 1] = {};
  const auto slot = [&](Slot place, auto* function) { table[place] = reinterpret_cast<const void*>(function); };
  slot(kErrorMessage, +[](const Status*) { return "it fails"; });
  slot(kReleaseStatus, +[](Status*) { std::printf("release status\n"); });
  slot(kAllocate, +[](Allocator*, size_t size, void** memory) {
    *memory = handle<void>(16);
    std::printf("%zu bytes: ", size);
    return said("allocate");
  });
  slot(kFree, +[](Allocator*, void* memory) {
    std::printf("%p: ", memory);
    return said("free");
  });
  slot(kAllocatorInfo, +[](const Allocator*, const MemoryInfo** info) {
    *info = handle<const MemoryInfo>(5);
    return said("info");
  });
  slot(kReleaseAllocator, +[](Allocator*) { std::printf("release allocator\n"); });
  slot(kScratchBuffer, +[](const KernelContext*, const MemoryInfo* info, size_t size, void** memory) {
    *memory = handle<void>(32);
    std::printf("%zu bytes of %p: ", size, static_cast<const void*>(info));
    return said("scratch buffer");
  });
  slot(kKernelAllocator, +[](const KernelInfo*, int type, Allocator** allocator) {
    *allocator = handle<Allocator>(7);
    std::printf("memory type %d: ", type);
    return said("allocator");
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
