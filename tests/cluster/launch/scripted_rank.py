"""A rank process without a model: speaks the link's protocol, echoes tokens, and misbehaves as its argument says.

ok: echoes the prompt. bad-frame, huge-frame: sends garbage when it gets a prompt. fault: rank 0 then blames the next one.
silent: does nothing then. no-hello: fails to load. crash: exits at once. other-bits: rank 1 has another fingerprint
and a smaller KV cache.
stubborn: does not stop when told to.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from typing import Any

import msgspec

from switchgear_runtime import messages, rank_worker
from switchgear_runtime.inbox import Inbox
from switchgear_runtime.link import RankLink
from switchgear_runtime.system import RealSystem

STATS = messages.RankStats(0, 0, 8, 8, 0, 0, 0, 0)


class ScriptedRank:
    def __init__(self, config: rank_worker.RankWorkerConfig) -> None:
        self.config = config
        self.script = sys.argv[1]
        self.link: Any = None
        self.generation = 0

    def run(self) -> int:
        system = RealSystem()
        config = self.config
        address = (config.host, config.port)
        if self.script == "crash":
            print("a last word of the rank", flush=True)
            return 7
        self.link = RankLink.connect(address, bytes.fromhex(config.token), config.rank, timeout_s=5, system=system)
        inbox: Inbox[Any] = Inbox(system)
        self.link.start_reader(system, inbox.put, lambda _: os._exit(3))
        if self.script == "no-hello":
            fault = messages.Fault(
                rank=config.rank, generation=0, step=0, kind="CheckpointError", peers=[], message="tensor x is missing"
            )
            self.link.send(fault)
            return 1
        bits = "b" if self.script == "other-bits" and config.rank == 1 else "a"
        self.link.send(
            messages.Hello(
                rank=config.rank,
                pid=os.getpid(),
                fingerprint=f"bits={bits}",
                num_kv_blocks=64,
                block_size=16,
                max_model_len=1024 if bits == "a" else 256,
                num_layers=1,
                num_experts=1,
            )
        )
        pending: deque[Any] = deque()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            inbox.wait(5)
            inbox.drain_into(pending)
            while pending:
                if not self.handle(pending.popleft()):
                    return 0
        return 9

    def handle(self, message: Any) -> bool:
        rank = self.config.rank
        match message:
            case messages.BeginGeneration():
                self.generation = message.descriptor.generation
                self.link.send(messages.Parked(rank, self.generation, 0))
            case messages.Submits():
                for submit in message.sequences:
                    self.handle(submit)
            case messages.Submit():
                if self.script == "bad-frame":
                    self.link._socket.sendall(b"\x05\x00\x00\x00hello")
                elif self.script == "huge-frame":
                    self.link._socket.sendall(b"\xff\xff\xff\xff")
                elif self.script == "fault" and rank == 0:
                    peer = (rank + 1) % self.config.world_size
                    self.link.send(
                        messages.Fault(
                            rank=rank,
                            generation=self.generation,
                            step=3,
                            kind="TransportTimeout",
                            peers=[peer],
                            message=f"waited 1 s for rank {peer}",
                        )
                    )
                elif self.script not in ("silent", "fault"):
                    self.echo(message)
            case messages.Stop() if self.script != "stubborn":
                self.link.send(messages.Stopped(rank))
                return False
        return True

    def echo(self, submit: messages.Submit) -> None:
        num_tokens = submit.sampling.max_tokens
        tokens = [
            messages.TokenOutput(
                submit.sequence_id,
                submit.incarnation,
                index,
                submit.prompt_token_ids[index % len(submit.prompt_token_ids)],
                "length" if index == num_tokens - 1 else None,
            )
            for index in range(num_tokens)
        ]
        self.link.send(
            messages.StepFrame(rank=self.config.rank, generation=self.generation, step=1, tokens=tokens, stats=STATS)
        )


def main() -> int:
    config = msgspec.json.decode(os.read(0, 1 << 16), type=rank_worker.RankWorkerConfig)
    threading.Thread(target=lambda: os.read(0, 1) or os._exit(3), daemon=True).start()
    return ScriptedRank(config).run()


if __name__ == "__main__":
    sys.exit(main())
