"""Why a network cannot be run or traced, in the words of its author: which module, which line, and torch's reason."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import logging
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.export._trace
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode, ShapeEnv
from torch.onnx._internal.exporter._errors import ConversionError, DispatchError

from dexport.errors import DexportError, InputError
from dexport.exporter.recipes.recipe import BATCH

MACHINERY = tuple(
    str(Path(path).resolve()) + "/"
    for path in (Path(torch.__file__).parent, Path(__file__).parent, sysconfig.get_path("stdlib"))
)
"""Whose code is no network's, except for what is installed in the standard library's ``site-packages``."""
LONGEST = 300
"""Characters of torch's reason: some are whole graphs."""
SYMBOL = re.compile(r"\b[su]\d+\b")
ON_VALUES = (
    "a graph is the same for all values: torch.where(condition, a, b) in place of `if`, tensors in place of "
    "int(), float(), .item(), .tolist() and .numpy(), masks in place of shapes that depend on values"
)
ON_BATCH = (
    "a graph is the same for every batch: flatten, unflatten, unsqueeze and broadcasting in place of the batch as a "
    "number; no branch, loop or check on it"
)
ON_CHECK = (
    "it runs on batches of 2 and 3 of the inputs that its signature declares: correct the signature or the check, and "
    "check no batch"
)
ELSE = "docs/your-own-backbone.md says what dexport asks of a network"


@dataclass
class Place:
    """A line of a network.

    Attributes:
        module: path and class of the innermost module that was running; empty for none.
        line: file, number and text.
    """

    module: str = ""
    line: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.module, self.line)))


@dataclass
class _Watch:
    """Knows the modules of a network, and where in it something was decided about the batch."""

    network: nn.Module
    guards: dict[tuple[str, int], Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.paths = {id(module): path for path, module in self.network.named_modules()}
        files = (_file_of(type(module)) for module in self.network.modules())
        self.files = {file for file in files if file and not file.startswith(MACHINERY[0])}

    def place(self, frames: list[FrameType]) -> Place:
        """Of frames from the outermost to the innermost; the innermost line of the network's own code."""
        modules = [frame.f_locals.get("self") for frame in frames]
        running = [module for module in modules if isinstance(module, nn.Module) and id(module) in self.paths]
        described = self.describe(running[-1]) if running else ""
        own = [f for f in frames if f.f_code.co_filename in self.files or not _is_machinery(f.f_code.co_filename)]
        return Place(described, _line(own[-1].f_code.co_filename, own[-1].f_lineno) if own and running else "")

    def place_of(self, node: fx.Node) -> Place:
        """Of an operation of the trace: its line where torch kept it, else where its module's ``forward`` begins."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0] if stack else ""
        modules = dict(self.network.named_modules())
        while path not in modules and "." in path:
            path = path.partition(".")[2]  # of the modules around the network
        module = modules.get(path, self.network)
        lines = re.findall(r'File "(.+)", line (\d+)', node.meta.get("stack_trace") or "")
        own = [(file, int(number)) for file, number in lines if file in self.files or not _is_machinery(file)]
        start = type(module).forward.__code__
        return Place(self.describe(module), _line(*(own[-1] if own else (start.co_filename, start.co_firstlineno))))

    def describe(self, module: nn.Module) -> str:
        """Path and class."""
        return f"{self.paths.get(id(module)) or 'the network'} ({type(module).__name__})"

    def user_frame(self) -> FrameType:
        """In place of what torch takes for the line that fixed a size, which often is one of its own."""
        frames = list(_outwards(sys._getframe(1)))[::-1]
        own = [f for f in frames if f.f_code.co_filename in self.files]
        if not own:
            return frames[-1]
        self.guards[(own[-1].f_code.co_filename, own[-1].f_lineno)] = self.place(frames)
        return own[-1]


@contextlib.contextmanager
def explained(owner: str, network: nn.Module) -> Iterator[None]:
    """Turn what a network raises in the block, while it runs or is traced, into an error for its author.

    Args:
        owner: whose network it is, for messages.
        network: the module that runs, or any around it.

    Raises:
        InputError: with the module's path, its line and torch's reason.
    """
    watch = _Watch(network)
    try:
        with _listening(watch):
            yield
    except Exception as error:
        chain = list(_causes(error))
        own = next((cause for cause in chain if isinstance(cause, DexportError)), None)
        if own is not None:
            raise own from own.__cause__
        raise _explanation(owner, chain, watch) from error


@contextlib.contextmanager
def _listening(watch: _Watch) -> Iterator[None]:
    """Have torch say which of a network's lines fixed a size, and nothing else; its own prints are no results."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            mock.patch.object(ShapeEnv, "_get_user_frame", lambda _env: watch.user_frame()),
            mock.patch.object(torch.export._trace, "print", lambda *_, **__: None, create=True),  # of whole graphs
        ):
            yield
    finally:
        log.setLevel(level)


