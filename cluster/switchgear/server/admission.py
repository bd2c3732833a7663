"""Checks a request against every limit, then tokenizes it: `Admission`. Thread-safe; before anything is expanded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from switchgear.server.limits import ModelFacts, ServerLimits
from switchgear.server.seeds import derive_seed
from switchgear.tokenizer import Tokenizer
from switchgear_runtime.errors import RequestError
from switchgear_runtime.messages import WireSampling
from switchgear_runtime.sampling_params import SamplingParams

Prompt = str | Sequence[int]
# Ranks compute in float32, where smaller values would be zero or overflow the logits they divide.
TEMPERATURE_MIN = 1e-5  # below: greedy, as in vLLM
TOP_P_MIN = 1e-6  # the likeliest token alone
REPETITION_PENALTY_MIN = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """One prompt that may run. `max_tokens` is resolved."""

    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int


def parse_prompts(prompts: object, max_prompts: int | None = None) -> list[Prompt]:
    """OpenAI's `prompt`: str | list[str] | list[int] | list[list[int]], or texts and lists of ids mixed.

    What is in a list of ids is checked once its length is.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise RequestError(
            f"prompt is {_kind(prompts)}; it must be a string, or an array of strings or token ids", param="prompt"
        )
    if not prompts:
        raise RequestError("prompt is an empty array; give at least one prompt", param="prompt")
    if _is_token_id(prompts[0]):
        return [prompts]
    if max_prompts is not None:
        _check_num_prompts(len(prompts), max_prompts, "prompt")
    parsed: list[Prompt] = []
    for i, item in enumerate(prompts):
        if isinstance(item, (str, list, tuple)):
            parsed.append(item)
        else:
            raise RequestError(
                f"prompt[{i}] is {_kind(item)}; it must be a string or an array of token ids", param="prompt"
            )
    return parsed


