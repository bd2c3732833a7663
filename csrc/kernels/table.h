// The functions every instruction-set build of csrc/kernels/isa provides, as one table of pointers.
//
// A kernel here is one worker's share of an op: it checks nothing, allocates nothing, starts no thread and throws nothing.
// The files in csrc/kernels/*.cpp check, split the work (never a reduction) and call through `kernels()`.
#pragma once

#include <cstdint>

namespace sg {

struct KernelTable {
  const char* name;
};

// The table in use: the best this CPU runs, unless sg_set_instruction_set forced another.
const KernelTable& kernels();

}  // namespace sg
