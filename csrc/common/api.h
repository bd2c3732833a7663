// What every C-ABI entry point shares: the export marker; and the marker of functions that kernels of a GPU call too.
#pragma once

#define SG_API extern "C" __attribute__((visibility("default")))

#if defined(__CUDACC__)
#define SG_PORTABLE __host__ __device__ inline
#else
#define SG_PORTABLE inline
#endif
