"""Signatures: made once per key and manifest, and every way in which one does not hold has its own message."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

import dexport
from dexport.bundle import MANIFEST, SIGNATURE, hash_files, load_bundle
from dexport.cli import main
from dexport.errors import InputError, MachineError
from dexport.runtime.opened import OpenProgram
from dexport.signature import MAKE_KEYS, read_signature, sign, verify

TEXT = b'{"schema": 1}'


def write_keys(folder: Path, encryption: KeySerializationEncryption | None = None) -> tuple[Path, Path]:
    """PEM files of a new pair: private, public."""
    key = Ed25519PrivateKey.generate()
    folder.mkdir(exist_ok=True)
    private, public = folder / "key.pem", folder / "key.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(plain: Path, keys: tuple[Path, Path], tmp_path: Path) -> Path:
    """A bundle with a signature."""
    path = shutil.copytree(plain, tmp_path / "signed")
    (path / SIGNATURE).write_bytes(sign((path / MANIFEST).read_bytes(), keys[0]))
    return path


def test_a_signature_holds_and_is_the_same_every_time(keys: tuple[Path, Path]) -> None:
    private, public = keys
    signature = sign(TEXT, private)
    verify(TEXT, signature, public, "it")
    assert sign(TEXT, private) == signature


def test_each_way_not_to_hold_is_told_apart(keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    signature = sign(TEXT, private)
    with pytest.raises(InputError, match="it is not signed"):
        verify(TEXT, None, public, "it")
    with pytest.raises(InputError, match=f"it is signed with another key: {read_signature(signature, 'it')[0]}, but"):
        verify(TEXT, signature, write_keys(tmp_path / "other")[1], "it")
    with pytest.raises(InputError, match="the manifest of it was changed after it was signed"):
        verify(TEXT + b" ", signature, public, "it")


def test_a_flipped_bit_anywhere_in_the_signature_does_not_hold(keys: tuple[Path, Path]) -> None:
    private, public = keys
    facts = json.loads(sign(TEXT, private))
    for name in ("key", "signature"):
        for position in range(0, len(facts[name]), 5):
            digit = f"{int(facts[name][position], 16) ^ 1:x}"
            changed = {**facts, name: facts[name][:position] + digit + facts[name][position + 1 :]}
            with pytest.raises(InputError):
                verify(TEXT, json.dumps(changed).encode(), public, "it")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"algorithm": "rsa", "key": "", "signature": ""}'])
def test_what_is_no_signature_is_refused(content: bytes, keys: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="it has a signature that cannot be read"):
        verify(TEXT, content, keys[1], "it")


def test_keys_that_cannot_be_used_are_refused_with_the_command_that_makes_one(
    keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    locked, _ = write_keys(tmp_path / "locked", BestAvailableEncryption(b"secret"))
    other = tmp_path / "curve.pem"
    other.write_bytes(
        generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    for file, message, hint in [
        (locked, "without a password", "this takes it away"),
        (public, "holds no private key", "give the private key"),
        (other, "another kind than ed25519", "openssl genpkey"),
        (tmp_path / "missing", "cannot be read", "openssl genpkey"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            sign(TEXT, file)
        assert hint in caught.value.hint
    with pytest.raises(InputError, match="holds no public key") as caught:
        verify(TEXT, sign(TEXT, private), private, "it")
    assert "gives the public one" in caught.value.hint


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
@pytest.mark.parametrize("name", ["key.pem", "key.pub.pem", "my key.pem", ".key"])
@pytest.mark.parametrize("content", ["private", "public", "locked", "curve", "text", "missing"])
@pytest.mark.parametrize("signing", [True, False])
def test_no_fix_of_a_key_writes_over_a_file(
    name: str, content: str, signing: bool, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {"private": keys[0].read_bytes(), "public": keys[1].read_bytes(), "text": b"no key"}
    contents["curve"] = generate_private_key(SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    contents["locked"] = write_keys(tmp_path, BestAvailableEncryption(b"secret"))[0].read_bytes()
    for present in {"key.pem", "key.pub.pem"} | ({name} if content != "missing" else set()):
        Path(present).write_bytes(contents.get(content, b"another"))
    file = "gone.pem" if content == "missing" else name
    if content == ("private" if signing else "public"):
        return
    before = {path: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(InputError) as caught:
        sign(TEXT, file) if signing else verify(TEXT, sign(TEXT, keys[0]), file, "it")
    command = caught.value.hint[caught.value.hint.find("openssl") :] if "openssl" in caught.value.hint else "true"
    subprocess.run(command, shell=True, check=False, input=b"secret\n", capture_output=True)
    for path, bytes_before in before.items():
        assert path.read_bytes() == bytes_before
    if content in ("missing", "text", "curve") or (content == "private" and not signing):
        assert {path.name for path in Path().iterdir()} > {path.name for path in before}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_the_documented_commands_make_keys(tmp_path: Path) -> None:
    subprocess.run(MAKE_KEYS, shell=True, check=True, cwd=tmp_path)
    verify(TEXT, sign(TEXT, tmp_path / "key.pem"), tmp_path / "key.pub.pem", "it")


# On bundles


def test_a_signed_bundle_opens(signed: Path, keys: tuple[Path, Path]) -> None:
    dexport.load(signed, require_signature=keys[1])
    OpenProgram.open(signed, require_signature=keys[1])
    assert load_bundle(signed).path == signed  # nothing requires it


def test_an_unsigned_one_and_an_unsigned_decoder_do_not(signed: Path, plain: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="is not signed"):
        dexport.load(plain, require_signature=keys[1])
    with pytest.raises(InputError, match="is not signed"):
        OpenProgram.open(signed, players={"decoder": plain}, require_signature=keys[1])


def test_a_changed_file_needs_a_changed_manifest_which_the_signature_shows(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    with (signed / "model.onnx.data").open("ab") as file:
        file.write(b"something else")
    with pytest.raises(InputError, match=r"model\.onnx\.data: size differs"):
        load_bundle(signed, keys[1])
    manifest = json.loads((signed / MANIFEST).read_text())
    (signed / MANIFEST).write_text(json.dumps({**manifest, "files": hash_files(signed)}))
    load_bundle(signed)
    with pytest.raises(InputError, match="changed after it was signed"):
        load_bundle(signed, keys[1])


def test_every_command_that_opens_a_bundle_can_require_one(
    plain: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    output = ["-o", str(tmp_path / "out.png")]
    for command in (["info"], ["sample", *output], ["sweep", *output]):
        arguments = [command[0], str(plain), *command[1:], "--require-signature", str(keys[1])]
        result = CliRunner().invoke(main, arguments)
        assert (result.exit_code, list(tmp_path.iterdir())) == (4, [])
        assert f"error: {plain} is not signed" in result.stderr


def test_without_cryptography_only_signatures_are_missing(signed: Path, keys: tuple[Path, Path]) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from dexport.bundle import load_bundle\nfrom dexport.errors import MachineError\n"
        f"load_bundle({str(signed)!r})\n"
        f"try: load_bundle({str(signed)!r}, {str(keys[1])!r})\n"
        "except MachineError as error: print(error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"pip install 'dexport\[sign\]'\n", done.stdout)
    assert MachineError.exit_code == 3


def test_validate_does_not_change_the_manifest_of_a_signed_bundle(signed: Path) -> None:
    before = (signed / MANIFEST).read_bytes()
    result = CliRunner().invoke(main, ["validate", str(signed), "--level", "forward"])
    assert result.exit_code == 2
    assert "is signed, and a changed manifest would not be" in result.stderr
    assert "--no-record" in result.stderr
    assert (signed / MANIFEST).read_bytes() == before
