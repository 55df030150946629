// The ops that the library registers, one entry for each dtype of scores.
#pragma once

#include <vector>

#include "ort_abi.h"

namespace umv2::ort {

std::vector<const CustomOp*> custom_ops(const Api& api);

// Each fills in one registration; `api` outlives the library.
const CustomOp* key_scores_op(const Api& api, ElementType scores);
const CustomOp* tucker_topk_op(const Api& api, ElementType scores);
const CustomOp* memory_lookup_op(const Api& api, ElementType scores);

}  // namespace umv2::ort
