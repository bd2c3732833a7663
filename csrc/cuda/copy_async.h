// Copies from global to shared memory that a thread starts and later waits for (cp.async of the PTX ISA).
//
// A thread's copies are done, and seen by it, once it has waited for their commit; other threads see them after a
// barrier behind that. In the twin a copy happens at once, or, where threads run backwards, when its thread waits for
// it: both are allowed.
#pragma once

#include "cuda/lanes.h"

#if !defined(__CUDACC__)
#include <vector>
#endif

namespace sg::cuda {

#if defined(__CUDACC__)
SG_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// BYTES bytes, 16 or 4, or as many zeros: then `from` is an address that could be read.
template <int BYTES>
SG_DEVICE void copy_async(void* shared, const void* from, bool is_there) {
  const int size = is_there ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from),
                 "r"(size)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(from), "r"(size)
                 : "memory");
  }
}
SG_DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the latest PENDING commits of this thread.
template <int PENDING>
SG_DEVICE void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#else
struct Copies {
  struct Copy {
    void* to;
    const void* from;  // null: zeros
    size_t size;
    int64_t commit;
    void run() const {
      if (from == nullptr) {
        std::memset(to, 0, size);
      } else {
        std::memcpy(to, from, size);
      }
    }
  };
  std::vector<Copy> pending;
  int64_t commits = 0;
};
inline thread_local Copies copies_of[1024];

template <int BYTES>
void copy_async(void* shared, const void* from, bool is_there) {
  check_aligned<BYTES>(shared);
  check_aligned<BYTES>(from);
  Copies& mine = copies_of[current_thread];
  const Copies::Copy copy{shared, is_there ? from : nullptr, BYTES, mine.commits};
  if (sg_cuda_twin_backwards) {
    mine.pending.push_back(copy);
  } else {
    copy.run();
  }
}
inline void commit_async() { ++copies_of[current_thread].commits; }
template <int PENDING>
void wait_async() {
  Copies& mine = copies_of[current_thread];
  size_t left = 0;
  for (const Copies::Copy& copy : mine.pending) {
    if (copy.commit < mine.commits - PENDING) {
      copy.run();
    } else {
      mine.pending[left++] = copy;
    }
  }
  mine.pending.resize(left);
}
#endif

}  // namespace sg::cuda
