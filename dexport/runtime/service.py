"""Many small requests for pictures as few batches: what a server needs around a pipeline."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np

from dexport.errors import DexportError, MachineError, UsageError
from dexport.limits import MOST_STEPS_SERVED
from dexport.runtime.draws import Draws
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import PICTURES, Request, check_condition

MOST_IN_PROGRESS = 16
"""Batches that take turns; each has its states in memory."""


@dataclass(frozen=True)
class Picture:
    """One picture to make.

    Attributes:
        label: its class; None for an unconditional network.
        seed: the same label, seed and settings give the same picture, the first one of ``dexport sample``.
        settings: of the program, by name; those that are left out are its own.
    """

    label: int | None
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)


Answer = Callable[[np.ndarray | DexportError], None]
"""Takes pictures (N, H, W, C) uint8, or what is wrong; called once per request."""
Settings = tuple[tuple[str, Any], ...]
KNOWN_SETTINGS = 256
"""Of which the service remembers that they can be had."""


class Service:
    """Makes the pictures of many requests, a sampling step of each batch in turn.

    Pictures with the same settings share batches, whichever request they are from; those that come
    while such a batch is in progress wait for it, and make the next one. What has other settings takes its turn after
    the step that is running, so that a small request waits for steps of large ones, not for the whole of them.

    Args:
        batch: most pictures that are made at once.
        most: batches in progress, each of other settings; what comes later waits until one of them is done.
    """

    def __init__(self, program: OpenProgram, batch: int, most: int = MOST_IN_PROGRESS) -> None:
        self._program, self._batch, self._most = program, batch, most
        self._with = lru_cache(KNOWN_SETTINGS)(lambda settings: program.with_settings(**dict(settings)))
        self._waiting: dict[Settings, deque[_Row]] = {}
        self._running: deque[_Batch] = deque()

    @property
    def busy(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._running or self._waiting)

    @property
    def full(self) -> bool:
        """Whether more pictures wait than the next batches take: what asks for others had better wait."""
        return sum(map(len, self._waiting.values())) >= self._batch * self._most

    def add(self, pictures: Sequence[Picture], answer: Answer) -> None:
        """Take a request; one that is wrong is answered at once."""
        refusal = self._refusal(pictures)
        if refusal is not None:
            answer(refusal)
            return
        request = _Request(answer, len(pictures))
        for index, picture in enumerate(pictures):
            settings = _settings(picture)
            self._waiting.setdefault(settings, deque()).append(_Row(request, index, picture))

    def turn(self) -> None:
        """Run one step of the next batch."""
        self._start()
        if not self._running:
            return
        batch = self._running.popleft()
        try:
            images = next(batch.progress)
        except Exception as error:  # noqa: BLE001 - whatever it is ends the requests of this batch, and no others
            for row in batch.rows:
                row.request.refuse(error if isinstance(error, DexportError) else _unforeseen(error))
            return
        if images is None:
            self._running.append(batch)
            return
        for row, image in zip(batch.rows, images, strict=True):
            row.request.deliver(row.index, image)

    def _start(self) -> None:
        """Make a batch of every waiting settings that are not in progress, the ones that came first before others."""
        in_progress = {batch.settings for batch in self._running}
        for settings in [each for each in self._waiting if each not in in_progress]:
            if len(self._running) >= self._most:
                return
            rows = [row for row in self._waiting.pop(settings) if not row.request.answered]
            program = self._with(settings)
            size = max(1, min(self._batch, program.largest_batch() or self._batch))
            if rows[size:]:
                self._waiting[settings] = deque(rows[size:])
            if chosen := rows[:size]:  # an error of another batch may have ended their requests
                self._running.append(_Batch(settings, chosen, _running(program, chosen)))

    def _refusal(self, pictures: Sequence[Picture]) -> DexportError | None:
        """What is wrong with a request."""
        try:
            if not pictures:
                raise UsageError("a request for no pictures", hint="ask for one or more")
            for picture in pictures:
                if (picture.label is None) != (self._program.classes is None):
                    raise UsageError("labels go with models that have classes, and only with them")
                steps = picture.settings.get("steps")
                if steps is not None and not 1 <= steps <= MOST_STEPS_SERVED:
                    raise UsageError(f"{steps} steps", hint=f"ask for 1 to {MOST_STEPS_SERVED}")
                Draws.of_seeds([picture.seed])
                labels = () if picture.label is None else (picture.label,)
                check_condition(self._program.condition, Request(1, labels))
                self._with(_settings(picture))
        except DexportError as error:
            return error
        return None


class Worker:
    """Runs a service in a thread of its own."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._inbox: queue.Queue[Sequence[tuple[Sequence[Picture], Answer]]] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._work, name="dexport-service", daemon=True)
        self._thread.start()

    def add(self, requests: Sequence[tuple[Sequence[Picture], Answer]]) -> None:
        """Take requests that may share batches; waits while too many are waiting already."""
        self._inbox.put(requests)

    def stop(self) -> None:
        """Answer everything that was added, and end."""
        self._inbox.put(())
        self._thread.join()

    def _work(self) -> None:
        stopping = False
        while self._service.busy or not stopping:
            if not (stopping or self._service.full):
                stopping = self._take()
            self._service.turn()

    def _take(self) -> bool:
        """Add what has come, if anything has; whether that was the end."""
        try:
            requests = self._inbox.get(block=not self._service.busy)
        except queue.Empty:
            return False
        for pictures, answer in requests:
            self._service.add(pictures, answer)
        return not requests


