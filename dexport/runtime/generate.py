"""What ``dexport sample`` does: pictures of a bundle in a folder, and their grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dexport.errors import UsageError, free_name
from dexport.files import replacing
from dexport.limits import MOST_BATCH, check_pictures, check_whole
from dexport.places import check_place
from dexport.runtime.draws import Draws
from dexport.runtime.gallery import open_gallery
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import PICTURES, Request, check_condition

DEFAULT_CLASSES = 10
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class SampleRequest:
    """Pictures to make.

    Attributes:
        classes: labels; by default the first few. A program without classes takes none.
        count: pictures of each class.
        seed: of the whole run: a picture depends on it and on its number only.
        batch: pictures that are made together.
        settings: of the program; see :attr:`dexport.runtime.programs.program.Program.settings`.
    """

    classes: tuple[int, ...] = ()
    count: int = 1
    seed: int = 0
    batch: int = 8
    settings: Mapping[str, Any] = field(default_factory=dict)

    def labels(self, program: OpenProgram) -> list[int | None]:
        """One label per picture; None where the program takes none.

        Raises:
            UsageError: classes that it does not have, or numbers that are out of range.
        """
        if self.count < 1 or self.batch < 1:
            raise UsageError(f"--count {self.count}, --batch {self.batch}: both start at 1", hint="give 1 or more")
        check_whole("--batch", self.batch, MOST_BATCH)
        Draws(self.seed, images=[0])
        if program.classes is None:
            chosen: Sequence[int | None] = [None]
            check_condition(program.condition, Request(len(self.classes), self.classes))
        else:
            chosen = self.classes or range(min(DEFAULT_CLASSES, program.classes))
            check_condition(program.condition, Request(len(chosen), tuple(chosen)))
        check_pictures(len(chosen), self.count)
        return [label for label in chosen for _ in range(self.count)]


def run_batches(
    program: OpenProgram, labels: Sequence[int | None], numbers: Sequence[int], seed: int, batch: int
) -> Iterator[tuple[Sequence[int], Mapping[str, np.ndarray]]]:
    """The results of some images, a batch at a time: the only loop over batches that there is.

    Args:
        labels: of all images.
        numbers: of the images to make, by which each has its own draws.

    Yields:
        The numbers of a batch, and its results by name.
    """
    batch = min(batch, program.largest_batch() or batch)
    for first in range(0, len(numbers), batch):
        some = numbers[first : first + batch]
        given = tuple(label for label in (labels[number] for number in some) if label is not None)
        yield some, program.results(Request(len(some), given), Draws(seed, images=some))


@dataclass(frozen=True)
class Generated:
    """What a run made.

    Attributes:
        grid, folder: the picture of all samples, and the folder that holds each of them.
        run: the program and its settings, in words.
        settings: what fixes every picture, as the folder records it.
        made, kept: pictures made now, and those that were there already.
        seconds: for those made now.
        runner: what ran.
        caveats: what the bundle is not, such as trained or verified; see :attr:`dexport.bundle.Bundle.caveats`.
        set_aside: files of others that lay where pictures go, by their new names in ``folder``.
    """

    grid: Path
    folder: Path
    run: str
    settings: dict[str, Any]
    made: int
    kept: int
    seconds: float
    runner: str
    caveats: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()


def check_request(program: OpenProgram, output: Path, request: SampleRequest) -> None:
    """Refuse what :func:`generate` would refuse, before a network is loaded.

    Raises:
        UsageError: anything that the program does not have; a place that cannot be written.
    """
    if output.suffix.lower() != ".png":
        raise UsageError(
            f"-o {output} is not a PNG file", hint=f"for example -o {free_name(output.with_suffix('.png'))}"
        )
    check_place(output)
    request.labels(program)
    program.with_settings(**request.settings).check_pictures()


def generate(
    program: OpenProgram,
    output: Path,
    request: SampleRequest,
    *,
    force: bool = False,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> Generated:
    """Make the pictures and draw the grid.

    A run that was interrupted goes on with the pictures that are missing: each has its own draws, so they are the same
    whichever are made together.

    Args:
        output: PNG file of the grid; the pictures go to a folder named after it.

    Raises:
        UsageError: anything that the program does not have, before any work.
        GateError: values that are not finite, which would be shown as black pictures.
    """
    check_request(program, output, request)
    labels, chosen = request.labels(program), program.with_settings(**request.settings)
    settings = {
        "bundle": program.bundle.manifest["name"],
        "files": {name: entry["sha256"] for name, entry in program.bundle.manifest["files"].items()},
        "runner": chosen.runner,
        "program": chosen.program.to_json(),
        "seed": request.seed,
        "labels": labels,
    }
    captions = [caption(program, label) for label in labels]
    folder = output.with_name(f"{output.stem}-images")
    with open_gallery(folder, settings, captions, force=force) as gallery:
        missing = gallery.missing()
        started, done = time.perf_counter(), 0
        on_progress(0, len(missing), f"0 of {len(missing)} images")
        for numbers, results in run_batches(chosen, labels, missing, request.seed, request.batch):
            for number, image in zip(numbers, results[PICTURES], strict=True):
                gallery.add(number, image)
            done += len(numbers)
            on_progress(done, len(missing), f"{done} of {len(missing)} images")
        seconds = time.perf_counter() - started
        gallery.write_grid(output, columns=request.count if request.count > 1 else None)
    return Generated(
        grid=output,
        folder=folder,
        run=chosen.program.title,
        settings=settings,
        made=len(missing),
        kept=len(labels) - len(missing),
        seconds=round(seconds, 2),
        runner=chosen.runner,
        caveats=program.bundle.caveats,
        set_aside=gallery.set_aside,
    )


@dataclass(frozen=True)
class GeneratedArray:
    """What a run made that is no picture.

    Attributes:
        file: holds one array, with a row per image.
        name: of the result, such as ``latents``.
        run, seconds, runner, caveats: as of :class:`Generated`.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    run: str
    seconds: float
    runner: str
    caveats: tuple[str, ...] = ()


def generate_array(
    program: OpenProgram,
    output: Path,
    request: SampleRequest,
    *,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> GeneratedArray:
    """Make what comes before the pictures, such as latents, and write it as one ``.npy`` file.

    Raises:
        UsageError: anything that the program does not have, before any work.
        GateError: values that are not finite.
    """
    check_place(output)
    labels, chosen = request.labels(program), program.with_settings(**request.settings)
    name = next((name for name in chosen.makes if name != PICTURES), PICTURES)
    started, parts = time.perf_counter(), []
    for numbers, results in run_batches(chosen, labels, range(len(labels)), request.seed, request.batch):
        parts.append(results[name])
        done = numbers[-1] + 1
        on_progress(done, len(labels), f"{done} of {len(labels)} {name}")
    array = np.concatenate(parts)
    with replacing(output) as file:
        np.save(file, array, allow_pickle=False)
    seconds = round(time.perf_counter() - started, 2)
    return GeneratedArray(
        output, name, array.shape, chosen.program.title, seconds, chosen.runner, program.bundle.caveats
    )


def caption(program: OpenProgram, label: int | None) -> str:
    """The name of a class where there are names."""
    if label is None:
        return ""
    names = program.condition.names
    return names[label] if names else f"class {label}"
