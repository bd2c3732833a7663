"""How many of each rank's tokens go to which replica of each expert, from the exact counts of one layer and batch.

The slow reference of csrc/placement/quotas.cpp, which a test holds equal to it in every number. All ranks have the same
counts and compute the same quotas: integers only, every tie decided by an order.

What is made small is the largest cost of a rank: the rows it computes, and `expert_rows` for each expert whose weights
it reads (`lent_expert_rows` where it reads another rank's). Steps of `lp`: the best split over all replicas (exact:
flow), one that reads few experts (replicas opened only where a rank is over the target), and then *lending*: a rank with
slack computes rows of up to `lending` experts it does not hold. The binary search over a target with greedy export is
UltraEP's (arXiv 2606.04101), here with the reads charged and replicas opened before experts are lent; the flow finds each
infeasible target's densest set of ranks and takes its mean as the next target (Dinkelbach).

Letters: R ranks, E experts, S slots of a rank, I instances (an expert at a rank: a slot, or lent).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.moe.expert_map import EMPTY

CHOICES = ("static", "hash", "waterfill", "lp")
TARGET_STEPS = 256  # the search over targets ends at a step of 1 / TARGET_STEPS
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    """How a step chooses replicas. `expert_rows`: rows that take as long as one read of an expert's weights;
    `lent_expert_rows`: the same of another rank's expert. None: as long."""

    choice: str = "lp"
    lending: int = 0
    expert_rows: int = 0
    lent_expert_rows: int | None = None

    @property
    def lent_price(self) -> int:
        return self.expert_rows if self.lent_expert_rows is None else self.lent_expert_rows

    @property
    def exact(self) -> bool:
        """Whether it takes the counts of all ranks."""
        return self.choice in ("waterfill", "lp")


@dataclass(slots=True)
class Instances:
    """Where experts can be computed, and how many rows each place gets. Those after the slots' are lent."""

    experts: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # of all ranks' slots, lent ones included
    rows: list[int] = field(default_factory=list)
    costs_R: list[int] = field(default_factory=list)

    def cost(self) -> int:
        return max(self.costs_R)


