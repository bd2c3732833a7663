"""The seeded whole-cluster simulation: real engines, transports, Controller and ServerCore; a failure is a seed.

Oracle: every accepted sequence ends exactly once, with the tokens and logprobs of one rank serving it alone, whatever
ranks died under it; one that was aborted has a prefix of them. The same seed gives the same trace.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from sim_cluster import Call, SimCluster
from sim_follow import FollowingPlacement
from sim_system import SimSystem
from sim_versions import TunedModel, VersionedAlone
from tiny_cluster import VOCAB_SIZE, Alone, make_config, make_tiny_checkpoint

from switchgear.actions import Scaled
from switchgear.server.live_sequence import DEATHS_MAX
from switchgear_runtime.errors import RankFailed
from switchgear_runtime.sampling_params import SamplingParams

STEP_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Scenario:
    """Weights of what the scenario does next."""

    num_actions: int = 30
    submit: int = 10
    pause: int = 4
    idle: int = 2  # long enough to park
    abort: int = 1
    stage: int = 0
    stage_some: int = 0  # the server dies while it tells the ranks
    drop: int = 0
    load: int = 0  # an expert from a file
    load_strike: int = 0  # a rank dies in the middle of that
    strike: int = 0  # a rank dies in the middle of a migration: a source, a destination or neither
    kill: int = 0
    hang: int = 0
    scale: int = 0
    follow: bool = False  # placement by the real controller


TRAFFIC = Scenario()
PLACEMENT = Scenario(stage=5)
MIGRATIONS = Scenario(num_actions=40, stage=5, stage_some=2, drop=3)
STRIKES = Scenario(num_actions=40, stage=3, stage_some=1, drop=1, strike=2, hang=1)
FAULTS = Scenario(num_actions=40, stage=2, kill=2, hang=1)
DEATHS = Scenario(num_actions=60, submit=10, pause=10, idle=0, abort=0, kill=4)
SCALING = Scenario(num_actions=60, submit=12, pause=12, idle=1, abort=0, scale=4)
FOLLOW = Scenario(num_actions=50, submit=14, idle=4, stage=2, drop=1, follow=True)
FOLLOW_FAULTS = Scenario(num_actions=50, submit=12, idle=4, stage=3, drop=1, strike=2, kill=2, scale=1, follow=True)
VERSIONS = Scenario(num_actions=60, submit=14, pause=6, idle=2, load=6, stage=1, follow=True)
VERSIONS_FAULTS = Scenario(
    num_actions=60, submit=14, pause=6, load=4, load_strike=3, stage=1, drop=1, kill=1, scale=1, follow=True
)
SCALING_FAULTS = Scenario(num_actions=60, submit=10, pause=8, idle=1, stage=3, drop=1, kill=2, hang=1, scale=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Alone]:
    model_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("sim"), seed=1)
    return model_dir, Alone(model_dir)


@pytest.fixture(scope="module")
def tuned(model: tuple[Path, Alone], tmp_path_factory: pytest.TempPathFactory) -> TunedModel:
    return TunedModel(model[0], tmp_path_factory.mktemp("tuned"), seed=3)


def draw_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2]),
        temperature=rng.choice([0.0, 0.8]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        max_tokens=rng.randrange(1, 16),
        logprobs=rng.choice([None, 1]),
        prompt_logprobs=rng.choice([None, None, None, 0, 2]),
        seed=rng.getrandbits(32),
    )


def play(
    model_dir: Path, seed: int, scenario: Scenario, world_size: int, tuned: TunedModel | None = None
) -> tuple[SimCluster, SimSystem]:
    system = SimSystem(seed)
    rng = random.Random(f"scenario {seed}")
    config = make_config(
        model_dir,
        max_model_len=128,
        num_kv_blocks=rng.choice([9, 12, 40]),  # preemption, sometimes
        max_num_seqs=rng.choice([4, 8]),
        max_num_batched_tokens=rng.choice([24, 64]),
        enable_prefix_caching=rng.random() < 0.8,
        step_timeout_s=STEP_TIMEOUT_S,
    )
    cluster = SimCluster(system, world_size, config, follow=scenario.follow)
    common = [rng.randrange(1, VOCAB_SIZE) for _ in range(40)]

    def main() -> None:
        cluster.start()
        weights = {name: weight for name, weight in asdict(scenario).items() if name != "num_actions"}
        for _ in range(scenario.num_actions):
            action = rng.choices(list(weights), list(weights.values()))[0]
            system.note(f"scenario: {action}")
            if action == "submit":
                for _ in range(rng.choice([1, 1, 2, 5])):
                    prompt = common[: rng.randrange(40)] if rng.random() < 0.5 else []
                    prompt = prompt + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 40))]
                    cluster.submit(prompt, draw_params(rng), tenant=rng.choice(["", "a"]))
                if scenario.abort and rng.random() < 0.2:  # gone in the same breath, perhaps before a parked rank looks
                    cluster.abort(cluster.calls[-1])
            elif action == "pause":
                system.sleep(rng.random() * 0.05)
            elif action == "idle":
                system.sleep(1.0 + rng.random() * 3.0)
            elif action == "abort" and cluster.calls:
                cluster.abort(rng.choice(cluster.calls))
            elif action == "stage":
                cluster.stage()
            elif action == "stage_some":
                cluster.stage(rng.sample(range(world_size), rng.randrange(1, world_size)))
            elif action == "drop":
                cluster.drop()
            elif action in ("load", "load_strike"):
                assert tuned is not None
                cluster.load_expert(rng.choice(tuned.files))
                if action == "load_strike":
                    system.sleep(rng.random() * rng.choice([0.01, 0.1]))
                    cluster.kill(rng.randrange(cluster.controller.num_ranks))
            elif action == "strike":
                cluster.stage()
                system.sleep(rng.random() * rng.choice([0.01, 0.1]))
                cluster.kill(rng.randrange(world_size))
            elif action == "kill":
                cluster.kill(rng.randrange(cluster.controller.num_ranks))
            elif action == "hang":
                cluster.hang(rng.randrange(cluster.controller.num_ranks), rng.choice([None, 0.5, 1.5, 3.0]))
            elif action == "scale":
                cluster.scale(rng.randrange(1, world_size + 2))
        cluster.wait_until(lambda: all(call.done or call.aborted for call in cluster.calls), 120.0)
        cluster.wait_until(lambda: cluster.core.ready and len(cluster.scalings) == cluster.num_orders, 120.0)
        cluster.stop()

    system.run(main)
    return cluster, system


def check(cluster: SimCluster, alone: Alone | VersionedAlone) -> None:
    for call in cluster.calls:
        if call.request is None:
            assert call.aborted
            assert not call.events
            continue
        for index, submit in enumerate(call.submits):
            check_sequence(
                cluster, call, index, [(o.token_id, o.logprob, o.finish_reason) for o in alone.outputs(submit)]
            )
        if call.params.prompt_logprobs is not None and any(
            event.token_ids for event in call.events if event.index == 0
        ):
            scored = [one for event in call.events for one in event.prompt_logprobs or ()]
            assert [(one.logprob, one.top) for one in scored] == alone.scored(call.submits[0])
    assert cluster.core.num_live == 0
    cluster.placement.check()
    assert {fault.kind for fault in cluster.faults} <= {"PeerLost", "TransportTimeout", "TransportAborted"}


def check_sequence(
    cluster: SimCluster, call: Call, index: int, expected: list[tuple[int, float | None, str | None]]
) -> None:
    events = [event for event in call.events if event.index == index]
    assert [event.finish is not None for event in events] == [False] * (len(events) - 1) + [True], "not one end"
    token_ids = [token_id for event in events for token_id in event.token_ids]
    logprobs = [logprob.logprob for event in events for logprob in event.logprobs or ()]
    assert token_ids == [token_id for token_id, _, _ in expected][: len(token_ids)]
    if call.params.logprobs is not None:
        assert logprobs == [logprob for _, logprob, _ in expected][: len(token_ids)]
    finish = events[-1].finish
    assert finish is not None
    if finish.reason == "abort":
        assert call.aborted
    elif finish.reason == "error":
        assert cluster.num_lost >= DEATHS_MAX, finish.error
        assert isinstance(finish.error, RankFailed), finish.error
        assert "no rank has survived this sequence" in str(finish.error)
    else:
        assert len(token_ids) == len(expected)
        assert finish.reason == expected[-1][2]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_traffic_parks_and_wakes(model: tuple[Path, Alone], world_size: int, seed: int) -> None:
    cluster, _ = play(model[0], seed, TRAFFIC, world_size)
    check(cluster, model[1])
    assert not cluster.faults
    assert cluster.num_generations == 1
    assert cluster.num_parked >= 2 * world_size


@pytest.mark.parametrize("seed", range(4))
def test_epochs_flip_under_traffic(model: tuple[Path, Alone], seed: int) -> None:
    cluster, _ = play(model[0], seed, PLACEMENT, 3)
    check(cluster, model[1])
    assert not cluster.faults
    assert cluster.placement.flipped_epochs


@pytest.mark.parametrize("seed", range(6))
def test_migrations_are_dropped_and_half_told(model: tuple[Path, Alone], seed: int) -> None:
    cluster, _ = play(model[0], seed, MIGRATIONS, 3)
    check(cluster, model[1])
    assert not cluster.faults
    assert cluster.placement.num_fetched > 0


@pytest.mark.parametrize("seed", range(8))
def test_ranks_die_in_the_middle_of_a_migration(model: tuple[Path, Alone], seed: int) -> None:
    cluster, _ = play(model[0], seed, STRIKES, 3)
    check(cluster, model[1])
    assert cluster.num_generations > 1


@pytest.mark.parametrize("seed", range(2))
def test_experts_follow_the_load(model: tuple[Path, Alone], seed: int) -> None:
    cluster, _ = play(model[0], seed, FOLLOW, 3)
    check(cluster, model[1])
    assert not cluster.faults
    assert cluster.placement.flipped_epochs


@pytest.mark.parametrize("seed", range(4))
def test_experts_follow_the_load_while_ranks_and_planners_die(model: tuple[Path, Alone], seed: int) -> None:
    cluster, _ = play(model[0], seed, FOLLOW_FAULTS, 3)
    check(cluster, model[1])


@pytest.mark.parametrize("seed", range(3))
def test_sequences_finish_on_the_version_they_began_with(
    model: tuple[Path, Alone], tuned: TunedModel, seed: int
) -> None:
    cluster, _ = play(model[0], seed, VERSIONS, 3, tuned)
    check_versions(cluster, tuned)
    assert not cluster.faults
    placement = cluster.placement
    assert isinstance(placement, FollowingPlacement)
    assert placement.history
    assert placement.num_settled > 0
    assert len({submit.version for call in cluster.calls for submit in call.submits}) > 2


@pytest.mark.parametrize("seed", range(6))
def test_experts_are_loaded_while_ranks_and_planners_die(
    model: tuple[Path, Alone], tuned: TunedModel, seed: int
) -> None:
    cluster, _ = play(model[0], seed, VERSIONS_FAULTS, 3, tuned)
    check_versions(cluster, tuned)
    assert cluster.num_generations > 1


def check_versions(cluster: SimCluster, tuned: TunedModel) -> None:
    placement = cluster.placement
    assert isinstance(placement, FollowingPlacement)
    check(cluster, tuned.oracle(placement.history))


@pytest.mark.parametrize("seed", range(8))
def test_killed_and_hung_ranks(model: tuple[Path, Alone], seed: int) -> None:
    cluster, _ = play(model[0], seed, FAULTS, 3)
    check(cluster, model[1])
    assert cluster.num_generations > 1


@pytest.mark.parametrize("seed", range(20, 26))
def test_what_dead_ranks_held_goes_on(model: tuple[Path, Alone], seed: int) -> None:
    cluster, _ = play(model[0], seed, DEATHS, 3)
    check(cluster, model[1])
    assert cluster.core.num_carried


@pytest.mark.parametrize("seed", range(6))
def test_requests_go_on_while_ranks_come_and_go(model: tuple[Path, Alone], seed: int) -> None:
    cluster, _ = play(model[0], seed, SCALING, 3)
    check(cluster, model[1])
    assert all(isinstance(result, Scaled) for result in cluster.scalings)
    assert cluster.num_generations == 1 + cluster.num_planned
    assert all(call.num_refused == 0 for call in cluster.calls), "a planned generation refuses nobody"
    assert not [fault for fault in cluster.faults if fault.kind != "TransportAborted"]


@pytest.mark.parametrize("seed", range(8))
def test_deaths_and_hangs_while_ranks_come_and_go(model: tuple[Path, Alone], seed: int) -> None:
    cluster, _ = play(model[0], seed, SCALING_FAULTS, 3)
    check(cluster, model[1])


@pytest.mark.parametrize(
    "scenario", [PLACEMENT, STRIKES, FAULTS, SCALING_FAULTS], ids=["placement", "strikes", "faults", "scaling"]
)
def test_a_seed_replays_exactly(model: tuple[Path, Alone], scenario: Scenario) -> None:
    traces = []
    for seed in (11, 12, 11):
        cluster, system = play(model[0], seed, scenario, 4)
        events = [[(event.index, event.token_ids, event.finish) for event in call.events] for call in cluster.calls]
        traces.append((system.trace_hash, system.num_turns, system.now(), repr(events)))
    assert traces[0] == traces[2]
    assert traces[0][0] != traces[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(100, 140))
@pytest.mark.parametrize(
    "scenario",
    [MIGRATIONS, STRIKES, FAULTS, SCALING_FAULTS, FOLLOW_FAULTS],
    ids=["migrations", "strikes", "faults", "scaling", "follow"],
)
def test_many_seeds(model: tuple[Path, Alone], scenario: Scenario, world_size: int, seed: int) -> None:
    cluster, _ = play(model[0], seed, scenario, world_size)
    check(cluster, model[1])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(100, 140))
def test_many_seeds_of_versions(model: tuple[Path, Alone], tuned: TunedModel, world_size: int, seed: int) -> None:
    cluster, _ = play(model[0], seed, VERSIONS_FAULTS, world_size, tuned)
    check_versions(cluster, tuned)
