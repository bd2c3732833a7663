"""`switchgear bench profile`: what a part needs, and one small run on the bundled model."""

from __future__ import annotations

import pytest

from switchgear.config import bundled_model
from switchgear_bench.step_profile import PYTHON, needs, profile
from switchgear_bench.step_profile_command import markdown
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.matrices import matrices
from switchgear_runtime.model.native_structs import PHASES
from switchgear_runtime.model.spec import load_spec


def test_parts_need_every_matrix_once() -> None:
    model = str(bundled_model())
    spec = load_spec(model)
    checkpoint = Checkpoint(model, spec)
    found = matrices(spec, checkpoint.names, lm_head=checkpoint.lm_head, dtype="bfloat16", quantization="none")
    need = needs(spec, found, 1 << 20, 0)  # a batch that touches every expert
    total = sum(matrix.num_bytes for matrix in found.values() if matrix.name != "embedding")
    assert sum(part.num_bytes for part in need.values()) == pytest.approx(total)
    assert need["experts"].flops == pytest.approx(
        sum(2 * m.num_out * m.num_k for m in found.values() if m.expert)
        * (1 << 20)
        * spec.moe.top_k
        / spec.moe.num_experts
    )


def test_parts_make_up_the_step() -> None:
    (row,) = profile(
        str(bundled_model()), (3,), precision="bf16", num_threads=1, prompt_tokens=8, num_steps=6, num_repeats=1
    )
    parts = {part["part"]: part for part in row["parts"]}
    assert set(parts) <= {*PHASES, PYTHON}
    assert {"attention products", "attention", "router", "experts", "combine", "logits", PYTHON} <= set(parts)
    assert sum(part["share"] for part in row["parts"]) == pytest.approx(1.0, abs=0.35)  # medians of each, six steps
    assert "decode-3" in markdown([row])
