// What a library of ops tells RegisterCustomOps.
#pragma once

#include <vector>

#include "ort_abi.h"

namespace umv2::ort {

// The ops that it registers; they and `api` live as long as the process. Throws where it cannot run here at all.
std::vector<const CustomOp*> custom_ops(const Api& api);

}  // namespace umv2::ort
