// Graphs: what is enqueued on a stream between begin and end is kept and later runs as one launch, as often as asked
// for, with the same pointers and sizes. Copies and fills are here because a graph has to contain them.
#include "cuda/abi.h"
#include "cuda/portable.h"

#if defined(__CUDACC__)

namespace {

int checked(const char* name, cudaError_t status) {
  if (status == cudaSuccess) return SG_OK;
  cudaGetLastError();  // or the next launch would report it
  return sg::fail("%s: %s (%s)", name, cudaGetErrorString(status), cudaGetErrorName(status));
}

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

int sg_cuda_graph_begin(void* stream) {
  return checked("graph_begin", cudaStreamBeginCapture(as_stream(stream), cudaStreamCaptureModeThreadLocal));
}

int sg_cuda_graph_end(void** graph, void* stream) {
  cudaGraph_t captured = nullptr;
  cudaGraphExec_t ready = nullptr;
  int status = checked("graph_end", cudaStreamEndCapture(as_stream(stream), &captured));
  if (status == SG_OK) status = checked("graph_end", cudaGraphInstantiate(&ready, captured, 0));
  if (captured != nullptr) cudaGraphDestroy(captured);
  *graph = ready;
  return status;
}

int sg_cuda_graph_launch(void* graph, void* stream) {
  return checked("graph_launch", cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), as_stream(stream)));
}

void sg_cuda_graph_free(void* graph) {
  if (graph != nullptr) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
}

int sg_cuda_copy(void* to, const void* from, int64_t bytes, void* stream) {
  return checked("copy", cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, as_stream(stream)));
}

int sg_cuda_zero(void* to, int64_t bytes, void* stream) {
  return checked("zero", cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), as_stream(stream)));
}

#else

int sg_cuda_graph_begin(void*) {
  if (sg::cuda::captured != nullptr) return sg::fail("graph_begin: this thread captures a graph already");
  sg::cuda::captured = new sg::cuda::Work;
  return SG_OK;
}

int sg_cuda_graph_end(void** graph, void*) {
  if (sg::cuda::captured == nullptr) return sg::fail("graph_end: this thread captures no graph");
  *graph = sg::cuda::captured;
  sg::cuda::captured = nullptr;
  return SG_OK;
}

int sg_cuda_graph_launch(void* graph, void*) {
  for (const auto& work : *static_cast<const sg::cuda::Work*>(graph)) {
    const int status = work();
    if (status != SG_OK) return status;
  }
  return SG_OK;
}

void sg_cuda_graph_free(void* graph) { delete static_cast<sg::cuda::Work*>(graph); }

int sg_cuda_copy(void* to, const void* from, int64_t bytes, void*) {
  return sg::cuda::run_or_capture([=] {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return SG_OK;
  });
}

int sg_cuda_zero(void* to, int64_t bytes, void*) {
  return sg::cuda::run_or_capture([=] {
    std::memset(to, 0, static_cast<size_t>(bytes));
    return SG_OK;
  });
}

#endif
