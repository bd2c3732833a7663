// A product over the pool: `multiply`, and the rows it takes as pointers.
#pragma once

#include "kernels/scratch.h"
#include "kernels/table.h"

namespace sg {

// One matrix in memory, as pack.h lays it out.
struct Weight {
  const uint8_t* packed = nullptr;
  int32_t format = 0;  // Format
  int32_t gate_up = 0;
  int64_t num_out = 0;  // rows of the source; 2F of gates and ups
  int64_t num_k = 0;
  const float* bias = nullptr;  // [num_out] or null
};

int64_t num_panels_of(const Weight& weight);

// How products of several matrices are cut into tasks: rows [row_begin, row_end) of matrix `index` for some panels.
struct GemmTask {
  int32_t index;
  int32_t row_begin, row_end;
  int32_t panel_begin, panel_end;
};
// About how long a product takes, in bytes of weights streamed: rows beyond some ten cost more than the bytes.
int64_t cost_of(const Weight& weight, int64_t num_rows);
// The cost a task should have when all products of a pass together cost `total`: some tasks for each thread to even
// out, and none so small that claiming it, and ramping up a stream, tells.
int64_t task_cost(int64_t total);
// Appends the tasks of one product, of about `cost` each.
void cut(const Weight& weight, int64_t num_rows, int32_t index, int64_t cost, ScratchVector<GemmTask>* tasks);

// y = x * weight, for the rows at x and y. See GemmArgs.
void multiply(const Weight& weight, const void* const* x, int64_t num_rows, void* const* y, int y_dtype,
              Epilogue epilogue, float multiplier = 1.0f);
// One task of it, on this thread.
void run_task(const Weight& weight, const GemmTask& task, const void* const* x, void* const* y, int y_dtype,
              Epilogue epilogue, float multiplier = 1.0f);

}  // namespace sg
