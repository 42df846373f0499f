"""Ed25519 signatures of a bundle's manifest, which has the sha256 of every other file.

A signature is a small JSON file beside the manifest. Keys are PEM files, as OpenSSL writes them:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub.pem
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dexport.errors import InputError
from dexport.optional import optional_import

ALGORITHM = "ed25519"
KEY_BYTES = 32
SIGNATURE_BYTES = 64
LARGEST = 4096
"""Bytes of a signature file."""
MAKE_KEYS = f"openssl genpkey -algorithm {ALGORITHM} -out key.pem && openssl pkey -in key.pem -pubout -out key.pub.pem"


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
    try:
        key = serialization.load_pem_private_key(_read(key_file), password=None)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key_file} holds no private key without a password: {error}", hint=MAKE_KEYS) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"{key_file} holds a key of another kind than {ALGORITHM}", hint=MAKE_KEYS)
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
    try:
        key = serialization.load_pem_public_key(_read(public_file))
    except ValueError as error:
        raise InputError(f"{public_file} holds no public key: {error}", hint=MAKE_KEYS) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise InputError(f"{public_file} holds a key of another kind than {ALGORITHM}", hint=MAKE_KEYS)
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


def _modules() -> tuple[Any, Any]:
    primitives = "cryptography.hazmat.primitives"
    return optional_import(f"{primitives}.serialization"), optional_import(f"{primitives}.asymmetric.ed25519")


def _read(file: str | Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", hint=MAKE_KEYS) from error