def encode_text(tokenizer: Tokenizer, text: str, *, add_special: bool) -> list[int]:
    """Tokenize what a request holds; RequestError for a lone surrogate, which JSON can carry and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"prompt is not valid Unicode text: {error.reason} at {error.start}", param="prompt"
        ) from None
    return tokenizer.encode(text, add_special=add_special)


class Admitter:
    """Turns prompts and sampling parameters into Admissions, or raises RequestError naming field, value and limit."""

    def __init__(self, tokenizer: Tokenizer | None, facts: ModelFacts, limits: ServerLimits) -> None:
        self._tokenizer = tokenizer
        self._facts = facts
        self._limits = limits

    def check(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        max_model_len: int,
        *,
        add_special: bool = True,
    ) -> list[Admission]:
        """`params`: one for all prompts, or one each. `add_special`: as the tokenizer's `encode`."""
        shared = isinstance(params, SamplingParams)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        self.check_counts(len(prompts), None if shared else len(each))
        num_sequences = sum(one.n for one in each)
        if num_sequences > self._limits.max_queued:
            raise RequestError(
                f"n and prompt ask for {num_sequences} sequences; the limit is {self._limits.max_queued}", param="n"
            )
        for one in each[:1] if shared else each:
            self._check_params(one)
        return [
            self._admit(prompt, one, max_model_len, add_special, f"prompt[{i}]" if len(prompts) > 1 else "prompt")
            for i, (prompt, one) in enumerate(zip(prompts, each, strict=True))
        ]

    def check_counts(self, num_prompts: int, num_params: int | None, *, param: str = "prompt") -> None:
        """Before anything is made of a request. `num_params`: None where one is for all. `param`: where prompts are."""
        _check_num_prompts(num_prompts, self._limits.max_prompts_per_request, param)
        if num_params not in (None, num_prompts):
            raise RequestError(
                f"{num_params} sampling parameters came for {num_prompts} prompts; give one, or one per prompt",
                param="sampling_params",
            )

    def choices(self, admission: Admission, base: WireSampling, seed: int) -> Iterator[WireSampling]:
        """What a rank needs to know for each choice. `base`: the `wire_sampling` of a prompt with the same params."""
        for index in range(admission.params.n):
            scores = admission.params.prompt_logprobs if index == 0 else None  # the choices have one prompt
            choice_seed = derive_seed(seed, index)
            yield msgspec.structs.replace(
                base, max_tokens=admission.max_tokens, seed=choice_seed, prompt_logprobs=scores
            )

    def wire_sampling(self, admission: Admission, seed: int) -> WireSampling:
        """What a rank needs to know for the first choice."""
        params = admission.params
        vocab_size = self._facts.vocab_size
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else self._facts.eos_token_ids)}
        return WireSampling(
            temperature=float(params.temperature) if params.temperature >= TEMPERATURE_MIN else 0.0,
            top_k=params.top_k if 0 < params.top_k < vocab_size else 0,
            top_p=max(float(params.top_p), TOP_P_MIN),
            min_p=float(params.min_p),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            repetition_penalty=float(params.repetition_penalty),
            logit_bias={token_id: float(bias) for token_id, bias in params.logit_bias.items()},
            stop_token_ids=tuple(sorted(token_id for token_id in stops if token_id < vocab_size)),
            max_tokens=admission.max_tokens,
            min_tokens=params.min_tokens,
            logprobs=params.logprobs,
            seed=derive_seed(seed, 0),
            prompt_logprobs=params.prompt_logprobs,
        )

    def _check_params(self, params: SamplingParams) -> None:
        for token_id in params.logit_bias:
            if token_id >= self._facts.vocab_size:
                raise RequestError(
                    f"logit_bias names token {token_id}; the vocabulary has {self._facts.vocab_size}",
                    param="logit_bias",
                )
        if params.repetition_penalty < REPETITION_PENALTY_MIN:
            raise RequestError(
                f"repetition_penalty={params.repetition_penalty} must be at least {REPETITION_PENALTY_MIN}",
                param="repetition_penalty",
            )
        if params.stop and self._tokenizer is None:
            raise RequestError("stop needs a tokenizer, which this checkpoint lacks; use stop_token_ids", param="stop")

    def _admit(
        self, prompt: Prompt, params: SamplingParams, max_model_len: int, add_special: bool, name: str
    ) -> Admission:
        given = self._encode(prompt, params, max_model_len, add_special) if isinstance(prompt, str) else prompt
        num_prompt = len(given)
        if num_prompt == 0:
            raise RequestError("prompt is empty; give at least one token", param="prompt")
        room = max_model_len - num_prompt
        max_tokens = max(room, 0) if params.max_tokens is None else params.max_tokens
        if room < 1 or max_tokens > room:
            raise _too_long(max_model_len, f"{num_prompt}", num_prompt + max(max_tokens, 1), max(max_tokens, 1))
        if params.min_tokens > max_tokens:
            raise RequestError(f"min_tokens={params.min_tokens} is above max_tokens={max_tokens}", param="min_tokens")
        token_ids = list(given) if isinstance(prompt, str) else self._checked_ids(given, name)
        return Admission(prompt_token_ids=token_ids, params=params, max_tokens=max_tokens)

    def _checked_ids(self, items: Sequence[int], name: str) -> list[int]:
        if set(map(type, items)) != {int}:  # at C's speed; perhaps all are of a kind of int
            for item in items:
                if not _is_token_id(item):
                    raise RequestError(f"{name} mixes token ids with {_kind(item)}; give integers only", param="prompt")
        low, high = min(items), max(items)
        if low < 0 or high >= self._facts.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(
                f"prompt has token id {wrong}; ids go from 0 to {self._facts.vocab_size - 1}", param="prompt"
            )
        return list(items)

    def _encode(self, text: str, params: SamplingParams, max_model_len: int, add_special: bool) -> list[int]:
        if self._tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer; send the prompt as token ids", param="prompt")
        num_least = -(-len(text) // self._tokenizer.token_chars_max)
        if num_least > max_model_len:  # certain without tokenizing, which would cost time in proportion
            max_tokens = params.max_tokens or 1
            raise _too_long(max_model_len, f"at least {num_least}", num_least + max_tokens, max_tokens)
        return encode_text(self._tokenizer, text, add_special=add_special)


def _too_long(max_model_len: int, num_prompt: str, num_total: int, max_tokens: int) -> RequestError:
    least = "at least " if num_prompt.startswith("at") else ""
    return RequestError(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {least}{num_total} "
        f"tokens ({num_prompt} in the prompt, {max_tokens} in the completion). Please reduce the length of the "
        "prompt or completion.",
        param="prompt" if max_tokens <= max_model_len else "max_tokens",
    )


def _check_num_prompts(num_prompts: int, limit: int, param: str) -> None:
    if num_prompts > limit:
        raise RequestError(f"{param} holds {num_prompts} prompts; the limit is {limit} per request", param=param)


def _is_token_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _kind(value: object) -> str:
    """A JSON user's word for a type."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        dict: "an object",
        str: "a string",
    }
    return names.get(type(value), "an array" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}")
