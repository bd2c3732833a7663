"""LLM: the embedded cluster, really started (local launcher, bundled model)."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from switchgear import LLM, SamplingParams
from switchgear_runtime.errors import CheckpointError, ConfigError, RankFailed, RequestError

pytestmark = pytest.mark.ranks

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(ranks=2, launcher="local", max_model_len=512) as llm:
        yield llm


def test_generate_shows_progress(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompts: list[str | list[int]] = ["Once upon a time", "import os\n", [5, 6, 7]]
    outputs = llm.generate(prompts, GREEDY)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "36 tokens" in shown
    for output in outputs:
        assert output.finished
        assert len(output.outputs[0].token_ids) == 12
        assert output.outputs[0].finish_reason == "length"
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    assert outputs[0].prompt_token_ids == tokenizer.encode("Once upon a time")
    assert outputs[0].outputs[0].text == tokenizer.decode(outputs[0].outputs[0].token_ids)


def test_stream_equals_generate(llm: LLM) -> None:
    (whole,) = llm.generate("Once upon a time", GREEDY, use_tqdm=False)
    deltas = list(llm.stream("Once upon a time", GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert [i for delta in deltas for i in delta.token_ids] == whole.outputs[0].token_ids
    assert deltas[-1].finish_reason == "length"


def test_a_closed_stream_ends_its_sequence(llm: LLM) -> None:
    stream = llm.stream("Once", SamplingParams(max_tokens=500, ignore_eos=True))
    next(iter(stream))
    assert llm._cluster.core.num_live == 1
    stream.close()  # type: ignore[attr-defined]
    assert llm._cluster.core.num_live == 0


def test_inside_a_running_loop_and_from_several_threads(llm: LLM) -> None:
    """As in a notebook, whose cell runs inside a loop."""
    expected = llm.generate(["a", "b"], GREEDY, use_tqdm=False)

    async def cell() -> list[str]:
        return [output.outputs[0].text for output in llm.generate(["a", "b"], GREEDY, use_tqdm=False)]

    texts = [output.outputs[0].text for output in expected]
    assert asyncio.run(cell()) == texts
    results: list[list[str]] = []
    threads = [threading.Thread(target=lambda: results.append(asyncio.run(cell()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [texts] * 4


def test_errors(llm: LLM) -> None:
    with pytest.raises(RequestError, match="maximum context length is 512"):
        llm.generate([[5] * 512], GREEDY)
    assert llm.generate([], GREEDY) == []
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        LLM(max_num_seq=3)
    with pytest.raises(CheckpointError, match="nowhere"):
        LLM("/nowhere", launcher="local")


def test_expert_load(llm: LLM) -> None:
    load = llm.expert_load()
    assert (load.num_layers, load.num_experts) == (4, 32)


def test_close_leaves_no_process_and_says_so() -> None:
    before = set(psutil.Process().children(recursive=True))
    llm = LLM(ranks=1, launcher="local")
    stream = llm.stream("Once", SamplingParams(max_tokens=1000, ignore_eos=True))
    next(iter(stream))
    assert set(psutil.Process().children(recursive=True)) - before
    llm.close()
    llm.close()
    assert not set(psutil.Process().children(recursive=True)) - before
    with pytest.raises(RankFailed, match="closed"):
        llm.generate("a", GREEDY)
    stream.close()  # type: ignore[attr-defined]


def test_a_script_that_forgets_to_close_still_ends_clean(tmp_path: Path) -> None:
    script = tmp_path / "forgetful.py"
    script.write_text(
        "from switchgear import LLM, SamplingParams\n"
        "llm = LLM(ranks=1, launcher='local')\n"
        "params = SamplingParams(max_tokens=3, ignore_eos=True)\n"
        "print(llm.generate('Once', params, use_tqdm=False)[0].outputs[0].token_ids)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split(",")) == 3
