"""Puts deltas together to RequestOutputs: `Assembler`, the same for a remote server and an embedded cluster."""

from __future__ import annotations

import time
from collections.abc import Sequence

from switchgear.client_errors import error_of_sequence
from switchgear.outputs import CompletionOutput, Delta, Logprob, RequestOutput
from switchgear.prompts import Prompt
from switchgear.server.events import TokenLogprob
from switchgear.server.schema import WireDelta
from switchgear_runtime.errors import SwitchgearError
from switchgear_runtime.sampling_params import SamplingParams


class Assembler:
    """`outputs`, one per prompt, grow as deltas are `add`ed."""

    def __init__(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> None:
        self._start_s = time.monotonic()
        self._num_open = [one.n for one in params]
        self.num_tokens = 0
        self.num_finished = 0  # prompts
        self.error: SwitchgearError | None = None  # of the first sequence that failed
        self.outputs = [
            RequestOutput(
                request_id="",
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=[] if isinstance(prompt, str) else list(prompt),
                outputs=[CompletionOutput(index=index) for index in range(one.n)],
            )
            for prompt, one in zip(prompts, params, strict=True)
        ]

    def accepted(self, request_id: str) -> None:
        for i, output in enumerate(self.outputs):
            output.request_id = f"{request_id}-{i}"

    def add(self, delta: WireDelta) -> None:
        request = self.outputs[delta.prompt_index]
        output = request.outputs[delta.index]
        logprobs = logprob_dicts(delta.logprobs)
        output.text += delta.text
        output.token_ids += delta.token_ids
        self.num_tokens += len(delta.token_ids)
        if logprobs is not None and delta.logprobs is not None:
            output.logprobs = (output.logprobs or []) + logprobs
            output.cumulative_logprob = sum((one.logprob for one in delta.logprobs), output.cumulative_logprob or 0.0)
        if delta.prompt_logprobs is not None:
            request.prompt_logprobs = request.prompt_logprobs or [None]
            request.prompt_logprobs += logprob_dicts(delta.prompt_logprobs) or ()
        if delta.token_ids and request.metrics.first_token_s is None:
            request.metrics.first_token_s = time.monotonic() - self._start_s
        if delta.finish is not None:
            self._finish(delta, request, output)

    def _finish(self, delta: WireDelta, request: RequestOutput, output: CompletionOutput) -> None:
        finish = delta.finish
        assert finish is not None
        output.finish_reason, output.stop_reason, output.seed = finish.reason, finish.stop_reason, finish.seed
        if output.index == 0:
            request.num_cached_tokens = finish.num_cached_tokens
        if finish.error is not None and self.error is None:
            self.error = error_of_sequence(finish.error, finish.error_status)
        self._num_open[delta.prompt_index] -= 1
        if self._num_open[delta.prompt_index] == 0:
            request.finished = True
            request.metrics.finished_s = time.monotonic() - self._start_s
            self.num_finished += 1


def public_delta(delta: WireDelta) -> Delta:
    """What `stream` yields. Raises the error of a sequence that failed."""
    finish = delta.finish
    if finish is not None and finish.error is not None:
        raise error_of_sequence(finish.error, finish.error_status)
    return Delta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=logprob_dicts(delta.logprobs),
        finish_reason=finish.reason if finish else None,
        stop_reason=finish.stop_reason if finish else None,
        seed=finish.seed if finish else None,
    )


def logprob_dicts(logprobs: Sequence[TokenLogprob] | None) -> list[dict[int, Logprob]] | None:
    """vLLM's form. Example: chosen 7 at -1.5, best 3 at -0.2 -> [{3: (-0.2, rank 1), 7: (-1.5, rank None)}]."""
    if logprobs is None:
        return None
    dicts = []
    for one in logprobs:
        by_id = {token_id: Logprob(logprob=value, rank=i + 1) for i, (token_id, value) in enumerate(one.top)}
        by_id.setdefault(one.token_id, Logprob(logprob=one.logprob))
        dicts.append(by_id)
    return dicts
