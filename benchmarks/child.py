"""Run a piece of work in a process of its own and say what it cost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

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


def summary(costs: list[Cost]) -> dict[str, Any]:
    """Medians, the fastest, and every measurement."""
    return {
        "wall s": round(median(cost.wall for cost in costs), 2),
        "cpu s": round(median(cost.cpu for cost in costs), 2),
        "fastest cpu s": round(min(cost.cpu for cost in costs), 2),
        "peak MB": round(median(cost.peak for cost in costs) / 1e6),
        "runs": [{k: v for k, v in asdict(cost).items() if k != "result"} for cost in costs],
    }
