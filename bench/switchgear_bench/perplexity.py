"""One question: what does quantisation cost in perplexity on text that the model was not trained on?

Every format scores the same rows of tokens through the engine (`LLM.generate` with prompt logprobs), the plain one
first. A format counts only if its logprobs differ from the plain ones, so that a setting that did nothing cannot win.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from switchgear import LLM, SamplingParams
from switchgear.tokenizer import Tokenizer
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.footprint import dense_bytes, run_dtype, slot_bytes
from switchgear_runtime.model.spec import DecoderSpec, load_spec

PLAIN = "none"
_BUNDLED_TEXT = Path(__file__).parent / "heldout"


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityRow:
    """`over_plain` is what it costs: perplexity over that of unquantised weights, minus 1."""

    quantization: str
    num_tokens: int
    perplexity: float
    over_plain: float
    over_plain_by_text: dict[str, float]
    weight_bytes: int  # of a rank with every expert
    weight_bytes_of_plain: float


def heldout_texts(model_dir: Path) -> dict[str, str]:
    """Those beside the checkpoint (folder `heldout`), else the bundled model's."""
    folder = model_dir / "heldout"
    paths = sorted((folder if folder.is_dir() else _BUNDLED_TEXT).glob("*.txt"))
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def token_rows(tokenizer: Tokenizer, text: str, *, row_tokens: int, num_rows: int) -> list[list[int]]:
    """The text's first whole rows; ConfigError if it is shorter than one."""
    token_ids = list(tokenizer.encode(text))
    starts = range(0, len(token_ids) - row_tokens + 1, row_tokens)[:num_rows]
    if not starts:
        raise ConfigError(
            f"row_tokens={row_tokens} is more than a held-out text has ({len(token_ids)} tokens); lower it"
        )
    return [token_ids[start : start + row_tokens] for start in starts]


def weight_bytes(spec: DecoderSpec, dtype: str, quantization: str) -> int:
    dense = dense_bytes(spec, run_dtype(spec, dtype), quantization, num_positions=1).total
    experts = spec.num_moe_layers * spec.num_experts * slot_bytes(spec, run_dtype(spec, dtype), quantization)
    return dense + experts


def run(
    model: str,
    texts: Mapping[str, str],
    quantizations: Sequence[str],
    *,
    row_tokens: int,
    rows_per_text: int,
    settings: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """A row per format; the plain one is always the first."""
    spec = load_spec(Path(model))
    dtype = str(settings.get("dtype", EngineConfig().dtype))
    plain: dict[str, list[float]] = {}
    for quantization in dict.fromkeys([PLAIN, *quantizations]):
        found = _logprobs(model, texts, row_tokens, rows_per_text, {**settings, "quantization": quantization})
        if quantization == PLAIN:
            plain = found
        elif found == plain:
            raise RuntimeError(f"quantization={quantization!r} gave the logprobs of unquantised weights, bit for bit")
        num_bytes = weight_bytes(spec, dtype, quantization)
        yield asdict(
            PerplexityRow(
                quantization=quantization,
                num_tokens=sum(map(len, found.values())),
                perplexity=math.exp(_loss(found)),
                over_plain=math.expm1(_loss(found) - _loss(plain)),
                over_plain_by_text={
                    name: math.expm1(_loss({name: found[name]}) - _loss({name: plain[name]})) for name in texts
                },
                weight_bytes=num_bytes,
                weight_bytes_of_plain=num_bytes / weight_bytes(spec, dtype, PLAIN),
            )
        )


def _logprobs(
    model: str, texts: Mapping[str, str], row_tokens: int, rows_per_text: int, settings: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Of every token but each row's first, by text."""
    with LLM(model, ranks=1, **settings) as llm:
        tokenizer = llm.get_tokenizer()
        if tokenizer is None:
            raise ConfigError(f"model={model!r} has no tokenizer.json, which held-out text needs")
        found: dict[str, list[float]] = {}
        for name, text in texts.items():
            rows = token_rows(tokenizer, text, row_tokens=row_tokens, num_rows=rows_per_text)
            outputs = llm.generate(rows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
            found[name] = []
            for row, output in zip(rows, outputs, strict=True):
                scored = output.prompt_logprobs
                if scored is None or len(scored) != row_tokens:
                    raise RuntimeError(f"{name}: a row of {row_tokens} tokens came back without all its logprobs")
                entries = zip(row[1:], scored[1:], strict=True)
                found[name] += [entry[token].logprob for token, entry in entries if entry is not None]
    return found


def _loss(logprobs: Mapping[str, Sequence[float]]) -> float:
    """Mean negative logprob of a token."""
    return -math.fsum(map(math.fsum, logprobs.values())) / sum(map(len, logprobs.values()))
