"""Steps of few tokens as graphs: `SmallSteps`, which captures one for each size that comes and runs it again and again.

A step of decode is hundreds of launches, each shorter than it takes the host to make it. Sizes are rounded up (padding
does no harm, step_inputs.py), so that few graphs serve all steps. A size's first step runs uncaptured, and is captured
after it, which runs nothing. Graphs know addresses alone: weights may move (PlacementTables), sequences come and go.

Letters: T tokens, D hidden, S rows that are sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from switchgear_runtime.cuda.attention_packing import num_tiles_max
from switchgear_runtime.cuda.graph import Graph
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.step_inputs import InputShape, StepInputs
from switchgear_runtime.cuda.step_memory import StepMemory

POSITIONS_MIN = 512
FINE, COARSE = 8, 16  # steps of the sizes up to 32, and from there on
GRAPHS_MAX = 64  # that are kept; a device has some megabytes of each


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a graph has room for. `max_positions`: no position is as large. `num_tiles`: 0 where no tokens attend
    together, as in decode, which then has no launch for them."""

    num_tokens: int
    max_positions: int
    num_tiles: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Enqueued:
    """A step that is on the stream; both in the step's memory, which the next one overwrites."""

    x_TD: Tensor
    logits_SV: Tensor


@dataclass(slots=True, eq=False)
class _Captured:
    inputs: tuple[
        StepInputs, StepInputs
    ]  # on the host by turns: one step's may not have been copied when the next comes
    turn: int = 0
    graph: Graph | None = None
    enqueued: Enqueued | None = None

    def close(self) -> None:
        """The graph's launches have ended, or are at least GRAPHS_MAX - 1 steps old."""
        if self.graph is not None:
            self.graph.close()
        self.graph = self.enqueued = None


class SmallSteps:
    """`enqueue` makes a step of what lies in inputs, the same launches each time. `captures` False: without graphs."""

    def __init__(
        self,
        kernels: Kernels,
        enqueue: Callable[[StepInputs, Bucket], Enqueued],
        *,
        max_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        captures: bool,
    ) -> None:
        self._kernels = kernels
        self._enqueue = enqueue
        self.max_tokens = max_tokens
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._block_size = block_size
        self._captures = captures
        self._memory = StepMemory(kernels.device)
        self._known: dict[Bucket, _Captured] = {}
        self.num_captures = self.num_replays = 0

    def bucket(self, num_tokens: int, num_positions: int, *, has_tiles: bool) -> Bucket:
        """`num_tokens`: of the rank that has most, so that all ranks have the same; the others: of this one."""
        positions = POSITIONS_MIN
        while positions < num_positions:
            positions *= 2
        capacity = -(-self._max_model_len // self._block_size) * self._block_size
        room = min(self.max_tokens, _rounded_up(num_tokens))
        return Bucket(room, min(positions, capacity), num_tiles_max(room) if has_tiles else 0)

    def begin(self, num_bytes: int) -> None:
        """A generation, whose largest step takes so many bytes; steps that are enqueued must have ended."""
        self.forget()
        self._memory.reserve(num_bytes)

    def inputs(self, bucket: Bucket) -> StepInputs:
        """To fill for the next `launch` of this bucket."""
        known = self._known.pop(bucket, None)
        if known is None:
            shape = InputShape(
                num_tokens=bucket.num_tokens,
                num_seqs=min(bucket.num_tokens, self._max_num_seqs),
                table_width=-(-bucket.max_positions // self._block_size),
                num_rows=min(bucket.num_tokens, self._max_num_seqs),
                num_tiles=bucket.num_tiles,
                num_alone=bucket.num_tokens if bucket.num_tiles else 0,
            )
            first = StepInputs(shape, self._kernels.device)
            second = StepInputs(shape, self._kernels.device, first.on_device)
            known = _Captured((first, second))
        self._known[bucket] = known  # the latest of all
        if len(self._known) > GRAPHS_MAX:
            self._known.pop(next(iter(self._known))).close()
        known.turn = 1 - known.turn
        return known.inputs[known.turn]

    def launch(self, bucket: Bucket) -> Enqueued:
        """Enqueue a step of the inputs that were filled last."""
        known = self._known[bucket]
        inputs = known.inputs[known.turn]
        self._kernels.copy_(inputs.on_device, inputs.host)
        if known.graph is not None:
            known.graph.launch()
            self.num_replays += 1
            assert known.enqueued is not None
            return known.enqueued
        enqueued = self._run(inputs, bucket)
        if self._captures:
            known.graph = Graph.capture(self._kernels, lambda: self._run(inputs, bucket))
            known.enqueued = enqueued
            self.num_captures += 1
        return enqueued

    def forget(self) -> None:
        """Addresses have changed. Steps that are enqueued must have ended."""
        for known in self._known.values():
            known.close()

    def _run(self, inputs: StepInputs, bucket: Bucket) -> Enqueued:
        with self._kernels.in_memory(self._memory), self._memory.scope():
            return self._enqueue(inputs, bucket)

    @property
    def memory(self) -> StepMemory:
        return self._memory


def _rounded_up(num_tokens: int) -> int:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, ..."""
    if num_tokens <= FINE:
        return 1 << max(0, num_tokens - 1).bit_length()
    unit = FINE if num_tokens <= 4 * FINE else COARSE
    return -(-num_tokens // unit) * unit