class _Request:
    def __init__(self, answer: Answer, count: int) -> None:
        self.answered = False
        self._answer = answer
        self._images: list[np.ndarray | None] = [None] * count

    def deliver(self, index: int, image: np.ndarray) -> None:
        self._images[index] = image
        images = [each for each in self._images if each is not None]
        if len(images) == len(self._images):
            self._end(np.stack(images))

    def refuse(self, error: DexportError) -> None:
        self._end(error)

    def _end(self, result: np.ndarray | DexportError) -> None:
        if not self.answered:
            self.answered = True
            self._answer(result)


@dataclass(frozen=True)
class _Row:
    request: _Request
    index: int
    picture: Picture


@dataclass(frozen=True)
class _Batch:
    settings: Settings
    rows: Sequence[_Row]
    progress: Iterator[np.ndarray | None]


def make_pictures(
    program: OpenProgram, requests: Sequence[Sequence[Picture]], batch: int
) -> list[np.ndarray | DexportError]:
    """Answer several requests together; see :class:`Service`.

    Returns:
        Per request (N, H, W, C) uint8, or what is wrong with it; the others are answered all the same.
    """
    service, answers = Service(program, batch), dict[int, np.ndarray | DexportError]()
    for index, pictures in enumerate(requests):
        service.add(pictures, partial(answers.__setitem__, index))
    while service.busy:
        service.turn()
    return [answers[index] for index in range(len(requests))]


def _unforeseen(error: Exception) -> DexportError:
    logging.getLogger(__name__).error("pictures could not be made", exc_info=error)
    reason = str(error).strip().partition("\n")[0]
    return MachineError(f"the pictures could not be made: {type(error).__name__} {reason}", hint="see the server's log")


def _settings(picture: Picture) -> Settings:
    return tuple(sorted((name, value) for name, value in picture.settings.items() if value is not None))


def _running(program: OpenProgram, rows: Sequence[_Row]) -> Iterator[np.ndarray | None]:
    """None after every step, and then the pictures."""
    pictures = [row.picture for row in rows]
    labels = tuple(picture.label for picture in pictures if picture.label is not None)
    draws = Draws.of_seeds([picture.seed for picture in pictures])
    for step in program.run(Request(len(pictures), labels), draws):
        yield step.results.get(PICTURES)
