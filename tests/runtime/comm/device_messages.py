"""Random device exchanges, every byte checked: what NCCL's and the staged way must both do."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import torch

from switchgear_runtime.comm.device_exchange import DeviceExchange, Parts

TIMEOUT_S = 30.0


def draw(seed: int, call: int, src: int, world_size: int, part: int) -> tuple[torch.Tensor, list[int]]:
    """What rank `src` sends in a call: bytes and offsets; some messages are empty."""
    rng = random.Random(f"{seed} {call} {src} {part}")
    lengths = [rng.choice((0, rng.randrange(1, 50), rng.randrange(1, 9000))) for _ in range(world_size)]
    data = torch.frombuffer(bytearray(rng.randbytes(sum(lengths)) or b"\0"), dtype=torch.uint8)[: sum(lengths)]
    return data, list(accumulate(lengths, initial=0))


def exchange_and_check(exchange: DeviceExchange, rank: int, world_size: int, seed: int, device: str = "cpu") -> int:
    """Random exchanges of one to three parts; every byte is checked. Returns how many crossed from here."""
    crossed = 0
    for call in range(25):
        num_parts = random.Random(f"{seed} {call}").randint(1, 3)
        drawn = [[draw(seed, call, src, world_size, part) for src in range(world_size)] for part in range(num_parts)]
        send = [Parts(of_ranks[rank][0].to(device), of_ranks[rank][1]) for of_ranks in drawn]
        received = exchange.exchange(send, timeout_s=TIMEOUT_S)
        for got, of_ranks in zip(received, drawn, strict=True):
            expected = [data[offsets[rank] : offsets[rank + 1]] for data, offsets in of_ranks]
            assert list(got.offsets) == list(accumulate(map(len, expected), initial=0)), f"seed {seed}, call {call}"
            assert torch.equal(got.data.cpu(), torch.cat(expected)), f"seed {seed}, call {call}"
            offsets = of_ranks[rank][1]
            crossed += sum(b - a for peer, (a, b) in enumerate(pairwise(offsets)) if peer != rank)
    return crossed
