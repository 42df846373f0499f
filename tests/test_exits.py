"""Every command ends with one message, its exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from dexport import cli, exits
from dexport.errors import DEFECT, GateError, InputError, MachineError, UsageError
from dexport.exits import Interrupted, expected, own_temporary_folder, stoppable

ROOT = Path(__file__).parents[1]
TINY = ["dit-s-2", *(f"--set={name}" for name in ("hidden_size=24", "depth=1", "num_heads=2", "input_size=4"))]
RUN = [sys.executable, "-m", "dexport"]


def ended_by(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Result:
    """A command in the middle of which this is raised."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(cli.main.commands["recipes"], "callback", lambda **_: fail())
    return CliRunner().invoke(cli.main, ["recipes"])


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Signals are not ignored, as they are where a job in the background or `nohup` started the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def printing(body: str) -> list[str]:
    """A command that does this, in a process of its own; it imports little."""
    lines = [
        "from dexport import cli",
        "def show(**_):",
        *(f"    {line}" for line in body.splitlines()),
        "cli.main.commands['recipes'].callback = show",
        "cli.main(['recipes'])",
    ]
    return [sys.executable, "-c", "\n".join(lines)]


# Unforeseen exceptions


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x" * 5000),
        KeyError("seed"),
        AssertionError(),
        RuntimeError("first line\nsecond line"),
        FileNotFoundError(errno.ENOENT, "gone", "engine.log"),
        UnicodeEncodeError("ascii", "é", 0, 1, "no"),
        TypeError("\x1b]0;title\x07"),
        ZeroDivisionError("ünïcode"),
    ],
)
def test_a_defect_is_one_line_and_never_a_gate(
    error: Exception, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = ended_by(error, monkeypatch)
    assert (result.exit_code, result.stdout) == (DEFECT, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: this is a defect of dexport ({type(error).__name__}")
    assert len(line) < 500 and line.isprintable()
    (saved,) = temporary.iterdir()
    assert line.endswith(f"please report it with {saved}")
    assert saved.stat().st_mode & 0o777 == 0o600
    assert "Traceback" in saved.read_text() and type(error).__name__ in saved.read_text()


def test_tracebacks_do_not_meet(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        ended_by(ValueError(), monkeypatch)
    assert len(list(temporary.iterdir())) == 3


def test_a_traceback_that_cannot_be_saved_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(exits.tempfile, "mkstemp", refuse)
    result = ended_by(ValueError("odd"), monkeypatch)
    assert result.exit_code == DEFECT
    assert "this is a defect of dexport (ValueError: odd)" in result.stderr.splitlines()[0]
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "x", "/a/b"), MachineError, "/a/b: No space left on device"),
        (OSError(errno.EROFS, "x"), MachineError, "Read-only file system"),
        (OSError(errno.EMFILE, "x"), MachineError, "Too many open files"),
        (PermissionError(errno.EACCES, "x", "/a"), MachineError, "/a: Permission denied"),
        (MemoryError(), MachineError, "too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), MachineError, "too little memory"),
        (RuntimeError("CUDA out of memory. Tried"), MachineError, "too little memory"),
        (RecursionError(), InputError, "nested too deeply"),
        (ModuleNotFoundError("no", name="torch"), MachineError, "needs torch"),
        (GateError("a gate"), GateError, "a gate"),
    ],
)
def test_what_is_no_defect(
    error: Exception, kind: type, words: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert type(expected(error)) is kind
    result = ended_by(error, monkeypatch)
    assert result.exit_code == kind.exit_code
    assert words in result.stderr.splitlines()[0]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "error", [ValueError(), ModuleNotFoundError("x", name="elsewhere"), OSError(errno.ENOENT, "x")]
)
def test_what_is_a_defect(error: Exception) -> None:
    assert expected(error) is None


@pytest.mark.parametrize("error", [click.UsageError("u"), click.exceptions.Exit(7), SystemExit(7)])
def test_what_click_says_stays(error: BaseException, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended_by(error, monkeypatch).exit_code == getattr(error, "exit_code", 7)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), *((Interrupted(each), 128 + each) for each in (2, 15, 1)), (BrokenPipeError(), 141)],
)
def test_interruptions_have_codes_of_their_own(
    error: BaseException, code: int, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = ended_by(error, monkeypatch)
    assert result.exit_code == code
    assert "Traceback" not in result.stderr and list(temporary.iterdir()) == []


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_exceptions_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stoppable() as stopped:
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)
            time.sleep(5)
        os.kill(os.getpid(), signal.SIGTERM)  # while it is cleaned up
        time.sleep(0.01)
        assert stopped == [number]
    assert signal.getsignal(number) is before


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir()
    return {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT), "DEXPORT_CACHE": ""}


