"""Run a piece of work in a process of its own and say what it cost."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

WRAPPER = """
import json, resource, sys, time
sys.argv = sys.argv[1:]
from importlib import import_module
module, function, arguments = sys.argv[0], sys.argv[1], json.loads(sys.argv[2])
result = getattr(import_module(module), function)(**arguments)
used = resource.getrusage(resource.RUSAGE_SELF)
peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
print("\\n" + json.dumps({"cpu": used.ru_utime + used.ru_stime, "peak": peak, "result": result}))
"""


@dataclass(frozen=True)
class Cost:
    """Wall and processor seconds, imports included, and the peak resident bytes (Linux) of one process."""

    wall: float
    cpu: float
    peak: int
    result: Any = None


def run(function: str, **arguments: Any) -> Cost:
    """Call ``module:function`` with JSON arguments in a new interpreter.

    Raises:
        RuntimeError: it failed; the message is the end of what it printed.
    """
    module, name = function.split(":")
    command = [sys.executable, "-W", "ignore", "-c", WRAPPER, module, name, json.dumps(arguments)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{function} failed: {done.stderr[-2000:]}")
    report = json.loads(done.stdout.strip().splitlines()[-1])
    return Cost(wall, report["cpu"], report["peak"], report["result"])


@contextlib.contextmanager
def watching_children(interval: float = 0.02) -> Iterator[dict[str, int]]:
    """Peak bytes of one child of this process, sampled while the block runs (Linux).

    ``RssAnon`` is memory of its own. ``RssFile`` is of files that it has mapped: it counts as resident, and the kernel
    takes it back when others need it.
    """
    peaks = {"RssAnon": 0, "RssFile": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            for child in psutil.Process().children():
                with contextlib.suppress(OSError):
                    status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
                    for name, kib in re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB", status, re.MULTILINE):
                        peaks[name] = max(peaks[name], int(kib) * 1024)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def summary(costs: list[Cost]) -> dict[str, Any]:
    """Medians, the fastest, and every measurement."""
    return {
        "wall s": round(median(cost.wall for cost in costs), 2),
        "cpu s": round(median(cost.cpu for cost in costs), 2),
        "fastest cpu s": round(min(cost.cpu for cost in costs), 2),
        "peak MB": round(median(cost.peak for cost in costs) / 1e6),
        "runs": [{k: v for k, v in asdict(cost).items() if k != "result"} for cost in costs],
    }
