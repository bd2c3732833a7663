"""`bench gpu` and the GPU suite, where there is no GPU: the same code through the twin, and a refusal that helps."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from switchgear.cli import main
from switchgear_bench import gpu_peers, machine
from switchgear_bench.gpu_clock import Bounds, Clock
from switchgear_bench.gpu_command import run_all
from switchgear_bench.gpu_goals import LAYER, LAYER_MEAN
from switchgear_bench.gpu_layer import TINY, UNIFORM, ZIPF, Layer, Routing, draw_ids, routings
from switchgear_bench.gpu_moe import Cell, LayerBench, plain
from switchgear_bench.gpu_peers import TorchGrouped, TransformersExperts
from switchgear_runtime.cuda.backend import kernels_of
from switchgear_runtime.cuda.facts import gather_facts
from switchgear_runtime.errors import ConfigError

ROOT = Path(__file__).parents[2]
DENSE = {"attention decode", "attention prefill", "qkv", "norm", "router", "draw"}
has_gpu = bool(gather_facts().gpus)


def test_rows_through_the_twin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each subject is checked against torch before it is timed; a kernel that did nothing would fail."""
    path = tmp_path / "rows.json"
    assert main(["bench", "gpu", "--device", "twin", "--output", str(path)]) == 0
    written = json.loads(path.read_text())
    rows = written["rows"]
    assert not [row for row in rows if "error" in row or row.get("errors")]
    kernels = {"dispatch", "combine", "pack fp8", "unpack fp8", LAYER, LAYER_MEAN, "decode", "prefill", "exchange"}
    kernels |= DENSE
    assert {row["kernel"] for row in rows} == kernels
    assert all(row["device"] == "twin" for row in rows)
    assert all(row["time_us"] > 0 < row["bound_us"] for row in rows if row["kernel"] != LAYER_MEAN)
    layers = [row for row in rows if row["kernel"] == LAYER]
    assert {row["variant"] for row in layers} == {"uniform", "zipf, router"}
    assert all(list(row["peers"]) == ["transformers grouped_mm"] and row["passed"] is not None for row in layers)
    assert written["machine"]["GPUs"] == "none" or has_gpu
    assert LAYER_MEAN in capsys.readouterr().out.splitlines()[-1]


def test_past_the_budget_it_says_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(run_all("twin", budget_s=0.0))
    assert [row["kernel"] for row in rows] == ["left out"]
    assert rows[0]["left_out"] == ["moving rows", "moe layer tiny", "engine steps", "dense kernels", "exchanges"]
    assert "left out moving rows" in capsys.readouterr().out


def test_a_part_of_it() -> None:
    rows = list(run_all("twin", only="moving"))
    assert {row["kernel"] for row in rows} == {"dispatch", "combine", "pack fp8", "unpack fp8"}
    with pytest.raises(ConfigError, match="names none of the sections: moving rows"):
        list(run_all("twin", only="everything"))


def test_routing_is_skewed_where_it_should_be() -> None:
    generator = torch.Generator().manual_seed(3)
    for skew, at_least, at_most in ((UNIFORM, 0.0, 0.2), (ZIPF, 0.25, 0.8)):
        ids_TK = draw_ids(TINY, 4000, skew, generator)
        assert ids_TK.dtype == torch.int32
        assert all(len(set(ids)) == TINY.top_k for ids in ids_TK.tolist())
        shares = torch.bincount(ids_TK.view(-1).long(), minlength=TINY.num_experts) / ids_TK.numel()
        assert at_least < float(shares.max()) < at_most
    routings_of = [routings(TINY, 4, ZIPF, torch.device("cpu")) for _ in range(2)]
    assert len(routings_of[0]) > 1
    for one, other in zip(*routings_of, strict=True):
        assert torch.equal(one.ids_TK, other.ids_TK)
    assert not torch.equal(routings_of[0][0].ids_TK, routings_of[0][1].ids_TK)


class Broken:
    name = "broken"

    def __call__(self, routing: Routing) -> torch.Tensor:
        return torch.zeros_like(routing.x_TD)

    routed = __call__


def test_a_peer_that_is_wrong_is_named_and_not_timed() -> None:
    kernels = kernels_of("twin", 0)
    bench = LayerBench(kernels, TINY, Bounds.of(kernels.device), Clock(kernels.device))
    bench._peers.append(Broken())
    (row,) = bench.rows([Cell(num_tokens=3, skew=UNIFORM, with_router=False)])
    assert list(row["errors"]) == ["broken"]
    assert "rows differ" in row["errors"]["broken"]
    assert list(row["peers"]) == ["transformers grouped_mm"]
    bench._ours = Broken()  # type: ignore[assignment]
    (row,) = bench.rows([Cell(num_tokens=3, skew=UNIFORM, with_router=True)])
    assert "differ" in row["error"] or "off by" in row["error"]
    assert row["passed"] is False


def test_both_grouped_peers_agree() -> None:
    layer = Layer.random(TINY, torch.device("cpu"))
    routing = Routing.draw(TINY, 9, ZIPF, 1, torch.device("cpu"))
    expected = plain(layer, routing.h_TD, routing.ids_TK, routing.weights_TK)
    for peer in (TorchGrouped(layer), TransformersExperts(layer)):
        found = peer(routing).float()
        assert float((found - expected).abs().max()) < 3e-2 * float(expected.abs().max()), peer.name


def test_a_peer_that_cannot_be_made_is_named_in_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Layer) -> None:
        raise TypeError("of another version")

    fails.name = "transformers grouped_mm"  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu_peers, "TransformersExperts", fails)
    kernels = kernels_of("twin", 0)
    bench = LayerBench(kernels, TINY, Bounds.of(kernels.device), Clock(kernels.device))
    (row,) = bench.rows([Cell(num_tokens=3, skew=UNIFORM, with_router=False)])
    assert row["errors"] == {"transformers grouped_mm": "TypeError: of another version"}
    assert row["baseline"] == "torch grouped_mm"


def test_a_checkout_that_is_not_installed_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", missing)
    assert machine.describe()["switchgear"] == "not installed"


@pytest.mark.skipif(has_gpu, reason="this machine has a GPU")
def test_without_a_gpu_both_say_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu"]) == 2
    assert "device='cuda' cannot run here" in capsys.readouterr().err
    command = [sys.executable, str(ROOT / "bench" / "gpu_suite.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "The GPU suite cannot run here" in done.stderr
    assert "device cuda" in done.stdout
