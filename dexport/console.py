"""How results look on a terminal: rich tables there, plain lines in CI."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dexport.bundle import ENGINES, MODEL, PARTS, REPORTS, Bundle, reading_manifest
from dexport.printable import printable
from dexport.verdict import ACCEPT, LOSSY, NOT_VERIFIED, PASSED, Loss, lossy_text

if TYPE_CHECKING:  # a terminal that only samples needs no torch
    from dexport.archive import Archive
    from dexport.exporter.build import BuildResult
    from dexport.exporter.cache import Kept
    from dexport.exporter.steps import Step
    from dexport.model_repository import Models
    from dexport.runtime.generate import Generated
    from dexport.validate.bench.bench import BenchReport
    from dexport.validate.compare.diff import Diff, Finding
    from dexport.validate.fid import FidReport, SetFacts
    from dexport.validate.gates import Gate
    from dexport.validate.levels.distribution import DistributionReport
    from dexport.validate.levels.forward import ParityReport
    from dexport.validate.levels.ops import OpReport
    from dexport.validate.levels.trajectory import TrajectoryReport
    from dexport.validate.stitch_sweep import Sweep
    from dexport.validate.validate import Validation

WIDE = 150
"""Columns where no terminal says how many it has, such as in CI."""


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
ROWS = 12
"""Steps of a trajectory that a table shows."""
DIFFERENCES = 6
"""Differences of a block that are shown."""
GB = 1e9
MB = 1e6


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


def print_cache(folder: Path, limit: int, entries: Sequence[Kept]) -> None:
    """One line per entry, and the total."""
    table = Table("step", "size", "last used", "key")
    for entry in entries:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        table.add_row(entry.label, f"{entry.size / 1e6:.1f} MB", used, entry.key[:12])
    out.print(table)
    total = sum(entry.size for entry in entries)
    out.print(f"{folder}: {total / 1e9:.2f} of {limit / 1e9:.0f} GB", soft_wrap=True)


def print_recipes(described: Sequence[Mapping[str, Any]]) -> None:
    """One line per variant."""
    table = Table("name", "system", "parameters", "input", "official weights")
    for recipe in described:
        shape = "x".join(str(dim) for dim in recipe["inputs"][0]["shape"])
        weights = ", ".join(recipe["checkpoint"]["files"])
        table.add_row(recipe["name"], recipe["family"], f"{recipe['parameters']:,}", shape, weights)
    out.print(table)


def print_recipe(recipe: Mapping[str, Any]) -> None:
    """Everything about one recipe."""
    out.print(Text.assemble((recipe["name"], "bold"), f": {recipe['summary']} ({recipe['source']})"))
    lines = {
        "parameters": f"{recipe['parameters']:,}",
        "inputs": _signature(recipe["inputs"]),
        "outputs": _signature(recipe["outputs"]),
        "settings": ", ".join(f"{key}={value}" for key, value in recipe["settings"].items()),
        "weights": ", ".join(recipe["checkpoint"]["files"]) or "none published",
        "from": recipe["checkpoint"]["from"] or "-",
        "formats": ", ".join(recipe["checkpoint"]["formats"]),
        "containers": ", ".join(recipe["checkpoint"]["containers"]),
        "custom ops": ", ".join(recipe["custom_ops"]) or "none",
        "fp32 islands": ", ".join(itertools.chain(*recipe["islands"].values())),
        "gates": ", ".join(f"{p} {gate:g}" for p, gate in recipe["gates_relative_l2"].items()) + " (relative L2)",
        "guidance": "{rule}, default scale {default_scale:g}".format(**recipe["guidance"])
        if recipe["guidance"]
        else "none",
        "sampling": _sampling_line(recipe["sampling"]),
    }
    _print_lines(lines)


def print_bundle(bundle: Bundle) -> None:
    """A bundle's manifest in short. Its hashes have been checked.

    Raises:
        InputError: the manifest lacks something.
    """
    with reading_manifest(bundle):
        _print_bundle(bundle)


def _print_bundle(bundle: Bundle) -> None:
    m = bundle.manifest
    if bundle.stitch:
        _print_stitched(bundle)
        return
    named = f": {m['recipe']['family']} {m['name']}, "
    out.print(Text.assemble((str(bundle.source), "bold"), named, _colored(m["status"]), ", hashes verified"))
    precision = m["precision"]
    kinds: dict[str, int] = {}
    for dtype in precision["nodes"].values():
        kinds[dtype] = kinds.get(dtype, 0) + 1
    engine = m["engine"]
    _print_lines(
        {
            "weights": "RANDOM, not a trained model" if m["weights"]["random"] else m["weights"]["path"],
            "inputs": _signature(m["io"]["inputs"]),
            "outputs": _signature(m["io"]["outputs"]),
            "batch": "{min} to {max}, tuned for {opt}".format(**m["batch"]),
            "precision": f"{precision['name']} ({', '.join(f'{n} nodes {d}' for d, n in kinds.items())})",
            "layers": _layers_line(precision),
            "guidance": m["guidance"],
            "sampling": _sampling_line(m.get("sampling")),
            "times": _times_line(m),
            "parts": ", ".join(m.get("parts", ())) or "none",
            "custom ops": ", ".join(map(_custom_op, m["custom_ops"])) or "none",
            "engine": _engine_line(engine) if engine else "none",
            "lost": _lost(bundle) or "not measured",
            "validation": _validation_line(m.get("validation")),
            "built with": f"dexport {m['dexport']}, opset {m['opset']}",
        }
    )
    _print_files(m["files"])


def print_archive(archive: Archive, verified: bool) -> None:
    """What is in an archive of which every byte has been checked; ``verified``: the signature as well."""
    out.print(Text.assemble((str(archive.path), "bold"), f": archive, {archive.bytes:,} bytes, hashes verified"))
    m = archive.manifest
    key = "none" if archive.key is None else f"by {archive.key}{'' if verified else ', not verified'}"
    lines = {"bundle": m.get("name"), "status": m.get("status"), "lost": Loss.of_json(m.get("loss"))}
    lines["built with"] = f"dexport {m.get('dexport')}"
    _print_lines({**{name: str(text) for name, text in lines.items()}, "signature": key})
    _print_files(m["files"])


def print_packed(archive: Archive) -> None:
    """What ``dexport pack`` wrote."""
    signed = f", signed by {archive.key}" if archive.key else ", not signed"
    out.print(f"{archive.path}: {archive.bytes:,} bytes{signed}", soft_wrap=True)


def print_models(models: Models) -> None:
    """What ``dexport pack --triton`` wrote."""
    for folder in models.folders:
        out.print(f"{folder}", soft_wrap=True)
    for name, reason in models.left_out.items():
        out.print(f"not written: {name} on its own: {reason}", soft_wrap=True)
    out.print(f"tritonserver --model-repository {models.folders[0].parent}", soft_wrap=True)


def _print_files(files: Mapping[str, Any]) -> None:
    table = Table("file", "bytes", "sha256")
    for name, entry in files.items():
        table.add_row(name, f"{entry['size']:,}", entry["sha256"][:16])
    out.print(table)


def _print_stitched(bundle: Bundle) -> None:
    m = bundle.manifest
    named = (str(bundle.source), "bold"), f": {m['name']}, "
    out.print(Text.assemble(*named, _colored(m["status"]), ", hashes verified"))
    if lost := _lost(bundle):
        out.print(Text("  ") + lost, soft_wrap=True)
    _print_lines({f"{fraction:.0%}": str(part.path) for part, fraction in bundle.stitch})
    for part, _ in bundle.stitch:
        _print_bundle(part)


def print_generated(generated: Generated) -> None:
    """What ``dexport sample`` made."""
    settings = generated.settings
    guidance = f"cfg {settings['cfg']:g}, " if settings["cfg"] != 1 else ""
    out.print(
        f"{generated.made} images in {generated.seconds:.1f} s"
        + (f", {generated.kept} kept" if generated.kept else "")
        + f": {settings['steps']} {settings['sampler']} steps, {guidance}seed {settings['seed']}, {generated.runner}"
    )
    out.print(f"  {generated.grid}\n  {generated.folder}")
    for name in generated.set_aside:
        out.print(f"  not of this run, and kept: {generated.folder / name}", soft_wrap=True)


def warn(bundle: Bundle) -> None:
    """What who runs a bundle has to know, on stderr."""
    for caveat in bundle.caveats:
        err.print(Text.assemble(("warning", "yellow"), f": {bundle.path}: {caveat}"), soft_wrap=True)


def print_sweep(result: Sweep, path: Path) -> None:
    """The table of ``dexport sweep``."""
    from dexport.validate.distances import PIXELS

    title = f"{result.bundle}: {result.images} images, {result.steps} {result.sampler} steps, cfg {result.cfg:g}"
    columns = ["share", "evaluations", "ms per image", "cost", "relative L2 to share 0"]
    table = Table(
        *columns, *[f"{PIXELS} to {result.reference_images} images"] * (result.reference_images > 0), title=title
    )
    for point in result.points:
        row = [f"{point.fraction:g}", "+".join(map(str, point.evaluations)), f"{point.seconds * 1000:.1f}"]
        row += [f"{point.cost:.2f}x", f"{point.relative_l2:.4f}"]
        table.add_row(*row, *([] if point.frechet is None else [f"{point.frechet:.4f}"]))
    out.print(table)
    out.print(f"{result.runner}; the time is that of the networks\n  {path}\n  {path.with_suffix('.png')}")


def print_fid(report: FidReport) -> None:
    """Counts first: no distance means anything without them."""
    lines = {
        "evaluator": f"{report.evaluator}, {report.weights or 'no weights'}",
        "weights": f"sha256 {report.weights_sha256}" if report.weights_sha256 else "",
        "samples": _set_line(report.samples),
        "reference": _set_line(report.reference),
        "seed": str(report.seed),
    }
    _print_lines({name: text for name, text in lines.items() if text})
    for skipped in report.skipped:
        out.print(_skipped_line(vars(skipped)), soft_wrap=True)
    table = Table("distance", "", "floor")
    floor = report.floor
    table.add_row(report.distance, f"{report.frechet:.4f}", f"{floor.frechet:.4f}" if floor else "not known")
    if report.spatial is not None:
        table.add_row(report.spatial_distance, f"{report.spatial:.4f}", "")
    if report.kernel is not None:
        mean, deviation = (1000 * value for value in report.kernel)
        name = "KID" if report.distance == "FID" else "kernel distance"
        shown = f"{1000 * floor.kernel:.3f}" if floor else "not known"
        table.add_row(f"{name} x 1000", f"{mean:.3f} ± {deviation:.3f}", shown)
    if report.rbf is not None:
        shown = f"{1000 * floor.rbf:.4f}" if floor else "not known"
        table.add_row("RBF distance x 1000", f"{1000 * report.rbf:.4f}", shown)
    if report.precision_recall is not None:
        table.add_row("precision, recall", "{:.3f}, {:.3f}".format(*report.precision_recall), "")
    if report.score is not None:
        table.add_row("Inception Score of the samples", "{:.3f} ± {:.3f}".format(*report.score), "")
    out.print(table)
    if floor:
        out.print(f"floor: {floor.count:,} images of the reference against {floor.against:,} others of it")
    for warning in report.warnings:
        out.print(Text.assemble(("warning", "yellow"), f": {warning}"), soft_wrap=True)
    for reason in report.not_run:
        out.print(f"not run: {reason}", soft_wrap=True)


def print_result(result: BuildResult) -> None:
    """What a build made: the parity table, the engine, and the paths to look at."""
    manifest, path = result.bundle.manifest, result.bundle.path
    if manifest["weights"]["random"]:
        seed = manifest["weights"]["seed"]  # None for several denoisers with different ones
        about = f"{'' if seed is None else f' (seed {seed})'}: this is not a trained model"
        out.print(Text.assemble(("RANDOM weights", "yellow"), about))
    for part, bundle in {"": result.bundle, **result.bundle.parts}.items():
        _print_ranges(part, bundle.manifest.get("precision", {}).get("ranges"))
    for part, verdict in {"": result.verdict, **result.parts}.items():
        if verdict is not None:
            print_parity(verdict, part)  # type: ignore[arg-type]
    if manifest["status"] == NOT_VERIFIED:
        out.print(Text.assemble("parity: ", ("not run", "yellow"), " (--no-parity)"))
    if any(scheme != "float" for scheme in manifest.get("precision", {}).get("layers", {}).values()):
        out.print(f"layers: {_layers_line(manifest['precision'])}")
    if "sizes" in manifest and manifest["sizes"]["time_tables"] is not None:
        out.print(f"times: {_times_line(manifest)}")
    for name, bundle in {"": result.bundle, **result.bundle.parts}.items():
        if bundle.manifest.get("engine"):
            out.print(Text(f"engine{name and f' of {name}'}: ") + _engine_line(bundle.manifest["engine"]))
    if lost := _lost(result.bundle):
        out.print(Text("lost: ") + lost, soft_wrap=True)
    out.print(Text.assemble(f"bundle: {path} (", _colored(manifest["status"]), ")"))
    for name in (MODEL, ENGINES, REPORTS, PARTS):
        if (path / name).exists():
            out.print(f"  {path / name}")


def _print_ranges(part: str, ranges: Mapping[str, Any] | None) -> None:
    """What ``--precision auto`` kept in float32, and why."""
    if ranges is None:
        return
    of = part and f" of {part}"
    if not ranges["kept"]:
        out.print(f"precision{of}: float16 holds everything ({ranges['inputs']})")
        return
    table = Table("kept in float32", "largest", "subnormal", "why", title=f"precision{of}: {ranges['inputs']}")
    for path, seen in ranges["kept"].items():
        why = "; ".join(f"{reason} {figure:.2g}" for reason, figure in seen["reasons"].items())
        table.add_row(path or "outside of modules", f"{seen['largest']:.4g}", f"{seen['subnormal']:.0%}", why)
    out.print(table)


def print_parity(report: ParityReport, part: str = "") -> None:
    """The table of checks."""
    from dexport.validate.report.parity_table import COLUMNS, lost, rows

    table = Table(*COLUMNS, title=f"{part and f'{part}: '}{report.precision} against {report.reference}")
    for row in rows(report):
        table.add_row(*row[:-1], _colored(row[-1]))
    out.print(table)
    if report.status == LOSSY:
        out.print(Text.assemble(("LOSSY", "yellow"), f": {lost(report)}"), soft_wrap=True)
    for note in report.notes:
        out.print(f"note: {note}", soft_wrap=True)
    for reason in report.not_run:
        out.print(f"not run: {reason}")


def print_validation(result: Validation) -> None:
    """What ``dexport validate`` found: level by level, then the gates and the verdict."""
    if result.ops is not None and result.ops.checks:
        print_ops(result.ops)
    for name, report in result.forward.items():
        print_parity(report, name)
    if result.trajectory is not None:
        print_trajectory(result.trajectory)
    if result.distribution is not None:
        print_distribution(result.distribution)
    print_gates(result.gates)
    for change in result.changes:
        if change.verdict != "same":
            before, now = (f"{value:.4g}" if value is not None else "-" for value in (change.before, change.now))
            color = "red" if change.verdict == "worse" else "green"
            moved = f" than the baseline: {change.metric} {before} -> {now} ({change.text})"
            out.print(Text.assemble((change.verdict, color), moved))
    for reason in result.not_run:
        out.print(f"not run: {reason}", soft_wrap=True)
    if result.verdict == LOSSY:
        accepted = "accepted" if result.acceptable else f"not accepted ({ACCEPT})"
        out.print(Text.assemble(("LOSSY", "yellow"), f", {accepted}: {lossy_text(result.loss)}"), soft_wrap=True)
    elif str(result.loss):
        out.print(f"lost: {result.loss}", soft_wrap=True)
    out.print(Text.assemble(f"{result.bundle}: ", _colored(result.verdict)))


def print_bench(report: BenchReport) -> None:
    """One table per batch size, then the gates."""
    for result in report.results:
        of = "" if result.gflop is None else f", {result.gflop:.4g} GFLOP, peak {result.peak_gflop_s:.4g} GFLOP/s"
        table = Table(
            *("", "runs on", "wall", "fastest", "processor", "images/s", "to PyTorch", "to other", "of peak"),
            title=f"batch {result.batch}{of}; {report.rounds} rounds, {report.threads} threads, load {result.load:.1f}",
        )
        for row in result.rows:
            times = (f"{value:.1f} ms" for value in (row.wall_ms, row.fastest_ms, row.cpu_ms))
            ratios = ("-" if value is None else f"{value:.2f}x" for value in (row.speedup, row.speedup_against))
            peak = "-" if row.of_peak is None else f"{row.of_peak:.0%}"
            name = f"{row.owner}, {row.kind}"
            table.add_row(name, row.runner, *times, f"{row.images_per_s:.3g}", *ratios, peak)
        out.print(table)
    if report.gates:
        print_gates(report.gates)
    for note in report.notes:
        out.print(f"note: {note}", soft_wrap=True)
    for reason in report.not_run:
        out.print(f"not run: {reason}", soft_wrap=True)


def print_gates(gates: Sequence[Gate]) -> None:
    """Every judged metric."""
    from dexport.validate.report.views.text import limit_of, value_of

    table = Table("gate", "value", "limit", "of", "result", title="gates")
    for gate in gates:
        shown = gate.to_json()
        table.add_row(gate.metric, value_of(shown), limit_of(shown), gate.where, _colored(gate.verdict))
    out.print(table)
    for gate in gates:
        if gate.advice:
            out.print(Text.assemble((gate.metric, "yellow"), f": {gate.advice}"), soft_wrap=True)


def print_ops(report: OpReport) -> None:
    """The custom ops by themselves."""
    table = Table("op", "first in", "nodes", "type", "shapes", "relative L2", "gate", "result", title="custom ops")
    for check in report.checks:
        shapes = " ".join("x".join(map(str, shape)) for shape in check.shapes)
        figures = (
            f"{check.metrics.relative_l2:.2e}",
            f"{check.gate:.0e}",
            _colored("pass" if check.passed else "FAIL"),
        )
        table.add_row(check.op, check.module, str(check.nodes), check.dtype, shapes, *figures)
    out.print(table)


def print_distribution(report: DistributionReport) -> None:
    """The paired delta first: absolute distances mean little at this many images."""
    title = (
        f"{report.count:,} images each, {report.sampler}, cfg {report.cfg:g}, seed {report.seed}: {report.evaluator}"
    )
    table = Table("distance", "delta", "95 % interval", "bundle", "PyTorch", "floor", title=title)
    floor = report.floor
    for name, delta, real in (
        (report.distance, report.delta, floor and floor.frechet),
        (report.kernel_distance, report.kernel_delta, floor and floor.kernel),
    ):
        if delta is not None:
            interval = f"[{delta.low:+.3g}, {delta.high:+.3g}]"
            known = "not known" if real is None else f"{real:.4g}"
            table.add_row(name, f"{delta.delta:+.3g}", interval, f"{delta.a:.4g}", f"{delta.b:.4g}", known)
    out.print(table)
    out.print(f"evaluator: {report.evaluator}, {report.weights or 'no weights'}", soft_wrap=True)
    if floor:
        out.print(f"floor: {floor.count:,} real images against {floor.against:,} others")
    if report.lowest_psnr_db is not None:
        out.print(f"pictures: PSNR at least {report.lowest_psnr_db:.1f} dB, {report.equal} of {report.count} equal")
    for warning in report.warnings:
        out.print(Text.assemble(("warning", "yellow"), f": {warning}"), soft_wrap=True)


def print_trajectory(report: TrajectoryReport) -> None:
    """The table of steps: at most a dozen, evenly spread, the last among them."""
    from dexport.validate.report.parity_table import WORDS

    images = f"{len(report.labels)} image{'s' * (len(report.labels) > 1)}"
    title = f"{report.sampler}, {images}, cfg {report.cfg:g}: {report.runner} against {report.reference}"
    table = Table("step", "t", "state SNR dB", "state relative L2", "evaluation relative L2", title=title)
    count = len(report.states)
    shown = sorted({round(index * (count - 1) / (ROWS - 1)) for index in range(ROWS)})
    for index in shown:
        state = report.states[index]
        local = [at.metrics.relative_l2 for at in report.evaluations if at.t == state.t]
        row = (f"{state.metrics.snr_db:.1f}", f"{state.metrics.relative_l2:.2e}")
        table.add_row(str(index + 1), f"{state.t:g}", *row, f"{max(local):.2e}" if local else "-")
    out.print(table)
    last, worst = report.states[-1].metrics, report.worst_evaluation
    final = f"final latents: SNR {last.snr_db:.1f} dB, gate {report.gate_snr_db:g} dB: "
    out.print(Text.assemble(final, _colored(WORDS[report.status])))
    out.print(f"worst evaluation: relative L2 {worst.metrics.relative_l2:.2e} at t = {worst.t:g}")
    out.print(report.drift)
    if report.psnr_db:
        psnr, ssim = f"PSNR at least {min(report.psnr_db):.1f} dB", f"SSIM at least {min(report.ssim):.5f}"
        lpips = f"LPIPS at most {max(report.lpips):.4f}" if report.lpips else "LPIPS not measured"
        out.print(f"pictures: {psnr}, {ssim}, {lpips}")


def print_diff(result: Diff) -> None:
    """What ``dexport diff`` found: the blocks, then what is wrong first, then what would mend it."""
    title = f"{result.bundle} against {result.reference}, {result.inputs}; gate {result.gate} {result.allowed:g}"
    table = Table("block", "own error", "explained", "unexplained", "propagated", "result", title=title)
    for block in result.blocks:
        verdict = "pass" if block.passed else "FAIL" if block.finite else "FAIL: NaN or Inf"
        errors = (block.own, block.expected, block.unexplained, block.propagated)
        table.add_row(block.path or "outside of blocks", *map(_figure, errors), _colored(verdict))
    out.print(table)
    out.print(f"outputs: relative L2 {_figure(result.outputs)}")
    if result.pytorch:
        worst = max(result.pytorch.values())
        out.print(
            f"PyTorch: within {worst:.1e} of the reference at {len(result.pytorch)} of {len(result.blocks)} blocks"
        )
    for note in result.notes:
        out.print(f"not compared: {note}", soft_wrap=True)
    if result.finding is None:
        lost = "" if result.status == PASSED else f"; {lossy_text(result.loss)}"
        found = (f"{result.bundle}: ", _colored(result.status), f", nothing found{lost}")
        out.print(Text.assemble(*found), soft_wrap=True)
        return
    _print_finding(result.finding)
    if result.others:
        out.print("also bad: " + ", ".join(path or "outside of blocks" for path in result.others), soft_wrap=True)
    if result.mend is not None:
        mend = result.mend
        options = " ".join(f"--island '{pattern}'" for pattern in mend.islands)
        before, after = (_figure(max(errors.values())) for errors in (mend.before, mend.after))
        out.print(
            f"{'fix' if mend.enough else 'not enough'}: {options}: own error {before} -> "
            f"{after}, outputs {_figure(mend.output_before)} -> {_figure(mend.output_after)} (tried out)",
            soft_wrap=True,
        )


KINDS = {
    "export": "the export itself departs from PyTorch",
    "altered": "the file computes something else than recipe and checkpoint",
    "precision": "rounding or overflow",
    "inexact": "too far from the reference",
    "gathered": "no block is to blame: the errors of all add up; the largest is here",
}


def _print_finding(finding: Finding) -> None:
    found = f": {finding.block or 'outside of blocks'}: {KINDS[finding.kind]}"
    out.print(Text.assemble(("first bad block", "red"), found))
    op = finding.op
    if op is not None:
        out.print(
            f"  operation {op.node} ({op.op_type}, stored as {op.dtype}): own error {_figure(op.own)}; largest value "
            f"{op.largest_actual:.4g}, reference {op.largest:.4g}; {op.not_finite} of {op.size} values NaN or Inf",
            soft_wrap=True,
        )
    for difference in finding.differences[:DIFFERENCES]:
        out.print(f"  {difference.node}: {difference.text}", soft_wrap=True)
    if len(finding.differences) > DIFFERENCES:
        out.print(f"  and {len(finding.differences) - DIFFERENCES} more differences")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def print_kernels(summaries: Sequence[Mapping[str, Any]]) -> None:
    """What ``dexport plugins compile`` shows."""
    table = Table("kernel", "target", "type", "sizes", "registers", "shared", "spills", "PTX sha256")
    for kernel in summaries:
        sizes = " ".join(f"{name}={size}" for name, size in kernel["dims"].items() if name != "B")
        numbers = (str(kernel[name]) for name in ("registers", "shared_bytes", "spill_bytes"))
        table.add_row(kernel["kernel"], kernel["target"], kernel["dtype"], sizes, *numbers, kernel["ptx_sha256"][:16])
    out.print(table)


def print_machine(machine: Mapping[str, Any]) -> None:
    """What ``dexport doctor`` shows."""
    _print_lines(
        {
            "python": machine["python"],
            "system": machine["os"],
            "cpu": f"{machine['cpu_count']} cores",
            "memory": f"{machine['ram_available_bytes'] / GB:.1f} of {machine['ram_bytes'] / GB:.1f} GB free",
            "disk": f"{machine['disk_free_bytes'] / GB:.1f} GB free here",
            "gpu": ", ".join(f"{gpu['name']} ({gpu['target']})" for gpu in machine["gpus"]) or "none",
        }
    )
    packages = Table("package", "version", "install with")
    for name, entry in machine["packages"].items():
        packages.add_row(name, entry["version"] or "-", entry["fix"] or "")
    out.print(packages)
    abilities = Table("can", "", "why", "fix")
    for name, ability in machine["can"].items():
        abilities.add_row(
            name,
            Text("yes", "green") if ability["ok"] else Text("no", "red"),
            ability["why"],
            ability["fix"],
        )
    out.print(abilities)


def _engine_line(engine: Mapping[str, Any]) -> Text:
    return Text.assemble(
        f"{engine['flavour']} {engine['version']} for {', '.join(engine['targets'])}, "
        f"{engine['plan_bytes'] / MB:,.1f} MB, types of {engine['checked_nodes']} nodes asserted; ",
        ("built, not executed", "yellow"),
        f" ({engine['reason']})",
    )


def _layers_line(precision: Mapping[str, Any]) -> str:
    """How many layers have which scheme, and what a budget came to."""
    counts: dict[str, int] = {}
    for scheme in precision.get("layers", {}).values():
        counts[scheme] = counts.get(scheme, 0) + 1
    line = ", ".join(f"{count} {scheme}" for scheme, count in sorted(counts.items())) or "not quantised"
    budget = precision.get("budget")
    if budget:
        snr = "exact" if budget["snr_db"] is None else f"{budget['snr_db']:.1f} dB after {budget['steps']} steps"
        share = budget["bytes"] / budget["float_bytes"]
        line += f"; budget {budget['asked']}: {snr}, {budget['bytes'] / MB:.2f} MB, {share:.2f} of the float file"
    return line


def _lost(bundle: Bundle) -> Text:
    """What a build cost, as parity measured it; nobody should have to look it up. Empty where nothing was measured."""
    if bundle.status == LOSSY:
        accepted = "accepted" if bundle.acceptable else "not accepted"
        return Text.assemble(("LOSSY", "yellow"), f", {accepted}: {lossy_text(bundle.loss)}")
    return Text(str(bundle.loss))


def _validation_line(record: Mapping[str, Any] | None) -> Text:
    if not record:
        return Text("none recorded; run `dexport validate`")
    levels = ", ".join(record["settings"]["levels"])
    lost = str(Loss.of_json(record.get("loss")))
    return _colored(record["verdict"]) + f" on {record['date'][:10]} ({levels}){lost and f': {lost}'}"


def _sampling_line(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "none"
    shown = "{steps} {sampler} steps, {schedule}, {prediction}, latent scale {latent_scale:g}, decoder {decoder}"
    return shown.format(**facts)


def _times_line(manifest: Mapping[str, Any]) -> str:
    tables = manifest.get("sizes", {}).get("time_tables")
    if tables is None:
        return "any"
    return (
        f"those of {manifest['sampling']['folded']['steps']} steps: {tables['tables']} tables, "
        f"{tables['bytes'] / MB:.2f} MB in place of {tables['weight_bytes'] / MB:.2f} MB of weights and "
        f"{tables['nodes']} nodes"
    )


def _custom_op(op: Mapping[str, Any]) -> str:
    kernels = f"plugin, {len(op['ptx_sha256'])} kernels" if op["ptx_sha256"] else "function body"
    return f"{op['name']} v{op['version']} ({op['nodes']} nodes, {kernels})"


def _signature(specs: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{s['name']} ({','.join(map(str, s['shape']))}) {s['dtype']}" for s in specs)


def print_saved_statistics(facts: Mapping[str, Any]) -> None:
    """What ``dexport fid --save-stats`` wrote."""
    out.print(f"{facts['path']}: {facts['count']} images, {facts['evaluator']}", soft_wrap=True)
    for skipped in facts["skipped"]:
        out.print(_skipped_line(skipped), soft_wrap=True)
    for warning in facts["warnings"]:
        out.print(Text.assemble(("warning", "yellow"), f": {warning}"), soft_wrap=True)


def _skipped_line(skipped: Mapping[str, Any]) -> str:
    names = [*map(printable, skipped["names"]), *(["..."] if skipped["count"] > len(skipped["names"]) else [])]
    return f"skipped in {skipped['path']}: {skipped['count']} {skipped['why']} ({', '.join(names)})"


def _set_line(facts: SetFacts) -> str:
    return f"{'an unknown number of' if facts.count is None else f'{facts.count:,}'} images, {facts.path}"


def _colored(verdict: str) -> Text:
    color = (
        "green" if verdict.startswith("pass") else "yellow" if verdict.startswith(("not", "inc", "lossy")) else "red"
    )
    return Text(verdict, color)


def _print_lines(lines: Mapping[str, str | Text]) -> None:
    for name, text in lines.items():
        out.print(Text(f"  {name:<13}") + text, soft_wrap=True)
