// Memory of the first GPU, through the driver alone.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace umv2::test {

// Makes the primary context of the first GPU current in this thread, and frees what it allocated. All throw
// std::runtime_error where the driver fails, or is not there.
class Device {
 public:
  Device();
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  std::string name() const;
  // Another than the default one.
  void* stream() const { return stream_; }

  void* upload(const std::vector<uint8_t>& bytes);
  // Once all work that was enqueued is done.
  std::vector<uint8_t> download(const void* address, size_t size) const;

 private:
  void check(int result, const char* what) const;

  int device_ = 0;
  void* stream_ = nullptr;
  std::vector<uint64_t> allocations_;
  int (*get_name_)(char*, int, int);
  int (*allocate_)(uint64_t*, size_t);
  int (*free_)(uint64_t);
  int (*destroy_stream_)(void*);
  int (*to_device_)(uint64_t, const void*, size_t);
  int (*to_host_)(void*, uint64_t, size_t);
  int (*synchronize_)();
};

}  // namespace umv2::test
