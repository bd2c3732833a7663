"""DeepEP behind an ExpertGroup: `DeepEp`, its ElasticBuffer as a PairLibrary.

The ways that DeepEP has, and whether a token's bits would be ours (docs/decisions/0017-libraries-behind-a-group.md):

- dispatch and combine of tokens with all their experts: the caller sums a rank's results, DeepEP the ranks': refused;
- the same expanded (a row per expert), allow_multiple_reduction: it sums a rank's results, then the ranks': refused;
- expanded, one reduction at the source: in router order, but of rows that were weighted and rounded before: refused;
- fp8 dispatch: rounds what crosses: refused;
- one expert a token, expanded, bf16: sums nothing. This one.

STATUS: tested against a made-up module with the signatures of deep_ep 2.1.0; has run with no real DeepEP, on no GPU.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switchgear_runtime.comm.nccl import Gpu
from switchgear_runtime.comm.nccl_communicator import NcclCommunicator, start_together
from switchgear_runtime.comm.nccl_library import Nccl
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.cuda.pair_dispatch import Arrived
from switchgear_runtime.errors import ConfigError

HIDDEN_MULTIPLE = 256  # of its kernels' vectors: 32 lanes of 16 bytes
NCCL_VERSION_MIN = 23004
_LEFT: list[Any] = []  # of earlier generations


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    x_MD: Tensor
    handle: Any  # an EPHandle


class DeepEp:
    """A PairLibrary of one generation; all ranks construct it together."""

    def __init__(
        self, control: Transport, gpu: Gpu, nccl: Nccl, *, max_pairs: int, hidden: int, timeout_s: float
    ) -> None:
        if nccl.version < NCCL_VERSION_MIN:
            raise ConfigError(f"dispatch='deepep' needs NCCL 2.30.4 or later, and {nccl.path} is {nccl.version_text}")
        self._module: Any = importlib.import_module("deep_ep")
        self._buffer: Any = None
        self._num_ranks = control.world_size
        self._max_pairs = max_pairs
        self._comm = NcclCommunicator(control, gpu, nccl, timeout_s=timeout_s)
        group = _Group(control.rank, control.world_size, self._comm.address)

        def start() -> int:
            with gpu.current():
                self._buffer = self._module.ElasticBuffer(
                    group,
                    num_max_tokens_per_rank=max_pairs,
                    hidden=hidden,
                    num_topk=1,
                    use_fp8_dispatch=False,
                    allow_multiple_reduction=False,
                    num_cpu_timeout_secs=math.ceil(timeout_s),
                    num_gpu_timeout_secs=math.ceil(timeout_s),
                    explicitly_destroy=True,
                )
            return 0

        try:
            start_together(control, "DeepEP start", start, timeout_s=timeout_s)
        except BaseException:
            self._comm.close()
            raise

    def send(self, x_ND: Tensor, slot_ids_N: Tensor, slots_per_rank: int) -> _Sent:
        """Without DeepEP's wait for the counts on the host, which no peer's death would end."""
        x_MD, _, _, handle, _ = self._buffer.dispatch(
            x_ND,
            topk_idx=slot_ids_N.view(-1, 1).to(self._module.topk_idx_t),
            num_experts=slots_per_rank * self._num_ranks,
            num_max_tokens_per_rank=self._max_pairs,
            expert_alignment=1,
            do_cpu_sync=False,
            do_expand=True,
        )
        return _Sent(x_MD, handle)

    def arrived(self, sent: _Sent) -> Arrived:
        ends_S = sent.handle.psum_num_recv_tokens_per_expert.tolist()  # where each slot's rows end
        counts_S = [end - begin for begin, end in zip([0, *ends_S], ends_S, strict=False)]
        rows_N = torch.arange(ends_S[-1], dtype=torch.int32, device=sent.x_MD.device)
        return Arrived(sent.x_MD, counts_S, rows_N)

    def give_back(self, y_ND: Tensor, sent: _Sent) -> Tensor:
        if not len(y_ND):
            y_ND = sent.x_MD[:1]  # of no pair, so it goes nowhere
        rows_ND, _, _ = self._buffer.combine(y_ND, handle=sent.handle)
        returned: Tensor = rows_ND
        return returned

    def close(self) -> None:
        """Leaves buffer and communicator to the end of the process: their own end waits for all peers, and a peer that hangs
        may still write into them."""
        if self._buffer is not None:
            _LEFT.append((self._buffer, self._comm))
            self._buffer = None


class _Group:
    """What ElasticBuffer asks of a torch ProcessGroup: who is in it, and NCCL's communicator. A real one would open a
    second store and exchange pickled objects."""

    def __init__(self, rank: int, num_ranks: int, comm: int) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._comm = comm

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._num_ranks

    def barrier(self) -> None:
        """The last thing that a start does; start_together is one."""

    def _get_backend(self, _device: torch.device) -> _Group:
        return self

    def _comm_ptr(self) -> int:
        return self._comm
