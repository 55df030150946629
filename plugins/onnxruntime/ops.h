// The ops of the CPU library, one entry for each dtype of scores.
#pragma once

#include "kernels.h"
#include "library.h"

namespace umv2::ort {

inline constexpr const char* kExecutionProvider = "CPUExecutionProvider";

// The kernels of a node, which asks once, when it is created: what the environment says may change later. Throws where it
// names kernels that this processor does not run.
const Kernels& runnable_kernels();

// Throws at the first NaN of `values`, which are elements `place` and on of a tensor. NaN compares false with everything:
// which rows win would depend on their order.
void require_no_nan(const float* values, int64_t place, int64_t count, const char* name);

// How the kernels call an element type of rows or keys; throws for one that they cannot read.
Storage storage(ElementType type, const char* name);

// Each fills in one registration; `api` outlives the library.
const CustomOp* key_scores_op(const Api& api, ElementType scores);
const CustomOp* tucker_topk_op(const Api& api, ElementType scores);
const CustomOp* memory_lookup_op(const Api& api, ElementType scores);

}  // namespace umv2::ort
