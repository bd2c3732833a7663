// The torch side of the ops, over libtorch's stable ABI; the only file that knows torch. It checks dtype, shape and
// contiguity once, hands raw pointers to the C ABI of kernels/ops.h and turns its failures into exceptions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>

#include "common/error.h"
#include "kernels/ops.h"

using torch::stable::Tensor;
static Tensor probe(const Tensor& x, std::vector<Tensor> l, std::optional<Tensor> o, double d, bool b, torch::headeronly::ScalarType t) {
  if (x.dim() == 1) throw std::invalid_argument("x must be 2-D");
  if (x.dim() == 3) throw std::runtime_error("x must be 2-D");
  return torch::stable::new_empty(x, {3, (int64_t)l.size()}, t);
}
STABLE_TORCH_LIBRARY(switchgear, m) { m.def("probe(Tensor x, Tensor[] l, Tensor? o, float d, bool b, ScalarType t) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(switchgear, CPU, m) { m.impl("probe", TORCH_BOX(&probe)); }

