// The processor's instruction sets -> the kernels that run on it.
#pragma once
#include <vector>

#include "kernels.h"

namespace native {

// Best first; the portable ones last, always.
const std::vector<const Kernels*>& levels();

}  // namespace native
