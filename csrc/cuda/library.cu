// What the library is: which of the two, for which GPUs, and what the driver under it can run.
#include "cuda/abi.h"
#include "cuda/portable.h"

#if defined(__CUDACC__)

const char* sg_cuda_kind() { return "cuda"; }
const char* sg_cuda_architectures() { return SG_CUDA_ARCHITECTURES; }
int sg_cuda_toolkit() { return CUDART_VERSION; }

int sg_cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int sg_cuda_num_devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int sg_cuda_synchronize(void* stream) {
  const cudaError_t status = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  return status == cudaSuccess ? SG_OK : sg::fail("%s (%s)", cudaGetErrorString(status), cudaGetErrorName(status));
}

void* sg_cuda_managed_alloc(int64_t bytes) {
  void* data = nullptr;
  const cudaError_t status = cudaMallocManaged(&data, static_cast<size_t>(bytes));
  if (status == cudaSuccess) return data;
  sg::fail("%lld bytes of managed memory: %s", static_cast<long long>(bytes), cudaGetErrorString(status));
  return nullptr;
}

void sg_cuda_managed_free(void* data) { cudaFree(data); }

void* sg_cuda_mapped_alloc(int64_t bytes) {
  void* data = nullptr;  // one address for host and device, as all CUDA addresses of a 64-bit process
  const cudaError_t status =
      cudaHostAlloc(&data, static_cast<size_t>(bytes), cudaHostAllocMapped | cudaHostAllocPortable);
  if (status == cudaSuccess) return data;
  sg::fail("%lld bytes of mapped host memory: %s", static_cast<long long>(bytes), cudaGetErrorString(status));
  return nullptr;
}

void sg_cuda_mapped_free(void* data) { cudaFreeHost(data); }
void sg_cuda_twin_order(int) {}

#else

int sg_cuda_twin_backwards = 0;

const char* sg_cuda_kind() { return "twin"; }
const char* sg_cuda_architectures() { return ""; }
int sg_cuda_toolkit() { return 0; }
int sg_cuda_driver() { return 0; }
int sg_cuda_num_devices() { return 0; }
int sg_cuda_synchronize(void*) { return SG_OK; }
void* sg_cuda_managed_alloc(int64_t bytes) { return std::malloc(static_cast<size_t>(bytes)); }
void sg_cuda_managed_free(void* data) { std::free(data); }
void* sg_cuda_mapped_alloc(int64_t bytes) { return std::malloc(static_cast<size_t>(bytes)); }
void sg_cuda_mapped_free(void* data) { std::free(data); }
void sg_cuda_twin_order(int backwards) { sg_cuda_twin_backwards = backwards; }

#endif

const char* sg_cuda_kernel_version() { return "3"; }
