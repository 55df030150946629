// The ops of the CUDA library, one entry for each dtype of scores. KeyScores is not among them: its body is matrix
// products, which the provider computes best itself, and once an op is registered its body is not used.
#pragma once

#include "kernel_archive.h"
#include "library.h"

// The tests run whole models on a machine without a GPU: they compile these files for the provider of the CPU, and put a
// stand-in driver in place whose device memory is the host's.
#ifndef UMV2_EXECUTION_PROVIDER
#define UMV2_EXECUTION_PROVIDER "CUDAExecutionProvider"
#endif

namespace umv2::ort {

inline constexpr const char* kExecutionProvider = UMV2_EXECUTION_PROVIDER;

// How the compiled kernels call an element type; throws for one that they do not know.
cuda::ElementType element_type(ElementType type, const char* name);

cuda::Stream stream_of(const Api& api, const KernelContext* context);

// Each fills in one registration; `api` outlives the library.
const CustomOp* tucker_topk_op(const Api& api, ElementType scores);
const CustomOp* memory_lookup_op(const Api& api, ElementType scores);

}  // namespace umv2::ort
