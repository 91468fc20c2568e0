"""Where the time of a run goes: seconds by part.

`timed(part)` costs some microseconds, and nothing where no clock runs. On a GPU the marks are events of its stream,
read when they have passed: nothing waits, and what the host does meanwhile is not counted a second time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

LOADING, CACHE, GENERATING, EVALUATING = "loading", "teacher's cache", "generating", "evaluating"
TEACHER, STUDENT, LOSS, BACKWARD = "teacher's forward", "student's forward", "loss and its gradients", "backward"
UPDATE, SAVING, REST = "optimizer", "saving", "data and the rest"
WHOLE = {LOADING, CACHE, GENERATING, EVALUATING, SAVING}  # what is within them is theirs
BEHIND = 512  # marks of a GPU before those that have passed are read

_running: Clock | None = None


class Clock:
    """Seconds by part, from `with clock:` on. Of parts within one another the innermost counts, but inside `WHOLE`."""

    def __init__(self, device: Any = "cpu"):
        self._is_gpu = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = {}
        self._open = [REST]
        self._marks: deque[tuple[Any, str]] = deque()  # a time, and the part that begins there

    def enter(self, part: str) -> None:
        self._open.append(self._open[-1] if self._open[-1] in WHOLE else part)
        self._mark()

    def leave(self) -> None:
        self._open.pop()
        self._mark()

    def seconds(self) -> dict[str, float]:
        """Up to now; on a GPU, to the last mark that it has passed."""
        self._mark()
        self._settle()
        return dict(self._seconds)

    def __enter__(self) -> Clock:
        global _running
        self._outer, _running = _running, self
        self._mark()
        return self

    def __exit__(self, *_: Any) -> None:
        global _running
        _running = self._outer

    def _mark(self) -> None:
        if self._is_gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((now, self._open[-1]))
        if not self._is_gpu or len(self._marks) > BEHIND:
            self._settle()

    def _settle(self) -> None:
        while len(self._marks) > 1 and (not self._is_gpu or self._marks[1][0].query()):
            since, part = self._marks.popleft()
            until = self._marks[0][0]
            taken = since.elapsed_time(until) / 1000 if self._is_gpu else until - since
            self._seconds[part] = self._seconds.get(part, 0.0) + taken


@contextmanager
def timed(part: str) -> Iterator[None]:
    """What happens inside belongs to this part, where a clock runs."""
    clock = None if torch.compiler.is_compiling() else _running
    if clock is None:
        yield
        return
    clock.enter(part)
    try:
        yield
    finally:
        clock.leave()


def running() -> Clock | None:
    return _running
