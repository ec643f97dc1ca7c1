// The processor's instruction sets -> the kernels that run on it.
#pragma once
#include <vector>

#include "kernels.h"

namespace native {

// Best first; the portable ones last, always.
const std::vector<const Kernels*>& levels();

// For the tables of docs and the choice inside a level.
bool has_avx512_bf16();

}  // namespace native
