"""The terminal: rich output there, plain lines in CI, and the progress of a command."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.segment import Segment
from rich.text import Text

from dexport.bundle import Bundle
from dexport.printable import printable

if TYPE_CHECKING:  # a terminal that only samples needs no torch
    from dexport.exporter.steps import Step

WIDE = 150
"""Columns where no terminal says how many it has, such as in CI."""
GB = 1e9
MB = 1e6


class PlainConsole(Console):
    """Prints no control characters but its own, whatever a manifest, a graph or a report brings.

    It leaves it to the command what the end of its reader means.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text
            if segment.control or text.isprintable() or text == "\n":
                yield segment
            else:
                lines = "\n".join(printable(line) for line in text.split("\n"))
                yield Segment(lines, segment.style)

    def on_broken_pipe(self) -> None:
        raise


def _console(stderr: bool) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return PlainConsole(stderr=stderr, highlight=False, markup=False, width=None if terminal else WIDE)


out = _console(stderr=False)
err = _console(stderr=True)


class Progress:
    """Progress of a build on stderr: a live bar on a terminal, one line per finished step elsewhere."""

    def __init__(self) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, name: str) -> None:
        self._task = self._bar.add_task(name, total=None, detail="")

    def advance(self, done: int, total: int, detail: str = "") -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total, detail=detail[-40:])

    def finish(self, step: Step) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        cached = "   cached" if step.cached else ""
        err.print(f"  {step.name:<12} {step.seconds:7.1f} s   peak {step.peak_rss_bytes / GB:5.2f} GB{cached}")


def warn(bundle: Bundle) -> None:
    """What who runs a bundle has to know, on stderr."""
    for caveat in bundle.caveats:
        err.print(Text.assemble(("warning", "yellow"), f": {bundle.path}: {caveat}"), soft_wrap=True)


def colored(verdict: str) -> Text:
    """A verdict, green, yellow or red."""
    color = (
        "green" if verdict.startswith("pass") else "yellow" if verdict.startswith(("not", "inc", "lossy")) else "red"
    )
    return Text(verdict, color)


def print_lines(lines: Mapping[str, str | Text], stem: str = "") -> None:
    """Names and values, one pair a line, behind a stem."""
    for name, text in lines.items():
        out.print(Text(f"{stem}  {name:<13}") + text, soft_wrap=True)


def figure(value: float | None) -> str:
    """A relative error; a dash where there is none."""
    return "-" if value is None else f"{value:.1e}"
