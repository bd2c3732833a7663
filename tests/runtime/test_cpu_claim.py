"""CPUs are claimed by one rank at a time, all or none, and free again when their owner ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from switchgear_runtime import cpu_claim
from switchgear_runtime.cpu_claim import claim_cpus

NUM_CPUS = len(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(NUM_CPUS < 2, reason="one CPU leaves no choice")


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names of this test alone: other clusters of this host hold theirs."""
    monkeypatch.setattr(cpu_claim, "_NAME", f"\0switchgear-test-{os.getpid()}-{{cpu}}")
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


def test_two_ranks_get_different_cpus_and_a_third_none() -> None:
    before = os.sched_getaffinity(0)
    claims = []
    for _ in range(NUM_CPUS):
        os.sched_setaffinity(0, before)
        claim = claim_cpus(1, num_ranks=NUM_CPUS)
        assert claim is not None
        assert os.sched_getaffinity(0) == claim.cpus
        claims.append(claim)
    assert set().union(*(claim.cpus for claim in claims)) == before
    os.sched_setaffinity(0, before)
    assert claim_cpus(1, num_ranks=1) is None
    assert os.sched_getaffinity(0) == before
    claims[0].release()
    again = claim_cpus(1, num_ranks=1)
    assert again is not None
    again.release()
    for claim in claims[1:]:
        claim.release()


def test_nothing_is_bound_when_all_ranks_do_not_fit_or_one_takes_everything() -> None:
    before = os.sched_getaffinity(0)
    assert claim_cpus(1, num_ranks=NUM_CPUS + 1) is None
    assert claim_cpus(NUM_CPUS, num_ranks=1) is None
    assert os.sched_getaffinity(0) == before


def test_a_killed_owner_leaves_its_cpus_free() -> None:
    script = (
        "import sys; from switchgear_runtime import cpu_claim; cpu_claim._NAME = sys.argv[1];"
        "claim = cpu_claim.claim_cpus(1, num_ranks=1); print(claim.cpus, flush=True); sys.stdin.read()"
    )
    name = cpu_claim._NAME.replace("\0", "")
    script = script.replace("sys.argv[1]", "'\\0' + sys.argv[1]")
    with subprocess.Popen(
        [sys.executable, "-c", script, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline().strip() == str({min(os.sched_getaffinity(0))})
        other = claim_cpus(1, num_ranks=1)
        assert other is not None
        assert min(other._before) not in other.cpus
        other.release()
        owner.kill()
    claim = claim_cpus(1, num_ranks=1)
    assert claim is not None
    assert claim.cpus == {min(claim._before)}
    claim.release()
