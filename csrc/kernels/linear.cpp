// Products over the pool: how they are cut into tasks, and the dense one as an op.
#include "kernels/linear.h"

#include <algorithm>
#include <cstring>

#include "common/error.h"
#include "common/flush.h"
#include "kernels/ops.h"
#include "kernels/thread_pool.h"

namespace sg {

namespace {

// A task's rows: what of bf16 activations fits the L2 cache beside a panel. A multiple of every strip in isa/gemm.cpp.
constexpr int64_t ROWS_PER_TASK = 192;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t num_panels_of(const Weight& weight) {
  return weight.gate_up ? num_panels_gate_up(weight.num_out / 2) : num_panels(weight.num_out);
}

int64_t cost_of(const Weight& weight, int64_t num_rows) {
  constexpr int64_t BYTES_PER_PRODUCT_ROW = 12;  // of a panel: 64 outputs for one k
  return num_panels_of(weight) *
         (panel_bytes(weight.format, weight.num_k) + num_rows * weight.num_k * BYTES_PER_PRODUCT_ROW);
}

int64_t task_cost(int64_t total) {
  constexpr int64_t COST_MIN = 96 << 10;
  const int64_t threads = num_threads();
  if (threads == 1) return total;
  const int64_t share = total / (8 * threads);
  return share > COST_MIN ? share : COST_MIN;
}

void cut(const Weight& weight, int64_t num_rows, int32_t index, int64_t cost, ScratchVector<GemmTask>* tasks) {
  const int64_t panels = num_panels_of(weight);
  const int64_t blocks = divide_up(num_rows, ROWS_PER_TASK);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = num_rows * block / blocks, end = num_rows * (block + 1) / blocks;
    const int64_t pieces = std::clamp<int64_t>(cost_of(weight, end - begin) / cost, 1, panels);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      tasks->push_back({index, static_cast<int32_t>(begin), static_cast<int32_t>(end),
                        static_cast<int32_t>(panels * piece / pieces),
                        static_cast<int32_t>(panels * (piece + 1) / pieces)});
    }
  }
}

void run_task(const Weight& weight, const GemmTask& task, const void* const* x, void* const* y, int y_dtype,
              Epilogue epilogue, float multiplier) {
  thread_local Scratch decoded;
  GemmArgs args = {.x = x,
                   .packed = weight.packed,
                   .num_k = weight.num_k,
                   .num_out = weight.num_out,
                   .bias = weight.bias,
                   .multiplier = multiplier,
                   .epilogue = epilogue,
                   .y_dtype = y_dtype,
                   .y = y,
                   .decoded = nullptr};
  if (weight.format == FORMAT_INT8 || weight.format == FORMAT_INT4) {
    args.decoded = decoded.get<uint8_t>((weight.num_k + 1) / 2 * PANEL * 4);
  }
  kernels().gemm[weight.format](args, task.row_begin, task.row_end, task.panel_begin, task.panel_end);
}

void multiply(const Weight& weight, const void* const* x, int64_t num_rows, void* const* y, int y_dtype,
              Epilogue epilogue, float multiplier) {
  thread_local ScratchVector<GemmTask> tasks;
  tasks.clear();
  cut(weight, num_rows, 0, task_cost(cost_of(weight, num_rows)), &tasks);
  const GemmTask* all = tasks.data();
  parallel_for(tasks.size(), [&](int64_t i) { run_task(weight, all[i], x, y, y_dtype, epilogue, multiplier); });
}

}  // namespace sg

int sg_linear(const float* x, int64_t num_rows, const sg_weight* weight, int silu_mul, float* out) {
  const sg::FlushDenormals flush;
  const sg::Weight w = {static_cast<const uint8_t*>(weight->packed),
                        weight->format,
                        weight->gate_up,
                        weight->num_out,
                        weight->num_k,
                        weight->bias_N};
  const int64_t width = silu_mul ? w.num_out / 2 : w.num_out;
  if (num_rows == 0 || width == 0) return SG_OK;
  if (w.num_k == 0) return sg::fail("x_TK has no columns");
  thread_local sg::Scratch rounded;
  thread_local sg::ScratchVector<const void*> x_rows;
  thread_local sg::ScratchVector<void*> y_rows;
  x_rows.resize(num_rows);
  y_rows.resize(num_rows);
  if (sg::activation_dtype(w.format) == sg::BF16) {
    const int64_t stride = (w.num_k + 1) / 2 * 2;
    auto* rows = rounded.get<sg::bf16>(num_rows * stride);
    for (int64_t r = 0; r < num_rows; ++r) x_rows[r] = rows + r * stride;
    sg::parallel_rows(num_rows, w.num_k, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        rows[r * stride + stride - 1].bits = 0;
        sg::kernels().to_bf16(x + r * w.num_k, w.num_k, rows + r * stride);
      }
    });
  } else {
    for (int64_t r = 0; r < num_rows; ++r) x_rows[r] = x + r * w.num_k;
  }
  for (int64_t r = 0; r < num_rows; ++r) y_rows[r] = out + r * width;
  sg::multiply(w, x_rows.data(), num_rows, y_rows.data(), sg::F32,
               silu_mul ? sg::EPILOGUE_SILU_MUL : sg::EPILOGUE_STORE);
  return SG_OK;
}
