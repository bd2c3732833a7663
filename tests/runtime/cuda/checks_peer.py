"""Check of the exchange through peer memory: several ranks' regions in one process, several exchanges in a row."""

from __future__ import annotations

import ctypes
import threading
import time

import numpy as np
import pytest
from arena import Arena, Checked, at

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import DeviceError


class PeerRanks:
    """Ranks with a region each; `draw` makes what one sends, `verify` holds what one got to what all sent."""

    def __init__(
        self, library: Checked, seed: int, *, num_ranks: int, timeout_ns: int, max_rows: int | None = None
    ) -> None:
        self.arena = Arena(library, seed)
        self.library, self.num_ranks = library, num_ranks
        rng = self.arena.rng
        self.max_rows, self.max_pairs = max_rows or int(rng.integers(1, 70)), int(rng.choice([1, 7, 400, 20_000]))
        self.row_bytes = 16 * int(rng.choice([1, 3, 300]) if max_rows is None else 300)
        num_bytes = library.sg_cuda_peer_bytes(num_ranks, self.max_rows, self.max_pairs, self.row_bytes)
        sizes = (num_ranks * 64, num_ranks * self.max_pairs * 8, num_ranks * self.max_rows * self.row_bytes)
        headers, pairs, rows = (-(-size // 128) * 128 for size in sizes)
        self.rows_at = (headers + pairs, 2 * (headers + pairs) + rows)  # of even exchanges, and of odd ones
        assert num_bytes == 2 * (headers + pairs + rows), f"seed {seed}"
        self.regions = [self.arena.put(np.zeros(num_bytes), np.uint8) for _ in range(num_ranks)]
        table = self.arena.put([at(region) for region in self.regions], np.int64)
        self.faults = [self.arena.put([0], np.int32) for _ in range(num_ranks)]
        self.sequences = [self.arena.put([1], np.int32) for _ in range(num_ranks)]
        self.done = [self.arena.put(np.zeros(num_ranks), np.int32) for _ in range(num_ranks)]
        self.got = [
            {
                "from_begin_R1": self.arena.room(num_ranks + 1, np.int32),
                "pairs_to_N2": self.arena.room((num_ranks * self.max_pairs, 2), np.int32),
                "pairs_to_R1": self.arena.room(num_ranks + 1, np.int32),
            }
            for _ in range(num_ranks)
        ]
        self.args = [
            structs.Peer(
                regions_R=at(table),
                num_ranks=num_ranks,
                rank=rank,
                max_rows=self.max_rows,
                max_pairs=self.max_pairs,
                row_bytes=self.row_bytes,
                sequence=at(self.sequences[rank]),
                done_R=at(self.done[rank]),
                fault=at(self.faults[rank]),
                timeout_ns=timeout_ns,
                **{name: at(array) for name, array in self.got[rank].items()},
            )
            for rank in range(num_ranks)
        ]
        self.sent: list[dict[str, np.ndarray]] = [{} for _ in range(num_ranks)]

    def draw(self, rank: int, rng: np.random.Generator, *, with_pairs: bool) -> None:
        sizes = rng.integers(0, self.max_rows + 1, self.num_ranks) * rng.integers(0, 2, self.num_ranks)
        pairs = rng.integers(0, self.max_pairs + 1, self.num_ranks) * (sizes > 0)
        begin, pairs_begin = (np.concatenate([[0], one.cumsum()]) for one in (sizes, pairs))
        sent = {
            "rows_M": self.arena.put(rng.integers(0, 256, (begin[-1], self.row_bytes)), np.uint8),
            "rows_begin_R1": self.arena.put(begin, np.int32),
            "pairs_N2": self.arena.put(rng.integers(0, 1 << 30, (pairs_begin[-1], 2)), np.int32),
            "pairs_begin_R1": self.arena.put(pairs_begin, np.int32),
        }
        self.sent[rank] = sent
        for name, array in sent.items():
            setattr(self.args[rank], name, at(array) if with_pairs or "pairs" not in name else None)
        self.args[rank].pairs_to_N2 = at(self.got[rank]["pairs_to_N2"]) if with_pairs else None

    def send(self, rank: int) -> None:
        self.library.sg_cuda_peer_send(ctypes.byref(self.args[rank]), None)

    def collect(self, rank: int) -> None:
        self.library.sg_cuda_peer_collect(ctypes.byref(self.args[rank]), None)

    def verify(self, rank: int, sequence: int, *, with_pairs: bool, absent: int = -1) -> None:
        got = self.got[rank]
        assert self.sequences[rank][0] == sequence + 1
        assert (got["from_begin_R1"] == np.arange(self.num_ranks + 1) * self.max_rows).all()
        rows_at = self.library.sg_cuda_peer_rows_at(ctypes.byref(self.args[rank]), sequence)
        assert rows_at == self.rows_at[sequence % 2]
        counts, all_pairs = [], []
        for source in range(self.num_ranks):
            if source == absent:
                counts.append(0)
                continue
            sent = self.sent[source]
            rows = sent["rows_M"][sent["rows_begin_R1"][rank] : sent["rows_begin_R1"][rank + 1]]
            begin = rows_at + source * self.max_rows * self.row_bytes
            found = self.regions[rank][begin : begin + rows.size].reshape(rows.shape)
            assert (found == rows).all(), f"rows of rank {source} at {rank}, exchange {sequence}"
            pairs = sent["pairs_N2"][sent["pairs_begin_R1"][rank] : sent["pairs_begin_R1"][rank + 1]]
            all_pairs.append(pairs)
            counts.append(len(pairs) if with_pairs else len(rows))
        assert got["pairs_to_R1"].tolist() == [0, *np.cumsum(counts).tolist()]
        if with_pairs:
            assert (got["pairs_to_N2"][: sum(counts)] == np.concatenate(all_pairs)).all()


def check_peers(library: Checked, seed: int) -> None:
    """All send, then all collect, so that one thread and one stream do. Then one is absent, then one sends too much."""
    num_ranks = (1, 2, 3, 5)[seed % 4]
    ranks = PeerRanks(library, seed, num_ranks=num_ranks, timeout_ns=20_000_000)
    rng = ranks.arena.rng
    for sequence in range(1, 5):
        with_pairs = sequence != 3
        for rank in range(num_ranks):
            ranks.draw(rank, rng, with_pairs=with_pairs)
            ranks.send(rank)
        for rank in range(num_ranks):
            ranks.collect(rank)
            ranks.verify(rank, sequence, with_pairs=with_pairs)
            assert ranks.faults[rank][0] == 0, f"seed {seed}"
        assert not any(done.any() for done in ranks.done), f"seed {seed}"
    absent, present = num_ranks - 1, 0
    if num_ranks > 1:
        for rank in range(num_ranks):
            ranks.draw(rank, rng, with_pairs=True)
            if rank != absent:
                ranks.send(rank)
        ranks.collect(present)
        ranks.verify(present, 5, with_pairs=True, absent=absent)
        assert ranks.faults[present][0] == 1 + absent, f"seed {seed}"
    too_many = np.full(num_ranks, ranks.max_rows) + (np.arange(num_ranks) == 0)
    ranks.draw(absent, rng, with_pairs=False)
    ranks.args[absent].rows_M = at(ranks.arena.room((too_many.sum(), ranks.row_bytes), np.uint8))
    ranks.args[absent].rows_begin_R1 = at(ranks.arena.put(np.concatenate([[0], too_many.cumsum()]), np.int32))
    ranks.faults[absent][0] = 0
    ranks.send(absent)
    assert ranks.faults[absent][0] == 1 + absent, f"seed {seed}"
    ranks.arena.check()
    for wrong in ({"rank": num_ranks}, {"rank": -1}, {"row_bytes": ranks.row_bytes + 8}):
        args = structs.Peer(num_ranks=num_ranks, rank=0, row_bytes=ranks.row_bytes, max_rows=1, max_pairs=1)
        for name, value in wrong.items():
            setattr(args, name, value)
        with pytest.raises(DeviceError):
            library.sg_cuda_peer_send(ctypes.byref(args), None)


def check_waits(library: Checked, seed: int) -> None:
    """One that collects before the others send gets it all: no flag comes before the last row. On the host only, where
    a thread is a rank; ranks of a GPU's one stream would wait for each other."""
    if library.managed:
        return
    ranks = PeerRanks(library, seed, num_ranks=2, timeout_ns=10_000_000_000, max_rows=400)
    for sequence in (1, 2):
        for rank in (0, 1):
            ranks.draw(rank, ranks.arena.rng, with_pairs=True)
        failures: list[BaseException] = []

        def collect(sequence: int = sequence, failures: list[BaseException] = failures) -> None:
            try:
                ranks.collect(1)
                ranks.verify(1, sequence, with_pairs=True)
            except BaseException as error:  # noqa: BLE001 (it is raised below)
                failures.append(error)

        ranks.send(1)
        thread = threading.Thread(target=collect)
        thread.start()
        time.sleep(0.002)
        ranks.send(0)
        ranks.collect(0)
        thread.join(timeout=20)
        assert not failures, f"seed {seed}: {failures}"
        assert [ranks.faults[rank][0] for rank in (0, 1)] == [0, 0], f"seed {seed}"
        assert not any(done.any() for done in ranks.done), f"seed {seed}"
    ranks.arena.check()