WORK = """import subprocess, sys, tempfile, time
from pathlib import Path
from dexport.bundle import Draft
from dexport.files import replacing
with (
    Draft(Path(sys.argv[1])) as draft,
    replacing(Path(sys.argv[1] + ".json")),
    tempfile.TemporaryDirectory() as folder,
):
    print("working", flush=True)
    time.sleep(60)"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_work_that_is_stopped_leaves_nothing(
    number: signal.Signals, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "out").mkdir()
    command = [*printing(WORK), str(tmp_path / "out" / "b")]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "working\n"
    assert len(list((tmp_path / "out").iterdir())) == 2
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (128 + number, f"stopped by {number.name}\n")
    assert list((tmp_path / "out").iterdir()) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_build_that_is_stopped_leaves_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "out").mkdir()
    command = [*RUN, "build", *TINY, "--profile", "ci", "-o", str(tmp_path / "out" / "b")]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 200
    while not any((tmp_path / "out").glob(".b.partial-*/model.onnx")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said.splitlines()[-1]) == (143, "stopped by SIGTERM")
    assert list((tmp_path / "out").iterdir()) == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow  # ten seconds; one that is stopped leaves nothing there either, which the test above holds
def test_a_build_leaves_nothing_in_the_temporary_folder(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [*RUN, "build", *TINY, "--profile", "ci", "--no-parity", "-o", str(tmp_path / "b")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_temporary_folder_of_a_killed_command_goes_with_the_next(temporary: Path) -> None:
    code = "import os\nfrom dexport.exits import *\nwith own_temporary_folder():\n    os.kill(os.getpid(), 9)\n"
    subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT)
    assert len(list(temporary.iterdir())) == 1
    with own_temporary_folder():
        (ours,) = temporary.iterdir()
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(ours)
        with own_temporary_folder():
            assert ours.exists()
    assert list(temporary.iterdir()) == []
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(temporary)


# Output


BY_CLICK = "cli.app.click.echo('x' * 1000)"
BY_RICH = "from dexport.cli import terminal\nterminal.out.print('x' * 1000)"


@pytest.mark.parametrize("body", [BY_CLICK, BY_RICH, f"for _ in range(1000): {BY_CLICK}"])
def test_a_reader_that_goes_away(body: str, environment: dict[str, str]) -> None:
    child = subprocess.Popen(printing(body), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    said = child.stderr.read()
    child.stderr.close()
    assert (child.wait(), said) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("body", [BY_CLICK, BY_RICH])
def test_output_on_a_full_disk(body: str, environment: dict[str, str]) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            printing(body), env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == MachineError.exit_code
    assert done.stderr.startswith("error: No space left on device\nfix: ")


ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp1252"},
    {"PYTHONIOENCODING": "cp437:strict"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]
LETTERS = "Fréchet ± … ─ 画 \udc80"


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_terminals_of_few_letters(encoding: dict[str, str], environment: dict[str, str]) -> None:
    body = (
        "from rich.table import Table\n"
        "from dexport.cli import terminal\n"
        "from dexport.errors import UsageError\n"
        f"letters = {LETTERS!a}\n"
        "table = Table(letters, title=letters)\n"
        "table.add_row(letters)\n"
        "terminal.out.print(table)\n"
        "terminal.err.print(table)\n"
        "cli.app.click.echo(letters)\n"
        "raise UsageError(letters, hint=letters)"
    )
    done = subprocess.run(printing(body), env={**environment, **encoding}, capture_output=True, check=False)
    assert done.returncode == UsageError.exit_code, done.stderr
    assert b"UnicodeEncodeError" not in done.stderr and b"chet" in done.stdout


@pytest.mark.parametrize("encoding", ENCODINGS[:2], ids=str)
def test_json_is_json_on_every_terminal(encoding: dict[str, str], environment: dict[str, str]) -> None:
    colours = {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1"}
    body = f"cli.app.print_json([{LETTERS!a}, 1.5])"
    done = subprocess.run(printing(body), env={**environment, **encoding, **colours}, capture_output=True, check=True)
    assert json.loads(done.stdout.decode("ascii")) == [LETTERS, 1.5]


@pytest.mark.parametrize("closed", ["1", "2"])
def test_streams_that_are_closed(closed: str, environment: dict[str, str]) -> None:
    shell = shutil.which("sh")
    assert shell is not None
    done = subprocess.run(
        [shell, "-c", f'exec "$@" {closed}>&-', shell, *printing(f"{BY_CLICK}\n{BY_RICH}")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# Outputs that are no files


@pytest.fixture
def in_folder(tmp_path: Path) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


@pytest.mark.parametrize("output", ["./", ".", "/", "pipe", "/dev/null"])
@pytest.mark.parametrize(
    "command",
    [
        ["validate", "x", "-o"],
        ["validate", "x", "--html"],
        ["sample", "x", "-o"],
        ["sweep", "x", "-o"],
        ["fid", "x", "--save-stats"],
        ["baseline", "update", "x", "-o"],
        ["report", "x", "--junit"],
    ],
    ids=" ".join,
)
def test_files_to_write_that_are_none(command: list[str], output: str, in_folder: Path) -> None:
    os.mkfifo(in_folder / "pipe")
    result = CliRunner().invoke(cli.main, [*command, output])
    assert result.exit_code == UsageError.exit_code, result.output
    assert re.search(r"error: \S+ is no regular file\nfix: ", result.stderr)


@pytest.mark.parametrize("output", ["./", ".", "..", "/", ""])
def test_folders_to_write_that_cannot_be(output: str, in_folder: Path) -> None:
    result = CliRunner().invoke(cli.main, ["build", *TINY, "--force", "-o", output])
    assert result.exit_code == UsageError.exit_code, result.output
    assert "which cannot be replaced\nfix: " in result.stderr
    assert list(in_folder.iterdir()) == []
