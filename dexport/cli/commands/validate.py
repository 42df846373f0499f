"""``dexport validate``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from dexport.choices import DEFAULT_LEVELS, EVALUATORS, LEVELS
from dexport.cli.app import print_json, say_lossy
from dexport.cli.groups.gates import accept_loss_of_report, gates
from dexport.cli.groups.sampling import Sampling, class_labels, sampling
from dexport.cli.groups.views import Views, views
from dexport.cli.headings import command, expert_option, option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import (
    BATCH,
    COUNT,
    PATH,
    OutputPath,
    as_json_beside_progress,
    by_part,
    choice,
    given_options,
    help_all,
    require_signature,
)
from dexport.errors import GateError, UsageError


@dataclass(frozen=True)
class Subject:
    """What is compared, and with what."""

    levels: tuple[str, ...]
    checkpoints: tuple[str, ...]
    recipe: str | None
    against: tuple[str, ...]


@dataclass(frozen=True)
class Distances:
    """What the level ``distribution`` takes; the names are those of its parameters."""

    reference: Path | None
    count: int
    batch: int
    evaluator: str
    evaluator_weights: Path | None
    work: Path | None


@dataclass(frozen=True)
class Limits:
    """What a validation is held to."""

    fail_under: tuple[str, ...]
    fail_over: tuple[str, ...]
    baseline: Path | None
    accept_loss: bool


@dataclass(frozen=True)
class Report(Views):
    """Where the report goes."""

    output: Path | None
    record: bool
    as_json: bool


SUBJECT = OptionGroup(
    "subject",
    "Comparison",
    Subject,
    (
        option(
            "--level",
            "levels",
            multiple=True,
            type=choice(*LEVELS),
            default=DEFAULT_LEVELS,
            show_default=True,
            help="Custom ops, single evaluations, whole sampling runs, distances to real images. Repeatable.",
        ),
        option(
            "--checkpoint",
            "checkpoints",
            multiple=True,
            metavar="[NETWORK=]FILE",
            help="Where the weights of the build are now, if they were moved. Repeatable.",
        ),
        option("--recipe", metavar="FILE", help="The recipe file, where the bundle was built from one."),
        option(
            "--against",
            multiple=True,
            metavar="[NETWORK=]FILE.py:CLASS",
            help="A PyTorch module of your own as the reference, such as the official code. Repeatable.",
        ),
    ),
)
SAMPLING = sampling(
    class_labels("Class labels: one trajectory each, --count images each. [default: 0,1; all for distribution]")
)
DISTANCES = OptionGroup(
    "distances",
    "Level distribution",
    Distances,
    (
        option("--reference", type=PATH, help="Real images, as `dexport fid` has B."),
        option("--count", type=COUNT, default=10, show_default=True, help="Images per class."),
        option("--evaluator", type=choice(*EVALUATORS), default=EVALUATORS[0], show_default=True, help="The features."),
        expert_option("--batch", type=BATCH, default=8, show_default=True, help="Images that are made together."),
        expert_option("--evaluator-weights", type=PATH, help="File of the evaluator's weights."),
        expert_option(
            "--work", type=PATH, help="Folder where a run that was killed goes on. [default: BUNDLE.validation]"
        ),
    ),
)
LIMITS = gates(
    "Smallest snr, psnr, ssim, cosine. Repeatable.",
    "Largest relative_l2, fid_delta, kid_delta, ... Repeatable. [default: by recipe and precision]",
    option("--baseline", type=PATH, help="Fail where a figure falls behind this file."),
    accept_loss_of_report,
    make=Limits,
)
REPORT = OptionGroup(
    "written",
    "Report",
    Report,
    (
        option("-o", "--output", type=OutputPath(), help="Write the report as JSON."),
        *views,
        option("--record/--no-record", default=True, show_default=True, help="Put the summary into the manifest."),
        as_json_beside_progress,
    ),
)


@command("validate")
@click.argument("bundle", type=PATH)
@SUBJECT
@SAMPLING
@DISTANCES
@LIMITS
@REPORT
@require_signature
@help_all
def validate_command(
    bundle: Path,
    subject: Subject,
    sampling: Sampling,
    distances: Distances,
    gates: Limits,
    written: Report,
    require_signature: Path | None,
) -> None:
    """Compare a bundle with the PyTorch networks that it was built from; exit with 1 where a gate fails.

    An ONNX file that something else made is for `dexport compare`.
    """
    from dexport.bundle import change_manifest, check_changeable, load_bundle
    from dexport.cli.commands.validate_printer import print_validation
    from dexport.cli.terminal import Progress
    from dexport.exporter.recipes import find_recipe
    from dexport.files import write_whole
    from dexport.validate.gates import parse_limits
    from dexport.validate.report.baseline import read_baseline
    from dexport.validate.report.document import summary
    from dexport.validate.report.views import write_views
    from dexport.validate.validate import Distribution, validate

    if bundle.suffix == ".onnx" and not bundle.is_dir():
        raise UsageError(
            f"{bundle} is an ONNX file, not a bundle's folder",
            hint=f"dexport compare {bundle} --recipe NAME --checkpoint FILE",
        )
    given = given_options()
    unused = [given[name] for name in vars(distances) if name in given]
    if unused and "distribution" not in subject.levels:
        raise UsageError(f"{', '.join(unused)}: the level distribution does not run", hint="add --level distribution")
    opened = load_bundle(bundle, require_signature)
    if written.record:
        check_changeable(opened)
    with Progress() as progress:
        progress.start("validate")
        result = validate(
            opened,
            subject.levels if "levels" in given else None,
            checkpoints=by_part(subject.checkpoints),
            recipe=find_recipe(subject.recipe) if subject.recipe else None,
            against=by_part(subject.against),
            labels=None if sampling.classes is None else list(sampling.classes),
            settings=sampling.settings,
            seed=sampling.seed,
            distribution=Distribution(
                distances.reference,
                distances.evaluator,
                distances.evaluator_weights,
                distances.count,
                distances.batch,
                distances.work,
            ),
            limits=parse_limits(gates.fail_under, gates.fail_over),
            baseline=read_baseline(gates.baseline) if gates.baseline else None,
            accept_loss=gates.accept_loss,
            on_progress=progress.advance,
        )
    report = result.to_json()
    if written.output is not None:
        write_whole(written.output, json.dumps(report, indent=2) + "\n")
    write_views(report, junit=written.junit, markdown=written.markdown, html=written.html)
    if written.record:
        change_manifest(opened, validation=summary(report))
    print_json(report) if written.as_json else print_validation(result)
    say_lossy(result.acceptable, result.verdict, result.loss)
    sys.exit(0 if result.acceptable else GateError.exit_code)
