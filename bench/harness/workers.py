"""Worker processes that run one case at a time, so that a crash or hang affects only its case.

A GPU fault invalidates the context of its process: the worker reports it and ends, and another one is started. The
parent process never uses the device.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any

HANG_SECONDS = 180.0

Request = dict[str, Any]
Handler = Callable[[Request], dict[str, Any]]


def serve(pipe: connection.Connection, handler: Handler) -> None:
    """Runs in the child: answers requests until the pipe closes or the context is lost."""
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        answer = handler(request)
        pipe.send(answer)
        if answer.get("context_lost"):
            return


class Worker:
    def __init__(self, handler: Handler):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, handler), daemon=True)
        self.process.start()
        theirs.close()
        self.index, self.began = -1, 0.0

    def take(self, index: int, request: Request) -> None:
        self.index, self.began = index, time.monotonic()
        with contextlib.suppress(OSError):  # `answer` reports a process that has died
            self.pipe.send(request)

    def answer(self) -> dict[str, Any] | None:
        """The answer, or None if there is none yet."""
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return lost(f"the process ended with code {self.process.exitcode}")
        if time.monotonic() - self.began > HANG_SECONDS:
            return lost(f"no answer in {HANG_SECONDS:.0f} s")
        return None

    def end(self, gently: bool = True) -> None:
        """Close the pipe, which ends an idle process; kill a busy one."""
        self.pipe.close()
        if gently:
            self.process.join(10)
        self.process.kill()
        self.process.join()


def lost(why: str) -> dict[str, Any]:
    return {"status": "failed", "error": why, "context_lost": True}


class Pool:
    """Up to `width` workers, started on demand and reused."""

    def __init__(self, handler: Handler):
        self.handler = handler
        self.idle: list[Worker] = []

    def run(self, requests: list[Request], width: int, deadline: float) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (index, answer) as workers finish, until all are done or time.monotonic() passes the deadline."""
        waiting = deque(enumerate(requests))
        busy: list[Worker] = []
        self.trim(width)
        while waiting or busy:
            if (left := deadline - time.monotonic()) <= 0:
                break
            while waiting and len(busy) < width:
                worker = self.idle.pop() if self.idle else Worker(self.handler)
                busy.append(worker)
                worker.take(*waiting.popleft())
            connection.wait([x.pipe for x in busy], timeout=min(left, 1.0))
            for worker in list(busy):
                if (answer := worker.answer()) is None:
                    continue
                busy.remove(worker)
                if answer.pop("context_lost", False):
                    worker.end(gently=False)
                else:
                    self.idle.append(worker)
                yield worker.index, answer
        for worker in busy:
            worker.end(gently=False)

    def trim(self, width: int = 0) -> None:
        """End idle workers beyond width: none may run during a timing."""
        while len(self.idle) > width:
            self.idle.pop().end()
