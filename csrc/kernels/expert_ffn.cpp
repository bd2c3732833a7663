// Two passes with a barrier between them, each cut into tasks of about equal cost over slots, rows and panels: so a hot
// expert keeps all threads busy, and a cold one costs one pass over its bytes.
#include "kernels/expert_ffn.h"

#include <cstring>

#include "kernels/thread_pool.h"

namespace sg {

namespace {

// The tasks of one pass: `weight_of(slot)` for the rows of each slot that has any.
template <typename WeightOf>
void cut_slots(const ExpertSlots& slots, const int64_t* begin, WeightOf weight_of, ScratchVector<GemmTask>* tasks) {
  int64_t total = 0;
  for (int64_t s = 0; s < slots.num_slots; ++s) {
    if (begin[s + 1] > begin[s]) total += cost_of(weight_of(s), begin[s + 1] - begin[s]);
  }
  tasks->clear();
  const int64_t cost = task_cost(total);
  for (int64_t s = 0; s < slots.num_slots; ++s) {
    if (begin[s + 1] > begin[s]) cut(weight_of(s), begin[s + 1] - begin[s], static_cast<int32_t>(s), cost, tasks);
  }
}

}  // namespace

void expert_ffn(const ExpertSlots& slots, const int64_t* begin, const void* const* x, void* const* y, int y_dtype) {
  thread_local ScratchVector<GemmTask> tasks;
  thread_local ScratchVector<void*> act_rows;
  thread_local Scratch act;
  const int64_t num_rows = begin[slots.num_slots];
  const int act_dtype = activation_dtype(slots.format);
  const int64_t stride = (slots.ffn + LANES - 1) / LANES * LANES * ITEMSIZE[act_dtype];
  auto* memory = act.get<uint8_t>(num_rows * stride);
  act_rows.resize(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) act_rows[r] = memory + r * stride;
  if (slots.ffn % 2 != 0)
    std::memset(memory, 0, static_cast<size_t>(num_rows * stride));  // the last of a row has no mate
  void* const* acts = act_rows.data();

  cut_slots(slots, begin, [&](int64_t s) { return slots.gate_up(s); }, &tasks);
  const GemmTask* first = tasks.data();
  parallel_for(tasks.size(), [&](int64_t i) {
    const int64_t at = begin[first[i].index];
    run_task(slots.gate_up(first[i].index), first[i], x + at, acts + at, act_dtype, EPILOGUE_SILU_MUL);
  });

  cut_slots(slots, begin, [&](int64_t s) { return slots.down(s); }, &tasks);
  const GemmTask* second = tasks.data();
  parallel_for(tasks.size(), [&](int64_t i) {
    const int64_t at = begin[second[i].index];
    run_task(slots.down(second[i].index), second[i], acts + at, y + at, y_dtype, EPILOGUE_STORE);
  });
}

}  // namespace sg
