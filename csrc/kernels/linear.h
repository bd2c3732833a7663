// The product of rows with one packed weight, as the other ops use it.
#pragma once

#include "kernels/table.h"

namespace sg {

// Runs args over all tiles, on the pool when it pays. args.x holds values of the weight's dtype.
void multiply(const GemmArgs& args, int dtype);

}  // namespace sg
