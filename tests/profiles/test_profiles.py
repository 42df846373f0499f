"""Build profiles load, and their mistakes are named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dexport.errors import UsageError
from dexport.profiles import builtin_profiles, load_profile

GOOD = '[batch]\nmin = 1\nopt = 3\nmax = 8\n[engine]\ntargets = ["sm89", "sm120"]\nworkspace_mib = 512\n'


@pytest.mark.parametrize(("name", "batches"), [("latency", (1, 2, 4)), ("throughput", (1, 16, 64)), ("ci", (1, 2, 4))])
def test_builtin_batches(name: str, batches: tuple[int, int, int]) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert (profile.batch_min, profile.batch_opt, profile.batch_max) == batches
    assert profile.description
    assert profile.targets


def test_builtin_names_and_ci_has_one_target() -> None:
    assert builtin_profiles() == ("ci", "latency", "throughput")
    assert len(load_profile("ci").targets) == 1


def test_profile_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    profile = load_profile(path)
    assert profile.name == "mine"
    assert (profile.batch_min, profile.batch_opt, profile.batch_max) == (1, 3, 8)
    assert profile.targets == ("sm89", "sm120")
    assert profile.workspace_mib == 512
    assert load_profile(str(path)) == profile


def test_engine_table_is_optional(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[batch]\nmin = 2\nopt = 2\nmax = 2\n")
    profile = load_profile(path)
    assert profile.targets == ()
    assert profile.workspace_mib is None


def test_unknown_name_has_a_near_miss() -> None:
    with pytest.raises(UsageError, match=r"'latencey'; did you mean latency\?") as caught:
        load_profile("latencey")
    assert "throughput" in caught.value.hint


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_profile(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[batch\nmin = 1", "not valid TOML"),
        (GOOD.replace("opt = 3", "opt = 9"), r"min 1, opt 9, max 8 are out of order"),
        (GOOD.replace("opt = 3", "op = 3"), r"unknown key \[batch\] op; did you mean opt\?"),
        (
            GOOD.replace("workspace_mib", "workspace"),
            r"unknown key \[engine\] workspace; did you mean workspace_mib",
        ),
        (GOOD + "[engin]\n", r"unknown key engin; did you mean engine\?"),
        ("[batch]\nmin = 1\nmax = 2\n", r"\[batch\] lacks opt"),
        ("", r"\[batch\] lacks min, opt, max"),
        ("batch = 3", "batch must be a table"),
        (GOOD.replace("min = 1", "min = 0"), r"\[batch\] min must be a whole number of at least 1, not 0"),
        (GOOD.replace("min = 1", "min = true"), "not True"),
        (GOOD.replace("max = 8", "max = 8.0"), "not 8.0"),
        (GOOD.replace("512", "-1"), "workspace_mib must be"),
        (GOOD.replace('"sm89"', '"ada"'), "'ada' is not a compute capability"),
        (GOOD.replace('["sm89", "sm120"]', '"sm89"'), "must be a list"),
        ("name = 3\n" + GOOD, "name must be a string"),
    ],
)
def test_bad_profiles_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)


def test_profiles_import_neither_torch_nor_onnx() -> None:
    code = "import sys, dexport.profiles; sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'onnx_ir')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line", [b"\n", b"\r\n"])
def test_files_of_windows_editors(mark: bytes, line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(mark + line.join([b"[batch]", b"min = 1", b"opt = 2", b"max = 4", b""]))
    assert load_profile(file).batch_max == 4
