"""The documentation: every command is one that exists, every block of Python compiles, and what is cheap is run.

``make docs`` builds the pages with warnings as errors.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import dexport
from dexport import errors
from dexport.bundle import load_bundle
from dexport.cli import main
from dexport.exporter.machine import RTX_TARGETS
from dexport.exporter.options import BuildOptions
from dexport.exporter.recipes import find_recipe
from dexport.exporter.recipes.recipe import DEFAULT_GATES, Recipe
from dexport.exporter.system import plan_system
from dexport.exporter.variant import resolve
from dexport.exporter.weights.loading import open_weights
from dexport.profiles import load_profile
from dexport.runtime.opened import OpenProgram
from dexport.runtime.samplers import SAMPLERS
from dexport.validate.build import build_and_validate
from tests.commands import parsed
from tests.runtime.test_environment import NEEDED
from tests.test_stranger import installed  # noqa: F401 - a fixture: the example that a page says to install

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```[ {.]*(\w*)\}?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'--8<-- "([^":]+)(?::(\w+))?"')
TINY = {"hidden_size": 16, "depth": [0, 0, 1, 0, 0]}
QUICK = ("--steps", "2", "--count", "1")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Lines of a shell block, continued ones joined."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def blocks(page: Path) -> list[Block]:
    return [Block(page.name, language, text) for language, text in FENCE.findall(page.read_text(encoding="utf-8"))]


BLOCKS = [block for page in sorted(DOCS.glob("*.md")) for block in blocks(page)]
COMMANDS = [(b.page, command) for b in BLOCKS if b.language == "bash" for command in b.commands]
PYTHON = [b for b in BLOCKS if b.language == "python" and not SNIPPET.search(b.text)]


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def first_column(page: str, header: str) -> list[str]:
    """Cells of the first column of the table whose header row starts with ``header``."""
    table = text_of(page).split(f"\n| {header} |", 1)[1].split("\n\n", 1)[0]
    return [row.split("|")[1].strip() for row in table.splitlines()[2:]]


def names(cells: list[str]) -> list[str]:
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


class Resolved(errors.DexportError):
    """A build that would start now."""

    exit_code = 99


def plan_only(recipe: str | Recipe | None, options: BuildOptions, *_: Any) -> None:
    """In place of a build: everything that is checked before the work starts, but for bundles that are not here."""
    sources = [player.source for players in options.players.values() for player in players]
    if not any(source.startswith("out/") for source in sources):
        plan_system(recipe, options)
    raise Resolved("it would start now")


def check_dexport(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0] == "build":
        monkeypatch.setattr("dexport.validate.build.build", plan_only)
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == Resolved.exit_code, result.output
        return
    context = parsed(arguments)
    if context.info_name == "info" and not context.params["name"].startswith("out/"):
        find_recipe(context.params["name"])


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        assert set(extra.split(",")) <= set(extras)
    if "-c" in arguments:
        assert (ROOT / arguments[arguments.index("-c") + 1]).is_file()


def check_python(arguments: list[str]) -> None:
    assert arguments[:2] == ["-m", "venv"] or (ROOT / arguments[0]).is_file()


def check_make(arguments: list[str]) -> None:
    for target in arguments:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_every_block_is_of_a_checked_kind() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "toml", "text", "yaml", "mermaid"}
    assert not any(re.search(r"^\s*\$? ?dexport ", b.text, flags=re.MULTILINE) for b in BLOCKS if b.language != "bash")


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_every_command_exists(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(command, comments=True)
    match Path(program).name:
        case "dexport":
            check_dexport(arguments, monkeypatch)
        case "pip":
            check_pip(arguments)
        case "python" | "python3.11":
            check_python(arguments)
        case "make":
            check_make(arguments)
        case other:
            pytest.fail(f"nothing here knows how to check {other!r}")


def test_a_wrong_option_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(click.NoSuchOption):
        check_dexport(["sample", "out/demo", "--pictures", "8"], monkeypatch)
    with pytest.raises(AssertionError):
        check_dexport(["build", "dico-fashion", "--set", "widht=3"], monkeypatch)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page)
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.page, "exec")


def test_toml_parses() -> None:
    for block in BLOCKS:
        if block.language == "toml":
            tomllib.loads(block.text)


def test_included_sections_exist() -> None:
    included = [match for page in DOCS.glob("*.md") for match in SNIPPET.findall(page.read_text(encoding="utf-8"))]
    examples = {
        "examples/average/average_program.py",
        "examples/average/average_recipe.py",
        "examples/my_backbone.py",
        "examples/serve.py",
        "examples/ci/validate.sh",
        "examples/ci/github.yml",
        "examples/build.toml",
    }
    assert {file for file, _ in included} == {*examples, "benchmarks/results/small-models.md"}
    for file, section in included:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not section or (f"[start:{section}]" in source and f"[end:{section}]" in source)


def test_warnings_fail_the_build_and_nothing_is_fetched() -> None:
    makefile, settings = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "mkdocs.yml"))
    # With --quiet, mkdocs does not count warnings, and --strict lets them pass.
    assert re.search(r"mkdocs build --strict$", makefile, flags=re.MULTILINE)
    assert re.search(r"^test: .*\bdocs\b", makefile, flags=re.MULTILINE)
    assert "font: false" in settings
    assert "plugins: [search]" in settings
    assert "mermaid" not in settings  # the theme fetches the script that draws it; GitHub draws the page's source


# What the pages say about the code


def test_exit_codes_are_those_of_the_errors() -> None:
    classes = [errors.GateError, errors.UsageError, errors.MachineError, errors.InputError]
    codes = ["0", *(str(error.exit_code) for error in classes), str(errors.DEFECT)]
    assert first_column("quickstart.md", "code") == codes


def test_gates_are_the_default_ones() -> None:
    row = re.search(r"^\| gate, relative L2 \|(.*)\|$", text_of("precision.md"), flags=re.MULTILINE)
    assert row is not None
    assert [float(cell) for cell in row[1].split("|")] == list(DEFAULT_GATES.values())[:3]
    table = text_of("precision.md").split("\n## The gates\n")[1]
    assert re.findall(r"^\| (\w+) \| ([\de-]+) \|", table, flags=re.MULTILINE) == [
        (name, f"{gate:.0e}".replace("e-0", "e-")) for name, gate in DEFAULT_GATES.items()
    ]


def test_samplers_and_providers_are_all_there() -> None:
    assert set(names(first_column("your-own-backbone.md", "sampler"))) == set(SAMPLERS)
    provider = next(p for p in main.commands["sample"].params if p.name == "provider")
    assert set(names(first_column("deploying.md", "provider"))) == set(provider.type.choices)  # type: ignore[attr-defined]


def test_engine_facts() -> None:
    page = text_of("deploying.md")
    assert ", ".join(RTX_TARGETS) in page
    latency, throughput, ci = (load_profile(name) for name in ("latency", "throughput", "ci"))
    assert f"`latency` is 1 to {latency.batch_max}, tuned for {latency.batch_opt}" in page
    assert f"`throughput` is 1 to {throughput.batch_max}, tuned\n  for {throughput.batch_opt}" in page
    assert f"`ci` is 1 to {ci.batch_max} for one target" in page
    assert ", ".join(latency.targets[:3]) + f" and {latency.targets[3]}" in page


def test_the_runtime_needs_what_the_page_lists() -> None:
    listed = re.search(r"^serve/bin/pip install (?!-)(.*)$", text_of("deploying.md"), flags=re.MULTILINE)
    assert listed is not None
    assert listed[1].split() == sorted(NEEDED)
    rows = first_column("deploying.md", "package")
    assert sorted(name for row in rows for name in row.split(", ")) == sorted(NEEDED)


# The running example, at a tiny size


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the bundles that the pages talk about; the build is the quickstart's own command."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        variant = resolve(find_recipe("dico-fashion"), TINY)
        weights = open_weights(None, variant.outline, seed=1)
        Path("checkpoints").mkdir()
        tensors = {name: weights.read(name, torch.float32) for name in weights.shapes}
        save_file(tensors, "checkpoints/dico-fashion.safetensors")
        run(command("quickstart.md", "dexport build dico-fashion ").replace("--trt", ""), *settings(TINY))
        shutil.copytree("out/demo", "out/small")
        yield folder


def command(page: str, start: str) -> str:
    return next(command for name, command in COMMANDS if name == page and command.startswith(start))


def settings(values: dict[str, Any]) -> list[str]:
    return ["--profile", "ci", *(f"--set={name}={value}" for name, value in values.items())]


def run(line: str, *more: str) -> str:
    arguments = [*shlex.split(line)[1:], *more]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_quickstart_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    assert "hashes verified" in run(command("quickstart.md", "dexport info out/demo"))
    run(command("quickstart.md", "dexport sample out/demo "), *QUICK)
    run(command("quickstart.md", "dexport sample out/demo -o out/bags.png"), "--steps", "2")
    run(command("quickstart.md", "dexport build --stitch out/small:"))
    run(command("quickstart.md", "dexport sample out/stitched-bundles"), *QUICK)
    assert all((workplace / "out" / name).is_file() for name in ("demo.png", "bags.png", "stitched.png"))
    assert len(list((workplace / "out/bags-images").glob("*.png"))) == 4


def test_runs_are_resumed_with_another_batch(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    first, second = (line for page, line in COMMANDS if page == "deploying.md" and "out/many.png" in line)
    assert run(first, *QUICK).startswith("10 images")
    assert run(second, *QUICK).startswith("0 images in 0.0 s, 10 kept")


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page)
def test_python_runs(block: Block, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)

    def build(recipe: str, output: str, **options: Any) -> SimpleNamespace:
        with pytest.raises(Resolved):
            build_and_validate(recipe, output, **options)
        return SimpleNamespace(verdict=SimpleNamespace(passed=True))

    monkeypatch.setattr("dexport.validate.build.build", plan_only)
    monkeypatch.setattr(dexport, "build", build)
    exec(compile(block.text, block.page, "exec"), {})


def test_the_manifest_has_the_fields_that_the_page_lists(workplace: Path) -> None:
    bundle = load_bundle(workplace / "out/demo")
    tables = {
        "field": bundle.manifest,
        "field of a network": bundle.network.manifest,
        "field of a graph": bundle.network.entry(),
        "field of a program": bundle.manifest["program"],
    }
    for header, fields in tables.items():
        assert sorted(names(first_column("deploying.md", header))) == sorted(fields), header


def test_the_service_answers(workplace: Path) -> None:
    example: dict[str, Any] = {"__name__": "serve"}
    exec(compile((ROOT / "examples/serve.py").read_text(), "serve.py", "exec"), example)
    server = example["server"](OpenProgram.open(workplace / "out/demo"), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        with urllib.request.urlopen(address + "?label=3&seed=7", timeout=60) as answer:
            assert Image.open(io.BytesIO(answer.read())).size == (32, 32)
        for query in ("", "?label=99&seed=0", "?label=x&seed=0", "?label=1&seed=0&more=1", "?label=1&seed=-1"):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(address + query, timeout=60)
    finally:
        server.shutdown()
        server.server_close()


# The backbone from scratch


def test_the_backbone_builds_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = command("your-own-backbone.md", "dexport build examples/my_backbone.py --fp16 -o")
    run(line.replace("examples", str(ROOT / "examples")), "--set=width=16", "--latent=16x16")
    bundle = load_bundle("out/small-unet")
    assert bundle.status == "passed"
    parity = bundle.network.entry()["parity"]
    assert set(parity["worst_relative_l2"]) == {"as shipped", "rounded", "batch consistency"}
    run(command("your-own-backbone.md", "dexport sample"))
    picture = Image.open("out/small-unet-images/00000.png")
    assert (picture.size, picture.mode) == ((16, 16), "L")


def test_the_island_is_worth_what_the_page_says(tmp_path: Path) -> None:
    file = tmp_path / "bare.py"
    source = (ROOT / "examples/my_backbone.py").read_text(encoding="utf-8")
    file.write_text(source.replace('Islands(modules=("time",), ', "Islands("), encoding="utf-8")
    result = dexport.build(str(file), tmp_path / "bare", precision="fp16")
    assert result.bundle.failed
    assert min(result.verdict.summary()["worst_relative_l2"][kind] for kind in ("as shipped", "rounded")) > 3e-3
