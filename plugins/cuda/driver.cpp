#include "driver.h"

#include <dlfcn.h>

#include "require.h"

namespace umv2::cuda {
namespace {

// Numbers of the driver's interface, which never change.
constexpr int kMajorAttribute = 75, kMinorAttribute = 76;
constexpr int kMaxDynamicSharedBytes = 8;

// What a kernel may use without asking for more.
constexpr int kDefaultSharedBytes = 48 * 1024;

template <typename Signature>
void resolve(void* library, const char* name, Signature*& target) {
  target = reinterpret_cast<Signature*>(dlsym(library, name));
  require(target != nullptr, "the CUDA driver has no ", name);
}

}  // namespace

const Driver& Driver::instance() {
  static const Driver driver;
  return driver;
}

Driver::Driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  require(library != nullptr, "libcuda.so.1 cannot be loaded: the NVIDIA driver is not installed");
  resolve(library, "cuInit", init_);
  resolve(library, "cuCtxGetCurrent", ctx_get_current_);
  resolve(library, "cuCtxGetDevice", ctx_get_device_);
  resolve(library, "cuDeviceGetAttribute", device_get_attribute_);
  resolve(library, "cuModuleLoadData", module_load_data_);
  resolve(library, "cuModuleGetFunction", module_get_function_);
  resolve(library, "cuFuncSetAttribute", func_set_attribute_);
  resolve(library, "cuLaunchKernel", launch_kernel_);
  resolve(library, "cuGetErrorString", get_error_string_);
  check(init_(0), "start");
}

void Driver::check(int result, const char* what) const {
  if (result == 0) return;
  const char* text = nullptr;
  get_error_string_(result, &text);
  require(text != nullptr, "the CUDA driver failed to ", what, ": error ", result);
  require(false, "the CUDA driver failed to ", what, ": ", text);
}

Context Driver::current_context() const {
  Context context = nullptr;
  check(ctx_get_current_(&context), "name the current context");
  require(context != nullptr, "no CUDA context is current in the calling thread");
  return context;
}

ComputeCapability Driver::compute_capability() const {
  int device = 0;
  ComputeCapability found{};
  check(ctx_get_device_(&device), "name the device of the current context");
  check(device_get_attribute_(&found.major, kMajorAttribute, device), "tell the compute capability");
  check(device_get_attribute_(&found.minor, kMinorAttribute, device), "tell the compute capability");
  return found;
}

Module Driver::load(const void* image) const {
  Module module = nullptr;
  check(module_load_data_(&module, image), "load a kernel");
  return module;
}

Function Driver::function(Module module, const char* name, int shared_bytes) const {
  Function function = nullptr;
  check(module_get_function_(&function, module, name), "find a kernel in its module");
  if (shared_bytes > kDefaultSharedBytes) {
    check(func_set_attribute_(function, kMaxDynamicSharedBytes, shared_bytes), "grant shared memory to a kernel");
  }
  return function;
}

void Driver::launch(Function function, Grid grid, unsigned threads, unsigned shared_bytes, Stream stream,
                    void** arguments) const {
  check(launch_kernel_(function, grid.x, grid.y, grid.z, threads, 1, 1, shared_bytes, stream, arguments, nullptr),
        "launch a kernel");
}

}  // namespace umv2::cuda