class Planner:
    """One layer's placement. Slot s of rank r is r * stride + s; expert e lent to it is r * stride + S + e. The last
    `num_variants` slots of a rank are not chosen here (ModelVersions)."""

    def __init__(self, held_RS: Int32, num_experts: int, balance: Balance, *, num_variants: int = 0) -> None:
        self.num_ranks, self.num_slots = held_RS.shape
        self.num_experts = num_experts
        self.balance = balance
        self.lending = balance.lending if balance.exact else 0
        self.stride = self.num_slots + (num_experts if self.lending else 0) + num_variants
        self.empty = Instances()
        for rank, slots in enumerate(held_RS.tolist()):
            for slot, expert in enumerate(slots):
                if expert != EMPTY:
                    self._add(self.empty, expert, rank, rank * self.stride + slot)
        self.replicas_E = self._by_expert(self.empty)

    def static_slot(self, source: int, expert: int) -> int:
        """The slot that a rank's tokens go to without counts: its own, else spread over sources by rank."""
        own = [i for i in self.replicas_E[expert] if self.empty.ranks[i] == source]
        replicas = self.replicas_E[expert]
        return self.empty.slots[own[0] if own else replicas[(source + expert) % len(replicas)]]

    def hash_slot(self, token: int, expert: int) -> int:
        """By the token's place in its rank's batch."""
        replicas = self.replicas_E[expert]
        mixed = (token * 0x9E3779B1 + expert * 0x85EBCA77) & 0xFFFFFFFF
        return self.empty.slots[replicas[(mixed >> 16) % len(replicas)]]

    def plan(self, counts_RE: Int64, *, lends: bool = True) -> Instances | None:
        """Rows of each instance; None: the static slots are as good. Without `lends` no expert is lent."""
        totals_E = counts_RE.sum(0).tolist()
        static = self._static(counts_RE)
        water = self._water(totals_E)
        is_lp, lending = self.balance.choice == "lp", self.lending if lends else 0
        if is_lp:
            self._level(water, every=True)
        best = min(static, water, key=Instances.cost)
        starts = [best] if lending else []
        if is_lp and len(self.empty.rows) > self.num_experts:
            starts.append(self._whole(totals_E))
        for start in starts:
            found = self._spread(start, lending)
            if is_lp and lending:
                self._level(found, every=self.balance.expert_rows == self.balance.lent_price == 0)
            best = min(best, found, key=Instances.cost)
        return best if static.cost() - best.cost() > self.balance.expert_rows else None

    def quotas(self, counts_RE: Int64, plan: Instances | None, source: int) -> list[list[tuple[int, int]]]:
        """(slot, tokens) of each expert for the tokens of `source`, in token order: its own rank's instance first,
        the others where all sources, by rank, leave off."""
        if plan is None:
            counts_E = counts_RE[source].tolist()
            return [[(self.static_slot(source, e), n)] if n else [] for e, n in enumerate(counts_E)]
        quotas: list[list[tuple[int, int]]] = []
        for expert, instances in enumerate(self._by_expert(plan)):
            wants_R = counts_RE[:, expert].tolist()
            left_I = {i: plan.rows[i] for i in instances}
            parts: list[tuple[int, int]] = []
            for i in instances:
                rank = plan.ranks[i]
                own = min(wants_R[rank], left_I[i])
                wants_R[rank] -= own
                left_I[i] -= own
                if rank == source and own:
                    parts.append((plan.slots[i], own))
            before = sum(wants_R[:source])
            for i in instances:
                skipped = min(before, left_I[i])
                before -= skipped
                taken = min(wants_R[source], left_I[i] - skipped)
                wants_R[source] -= taken
                if taken:
                    parts.append((plan.slots[i], taken))
            quotas.append(parts)
        return quotas

    def choose(self, topk_ids_TK: Int32, quotas: list[list[tuple[int, int]]]) -> Int32:
        """The slot of each of a rank's (token, k), by its quotas."""
        slots_TK = np.empty_like(topk_ids_TK)
        left = [[[slot, count] for slot, count in parts] for parts in quotas]
        for index, expert in np.ndenumerate(topk_ids_TK):
            parts = left[expert]
            slots_TK[index] = parts[0][0]
            parts[0][1] -= 1
            if parts[0][1] == 0:
                parts.pop(0)
        return slots_TK

    # --- one split ------------------------------------------------------------------------------------------------

    def _static(self, counts_RE: Int64) -> Instances:
        state = self._copy(self.empty)
        by_slot = {slot: i for i, slot in enumerate(state.slots)}
        for source, counts_E in enumerate(counts_RE.tolist()):
            for expert, count in enumerate(counts_E):
                self._give(state, by_slot[self.static_slot(source, expert)], count)
        return state

    def _in_order(self, totals_E: list[int]) -> list[int]:
        """Experts with one place, then the others, each by rows."""
        return sorted(range(self.num_experts), key=lambda e: (len(self.replicas_E[e]) > 1, -totals_E[e], e))

    def _water(self, totals_E: list[int]) -> Instances:
        """Each expert poured over its replicas, level by level."""
        state = self._copy(self.empty)
        load_R = [0] * self.num_ranks
        for expert in self._in_order(totals_E):
            instances = sorted(self.replicas_E[expert], key=lambda i: (load_R[state.ranks[i]], i))
            total, below = totals_E[expert], 0
            for count, i in enumerate(instances, 1):
                below += load_R[state.ranks[i]]
                level, over = divmod(total + below, count)
                if count == len(instances) or level <= load_R[state.ranks[instances[count]]]:
                    break
            for place, i in enumerate(instances[:count]):
                given = level + (place < over) - load_R[state.ranks[i]]
                self._give(state, i, given)
                load_R[state.ranks[i]] += given
        return state

    def _whole(self, totals_E: list[int]) -> Instances:
        """Each expert at one place, so that few are read."""
        state = self._copy(self.empty)
        for expert in self._in_order(totals_E):
            i = min(self.replicas_E[expert], key=lambda i: (state.costs_R[state.ranks[i]], i))
            self._give(state, i, totals_E[expert])
        return state

    # --- a target for all ranks -----------------------------------------------------------------------------------

    def _spread(self, state: Instances, lending: int) -> Instances:
        """The lowest target found under which each rank over it can export what is over. The lightest first: the
        heaviest have experts with rows for any place that is left. Where that fails, the heaviest first."""
        low, high = -(-sum(state.costs_R) // self.num_ranks), state.cost()
        best, target = self._copy(state), low
        while low < high:
            found = self._export(state, target, lending, lightest_first=True)
            found = found or self._export(state, target, lending, lightest_first=False)
            if found is None:
                low = target + 1
            else:
                best, high = found, target
            if high - low < 1 + low // TARGET_STEPS:
                break
            target = (low + high) // 2
        return best

    def _export(self, state: Instances, target: int, lending: int, *, lightest_first: bool) -> Instances | None:
        """Ranks over the target give rows to ranks under it, each time of the expert that has most:
        a few rows that were left of one would take a place where another's many could go."""
        state = self._copy(state)
        at_ER = {(state.experts[i], state.ranks[i]): i for i in range(len(state.rows))}
        lent_R = [0] * self.num_ranks
        over = [rank for rank in range(self.num_ranks) if state.costs_R[rank] > target]
        sign = 1 if lightest_first else -1
        for rank in sorted(over, key=lambda rank: (sign * state.costs_R[rank], rank)):
            mine = [i for i in range(len(state.rows)) if state.ranks[i] == rank and state.rows[i]]
            while state.costs_R[rank] > target and mine:
                i = max(mine, key=lambda i: (state.rows[i], -i))
                found = self._importer(state, at_ER, lent_R, target, lending, i, state.costs_R[rank] - target)
                if found is None:
                    mine.remove(i)
                    continue
                to, rows = found
                expert = state.experts[i]
                if (expert, to) not in at_ER:
                    at_ER[expert, to] = len(state.rows)
                    lent_R[to] += 1
                    self._add(state, expert, to, to * self.stride + self.num_slots + expert)
                self._give(state, at_ER[expert, to], rows)
                self._give(state, i, -rows)
                if state.rows[i] == 0:
                    mine.remove(i)
            if state.costs_R[rank] > target:
                return None
        return state

    def _importer(
        self,
        state: Instances,
        at_ER: dict[tuple[int, int], int],
        lent_R: list[int],
        target: int,
        lending: int,
        i: int,
        need: int,
    ) -> tuple[int, int] | None:
        """(rank, rows): who reads the expert already, else who holds it, else who borrows it; there the least slack
        that takes all (with none lost to a place that was a rank's last), else the most. A part must be worth its
        read; a whole instance only moves the read."""
        best: tuple[int, int] | None = None
        best_key: tuple[int, int, int, int] | None = None
        for rank in range(self.num_ranks):
            j = at_ER.get((state.experts[i], rank))
            if j == i or (j is None and lent_R[rank] >= lending):
                continue
            kind = 2 if j is None else 0 if state.rows[j] else 1
            charge = (0, self.balance.expert_rows, self.balance.lent_price)[kind]
            slack = target - state.costs_R[rank] - charge
            wanted = min(max(need, charge + 1), state.rows[i])
            rows = min(wanted, slack)
            if rows < 1 or (rows <= charge and rows < state.rows[i]):
                continue
            is_last = kind == 2 and lent_R[rank] + 1 >= lending
            key = (kind, 0, (slack - wanted) * is_last, slack) if slack >= wanted else (kind, 1, 0, -slack)
            if best_key is None or key < best_key:
                best, best_key = (rank, rows), key
        return best

    # --- the best split over given instances ----------------------------------------------------------------------

    def _level(self, state: Instances, *, every: bool) -> None:
        """Move rows between instances of an expert until no split has a smaller maximum over ranks: of rows alone over
        `every` instance, else of costs over those that have rows."""
        may = [every or rows > 0 for rows in state.rows]
        by_expert = [[i for i in instances if may[i]] for instances in self._by_expert(state)]
        by_rank: list[list[int]] = [[] for _ in range(self.num_ranks)]
        for i, rank in enumerate(state.ranks):
            if may[i] and len(by_expert[state.experts[i]]) > 1:
                by_rank[rank].append(i)
        load_R = list(state.costs_R)
        if every:
            load_R = [0] * self.num_ranks
            for rank, rows in zip(state.ranks, state.rows, strict=True):
                load_R[rank] += rows
        target = -(-sum(load_R) // self.num_ranks)
        while max(load_R) > target:
            over = [rank for rank in range(self.num_ranks) if load_R[rank] > target]
            came: dict[int, tuple[int, int] | None] = dict.fromkeys(over)  # by rank: instances from and to
            queue, end = deque(over), None
            while queue and end is None:
                rank = queue.popleft()
                for i in by_rank[rank]:
                    if state.rows[i] == 0:
                        continue
                    for j in by_expert[state.experts[i]]:
                        to = state.ranks[j]
                        if to in came:
                            continue
                        came[to] = (i, j)
                        queue.append(to)
                        if load_R[to] < target:
                            end = to
                            break
                    if end is not None:
                        break
            if end is None:  # rows at these ranks cannot leave them, so their mean is a bound
                target = -(-sum(load_R[rank] for rank in came) // len(came))
                continue
            path, rank = [], end
            while (step := came[rank]) is not None:
                path.append(step)
                rank = state.ranks[step[0]]
            rows = min(target - load_R[end], load_R[rank] - target, *(state.rows[i] for i, _ in path))
            for i, j in path:
                self._give(state, i, -rows)
                self._give(state, j, rows)
            load_R[end] += rows
            load_R[rank] -= rows

    # --- states ---------------------------------------------------------------------------------------------------

    def _copy(self, state: Instances) -> Instances:
        return Instances(
            experts=[*state.experts],
            ranks=[*state.ranks],
            slots=[*state.slots],
            rows=[*state.rows],
            costs_R=state.costs_R[:] or [0] * self.num_ranks,
        )

    def _add(self, state: Instances, expert: int, rank: int, slot: int) -> None:
        state.experts.append(expert)
        state.ranks.append(rank)
        state.slots.append(slot)
        state.rows.append(0)

    def _give(self, state: Instances, i: int, rows: int) -> None:
        """`rows` more (or fewer) to instance i, with its read."""
        before = state.rows[i]
        state.rows[i] = before + rows
        reads = (state.rows[i] > 0) - (before > 0)
        is_lent = i >= len(self.empty.rows)
        price = self.balance.lent_price if is_lent else self.balance.expert_rows
        state.costs_R[state.ranks[i]] += rows + reads * price

    def _by_expert(self, state: Instances) -> list[list[int]]:
        """Instances of each expert, slots first, each by rank."""
        by_expert: list[list[int]] = [[] for _ in range(self.num_experts)]
        for i, expert in enumerate(state.experts):
            by_expert[expert].append(i)
        return by_expert
