"""The planner as a process of its own: `python -m switchgear.placement.worker`, requests on stdin, answers on stdout.

Apart from the server, so that a plan holds up no token, and one that crashes or hangs takes nothing with it. It has no
memory: each request brings all that a plan depends on. It ends when stdin does, and the kernel ends it with the server
even in the middle of a plan.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from typing import BinaryIO

from switchgear.placement.events import PlanReply, PlanRequest
from switchgear.placement.planner_protocol import PREFIX, decode_request, encode_reply, frame_length
from switchgear.placement.policy import POLICIES
from switchgear.placement.score import equal_split, step_time_s
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.rank_worker import set_parent_death_signal

NICENESS = 10  # a plan may wait for a step, not the other way round

log = logging.getLogger(__name__)


def answer(request: PlanRequest) -> PlanReply:
    """The policy's plan, or why there is none; and how the maps compare on the newest window."""
    start_s = time.perf_counter()
    try:
        plan = POLICIES[request.policy]().plan(request.windows_WLE, request.current, request.problem)
    except (ConfigError, KeyError, ArithmeticError, LookupError, ValueError) as error:
        log.exception("policy %r has no plan", request.policy)
        return PlanReply(request_id=request.request_id, plan=None, error=f"{type(error).__name__}: {error}")
    plan_s = time.perf_counter() - start_s

    def predicted_s(expert_map: ExpertMap) -> float:
        return step_time_s(equal_split(request.windows_WLE[-1], expert_map), request.problem)

    comparable = request.previous is not None and request.previous.num_ranks == request.current.num_ranks
    return PlanReply(
        request_id=request.request_id,
        plan=plan,
        current_s=predicted_s(request.current),
        previous_s=predicted_s(request.previous) if comparable and request.previous is not None else None,
        plan_s=plan_s,
    )


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    while len(prefix := requests.read(PREFIX.size)) == PREFIX.size:
        length = frame_length(prefix)
        body = requests.read(length)
        if len(body) < length:
            return
        replies.write(encode_reply(answer(decode_request(body))))
        replies.flush()


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    set_parent_death_signal(signal.SIGKILL)  # a server already gone has left stdin at its end
    os.nice(NICENESS)
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s planner %(levelname)s: %(message)s")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints goes to the log, not between the answers
    serve(sys.stdin.buffer, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
