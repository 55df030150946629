// The ops that the library registers, one entry for each dtype of scores.
#pragma once

#include <vector>

#include "kernels.h"
#include "ort_abi.h"

namespace umv2::ort {

// How the kernels call an element type of rows or keys; throws for one that they cannot read.
Storage storage(ElementType type, const char* name);

std::vector<const CustomOp*> custom_ops(const Api& api);

// Each fills in one registration; `api` outlives the library.
const CustomOp* key_scores_op(const Api& api, ElementType scores);
const CustomOp* tucker_topk_op(const Api& api, ElementType scores);
const CustomOp* memory_lookup_op(const Api& api, ElementType scores);

}  // namespace umv2::ort
