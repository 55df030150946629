// The ops of the CPU library, one entry for each dtype of scores.
#pragma once

#include "kernels.h"
#include "library.h"

namespace umv2::ort {

inline constexpr const char* kExecutionProvider = "CPUExecutionProvider";

// How the kernels call an element type of rows or keys; throws for one that they cannot read.
Storage storage(ElementType type, const char* name);

// Each fills in one registration; `api` outlives the library.
const CustomOp* key_scores_op(const Api& api, ElementType scores);
const CustomOp* tucker_topk_op(const Api& api, ElementType scores);
const CustomOp* memory_lookup_op(const Api& api, ElementType scores);

}  // namespace umv2::ort
