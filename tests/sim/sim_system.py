"""`SimSystem`: real threads of which one runs at a time, virtual time, and a seed that makes every choice.

A thread hands the baton on at its calls of the System: on entering a condition, waiting, sleeping, spawning. The seed
picks who goes on among those that can. When all wait, time jumps to the nearest deadline; when nobody has one, the run
is deadlocked and fails with a dump of all threads. Every choice goes into a hash, so two runs can be compared.

    system = SimSystem(seed=7)
    system.run(lambda: ...)          # in a simulated thread, until it returns; all others then end
    system.trace_hash                # the same for the same seed

Threads belong to a process (`with system.process("rank-2")`, or inherited from the thread that spawned). `freeze` is
SIGSTOP and, never followed by `thaw`, SIGKILL: a frozen thread stays where it is, once it has let go of its locks.
"""

from __future__ import annotations

import random
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b

SWITCH_S_MAX = 20e-6  # virtual time that a turn takes at most
REAL_TIMEOUT_S = 150.0


class SimOver(BaseException):
    """Unwinds the threads that are left when a run ends. Not an Exception, so nothing handles it."""


class SimDeadlock(AssertionError):
    """Nobody can run and nobody has a deadline, or virtual time ran out."""


class _Thread:
    def __init__(self, name: str, process: str, run: Callable[[], None]) -> None:
        self.name = name
        self.process = process
        self.run = run
        self.gate = threading.Semaphore(0)  # passed once per turn
        self.real: threading.Thread | None = None
        self.done = False
        self.num_locks = 0
        self.why = "starts"
        # What it waits for; all None: it can run.
        self.lock: SimCondition | None = None
        self.ready: Callable[[], bool] | None = None
        self.notified = False
        self.deadline_s: float | None = None

    def can_run(self, now_s: float) -> bool:
        if self.lock is not None and self.lock.owner is not None:
            return False
        if self.ready is None and self.deadline_s is None:
            return True
        if self.deadline_s is not None and self.deadline_s <= now_s:
            return True
        if self.ready is not None and self.notified:
            self.notified = self.ready()  # the lock is free: what a woken thread would see
        return self.ready is not None and self.notified


class SimTask:
    def __init__(self, system: SimSystem, thread: _Thread) -> None:
        self._system = system
        self._thread = thread

    def join(self, timeout_s: float | None = None) -> bool:
        with self._system.ended:
            return self._system.ended.wait_for(lambda: self._thread.done, timeout_s)


class SimCondition:
    """A re-entrant lock and its waiters."""

    def __init__(self, system: SimSystem) -> None:
        self._system = system
        self.owner: _Thread | None = None
        self._depth = 0
        self._waiters: list[_Thread] = []

    def __enter__(self) -> SimCondition:
        me = self._system.me
        if self.owner is not me:
            self._system.turn("enters", lock=self)
            self._take(me)
        self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        if self._system.over:
            return
        self._depth -= 1
        if self._depth == 0:
            self._release()

    def wait_for(self, ready: Callable[[], bool], timeout_s: float | None) -> bool:
        me, depth = self._system.me, self._depth
        assert self.owner is me, "wait_for without the lock"
        deadline_s = None if timeout_s is None else self._system.now() + timeout_s
        while not ready():
            if deadline_s is not None and self._system.now() >= deadline_s:
                return False
            self._release()
            self._waiters.append(me)
            try:
                self._system.turn("waits", lock=self, ready=ready, deadline_s=deadline_s)
            finally:
                self._waiters.remove(me)
            self._take(me)
            self._depth = depth
        return True

    def notify_all(self) -> None:
        assert self.owner is self._system.me, "notify_all without the lock"
        for waiter in self._waiters:
            waiter.notified = True

    def _take(self, me: _Thread) -> None:
        assert self.owner is None
        self.owner = me
        me.num_locks += 1

    def _release(self) -> None:
        assert self.owner is not None
        self.owner.num_locks -= 1
        self.owner, self._depth = None, 0


