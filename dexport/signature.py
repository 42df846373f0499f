"""Ed25519 signatures of a bundle's manifest, which has the sha256 of every other file.

A signature is a small JSON file beside the manifest. Keys are PEM files, as OpenSSL writes them:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub.pem
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from dexport.errors import InputError, free_name
from dexport.optional import optional_import

ALGORITHM = "ed25519"
KEY_BYTES = 32
SIGNATURE_BYTES = 64
LARGEST = 4096
"""Bytes of a signature file."""
MAKE_KEYS = f"openssl genpkey -algorithm {ALGORITHM} -out key.pem && openssl pkey -in key.pem -pubout -out key.pub.pem"
PRIVATE, PUBLIC = b" PRIVATE KEY-----", b" PUBLIC KEY-----"
"""In the first line of a PEM file."""


def sign(manifest: bytes, key_file: str | Path) -> bytes:
    """The content of a signature file.

    Args:
        manifest: the bytes of the manifest; the same bytes and key give the same signature.
        key_file: PEM file of a private ed25519 key without a password.

    Raises:
        InputError: the file holds no such key.
        MachineError: the package cryptography is missing.
    """
    serialization, ed25519 = _modules()
    content = _read(key_file)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{key_file} holds no private key without a password: {error}", hint=_instead_of(key_file, content, PRIVATE)
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"{key_file} holds a key of another kind than {ALGORITHM}", hint=make_keys())
    facts = {
        "algorithm": ALGORITHM,
        "key": key.public_key().public_bytes_raw().hex(),
        "signature": key.sign(manifest).hex(),
    }
    return (json.dumps(facts, indent=2) + "\n").encode()


def verify(manifest: bytes, signature: bytes | None, public_file: str | Path, name: str | Path) -> None:
    """Hold a manifest to a signature.

    Args:
        manifest: the bytes of the manifest.
        signature: the content of its signature file; None where there is none.
        public_file: PEM file of the public key that must have signed it.
        name: of the bundle, for messages.

    Raises:
        InputError: not signed, signed with another key, changed after it was signed, or no public key in the file.
        MachineError: the package cryptography is missing.
    """
    serialization, ed25519 = _modules()
    content = _read(public_file)
    try:
        key = serialization.load_pem_public_key(content)
    except ValueError as error:
        raise InputError(
            f"{public_file} holds no public key: {error}", hint=_instead_of(public_file, content, PUBLIC)
        ) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise InputError(f"{public_file} holds a key of another kind than {ALGORITHM}", hint=make_keys())
    if signature is None:
        raise InputError(
            f"{name} is not signed, and a signature by the key in {public_file} is required",
            hint="get a signed one: `dexport pack BUNDLE --sign key.pem`",
        )
    required = key.public_bytes_raw().hex()
    signer, value = read_signature(signature, name)
    if signer != required:
        raise InputError(
            f"{name} is signed with another key: {signer}, but {public_file} holds {required}",
            hint="get the public key of who made it, if you trust them",
        )
    try:
        key.verify(value, manifest)
    except optional_import("cryptography.exceptions").InvalidSignature as error:
        raise InputError(
            f"the manifest of {name} was changed after it was signed",
            hint="get it again from who made it; do not run it",
        ) from error


def read_signature(content: bytes, name: str | Path) -> tuple[str, bytes]:
    """The public key (64 hexadecimal digits) and the signature (64 bytes) of a signature file; checks neither.

    Raises:
        InputError: something else.
    """
    try:
        facts: Any = json.loads(content)
        signer, value = bytes.fromhex(facts["key"]), bytes.fromhex(facts["signature"])
        known = facts["algorithm"] == ALGORITHM and len(signer) == KEY_BYTES and len(value) == SIGNATURE_BYTES
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise InputError(f"{name} has a signature that cannot be read", hint="get it again from who made it")
    return signer.hex(), value


def make_keys() -> str:
    """The command that makes a pair of keys, in files that are not there yet."""
    private = free_name(Path("key.pem"))
    public = free_name(private.with_suffix(".pub.pem"))
    make = f"openssl genpkey -algorithm {ALGORITHM} -out {private}"
    return f"{make} && openssl pkey -in {private} -pubout -out {public}"


def _instead_of(file: str | Path, content: bytes, wanted: bytes) -> str:
    """What mends a file without the key that is wanted. Nothing that is there is written over: it may be the only copy
    of another key."""
    source = shlex.quote(str(file))
    if PRIVATE in content and wanted == PUBLIC:
        public = shlex.quote(str(free_name(Path(file).with_suffix(".pub.pem"))))
        return (
            f"it holds a private key; this gives the public one of it: openssl pkey -in {source} -pubout -out {public}"
        )
    if PUBLIC in content and wanted == PRIVATE:
        return "it holds a public key, which only checks: give the private key that it was made from"
    if PRIVATE in content:
        plain = shlex.quote(str(free_name(Path(file))))
        return f"where it has a password, this takes it away: openssl pkey -in {source} -out {plain}"
    return make_keys()


def _modules() -> tuple[Any, Any]:
    primitives = "cryptography.hazmat.primitives"
    return optional_import(f"{primitives}.serialization"), optional_import(f"{primitives}.asymmetric.ed25519")


def _read(file: str | Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", hint=make_keys()) from error
