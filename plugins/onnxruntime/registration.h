// Fills the function pointers that all ops answer alike.
#pragma once

#include "kernel_io.h"
#include "ort_abi.h"

namespace umv2::ort {

// A kernel class has: a constructor (const Api&, const KernelInfo*), compute(KernelContext*), kName, and kProvider, the
// execution provider that runs it.
template <typename Kernel>
struct Registration : CustomOp {
  const Api* api;
  ElementType scores;

  Registration(const Api& runtime, ElementType scores_type) : CustomOp{}, api(&runtime), scores(scores_type) {
    version = kApiVersion;
    name = [](const CustomOp*) { return Kernel::kName; };
    execution_provider = [](const CustomOp*) { return Kernel::kProvider; };
    input_type = [](const CustomOp* op, size_t index) { return Kernel::input_type(index, self(op).scores); };
    input_type_count = [](const CustomOp*) { return Kernel::kInputs; };
    output_type = [](const CustomOp* op, size_t index) { return Kernel::output_type(index, self(op).scores); };
    output_type_count = [](const CustomOp*) { return Kernel::kOutputs; };
    input_characteristic = [](const CustomOp*, size_t index) { return Kernel::input_characteristic(index); };
    output_characteristic = [](const CustomOp*, size_t) { return kRequired; };
    input_memory_type = [](const CustomOp*, size_t) { return 0; };
    variadic_input_min_arity = [](const CustomOp*) { return 1; };
    variadic_input_homogeneity = [](const CustomOp*) { return 0; };
    variadic_output_min_arity = [](const CustomOp*) { return 1; };
    variadic_output_homogeneity = [](const CustomOp*) { return 1; };
    start_version = [](const CustomOp*) { return 1; };
    end_version = [](const CustomOp*) { return 0x7fffffff; };
    create_kernel_v2 = [](const CustomOp* op, const void*, const KernelInfo* info, void** kernel) {
      const Api& runtime = *self(op).api;
      return guarded(runtime, Kernel::kName, [&] { *kernel = new Kernel(runtime, info); });
    };
    compute_v2 = [](void* kernel, KernelContext* context) {
      auto& typed = *static_cast<Kernel*>(kernel);
      return guarded(typed.api(), Kernel::kName, [&] { typed.compute(context); });
    };
    destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static const Registration& self(const CustomOp* op) { return *static_cast<const Registration*>(op); }
};

}  // namespace umv2::ort
