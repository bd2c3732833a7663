"""Rows that travel as fp8 or int8: the same tokens on any ranks and by any way, near those of bf16 rows, and half the bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from layer_run import HIDDEN, kernels, payload
from test_engine_equality import assert_as_alone, draw_submits
from test_small_steps import small_of
from tiny_cluster import Alone, Cluster, make_config, make_tiny_checkpoint, num_finished

from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cuda.kernels import Grouping
from switchgear_runtime.errors import ConfigError

Lab = tuple[Path, Alone]
SEED = random.SystemRandom().randrange(1 << 20)


@pytest.fixture(scope="module", params=["fp8", "int8"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    model_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), SEED)
    return model_dir, Alone(model_dir, device="twin", dispatch_dtype=request.param, small_step_tokens=0)


@pytest.mark.parametrize(("world_size", "small_step_tokens"), [(1, 256), (2, 256), (3, 0), (3, 256)])
def test_tokens_do_not_depend_on_the_way(lab: Lab, world_size: int, small_step_tokens: int) -> None:
    dtype = lab[1]._config.dispatch_dtype
    submits = draw_submits(random.Random(f"{SEED} {world_size} {small_step_tokens}"), 10, longest=30)
    settings = {"device": "twin", "dispatch_dtype": dtype, "small_step_tokens": small_step_tokens, "max_num_seqs": 8}
    cluster = Cluster(make_config(lab[0], **settings), world_size)
    for index, submit in enumerate(submits):
        cluster.inboxes[index % world_size].put(submit)
    cluster.pump(lambda run: num_finished(run) == len(submits) or bool(run.faults))
    assert not cluster.run_result.faults, cluster.run_result.faults
    assert_as_alone(lab, submits, cluster.stop())
    replays = [small_of(engine.runner).num_replays for engine in cluster.engines]
    assert all(replays) == (small_step_tokens > 0)


def test_written_rows_are_half_as_long_and_near() -> None:
    x_TD = torch.randn(5, HIDDEN)
    groups = Grouping(
        begin_S1=torch.tensor([0, 2, 3], dtype=torch.int32),
        x_rows_N=torch.tensor([4, 0, 1, 3], dtype=torch.int32),  # the last is not there
        y_rows_N=torch.arange(4, dtype=torch.int32),
    )
    bf16 = payload()
    assert bf16.read(bf16.written(x_TD), groups, "bf16")[1] is False
    for dtype in ("fp8", "int8"):
        quantised = payload(dtype)
        assert quantised.row_bytes <= bf16.row_bytes // 2 + 16
        written = quantised.written(x_TD)
        assert torch.equal(quantised.rows_of(written.reshape(-1)), written)
        back = quantised.passed_on(written, torch.tensor([3, 1], dtype=torch.int32))
        assert torch.equal(back, written[[3, 1]])
        x_ND, is_grouped = quantised.read(written, groups, "bf16")
        assert is_grouped
        torch.testing.assert_close(x_ND[:3].float(), x_TD[[4, 0, 1]], rtol=0.07, atol=0.03)
    fp8 = payload("fp8")
    as_it_came, is_grouped = fp8.read(fp8.written(x_TD), groups, "fp8")
    assert not is_grouped
    assert as_it_came.dtype == torch.uint8
    assert kernels().size("payload_bytes", HIDDEN, 2) == fp8.row_bytes


def test_refused_where_nobody_writes_such_rows() -> None:
    for settings in ({}, {"device": "cuda", "dispatch": "deepep"}):
        with pytest.raises(ConfigError, match="dispatch_dtype='fp8'"):
            EngineConfig(dispatch_dtype="fp8", **settings)
