// The part of the CUDA driver's interface that launching a compiled kernel takes, declared anew. The driver is loaded when
// it is first used: libraries built on this need CUDA neither to build nor to load.
#pragma once

#include <cstdint>
#include <string>

namespace umv2::cuda {

struct ComputeCapability {
  int major, minor;
  std::string text() const { return std::to_string(major) + "." + std::to_string(minor); }
};

// Handles of the driver, and CUDA's runtime: a cudaStream_t is a CUstream.
using Context = void*;
using Module = void*;
using Function = void*;
using Stream = void*;

struct Grid {
  unsigned x, y, z;
};

class Driver {
 public:
  // Throws where there is no driver.
  static const Driver& instance();

  // The context that is current in this thread, and its device; both throw where there is none.
  Context current_context() const;
  ComputeCapability compute_capability() const;

  Module load(const void* image) const;
  // `shared_bytes`: dynamic shared memory that its launches will ask for.
  Function function(Module module, const char* name, int shared_bytes) const;
  void launch(Function function, Grid grid, unsigned threads, unsigned shared_bytes, Stream stream, void** arguments) const;

 private:
  Driver();
  void check(int result, const char* what) const;

  int (*init_)(unsigned flags);
  int (*ctx_get_current_)(Context* context);
  int (*ctx_get_device_)(int* device);
  int (*device_get_attribute_)(int* value, int attribute, int device);
  int (*module_load_data_)(Module* module, const void* image);
  int (*module_get_function_)(Function* function, Module module, const char* name);
  int (*func_set_attribute_)(Function function, int attribute, int value);
  int (*launch_kernel_)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream, void** arguments,
                        void** extra);
  int (*get_error_string_)(int result, const char** text);
};

}  // namespace umv2::cuda
