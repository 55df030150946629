#include "device.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>

namespace umv2::test {
namespace {

template <typename Signature>
void resolve(void* library, const char* name, Signature*& target) {
  target = reinterpret_cast<Signature*>(dlsym(library, name));
  if (target == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
}

}  // namespace

Device::Device() {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error("libcuda.so.1 cannot be loaded: the NVIDIA driver is not installed");
  int (*init)(unsigned);
  int (*get)(int*, int);
  int (*retain)(void**, int);
  int (*set_current)(void*);
  resolve(library, "cuInit", init);
  resolve(library, "cuDeviceGet", get);
  resolve(library, "cuDeviceGetName", get_name_);
  resolve(library, "cuDevicePrimaryCtxRetain", retain);
  resolve(library, "cuCtxSetCurrent", set_current);
  int (*create_stream)(void**, unsigned);
  resolve(library, "cuStreamCreate", create_stream);
  resolve(library, "cuStreamDestroy_v2", destroy_stream_);
  resolve(library, "cuMemAlloc_v2", allocate_);
  resolve(library, "cuMemFree_v2", free_);
  resolve(library, "cuMemcpyHtoD_v2", to_device_);
  resolve(library, "cuMemcpyDtoH_v2", to_host_);
  resolve(library, "cuCtxSynchronize", synchronize_);
  void* context = nullptr;
  check(init(0), "start");
  check(get(&device_, 0), "find a GPU");
  check(retain(&context, device_), "make a context");
  check(set_current(context), "make the context current");
  check(create_stream(&stream_, 0), "make a stream");
}

Device::~Device() {
  for (const uint64_t address : allocations_) free_(address);
  destroy_stream_(stream_);
}

void Device::check(int result, const char* what) const {
  if (result != 0) {
    throw std::runtime_error(std::string("the CUDA driver failed to ") + what + ": error " + std::to_string(result));
  }
}

std::string Device::name() const {
  char text[256] = {};
  check(get_name_(text, sizeof text, device_), "name the GPU");
  return text;
}

void* Device::upload(const std::vector<uint8_t>& bytes) {
  uint64_t address = 0;
  check(allocate_(&address, std::max<size_t>(bytes.size(), 1)), "allocate memory");
  allocations_.push_back(address);
  if (!bytes.empty()) check(to_device_(address, bytes.data(), bytes.size()), "copy to the GPU");
  return reinterpret_cast<void*>(address);
}

std::vector<uint8_t> Device::download(const void* address, size_t size) const {
  std::vector<uint8_t> bytes(size);
  check(synchronize_(), "finish");
  if (size > 0) check(to_host_(bytes.data(), reinterpret_cast<uint64_t>(address), size), "copy from the GPU");
  return bytes;
}

}  // namespace umv2::test
