"""The steps of a build: each is announced, timed, and its peak memory is recorded."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass
class Step:
    """One finished step. ``peak_rss_bytes`` is of this process during the step; the engine reports its child's.

    ``cached`` says that its results were those of an earlier build.
    """

    name: str
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    cached: bool = False


class Listener(Protocol):
    """Who is told about progress: the command line, or nobody."""

    def start(self, name: str) -> None: ...

    def advance(self, done: int, total: int, detail: str = "") -> None: ...

    def finish(self, step: Step) -> None: ...


class Silent:
    """A listener that does nothing."""

    def start(self, name: str) -> None:
        pass

    def advance(self, done: int, total: int, detail: str = "") -> None:
        pass

    def finish(self, step: Step) -> None:
        pass


@dataclass
class StepLog:
    """Runs steps in order and keeps what they cost."""

    listener: Listener = field(default_factory=Silent)
    finished: list[Step] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Time a block. The step is recorded only when the block succeeds."""
        step = Step(name)
        self.listener.start(name)
        reset_peak_rss()
        started = time.perf_counter()
        yield step
        step.seconds = round(time.perf_counter() - started, 2)
        step.peak_rss_bytes = step.peak_rss_bytes or peak_rss_bytes()
        self.finished.append(step)
        self.listener.finish(step)

    def reuse(self, name: str, take: Callable[[], Any | None]) -> Any | None:
        """What ``take`` finds; a step is recorded only when it finds something."""
        reset_peak_rss()
        started = time.perf_counter()
        found = take()
        if found is not None:
            step = Step(name, round(time.perf_counter() - started, 2), peak_rss_bytes(), cached=True)
            self.listener.start(name)
            self.finished.append(step)
            self.listener.finish(step)
        return found


def reset_peak_rss() -> None:
    """Start measuring the peak anew where the kernel allows it (Linux); elsewhere it is of the process so far."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since the last reset.

    VmHWM starts anew at exec, where Linux carries ``ru_maxrss`` over from the forking parent.
    """
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
