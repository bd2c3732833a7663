"""Placement for a person to read: lines of a `PlacementStatus` and of an `OrderReply`."""

from __future__ import annotations

from switchgear.byte_size import format_bytes
from switchgear.placement.status import OrderReply, PlacementStatus

MOVES_SHOWN = SWAPS_SHOWN = 20


def status_lines(status: PlacementStatus) -> list[str]:
    """The status for a person."""
    lines = [
        f"policy {status.policy}, {status.state}, epoch {status.epoch}",
        f"latest: {status.last_reason}",
        f"{status.plans} plans, {status.migrations['committed']} committed, {status.migrations['refused']} refused, "
        f"{status.migrations['dropped']} dropped; {status.migrated_experts} experts, "
        f"{format_bytes(status.migrated_bytes)} moved",
    ]
    if status.alarm:
        lines.insert(0, f"ALARM: {status.alarm}")
    if status.plan_age_s is not None:
        lines.append(f"last commit {status.plan_age_s:.0f} s and {status.steps_since_commit} steps ago")
    if status.byte_budget is not None:
        lines.append(f"budget now: {format_bytes(status.byte_budget)}")
    if status.hold_windows:
        lines.append(f"holds still for {status.hold_windows} windows: {status.regretted_plans} plans were regretted")
    if (moving := status.migration) is not None:
        new = f" and model version {moving.model_version}" if moving.model_version != status.model_version else ""
        lines.append(
            f"migrating {moving.experts} experts ({format_bytes(moving.bytes)}) to epoch {moving.epoch}{new} for "
            f"{moving.seconds:.1f} s; waits for ranks {moving.waits_for_ranks}"
        )
    if (window := status.window) is not None:
        lines.append(f"last window: {window.seconds:.1f} s, {window.tokens} tokens routed")
        lines.append(f"  rows by rank: {' '.join(map(str, window.rows_by_rank))}")
        lines.append(f"  max/mean by layer: {' '.join(f'{value:.2f}' for value in window.imbalance_by_layer)}")
        hottest = ", ".join(f"{layer}:{expert} ({tokens})" for layer, expert, tokens in window.hottest)
        lines.append(f"  hottest layer:expert (tokens): {hottest}")
    if status.model_version:
        older = f", sequences run on {status.oldest_version} and later" * (status.oldest_version < status.model_version)
        lines.append(f"model version {status.model_version}{older}")
    lines += [
        f"  version {swap.version}: layer {swap.layer} expert {swap.expert} from {swap.path}"
        f"{'' if swap.settled else ' (beside the weights before)'}"
        for swap in status.swaps[-SWAPS_SHOWN:]
    ]
    if len(status.swaps) > SWAPS_SHOWN:
        lines.append(f"  and {len(status.swaps) - SWAPS_SHOWN} older ones (--json has all)")
    lines += [f"pinned: layer {layer} expert {expert} on ranks {ranks}" for layer, expert, ranks in status.pinned]
    return lines


def reply_lines(reply: OrderReply) -> list[str]:
    version = f", model version {reply.model_version}" if reply.model_version else ""
    done = f"epoch {reply.epoch}{version}" + (" is in force" if reply.done else " stays; this would be done")
    lines = [f"{done}: {reply.reason}" if reply.reason else done]
    if reply.predicted_before_s is not None and reply.predicted_after_s is not None:
        lines.append(
            f"{len(reply.moves)} moves, {format_bytes(reply.moved_bytes)}; expert time of a step, predicted: "
            f"{reply.predicted_before_s * 1e6:.1f} -> {reply.predicted_after_s * 1e6:.1f} us"
        )
    for layer, expert, rank, source in reply.moves[:MOVES_SHOWN]:
        lines.append(f"  layer {layer} expert {expert} -> rank {rank}" + ("" if source is None else f" from {source}"))
    if len(reply.moves) > MOVES_SHOWN:
        lines.append(f"  and {len(reply.moves) - MOVES_SHOWN} more")
    return lines
