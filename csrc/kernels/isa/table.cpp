// This build's table of kernels. Compiled once per instruction set, with SG_ISA naming the namespace.
#include "kernels/table.h"

#define SG_STRING_(x) #x
#define SG_STRING(x) SG_STRING_(x)

namespace sg::SG_ISA {

extern const KernelTable table;
const KernelTable table = {SG_STRING(SG_ISA)};

}  // namespace sg::SG_ISA
