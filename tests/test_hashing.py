from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import dexport.hashing as module
from dexport.hashing import hash_ahead, sha256_of


@pytest.fixture(autouse=True)
def nothing_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_begun", {})


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("size", [0, 3, 4, 5, 8])
def test_the_hash_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, ahead: bool) -> None:
    for name in ("CHUNK", "CHUNK_AHEAD"):
        monkeypatch.setattr(module, name, 4)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(size)))
    if ahead:
        hash_ahead(path)
    for _ in range(2):
        assert sha256_of(path) == hashlib.sha256(bytes(range(size))).hexdigest()


def test_a_hash_that_was_begun_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    monkeypatch.setattr(module, "_sha256", lambda *_: "once")
    hash_ahead(path)
    assert sha256_of(path) == "once"


def test_a_file_that_was_replaced_is_hashed_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    hash_ahead(path)
    path.write_bytes(b"changed")
    assert sha256_of(path) == hashlib.sha256(b"changed").hexdigest()


@pytest.mark.parametrize("path", [None, "owner/name", "hf://owner/name/file.pt", "a\0b", "."])
def test_what_is_no_file_is_left_alone(path: str | None) -> None:
    hash_ahead(path)
    assert not module._begun


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, _chunk: int) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    path = tmp_path / "file"
    path.write_bytes(b"abc")
    monkeypatch.setattr(module, "_sha256", fail)
    hash_ahead(path)
    with pytest.raises(PermissionError):
        sha256_of(path)
