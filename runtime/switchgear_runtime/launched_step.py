"""A step that was launched: `LaunchedStep`, whose results come when it is finished, at once or after the next is launched.

The host's steps are over when they return (`FinishedStep`); a device's run beside the host (`DeviceLaunch`), which can
agree on and schedule the next one meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.batch import Batch, FlatBatch, SampledToken
from switchgear_runtime.messages import PromptLogprobs
from switchgear_runtime.moe.load import ExpertLoad, StepTenants
from switchgear_runtime.prompt_scorer import score_prompts
from switchgear_runtime.sampler import Sampler

if TYPE_CHECKING:
    from switchgear_runtime.cuda.decoder import DeviceDecoder
    from switchgear_runtime.cuda.pending_step import PendingStep

PROMPT_LOGITS_BYTES_MAX = 16 << 20  # held at a time while prompts are scored


@dataclass(frozen=True, slots=True)
class StepResult:
    """`tokens`: in the order of batch.sampling. `scored`: what the step says of prompts."""

    tokens: list[SampledToken]
    scored: list[PromptLogprobs]


class LaunchedStep(Protocol):
    @property
    def may_overlap(self) -> bool:
        """Whether the next step may be launched before this one is finished."""
        ...

    def finish(self) -> StepResult:
        """Waits, with a deadline. What broke the step is raised; then nothing of it counts. Once."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    result: StepResult
    may_overlap = False

    def finish(self) -> StepResult:
        return self.result


class DeviceLaunch:
    """Tokens that a device drew; those that need more than it knows are drawn here, of its logits."""

    def __init__(
        self,
        batch: Batch,
        pending: PendingStep,
        tenants: StepTenants,
        *,
        decoder: DeviceDecoder,
        load: ExpertLoad,
        sampler: Sampler,
        host_rows: list[int],
        prompt_rows: list[int],
        timeout_s: float,
    ) -> None:
        self._batch = batch
        self._pending = pending
        self._tenants = tenants
        self._decoder = decoder
        self._load = load
        self._sampler = sampler
        self._prompt_rows = prompt_rows
        self._timeout_s = timeout_s
        sequences = batch.sampling
        self._host_rows = host_rows
        self._host_sequences = [sequences[row] for row in host_rows]
        self._layout = sampler.layout(self._host_sequences)  # now: the scheduler goes on

    @classmethod
    def of(
        cls,
        batch: Batch,
        flat: FlatBatch,
        decoder: DeviceDecoder,
        *,
        num_tokens_max: int,
        forced_ids_LTK: NDArray[np.int32] | None,
        versions_S: NDArray[np.int32] | None,
        host_rows: list[int],
        load: ExpertLoad,
        sampler: Sampler,
        timeout_s: float,
    ) -> DeviceLaunch:
        """Enqueues it: see DeviceDecoder.launch."""
        tenants = StepTenants.of([entry.sequence.tenant for entry in batch])
        pending = decoder.launch(
            flat,
            batch.sampling,
            tenants,
            num_tokens_max=num_tokens_max,
            forced_ids_LTK=forced_ids_LTK,
            versions_S=versions_S,
            host_rows=host_rows,
        )
        return cls(
            batch,
            pending,
            tenants,
            decoder=decoder,
            load=load,
            sampler=sampler,
            host_rows=host_rows,
            prompt_rows=flat.prompt_rows,
            timeout_s=timeout_s,
        )

    @property
    def may_overlap(self) -> bool:
        """Not with tokens that the device does not know, nor while its hidden states are wanted."""
        return not self._host_rows and not self._prompt_rows

    def wait(self) -> PendingStep:
        """The step is over, and counted."""
        pending = self._pending
        pending.wait(self._timeout_s)
        self._load.add_step(self._tenants, pending.read.routed_NLE, pending.read.rows_LE)
        return pending

    def finish(self) -> StepResult:
        pending = self.wait()
        tokens = [SampledToken(token_id) for token_id in pending.read.drawn_S[: len(self._batch.sampling)].tolist()]
        if self._host_rows:
            drawn = self._sampler.of(pending.logits_SV, self._host_sequences, self._layout)
            for row, token in zip(self._host_rows, drawn, strict=True):
                tokens[row] = token
        scored = score_prompts(self._prompt_logits(pending.x_TD), self._batch) if self._batch.unscored else []
        return StepResult(tokens, scored)

    def _prompt_logits(self, x_TD: Tensor) -> Iterator[Tensor]:
        for rows in prompt_chunks(self._prompt_rows, self._decoder.vocab_size):
            yield self._decoder.logits(x_TD, rows)


def prompt_chunks(rows: list[int], vocab_size: int) -> tuple[Tensor, ...]:
    """Rows whose logits are wanted, a bounded number at a time: a prompt has many more than sequences sample."""
    num_rows = max(1, PROMPT_LOGITS_BYTES_MAX // (4 * vocab_size))
    return torch.split(torch.tensor(rows, dtype=torch.int64), num_rows)
