"""How one request wants its tokens drawn: `SamplingParams`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from switchgear_runtime.errors import RequestError

NUM_LOGPROBS_MAX = 20
NUM_STOPS_MAX = 16
STOP_CHARS_MAX = 256
NUM_LOGIT_BIAS_MAX = 1024
N_MAX = 16


@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """Names, defaults and meanings are vLLM's. Raises RequestError (a ValueError) that names the field.

    The order of operations on a row of fp32 logits: logit_bias, repetition, presence and frequency penalties, min_tokens'
    mask, then argmax if temperature is 0, else / temperature, top_k, top_p, min_p, draw. Logprobs are of the raw model
    distribution (log-softmax of the unmodified logits), as in vLLM's default `raw_logprobs`.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0  # 0 and -1: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to max_model_len
    min_tokens: int = 0
    logprobs: int | None = None  # how many alternatives beside the chosen token
    prompt_logprobs: int | None = None  # likewise for each prompt token but the first; such a prompt is computed anew
    seed: int | None = None  # None: drawn by the server and returned

    def __post_init__(self) -> None:
        self.stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        self.stop_token_ids = tuple(self.stop_token_ids)
        _integer("n", self.n, 1, N_MAX)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, -1, 1 << 31)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 1 << 31)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens if self.max_tokens is not None else 1 << 31)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, NUM_LOGPROBS_MAX)
        if self.prompt_logprobs is not None:
            _integer("prompt_logprobs", self.prompt_logprobs, 0, NUM_LOGPROBS_MAX)
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if len(self.stop) > NUM_STOPS_MAX:
            raise RequestError(f"stop has {len(self.stop)} strings; the limit is {NUM_STOPS_MAX}", param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= STOP_CHARS_MAX:
                raise RequestError(f"stop={text!r} must be a string of 1 to {STOP_CHARS_MAX} characters", param="stop")
        if len(self.stop_token_ids) > NUM_STOPS_MAX:
            raise RequestError(f"stop_token_ids has over {NUM_STOPS_MAX} entries", param="stop_token_ids")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, 1 << 31)
        if len(self.logit_bias) > NUM_LOGIT_BIAS_MAX:
            raise RequestError(f"logit_bias has over {NUM_LOGIT_BIAS_MAX} entries", param="logit_bias")
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, 0, 1 << 31)
            _number("logit_bias", bias, -100.0, 100.0)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name}={value!r} must be an integer", param=name)
    if not low <= value <= high:
        raise RequestError(f"{name}={value} must be between {low} and {high}", param=name)


def _number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not isfinite(value):
        raise RequestError(f"{name}={value!r} must be a finite number", param=name)
    if not low <= value <= high or (low_open and value == low):
        raise RequestError(
            f"{name}={value} must be {'above' if low_open else 'at least'} {low} and at most {high}", param=name
        )
