"""`switchgear plan MODEL --ranks N --survive F --memory 80GiB`: a Plan as text or JSON; exit code 1 if it does not fit."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

from switchgear.byte_size import format_bytes, parse_bytes
from switchgear.config import bundled_model
from switchgear.flags import add_flags
from switchgear.plan import Plan, make_plan
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.model.spec import load_spec

_ENGINE_SETTINGS = frozenset(
    {
        "block_size",
        "device",
        "dispatch",
        "dtype",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "num_kv_blocks",
        "quantization",
        "small_step_tokens",
        "weight_cache_dir",
    }
)


class PlanCommand:
    """A subcommand, in the shape that cli.py's `Command` describes."""

    help = "show what each rank would hold, and whether it fits, without loading the model"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "model_argument",
            nargs="?",
            metavar="MODEL",
            help="directory with at least a Hugging Face config.json (default: bundled)",
        )
        parser.add_argument("--ranks", type=int, default=4, help="rank processes (default: 4)")
        parser.add_argument(
            "--survive",
            type=int,
            metavar="F",
            help="size the slot pool so that any RANKS - F ranks can hold every expert (default: what serve holds at first: "
            "0; with --device cuda, whose pool has its size from the start, serve's --survive)",
        )
        parser.add_argument("--memory", metavar="SIZE", help="what one rank may use, for example 80GiB")
        parser.add_argument("--json", action="store_true", help="print JSON, all sizes in bytes")
        skip = frozenset(field.name for field in fields(EngineConfig)) - _ENGINE_SETTINGS
        add_flags(parser, EngineConfig, skip=skip)

    def run(self, arguments: argparse.Namespace) -> int:
        path = Path(arguments.model_argument).expanduser().resolve() if arguments.model_argument else bundled_model()
        if path.is_file() and path.name == "config.json":
            path = path.parent
        given = {name: value for name, value in vars(arguments).items() if name in _ENGINE_SETTINGS}
        engine = EngineConfig(model=str(path), **given)
        held = 0 if engine.device != "cuda" else min(engine.survive, arguments.ranks - 1)
        plan = make_plan(
            load_spec(path),
            engine,
            model=str(path),
            num_ranks=arguments.ranks,
            survive=held if arguments.survive is None else arguments.survive,
            memory_bytes=None if arguments.memory is None else parse_bytes(arguments.memory),
        )
        sys.stdout.write((json.dumps(plan.to_json(), indent=2) if arguments.json else plan_text(plan)) + "\n")
        return 1 if plan.fits is False else 0


PLAN = PlanCommand()


def plan_text(plan: Plan) -> str:
    """What a deployer reads: one rank line by line, the price of survival, the verdict."""
    is_gpu = plan.device == "cuda"
    spare = plan.slots_per_rank - plan.num_moe_layers * plan.slots_per_layer
    rows = [
        ("dense weights", plan.dense_bytes, _largest_parts(plan)),
        (
            "expert slot pool",
            plan.pool_bytes,
            f"{plan.num_moe_layers} layers x {plan.slots_per_layer} slots of {format_bytes(plan.expert_bytes)}"
            + (f", and {spare} where experts arrive" if spare else "")
            + (f"; {format_bytes(plan.survive_extra_bytes)} of it to survive {plan.survive}" if plan.survive else ""),
        ),
        (
            "KV cache",
            plan.kv_cache_bytes,
            f"{plan.num_kv_blocks} blocks, {plan.kv_cache_tokens} tokens: {plan.max_len_sequences} sequences "
            f"of max_model_len {plan.max_model_len}" + _lowered(plan),
        ),
        (
            "transport",
            plan.exchange_bytes,
            "what peers write into"
            if is_gpu
            else f"its share of {format_bytes(plan.segment_bytes)} in /dev/shm, all ranks on one host",
        ),
        ("a step, at most", plan.step_bytes, "bound: every token of every rank routed here"),
        (
            "the process",
            plan.process_bytes,
            "CUDA, kernels, NCCL (a guess)" if is_gpu else "Python, torch, Ray (measured, rounded up)",
        ),
        ("total", plan.total_bytes, f"x {plan.num_ranks} ranks = {format_bytes(plan.cluster_bytes)}"),
    ]
    one_host = f"On one host all ranks take {format_bytes(plan.host_bytes)}"
    one_host += ": the weight cache holds each matrix once." if plan.dense_shared_bytes else " without a weight cache."
    weights = plan.dtype if plan.quantization == "none" else f"{plan.dtype} with {plan.quantization} weights"
    lines = [
        f"{plan.model}: {plan.architecture}, {weights}, {plan.num_moe_layers} MoE layers of {plan.num_experts} "
        f"experts, top-{plan.top_k}",
        f"Each of {plan.num_ranks} ranks holds"
        + (" on its GPU (no GPU has confirmed these sums yet):" if is_gpu else ":"),
        *(f"  {name:<17}{format_bytes(size):>11}  {note}" for name, size, note in rows),
        *([one_host] if plan.num_ranks > 1 and not is_gpu else []),
        "",
        "Surviving F deaths without waiting for a replacement:",
        f"  {'F':>3}{'slots':>9}{'pool':>12}{'extra a rank':>14}{'extra in all':>14}{'a rank':>12}",
    ]
    for choice in plan.survive_choices:
        mark = "" if choice.fits is None else ("  fits" if choice.fits else "  does not fit")
        lines.append(
            f"  {choice.survive:>3}{choice.slots_per_rank:>9}{format_bytes(choice.pool_bytes):>12}"
            f"{format_bytes(choice.extra_bytes):>14}{format_bytes(plan.num_ranks * choice.extra_bytes):>14}"
            f"{format_bytes(choice.total_bytes):>12}{mark}"
        )
    if is_gpu:
        lines.append("F is --survive of `switchgear serve`, whose pools have their size from the start.")
    else:
        lines.append("F = 0 is what `switchgear serve` holds today: a death means 503 until the rank is replaced.")
    if plan.memory_bytes is not None:
        lines += ["", _verdict(plan)]
    return "\n".join(lines)


def _lowered(plan: Plan) -> str:
    """Where nobody asked for less than the model has."""
    is_whole = plan.max_model_len == plan.max_position_embeddings or plan.max_model_len < plan.kv_cache_tokens
    return "" if is_whole else f", for which the model's {plan.max_position_embeddings} are too many"


def _verdict(plan: Plan) -> str:
    assert plan.memory_bytes is not None
    assert plan.usable_bytes is not None
    memory = format_bytes(plan.memory_bytes)
    if plan.usable_bytes != plan.memory_bytes:
        memory = f"{format_bytes(plan.usable_bytes)} of {memory}"
    spare = plan.usable_bytes - plan.total_bytes
    if spare >= 0:
        most = plan.largest_kv_cache_bytes
        return f"Fits {memory} per rank with {format_bytes(spare)} to spare; the KV cache may have up to {most} bytes."
    ways = "\n".join(f"  - {way}" for way in plan.advice)
    return f"Does not fit {memory} per rank: {format_bytes(-spare)} too much. Any one of these makes it fit:\n{ways}"


def _largest_parts(plan: Plan) -> str:
    parts = sorted(asdict(plan.dense).items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in parts if size)
