// Which instruction-set build runs: the best the CPU supports, or the one sg_set_instruction_set forces. All give the
// same bits.
#include <atomic>
#include <cstring>

#include "common/error.h"
#include "kernels/ops.h"
#include "kernels/table.h"

namespace sg {
namespace generic {
extern const KernelTable table;
}
#ifdef SG_HAVE_AVX2
namespace avx2 {
extern const KernelTable table;
}
#endif
#ifdef SG_HAVE_AVX512
namespace avx512 {
extern const KernelTable table;
}
#endif
#ifdef SG_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const KernelTable table;
}
#endif

namespace {

bool cpu_has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Best first; nullptr where this build or this CPU lacks it.
const KernelTable* find(const char* name) {
#ifdef SG_HAVE_AVX512_BF16
  if (!strcmp(name, "avx512_bf16")) {
    return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16") ? &avx512_bf16::table : nullptr;
  }
#endif
#ifdef SG_HAVE_AVX512
  if (!strcmp(name, "avx512")) return cpu_has_avx512() ? &avx512::table : nullptr;
#endif
#ifdef SG_HAVE_AVX2
  if (!strcmp(name, "avx2")) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2::table : nullptr;
  }
#endif
  return !strcmp(name, "generic") ? &generic::table : nullptr;
}

const KernelTable* best() {
  for (const char* name : {"avx512_bf16", "avx512", "avx2"}) {
    if (const KernelTable* table = find(name)) return table;
  }
  return &generic::table;
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = current.load(std::memory_order_relaxed);
  if (table == nullptr) {
    table = best();
    current.store(table, std::memory_order_relaxed);
  }
  return *table;
}

}  // namespace sg

int sg_set_instruction_set(const char* name) {
  const sg::KernelTable* table = sg::find(name);
  if (table == nullptr) {
    return sg::fail("instruction_set=%s is not in this build or not on this CPU; the best here is %s", name,
                    sg::best()->name);
  }
  sg::current.store(table, std::memory_order_relaxed);
  return SG_OK;
}

const char* sg_instruction_set() { return sg::kernels().name; }

const char* sg_kernel_version() { return SG_KERNEL_VERSION; }
