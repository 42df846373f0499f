"""How results look on a terminal: rich tables there, plain lines in CI."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from dexport.bundle import ENGINES, MANIFEST, MODEL, PARTS, REPORTS, Bundle
from dexport.errors import InputError

if TYPE_CHECKING:  # a terminal that only samples needs no torch
    from dexport.exporter.build import BuildResult
    from dexport.exporter.cache import Kept
    from dexport.exporter.steps import Step
    from dexport.runtime.generate import Generated
    from dexport.validate.fid import FidReport, SetFacts
    from dexport.validate.parity import ParityReport
    from dexport.validate.sweep import Sweep
    from dexport.validate.trajectory import TrajectoryReport
    from dexport.validate.validate import Validation

WIDE = 150
"""Columns where no terminal says how many it has, such as in CI."""


def _console(stderr: bool) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=None if terminal else WIDE)


out = _console(stderr=False)
err = _console(stderr=True)
ROWS = 12
"""Steps of a trajectory that a table shows."""
GB = 1e9
MB = 1e6


class Progress:
    """Progress of a build on stderr: a live bar on a terminal, one line per finished step elsewhere."""

    def __init__(self) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}"),
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
        table.add_row(escape(entry.label), f"{entry.size / 1e6:.1f} MB", used, entry.key[:12])
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
    out.print(f"[bold]{recipe['name']}[/]: {recipe['summary']} ({recipe['source']})")
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
        "fp32 islands": ", ".join((*recipe["islands"]["modules"], *recipe["islands"]["ops"])),
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
    try:
        _print_bundle(bundle)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{bundle.path / MANIFEST} is incomplete: {error}", hint="build the bundle again") from error


def _print_bundle(bundle: Bundle) -> None:
    m = bundle.manifest
    if bundle.stitch:
        _print_stitched(bundle)
        return
    out.print(f"[bold]{bundle.path}[/]: {m['recipe']['family']} {m['name']}, {_colored(m['status'])}, hashes verified")
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
            "guidance": m["guidance"],
            "sampling": _sampling_line(m.get("sampling")),
            "parts": ", ".join(m.get("parts", ())) or "none",
            "custom ops": ", ".join(map(_custom_op, m["custom_ops"])) or "none",
            "engine": _engine_line(engine) if engine else "none",
            "built with": f"dexport {m['dexport']}, opset {m['opset']}",
        }
    )
    table = Table("file", "bytes", "sha256")
    for name, entry in m["files"].items():
        table.add_row(name, f"{entry['size']:,}", entry["sha256"][:16])
    out.print(table)


def _print_stitched(bundle: Bundle) -> None:
    m = bundle.manifest
    out.print(f"[bold]{bundle.path}[/]: {m['name']}, {_colored(m['status'])}, hashes verified")
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
    if report.precision_recall is not None:
        table.add_row("precision, recall", "{:.3f}, {:.3f}".format(*report.precision_recall), "")
    if report.score is not None:
        table.add_row("Inception Score of the samples", "{:.3f} ± {:.3f}".format(*report.score), "")
    out.print(table)
    if floor:
        out.print(f"floor: {floor.count:,} images of the reference against {floor.against:,} others of it")
    for warning in report.warnings:
        out.print(f"[yellow]warning[/]: {escape(warning)}", soft_wrap=True)
    for reason in report.not_run:
        out.print(f"not run: {reason}", soft_wrap=True)


def print_result(result: BuildResult) -> None:
    """What a build made: the parity table, the engine, and the paths to look at."""
    manifest, path = result.bundle.manifest, result.bundle.path
    if manifest["weights"]["random"]:
        out.print(f"[yellow]RANDOM weights[/] (seed {manifest['weights']['seed']}): this is not a trained model")
    for part, verdict in {"": result.verdict, **result.parts}.items():
        if verdict is not None:
            print_parity(verdict, part)  # type: ignore[arg-type]
    if manifest["status"] == "not verified":
        out.print("parity: [yellow]not run[/] (--no-parity)")
    for name, bundle in {"": result.bundle, **result.bundle.parts}.items():
        if bundle.manifest.get("engine"):
            out.print(f"engine{name and f' of {name}'}: {_engine_line(bundle.manifest['engine'])}")
    out.print(f"bundle: {path} ({_colored(manifest['status'])})")
    for name in (MODEL, ENGINES, REPORTS, PARTS):
        if (path / name).exists():
            out.print(f"  {path / name}")


def print_parity(report: ParityReport, part: str = "") -> None:
    """The table of checks."""
    from dexport.validate.report import COLUMNS, rows

    table = Table(*COLUMNS, title=f"{part and f'{part}: '}{report.precision} against {report.reference}")
    for row in rows(report):
        table.add_row(*row[:-1], _colored(row[-1]))
    out.print(table)
    for reason in report.not_run:
        out.print(f"not run: {reason}")


def print_validation(result: Validation) -> None:
    """What ``dexport validate`` found: forward parity of each network, then the trajectory."""
    for name, report in result.forward.items():
        print_parity(report, name)
    if result.trajectory is not None:
        print_trajectory(result.trajectory)
    out.print(f"{result.bundle}: {_colored('passed' if result.passed else 'failed')}")


def print_trajectory(report: TrajectoryReport) -> None:
    """The table of steps: at most a dozen, evenly spread, the last among them."""
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
    verdict = "pass" if report.passed else "FAIL"
    out.print(f"final latents: SNR {last.snr_db:.1f} dB, gate {report.gate_snr_db:g} dB: {_colored(verdict)}")
    out.print(f"worst evaluation: relative L2 {worst.metrics.relative_l2:.2e} at t = {worst.t:g}")
    if report.psnr_db:
        out.print(f"pictures: PSNR at least {min(report.psnr_db):.1f} dB, SSIM at least {min(report.ssim):.5f}")


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
        packages.add_row(name, entry["version"] or "-", escape(entry["fix"] or ""))
    out.print(packages)
    abilities = Table("can", "", "why", "fix")
    for name, ability in machine["can"].items():
        abilities.add_row(
            name,
            "[green]yes[/]" if ability["ok"] else "[red]no[/]",
            escape(ability["why"]),
            escape(ability["fix"]),
        )
    out.print(abilities)


def _engine_line(engine: Mapping[str, Any]) -> str:
    return (
        f"{engine['flavour']} {engine['version']} for {', '.join(engine['targets'])}, "
        f"{engine['plan_bytes'] / MB:,.1f} MB, types of {engine['checked_nodes']} nodes asserted; "
        f"[yellow]built, not executed[/] ({engine['reason']})"
    )


def _sampling_line(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "none"
    shown = "{steps} {sampler} steps, {schedule}, {prediction}, latent scale {latent_scale:g}, decoder {decoder}"
    return shown.format(**facts)


def _custom_op(op: Mapping[str, Any]) -> str:
    kernels = f"plugin, {len(op['ptx_sha256'])} kernels" if op["ptx_sha256"] else "function body"
    return f"{op['name']} v{op['version']} ({op['nodes']} nodes, {kernels})"


def _signature(specs: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{s['name']} ({','.join(map(str, s['shape']))}) {s['dtype']}" for s in specs)


def _set_line(facts: SetFacts) -> str:
    return f"{'an unknown number of' if facts.count is None else f'{facts.count:,}'} images, {facts.path}"


def _colored(verdict: str) -> str:
    color = "green" if verdict.startswith("pass") else "yellow" if verdict.startswith("not") else "red"
    return f"[{color}]{verdict}[/]"


def _print_lines(lines: Mapping[str, str]) -> None:
    for name, text in lines.items():
        out.print(f"  {name:<13}{text}", markup="[/]" in text, soft_wrap=True)