def _explanation(owner: str, chain: list[BaseException], watch: _Watch) -> InputError:
    violation = next((cause for cause in chain if isinstance(cause, ConstraintViolationError)), None)
    if violation is not None:
        constraint, place = _constraint(violation, watch)
        where = f"{place}: " if str(place) else ""
        return InputError(f"{owner} cannot be traced for every batch: {where}it asks for {constraint}", hint=ON_BATCH)
    node = next((node for cause in reversed(chain) for node in _locals(cause, fx.Node)), None)
    if node is not None and any(isinstance(cause, ConversionError) for cause in chain):
        reason = f"{node.target} has no translation" if _has_no_translation(chain) else _one_line(str(chain[-1]))
        return InputError(
            f"{owner} cannot be converted to ONNX: {watch.place_of(node)}: {reason}",
            hint="compute the same with other operations",
        )
    cause = chain[-1] if isinstance(chain[-1], GuardOnDataDependentSymNode) else chain[0]
    place = max((watch.place(_frames(cause)) for cause in chain), key=lambda place: bool(place.line))
    where = f"{place}: " if str(place) else ""
    reason = _one_line(str(cause)) or type(cause).__name__
    return InputError(f"{owner} cannot be traced: {where}{reason}", hint=_hint(cause, reason))


def _hint(cause: BaseException, reason: str) -> str:
    on_values = isinstance(cause, GuardOnDataDependentSymNode) or re.search(
        r"\.numpy\(\)|\.item\(\)|\.tolist\(\)|data.dependent|nonzero|meta tensor|FakeTensor", reason
    )
    if on_values:
        return ON_VALUES
    if isinstance(cause, AssertionError):
        return ON_CHECK
    return ON_BATCH if re.search(r"for input of size", reason) else ELSE


def _constraint(violation: ConstraintViolationError, watch: _Watch) -> tuple[str, Place]:
    """What of the batch a network fixed first, and where."""
    for env in _locals(violation, ShapeEnv):
        for guard in env.guards:
            # That inputs have equal batches is what is wanted.
            if len(guard.expr.free_symbols) == 1:
                frame = guard.sloc.framework_loc
                at = (getattr(frame, "filename", ""), getattr(frame, "lineno", 0))
                constraint = SYMBOL.sub(BATCH, str(guard.expr))
                constraint = re.sub(r"^Eq\((.*), ([^,]*)\)$", r"\1 == \2", constraint)
                constraint = re.sub(r"^Ne\((.*), ([^,]*)\)$", r"\1 != \2", constraint)
                return f"{constraint}, where {BATCH} is the batch", watch.guards.get(at, Place())
    listed = re.findall(r"^ +- (.*?)(?:\. |$)", str(violation), re.MULTILINE)
    return _one_line("; ".join(dict.fromkeys(listed))), Place()


def _has_no_translation(chain: list[BaseException]) -> bool:
    return any(isinstance(cause, DispatchError) for cause in chain)


def _line(file: str, number: int) -> str:
    text = linecache.getline(file, number).strip()
    return f"{file}:{number}" + (f" `{text}`" if text else "")


def _one_line(text: str) -> str:
    """The first sentence of torch's reason, with the batch under its own name."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    text = re.sub(r"\s*\(unhinted: .*", "", text.split("\n", 1)[0])
    text = re.sub(r"\bs\d+\b", BATCH, text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _is_machinery(file: str) -> bool:
    return "/site-packages/" in file or file.startswith(MACHINERY) or file.startswith("<")


def _file_of(kind: type) -> str:
    try:
        return inspect.getsourcefile(kind) or ""
    except (TypeError, OSError):
        return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it; torch wraps what a network raises."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _frames(error: BaseException) -> list[FrameType]:
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return frames


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _locals(error: BaseException, kind: type) -> Iterator[Any]:
    """Variables of a kind in the frames that an error went through, from the innermost: torch's errors are texts."""
    for frame in reversed(_frames(error)):
        yield from (value for value in list(frame.f_locals.values()) if isinstance(value, kind))
