"""Scenarios (comm_scenarios.py) of a DomainTransport: whole MoE layers, and faults while only one host is in a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import TransportError

Tell = Callable[[str], None]


def moe_layers(transport: Transport, _: Tell, *, seed: int, num_layers: int) -> dict[str, Any]:
    """Random layers, each with the bits of a lone rank; returns how rows went."""
    import torch
    from layer_run import LayerRun, kernels, payload

    from switchgear_runtime.cuda.group_choice import large_group

    group: Any = large_group(kernels(), transport, payload())
    for layer in range(num_layers):
        run = LayerRun(seed + layer, transport.world_size)
        y_TD, expected_TD = run.forward(group, transport.rank), run.alone(transport.rank)
        assert torch.equal(y_TD, expected_TD), f"seed {seed}, layer {layer}"
    inner = getattr(getattr(group, "_inner", None), "_transport", None)
    return {"group": type(group).__name__, "inner": type(inner).__name__}


def inside_storm(transport: Any, tell: Tell, *, victim: int, timeout_s: float) -> dict[str, Any]:
    """Exchanges inside a host, and between all in turn, until something breaks. The victim comes no more when it is
    needed inside its host."""
    inside, world_size = transport.inner, transport.world_size
    try:
        for number in range(10**9):
            content = bytes([number % 256]) * 3000
            views = inside.all_to_all_v([content] * inside.world_size, timeout_s=timeout_s)
            assert all(view == content for view in views)
            assert inside.all_gather(bytes([inside.rank]), timeout_s=timeout_s) == [
                bytes([place]) for place in range(inside.world_size)
            ]
            inside.barrier(timeout_s=timeout_s)
            views = transport.all_to_all_v([content] * world_size, timeout_s=timeout_s)
            assert all(view == content for view in views)
            if number == 20 and transport.rank == victim:
                tell("ready")
                return {}
    except TransportError as error:
        found = {"error": type(error).__name__, "peers": error.peers, "text": str(error), "rank": error.rank}
        for call in (inside.barrier, transport.barrier):
            try:
                call(timeout_s=timeout_s)
            except TransportError as again:
                assert type(again) is type(error) and again.peers == error.peers, again
            else:
                raise AssertionError(f"{call} passed after {error!r}") from error
        return found
    raise AssertionError("unreachable")
