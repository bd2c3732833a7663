"""Check of a layer's exchanges through peer memory: several ranks' regions in one process, several layers in a row."""

from __future__ import annotations

import ctypes
import threading
import time

import numpy as np
import pytest
from arena import Arena, Checked, at, of_bf16, to_bf16

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import DeviceError

HEADER_BYTES, ALIGN = 64, 128
LATE_DISPATCH, LATE_RESULTS, TOO_MUCH = 1, 2, 4
GAVE_UP, LAST_LAYER = -1, (1 << 31) - 1  # flags


class PeerRanks:
    """Ranks with a region each. A layer of all of them is draw, dispatch, arrive, give_back, combine; `verify_*` hold what
    one got to what all sent. `packed`: rows are bytes already; else fp32, which dispatch rounds."""

    def __init__(
        self, library: Checked, seed: int, *, num_ranks: int, timeout_ns: int, max_tokens: int | None = None
    ) -> None:
        self.arena = Arena(library, seed)
        self.library, self.num_ranks = library, num_ranks
        rng = self.arena.rng
        is_large = max_tokens is None and seed % 12 == 5  # more pairs than a launch has threads
        self.max_tokens = max_tokens or (600 if is_large else int(rng.choice([1, 3, 40])))
        self.top_k = 8 if is_large else int(rng.choice([1, 2, 5, 8, 11]))
        self.hidden = 8 * (300 if max_tokens else 1 if is_large else int(rng.choice([1, 3, 300])))
        self.packed = bool(rng.integers(2))
        self.row_bytes = 16 * int(rng.integers(1, 40)) if self.packed else 2 * self.hidden
        max_pairs = self.max_tokens * self.top_k
        sizes = (
            2 * num_ranks * HEADER_BYTES,
            num_ranks * max_pairs * 8,
            num_ranks * self.max_tokens * self.row_bytes,
            max_pairs * self.hidden * 2,
        )
        headers, pairs, rows, returned = (-(-size // ALIGN) * ALIGN for size in sizes)
        self.rows_at = headers + pairs
        self.faults = [self.arena.put(np.zeros(num_ranks + 1), np.int32) for _ in range(num_ranks)]
        self.first_layer = LAST_LAYER - 1 if seed % 3 == 2 else 1
        self.sequences = [self.arena.put([self.first_layer], np.int32) for _ in range(num_ranks)]
        self.done = [self.arena.put(np.zeros(num_ranks), np.int32) for _ in range(num_ranks)]
        self.aborts = [self.arena.put([0], np.int32) for _ in range(num_ranks)]
        self.got = [
            {
                "from_begin_R1": self.arena.room(num_ranks + 1, np.int32),
                "pairs_to_N2": self.arena.room((num_ranks * max_pairs, 2), np.int32),
                "pairs_to_R1": self.arena.room(num_ranks + 1, np.int32),
                "out_TD": self.arena.room((self.max_tokens, self.hidden), np.float32),
            }
            for _ in range(num_ranks)
        ]
        self.args = [
            structs.Peer(
                num_ranks=num_ranks,
                rank=rank,
                max_tokens=self.max_tokens,
                top_k=self.top_k,
                hidden=self.hidden,
                row_bytes=self.row_bytes,
                sequence=at(self.sequences[rank]),
                done_R=at(self.done[rank]),
                fault_R1=at(self.faults[rank]),
                abort=at(self.aborts[rank]) if seed % 2 else None,
                timeout_ns=timeout_ns,
                **{name: at(array) for name, array in self.got[rank].items()},
            )
            for rank in range(num_ranks)
        ]
        num_bytes = library.sg_cuda_peer_bytes(ctypes.byref(self.args[0]))
        assert num_bytes == headers + pairs + rows + returned, f"seed {seed}"
        assert library.sg_cuda_peer_rows_at(ctypes.byref(self.args[0])) == self.rows_at
        self.regions = [self.arena.put(np.zeros(num_bytes), np.uint8) for _ in range(num_ranks)]
        self.table = self.arena.put([at(region) for region in self.regions], np.int64)
        for args in self.args:
            args.regions_R = at(self.table)
        self.sent: list[dict[str, np.ndarray]] = [{} for _ in range(num_ranks)]
        self.results: list[np.ndarray] = [np.empty((0, self.hidden))] * num_ranks
        self.step_tokens = self.max_tokens

    def draw(self, rank: int, rng: np.random.Generator) -> None:
        """Tokens, the ranks of their experts (-1: none), and a plan as sg_cuda_dispatch_plan makes it."""
        num_tokens = (
            self.max_tokens
            if rng.random() < 0.4 or self.max_tokens == 600
            else int(rng.integers(0, self.max_tokens + 1))
        )
        ranks_TK = rng.integers(0, self.num_ranks, (num_tokens, self.top_k))
        if rng.random() < 0.4 or self.max_tokens == 600:
            ranks_TK[:] = rng.integers(self.num_ranks)  # which gets as much as a rank can
        else:
            ranks_TK[rng.random(ranks_TK.shape) < 0.1] = -1
        rows, pairs, index_TK = [], [], np.full(ranks_TK.shape, -1)
        rows_begin, pairs_begin = [0], [0]
        for to in range(self.num_ranks):
            for t, k in np.argwhere(ranks_TK == to).tolist():
                if len(rows) == rows_begin[-1] or rows[-1] != t:
                    rows.append(t)
                index_TK[t, k] = len(pairs)
                pairs.append((len(rows) - rows_begin[-1] - 1, int(rng.integers(1 << 30))))
            rows_begin.append(len(rows))
            pairs_begin.append(len(pairs))
        arena = self.arena
        sent = {
            "rows_begin_R1": arena.put(rows_begin, np.int32),
            "pairs_begin_R1": arena.put(pairs_begin, np.int32),
            "pairs_N2": arena.put(np.array(pairs, np.int32).reshape(-1, 2), np.int32),
            "pair_index_TK": arena.put(index_TK, np.int32),
            "weights_TK": arena.put(rng.random(index_TK.shape), np.float32),
        }
        if self.packed:
            sent["rows_M"] = arena.put(rng.integers(0, 256, (len(rows), self.row_bytes)), np.uint8)
        else:
            sent["x_TD"] = arena.put(rng.standard_normal((num_tokens, self.hidden)), np.float32)
            sent["row_tokens_M"] = arena.put(rows, np.int32)
        args = self.args[rank]
        for name, array in sent.items():
            setattr(args, name, at(array))
        self.sent[rank] = sent

    def number_after(self, num_layers: int) -> int:
        """Of the next layer."""
        return (self.first_layer + num_layers - 1) % LAST_LAYER + 1

    def call(self, name: str, rank: int) -> None:
        own = len(self.sent[rank]["pair_index_TK"]) if self.sent[rank] else 0
        self.args[rank].num_tokens = self.step_tokens if name == "arrive" else own
        getattr(self.library, f"sg_cuda_peer_{name}")(ctypes.byref(self.args[rank]), None)

    def rows_of(self, source: int, to: int) -> np.ndarray:
        """The bytes of the rows that `source` sends to `to`."""
        sent = self.sent[source]
        mine = slice(*sent["rows_begin_R1"][to : to + 2])
        if self.packed:
            return sent["rows_M"][mine]
        return to_bf16(sent["x_TD"][sent["row_tokens_M"][mine]]).view(np.uint8).reshape(-1, self.row_bytes)

    def compute(self, rank: int, rng: np.random.Generator) -> None:
        """Any results for the pairs that came."""
        num_pairs = int(self.got[rank]["pairs_to_R1"][-1])
        self.results[rank] = self.arena.put(
            to_bf16(rng.standard_normal((num_pairs, self.hidden), np.float32)), np.uint16
        )
        self.args[rank].y_ND = at(self.results[rank])

    def verify_arrived(self, rank: int, *, absent: int = -1) -> None:
        got = self.got[rank]
        assert (got["from_begin_R1"] == np.arange(self.num_ranks + 1) * self.max_tokens).all()
        counts, all_pairs = [], [np.empty((0, 2), np.int32)]
        for source in range(self.num_ranks):
            if source == absent:
                counts.append(0)
                continue
            rows = self.rows_of(source, rank)
            begin = self.rows_at + source * self.max_tokens * self.row_bytes
            found = self.regions[rank][begin : begin + rows.size].reshape(rows.shape)
            assert (found == rows).all(), f"rows of rank {source} at {rank}"
            sent = self.sent[source]
            all_pairs.append(sent["pairs_N2"][slice(*sent["pairs_begin_R1"][rank : rank + 2])])
            counts.append(len(all_pairs[-1]))
        assert got["pairs_to_R1"].tolist() == [0, *np.cumsum(counts).tolist()]
        assert (got["pairs_to_N2"][: sum(counts)] == np.concatenate(all_pairs)).all()

    def verify_combined(self, rank: int) -> None:
        sent = self.sent[rank]
        back = []  # results by pair, as this rank counts them
        for expert_rank in range(self.num_ranks):
            begin, end = self.got[expert_rank]["pairs_to_R1"][rank : rank + 2]
            back.append(of_bf16(self.results[expert_rank][begin:end]))
        back_ND = np.concatenate(back)
        index_TK, weights_TK = sent["pair_index_TK"], sent["weights_TK"]
        expected = np.zeros((len(index_TK), self.hidden), np.float32)
        for k in range(self.top_k):
            has_T = index_TK[:, k] >= 0
            products_TD = weights_TK[has_T, k, None].astype(np.float64) * back_ND[index_TK[has_T, k]]
            expected[has_T] = (products_TD + expected[has_T]).astype(np.float32)
        assert self.got[rank]["out_TD"][: len(index_TK)].tobytes() == expected.tobytes()


def check_peers(library: Checked, seed: int) -> None:
    """All ranks make each call, then the next, so that one thread and one stream do. Then one is absent, in either
    exchange, or announces what cannot be."""
    num_ranks = (1, 2, 3, 5)[seed % 4]
    ranks = PeerRanks(library, seed, num_ranks=num_ranks, timeout_ns=20_000_000)
    rng, all_ranks = ranks.arena.rng, range(num_ranks)
    for layer in range(1, 4):
        for rank in all_ranks:
            ranks.draw(rank, rng)
            ranks.call("dispatch", rank)
        for rank in all_ranks:
            ranks.call("arrive", rank)
            ranks.verify_arrived(rank)
        for rank in all_ranks:
            ranks.compute(rank, rng)
            ranks.call("give_back", rank)
        for rank in all_ranks:
            ranks.call("combine", rank)
            ranks.verify_combined(rank)
            assert ranks.sequences[rank][0] == ranks.number_after(layer), f"seed {seed}"
        assert not any(done.any() for done in ranks.done), f"seed {seed}"
        assert not any(fault.any() for fault in ranks.faults), f"seed {seed}"
    absent = num_ranks - 1
    if num_ranks > 1:
        _check_giving_up(PeerRanks(library, seed, num_ranks=num_ranks, timeout_ns=60_000_000_000), seed)
        _check_absence(ranks, rng, absent, seed)
    _check_too_much(ranks, seed)
    ranks.arena.check()
    for wrong in ({"rank": num_ranks}, {"rank": -1}, {"row_bytes": ranks.row_bytes + 8}, {"hidden": ranks.hidden + 4}):
        args = structs.Peer(num_ranks=num_ranks, rank=0, row_bytes=ranks.row_bytes, hidden=ranks.hidden)
        for name, value in wrong.items():
            setattr(args, name, value)
        for name in ("dispatch", "arrive", "give_back", "combine"):
            with pytest.raises(DeviceError):
                getattr(library, f"sg_cuda_peer_{name}")(ctypes.byref(args), None)


def _check_giving_up(ranks: PeerRanks, seed: int) -> None:
    """Rank 0 gives up between the two exchanges of a layer. From then on it writes nothing to others but that, and they
    give up as soon as they look, blaming nobody: they would compute with what is not there."""
    rng, others = ranks.arena.rng, range(1, ranks.num_ranks)
    for call in ("dispatch", "arrive"):
        for rank in range(ranks.num_ranks):
            if call == "dispatch":
                ranks.draw(rank, rng)
            ranks.call(call, rank)
    ranks.faults[0][-1] = 1
    for rank in range(ranks.num_ranks):
        ranks.compute(rank, rng)
    before = [ranks.regions[rank].copy() for rank in others]
    ranks.call("give_back", 0)
    ranks.draw(0, rng)
    ranks.call("dispatch", 0)
    for rank, region in zip(others, before, strict=True):
        changed = np.nonzero(ranks.regions[rank] != region)[0]
        flags = {*range(4), *(ranks.num_ranks * HEADER_BYTES + byte for byte in range(4))}
        assert set(changed.tolist()) <= flags, f"seed {seed}: {changed}"
        assert ranks.regions[rank][:4].view(np.int32)[0] == GAVE_UP
    for rank in others:
        ranks.call("give_back", rank)
    start_s = time.monotonic()
    for call in ("combine", "dispatch", "arrive"):
        for rank in others:
            ranks.faults[rank][:] = 0
            ranks.call(call, rank)
            if call == "dispatch":
                continue
            assert (ranks.faults[rank] == [*[0] * ranks.num_ranks, 1]).all(), f"seed {seed}: {call}"
    assert time.monotonic() - start_s < 30.0
    assert not any(done.any() for done in ranks.done), f"seed {seed}"
    ranks.arena.check()


def _check_absence(ranks: PeerRanks, rng: np.random.Generator, absent: int, seed: int) -> None:
    """The last rank dispatches nothing; then it gives nothing back. Who waits names it, and an abort ends the wait."""
    for rank in range(ranks.num_ranks):
        ranks.draw(rank, rng)
        if rank != absent:
            ranks.call("dispatch", rank)
    ranks.call("arrive", 0)
    ranks.verify_arrived(0, absent=absent)
    named = (np.arange(ranks.num_ranks) == absent).astype(np.int32)
    assert (ranks.faults[0] == [*LATE_DISPATCH * named, 1]).all(), f"seed {seed}"
    ranks.args[0].timeout_ns = 60_000_000_000
    start_s = time.monotonic()
    ranks.call("arrive", 0)  # it has given up
    assert time.monotonic() - start_s < 20.0
    ranks.verify_arrived(0, absent=absent)
    ranks.args[0].timeout_ns = 20_000_000
    ranks.faults[0][:] = 0
    ranks.compute(0, rng)
    for rank in range(ranks.num_ranks - 1):
        ranks.got[rank]["pairs_to_R1"][:] = 0  # they gave up
        ranks.call("give_back", rank)
    aborts = bool(ranks.args[0].abort)
    if aborts:
        ranks.aborts[0][0] = 1
        ranks.args[0].timeout_ns = 60_000_000_000
    start_s = time.monotonic()
    ranks.call("combine", 0)
    assert time.monotonic() - start_s < 20.0
    assert (ranks.faults[0] == [*(0 if aborts else LATE_RESULTS) * named, 1]).all(), f"seed {seed}"
    ranks.aborts[0][0] = 0
    assert not any(done.any() for done in ranks.done), f"seed {seed}"


def _check_too_much(ranks: PeerRanks, seed: int) -> None:
    """Rank 0 would send a row, or a pair, over what was agreed: it sends nothing, and says so. And what a header cannot
    mean is refused by who reads it."""
    args, arena = ranks.args[0], ranks.arena
    max_pairs = ranks.max_tokens * ranks.top_k
    for num_rows, num_pairs in ((ranks.max_tokens + 1, 1), (1, max_pairs + 1)):
        begin, pairs_begin = ([0, *[count] * ranks.num_ranks] for count in (num_rows, num_pairs))
        keep = [
            arena.put(begin, np.int32),
            arena.put(pairs_begin, np.int32),
            arena.room((num_rows, max(ranks.row_bytes, 4 * ranks.hidden)), np.uint8),
            arena.put(np.zeros(num_rows), np.int32),
            arena.put(np.zeros((num_pairs, 2)), np.int32),
        ]
        args.rows_begin_R1, args.pairs_begin_R1 = at(keep[0]), at(keep[1])
        args.row_tokens_M, args.pairs_N2 = at(keep[3]), at(keep[4])
        args.rows_M, args.x_TD = (at(keep[2]), None) if ranks.packed else (None, at(keep[2]))
        ranks.faults[0][:] = 0
        ranks.call("dispatch", 0)
        assert ranks.faults[0][0] == TOO_MUCH, f"seed {seed}"
        assert ranks.faults[0][-1] == 1, f"seed {seed}"
        header = ranks.regions[0][:16].view(np.int32)
        assert header[0] == GAVE_UP, f"seed {seed}"
        ranks.faults[0][:] = 0
    for source in range(1, ranks.num_ranks):
        ranks.regions[0][source * HEADER_BYTES :][:16].view(np.int32)[:] = [ranks.sequences[0][0], 0, 0, 0]
    header[0] = ranks.sequences[0][0]
    limits = [ranks.max_tokens, max_pairs, 0]
    for place, value, is_right in (
        (1, ranks.max_tokens, True),
        (1, ranks.max_tokens + 1, False),
        (1, -1, False),
        (2, max_pairs, True),
        (2, max_pairs + 1, False),
        (2, -1, False),
        (3, -1, False),
        (3, 1, False),
    ):
        header[1:] = limits
        header[place] = value
        ranks.faults[0][:] = 0
        ranks.call("arrive", 0)
        assert (ranks.faults[0][[0, -1]] == ([0, 0] if is_right else [TOO_MUCH, 1])).all(), f"seed {seed}: {header}"
        assert ranks.got[0]["pairs_to_R1"][1] == (header[2] if is_right else 0), f"seed {seed}: {header}"
    header[1:] = [0, max_pairs - 1, 1]
    ranks.faults[0][:] = 0
    ranks.call("arrive", 0)
    assert ranks.faults[0][0] == 0, f"seed {seed}"
    ranks.step_tokens -= 1  # fewer in this step than there may be
    for rows, pairs, is_right in (
        (ranks.max_tokens - 1, max_pairs - ranks.top_k, True),
        (ranks.max_tokens, 0, False),
        (0, max_pairs - ranks.top_k + 1, False),
    ):
        header[1:] = [rows, pairs, 0]
        ranks.faults[0][:] = 0
        ranks.call("arrive", 0)
        assert ranks.faults[0][0] == (0 if is_right else TOO_MUCH), f"seed {seed}: {header}"
    ranks.step_tokens += 2
    with pytest.raises(DeviceError, match="more than max_tokens"):
        ranks.call("arrive", 0)


def check_waits(library: Checked, seed: int) -> None:
    """One that waits before the others send gets it all: no flag comes before the last row. On the host only, where a
    thread is a rank; ranks of a GPU's one stream would wait for each other."""
    if library.is_gpu:
        return
    ranks = PeerRanks(library, seed, num_ranks=2, timeout_ns=10_000_000_000, max_tokens=1000)
    rng = ranks.arena.rng
    for _ in range(2):
        for rank in (0, 1):
            ranks.draw(rank, rng)
        for first, second, verify in (
            ("dispatch", "arrive", ranks.verify_arrived),
            ("give_back", "combine", ranks.verify_combined),
        ):
            failures: list[BaseException] = []

            def wait(call: str = second, failures: list[BaseException] = failures) -> None:
                try:
                    ranks.call(call, 1)
                except BaseException as error:  # noqa: BLE001 (it is raised below)
                    failures.append(error)

            if first == "give_back":
                for rank in (0, 1):
                    ranks.compute(rank, rng)
            ranks.call(first, 1)
            thread = threading.Thread(target=wait)
            thread.start()
            time.sleep(0.002)
            ranks.call(first, 0)
            ranks.call(second, 0)
            thread.join(timeout=20)
            assert not failures, f"seed {seed}: {failures}"
            for rank in (0, 1):
                verify(rank)
                assert not ranks.faults[rank].any(), f"seed {seed}"
                assert not ranks.done[rank].any(), f"seed {seed}"
    ranks.arena.check()