class SimSystem:
    """A `System` for a whole cluster in one process."""

    def __init__(self, seed: int, *, virtual_timeout_s: float = 600.0) -> None:
        self.seed = seed
        self.over = False
        self.failure: BaseException | None = None
        self.num_turns = 0
        self._virtual_timeout_s = virtual_timeout_s
        self._random = random.Random(seed)
        self._now_s = 0.0
        self._threads: list[_Thread] = []
        self._running: _Thread | None = None
        self.frozen: set[str] = set()  # processes
        self._finished = threading.Event()
        self._hash = blake2b(digest_size=16)
        self._recent: deque[str] = deque(maxlen=60)
        self.ended = SimCondition(self)  # notified whenever a thread ends

    # --- System -----------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._now_s

    def sleep(self, duration_s: float) -> None:
        self.turn("sleeps", deadline_s=self._now_s + duration_s)

    def condition(self) -> SimCondition:
        return SimCondition(self)

    def spawn(self, name: str, run: Callable[[], None]) -> SimTask:
        thread = self._add(name, self.me.process, run)
        self.turn("spawns")
        return SimTask(self, thread)

    def randbits(self, num_bits: int) -> int:
        return self._random.getrandbits(num_bits)

    # --- what a simulation adds -------------------------------------------------------------------------------------

    @property
    def me(self) -> _Thread:
        if self.over:
            raise SimOver
        assert self._running is not None
        assert self._running.real is threading.current_thread(), "a thread that SimSystem did not spawn"
        return self._running

    @property
    def random(self) -> random.Random:
        """For the scenario; one stream with the scheduler's choices."""
        return self._random

    @property
    def trace_hash(self) -> str:
        return self._hash.hexdigest()

    def note(self, text: str) -> None:
        """Put an event of the scenario into the trace."""
        line = f"{self._now_s:.6f} {text}"
        self._hash.update(line.encode() + b"\n")
        self._recent.append(line)

    @contextmanager
    def process(self, name: str) -> Iterator[None]:
        """Threads spawned inside belong to process `name`."""
        me = self.me
        before, me.process = me.process, name
        try:
            yield
        finally:
            me.process = before

    def freeze(self, process: str) -> None:
        self.note(f"freezes {process}")
        self.frozen.add(process)
        self.turn("freezes")

    def thaw(self, process: str) -> None:
        self.note(f"thaws {process}")
        self.frozen.discard(process)
        self.turn("thaws")

    def run(self, main: Callable[[], None]) -> None:
        """Run `main` in a simulated thread until it returns, then end all others. Raises what any thread raised."""

        def run_main() -> None:
            main()
            self._finish(None)

        self._running = self._add("main", "main", run_main)
        self._running.gate.release()
        if not self._finished.wait(REAL_TIMEOUT_S):
            self.failure = SimDeadlock(f"{REAL_TIMEOUT_S} real seconds passed\n{self.dump()}")
        self.over = True
        for thread in self._threads:
            thread.gate.release()
        for thread in self._threads:
            assert thread.real is not None
            thread.real.join(10.0)
        if self.failure is not None:
            raise self.failure

    def dump(self) -> str:
        """Who waits where."""
        frames = sys._current_frames()
        lines = [f"seed {self.seed}, {self._now_s:.6f} s, {self.num_turns} turns; the last events:", *self._recent]
        for thread in self._threads:
            if not thread.done:
                frozen = " (frozen)" if thread.process in self.frozen else ""
                lines.append(
                    f"--- {thread.name} of {thread.process}{frozen} {thread.why}, deadline {thread.deadline_s}"
                )
                frame = frames.get(thread.real.ident or 0) if thread.real else None
                if frame is not None:
                    stack = [entry for entry in traceback.extract_stack(frame) if "switchgear" in entry.filename]
                    lines += [text.rstrip() for text in traceback.format_list(stack[-6:])]
        return "\n".join(lines)

    def turn(
        self,
        why: str,
        *,
        lock: SimCondition | None = None,
        ready: Callable[[], bool] | None = None,
        deadline_s: float | None = None,
    ) -> None:
        """Let the seed choose who goes on; returns when that is the caller again and it got what it waits for."""
        me = self.me
        me.why, me.lock, me.ready, me.notified, me.deadline_s = why, lock, ready, False, deadline_s
        chosen = self._choose()
        if chosen is not me:
            self._running = chosen
            if chosen is not None:
                chosen.gate.release()
            me.gate.acquire()
        if self.over:
            raise SimOver
        me.why, me.lock, me.ready, me.deadline_s = "runs", None, None, None

    # --- the baton --------------------------------------------------------------------------------------------------

    def _add(self, name: str, process: str, run: Callable[[], None]) -> _Thread:
        thread = _Thread(name, process, run)
        self._threads.append(thread)
        thread.real = threading.Thread(target=self._body, args=(thread,), name=f"sim-{name}", daemon=True)
        thread.real.start()
        return thread

    def _body(self, thread: _Thread) -> None:
        thread.gate.acquire()
        try:
            if not self.over:
                thread.why = "runs"
                thread.run()
            if not self.over:
                with self.ended:
                    thread.done = True
                    self.ended.notify_all()
                self._pass_on()
        except SimOver:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by run()
            with suppress(SimOver):
                self._finish(error)
        thread.done = True

    def _pass_on(self) -> None:
        self._running = chosen = self._choose()
        if chosen is not None:
            chosen.gate.release()

    def _finish(self, failure: BaseException | None) -> None:
        if not self.over and not self._finished.is_set():
            self.failure = failure
            self.over = True
            self._finished.set()
        raise SimOver

    def _choose(self) -> _Thread | None:
        if self.over:
            raise SimOver
        self.num_turns += 1
        self._now_s += self._random.random() * SWITCH_S_MAX
        living = [thread for thread in self._threads if not thread.done]
        if len(living) * 2 < len(self._threads):
            self._threads = living
        awake = [t for t in living if not (t.process in self.frozen and t.num_locks == 0)]
        candidates = [thread for thread in awake if thread.can_run(self._now_s)]
        if not candidates:
            deadline_s = min((t.deadline_s for t in awake if t.deadline_s is not None and _lock_free(t)), default=None)
            if deadline_s is None or deadline_s > self._virtual_timeout_s:
                problem = "deadlock" if deadline_s is None else f"{self._virtual_timeout_s} virtual seconds passed"
                self._finish(SimDeadlock(f"{problem}\n{self.dump()}"))
            self._now_s = max(self._now_s, deadline_s or 0.0)
            candidates = [thread for thread in awake if thread.can_run(self._now_s)]
        chosen = candidates[self._random.randrange(len(candidates))]
        self.note(f"{chosen.name} {chosen.why}")
        return chosen


def _lock_free(thread: _Thread) -> bool:
    return thread.lock is None or thread.lock.owner is None
