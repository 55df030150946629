// Memory of the device for one call, from the allocator of the execution provider.
#pragma once

#include <cstdint>

#include "driver.h"
#include "kernel_io.h"

namespace umv2::ort {

// The allocator of a node's provider; lives as long as the node.
class DeviceMemory {
 public:
  DeviceMemory(const Api& api, const KernelInfo* info) : api_(api) {
    check(api, api.kernel_allocator(info, kDefaultMemory, &allocator_), "allocator");
    try {
      check(api, api.allocator_info(allocator_, &info_), "allocator info");
    } catch (...) {
      api.release_allocator(allocator_);
      throw;
    }
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { api_.release_allocator(allocator_); }

  // A scratch buffer belongs to the stream of the call: the arena hands it to nobody else until that has done its work.
  // The runtime looks for the stream without asking whether there is one (1.18 to 1.31), and on a CPU there is none.
  void* allocate(const KernelContext* context, cuda::Stream stream, int64_t bytes) const {
    void* memory = nullptr;
    const size_t size = static_cast<size_t>(bytes);
    check(api_, stream == nullptr ? api_.allocate(allocator_, size, &memory)
                                  : api_.scratch_buffer(context, info_, size, &memory),
          "scratch memory");
    require(memory != nullptr, "the runtime has no ", bytes, " bytes of scratch memory");
    return memory;
  }
  void free(void* memory) const noexcept {
    if (Status* const status = api_.free(allocator_, memory)) api_.release_status(status);
  }

 private:
  const Api& api_;
  Allocator* allocator_ = nullptr;
  const MemoryInfo* info_ = nullptr;
};

// Given back once the kernels that use it are on their stream: what gets it next comes after them on the same stream.
class Scratch {
 public:
  Scratch(const DeviceMemory& memory, const KernelContext* context, cuda::Stream stream, int64_t bytes)
      : memory_(memory), data_(bytes == 0 ? nullptr : memory.allocate(context, stream, bytes)) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (data_ != nullptr) memory_.free(data_);
  }

  void* data() const { return data_; }

 private:
  const DeviceMemory& memory_;
  void* data_;
};

}  // namespace umv2::ort
