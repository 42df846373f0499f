"""Damaged and hostile files for every reader: ``python3 -m tools.fuzz --count 10000``.

Each input is a good file that was changed at random: bits, lengths, slices, fields of its JSON, opcodes of its pickle.
Whatever it is, a reader either takes it or raises a DexportError, whose message can be printed; anything else is a
finding. What was taken is also used, as far as that costs little. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from dexport import archive
from dexport.archive import check, pack, unpack
from dexport.bundle import ENGINES, MANIFEST, NETWORKS, SIGNATURE, Bundle, hash_files, load_bundle, reading_manifest
from dexport.cli import terminal
from dexport.cli.commands.info_printer import print_bundle
from dexport.errors import DexportError
from dexport.exporter.weights.loading import open_weights
from dexport.model_repository import graph_config, pipeline_config
from dexport.runtime.engine_checks import read_facts
from dexport.runtime.opened import OpenProgram
from dexport.signature import read_signature
from tests.runtime.mutations import read_mutated_record
from tests.validate.mutations import read_mutated_npz, read_mutated_picture
from tools.fuzz_documents import Baselines, PrecisionMaps, Records, Reports
from tools.fuzz_graphs import OnnxBundles, OnnxFiles
from tools.mutate import Rng, changed, damaged, rezipped

Reader = Callable[[Rng], None]
PORT = {"dtype": "float32", "shape": ["B"]}
STATE = {"dtype": "float32", "shape": ["B", 4, 16, 16]}
COMMON = {
    "status": "passed",
    "recipe": {"name": "dit-fashion-s", "family": "DiT", "source": ""},
    "weights": {"random": False, "path": "x.safetensors"},
    "opset": 23,
    "precision": {"name": "fp32", "gate": "fp32"},
    "batch": {"min": 1, "opt": 2, "max": 4},
    "folded": None,
    "sizes": {"onnx": 5, "time_tables": None},
}
DENOISER = {
    **COMMON,
    "name": "dit-fashion-s",
    "folded": 2,
    "sizes": {"onnx": 5, "time_tables": {"tables": 1, "bytes": 128, "nodes": 4, "weight_bytes": 1024}},
    "graphs": {
        "model": {
            "inputs": [
                {"name": "x", "role": "state", **STATE},
                {"name": "t", "role": "time", "choices": [0.0, 999.0], **PORT},
                {"name": "y", "role": "label", "dtype": "int64", "shape": ["B"], "range": [0, 2]},
            ],
            "outputs": [{"name": "out", "role": "prediction", "dtype": "float32", "shape": ["B", 8, 16, 16]}],
            "nodes": {"a": "float32"},
            "custom_ops": [{"name": "DexTMSA", "version": 1, "nodes": 1, "ptx_sha256": []}],
            "engine": {
                "file": "engines/a.plan",
                "flavour": "tensorrt",
                "version": "10.0",
                "targets": ["sm89"],
                "plan_bytes": 1,
                "checked_nodes": 1,
                "reason": "",
                "fingerprint": {"shapes": {"x": [[1, 4, 16, 16], [2, 4, 16, 16], [4, 4, 16, 16]]}},
            },
        }
    },
}
MODEL = {
    "schema": 2,
    "name": "dit-fashion-s",
    "status": "passed",
    "loss": {"relative_l2": 1e-6, "latents_snr_db": None},
    "accepted_loss": False,
    "dexport": "0.1.0",
    "program": {
        "kind": "diffusion",
        "condition": {"kind": "class", "classes": 2, "names": ["T-shirt", "trouser"], "null": 2},
        "schedule": "linear betas 1e-4..2e-2, 1000 steps",
        "prediction": "epsilon, learned variance",
        "sampler": "ddpm",
        "steps": 2,
        "cfg_scale": 2.0,
        "guidance": {"channels": 4, "power": 1.0},
        "decoding": {"kind": "network", "recipe": "sd-vae-decoder", "scale": 0.5, "factor": 1, "tiles": 1},
        "route": [{"share": 0.5}, {"share": 0.5}],
    },
    "networks": {
        "denoiser.0": DENOISER,
        "denoiser.1": DENOISER,
        "decoder": {
            **COMMON,
            "name": "sd-vae-decoder",
            "graphs": {
                "model": {
                    "inputs": [{"name": "z", "role": "latent", **STATE}],
                    "outputs": [{"name": "out", "role": "picture", "dtype": "float32", "shape": ["B", 3, 128, 128]}],
                    "nodes": {},
                    "custom_ops": [],
                    "engine": None,
                }
            },
        },
    },
}
"""A manifest with every field that a reader of bundles looks at."""


class Manifests:
    """Manifests of bundles: read, shown, and asked what a sampler, an engine and a server ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bundle"
        for name in MODEL["networks"]:
            (self.folder / NETWORKS / name / ENGINES).mkdir(parents=True)
            (self.folder / NETWORKS / name / "model.onnx").write_bytes(b"graph")
            (self.folder / NETWORKS / name / ENGINES / "a.plan").write_bytes(b"plan")
        self.manifest = {**MODEL, "files": hash_files(self.folder)}

    def __call__(self, rng: Rng) -> None:
        if rng.random() < 0.7:
            manifest = changed(rng, self.manifest)
            if rng.random() < 0.5 and isinstance(manifest, dict):
                manifest["files"], manifest["schema"] = self.manifest["files"], MODEL["schema"]
            text = json.dumps(manifest).encode()
        else:
            text = damaged(rng, json.dumps(self.manifest).encode())
        (self.folder / MANIFEST).write_bytes(text)
        bundle = load_bundle(self.folder)
        uses: list[Callable[[Bundle], Any]] = [_shown, _engine, _program, _configs]
        errors = []
        for use in uses:
            try:
                use(bundle)
            except DexportError as error:
                errors.append(error)
        if errors:
            raise errors[0]


def _shown(bundle: Bundle) -> None:
    with terminal.out.capture() as text:
        print_bundle(bundle)
    text.get().encode()  # as a terminal takes it


def _engine(bundle: Bundle) -> None:
    read_facts(bundle.network)


def _program(bundle: Bundle) -> None:
    program = OpenProgram(bundle, "tensorrt")
    program.largest_batch()
    program.with_settings(cfg_scale=1.5)
    program.check_pictures()


def _configs(bundle: Bundle) -> None:
    with reading_manifest(bundle):
        for network in bundle.networks.values():
            for graph in network.graphs:
                graph_config("x", network, graph)
    pipeline_config("x", OpenProgram(bundle))


class Archives:
    """Archives: damaged ones, ones that are right but for what their manifest says, and signatures in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bundle = folder / "small"
        (bundle / NETWORKS / "decoder").mkdir(parents=True)
        (bundle / "model.onnx").write_bytes(b"graph" * 200)
        (bundle / NETWORKS / "decoder" / "x").write_bytes(b"")
        self.manifest = {"schema": MODEL["schema"], "status": "passed", "files": hash_files(bundle)}
        (bundle / MANIFEST).write_text(json.dumps(self.manifest))
        facts = {"algorithm": "ed25519", "key": "00" * 32, "signature": "00" * 64}
        self.signature = json.dumps(facts).encode()
        (bundle / SIGNATURE).write_bytes(self.signature)
        self.members = {name: (bundle / name).read_bytes() for name in self.manifest["files"]}
        self.good = pack(bundle, folder / "good.dexport").path.read_bytes()
        self.path = folder / "x.dexport"

    def __call__(self, rng: Rng) -> None:
        self.path.write_bytes(damaged(rng, self.good) if rng.random() < 0.5 else self._forged(rng))
        check(self.path)
        unpack(self.path, self.folder / "unpacked", force=True)
        outside = {entry.name for entry in self.folder.iterdir()} - {"small", "good.dexport", "x.dexport", "unpacked"}
        assert not outside, outside

    def _forged(self, rng: Rng) -> bytes:
        """As its writer would make it of another manifest, with every digest that it needs."""
        manifest = changed(rng, self.manifest) if rng.random() < 0.8 else self.manifest
        signature = damaged(rng, self.signature) if rng.random() < 0.3 else None
        file = io.BytesIO()
        archive._write_start(file, json.dumps(manifest).encode(), signature)
        files = manifest.get("files") if isinstance(manifest, dict) else None
        for name in sorted(files) if isinstance(files, dict) else ():
            content = self.members.get(name, b"")
            try:
                file.write(archive._header(name, len(content)) + content + archive._padding(len(content)))
            except UnicodeEncodeError:
                continue
        file.write(archive.END)
        return file.getvalue()


class Signatures:
    """Signature files."""

    def __init__(self, _folder: Path) -> None:
        self.facts = {"algorithm": "ed25519", "key": "00" * 32, "signature": "00" * 64}

    def __call__(self, rng: Rng) -> None:
        whole = json.dumps(self.facts).encode()
        read_signature(
            damaged(rng, whole) if rng.random() < 0.5 else json.dumps(changed(rng, self.facts)).encode(), "x"
        )


class Safetensors:
    """Safetensors checkpoints: every tensor is read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "x.safetensors"
        self.network = _network()
        self.good = to_safetensors(_weights())

    def __call__(self, rng: Rng) -> None:
        self.path.write_bytes(damaged(rng, self.good) if rng.random() < 0.5 else self._forged(rng))
        _read_all(self.path, self.network)

    def _forged(self, rng: Rng) -> bytes:
        length = struct.unpack("<Q", self.good[:8])[0]
        header = json.dumps(changed(rng, json.loads(self.good[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(header)) + header + self.good[8 + length :]


class TorchFiles:
    """PyTorch checkpoints: damaged files, and whole zip files with a damaged pickle or record in them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "x.pt"
        self.network = _network()
        self.good = []
        for content in (_weights(), {"model": _weights(), "args": argparse.Namespace(a=1)}):
            for new in (True, False):
                file = io.BytesIO()
                torch.save(content, file, _use_new_zipfile_serialization=new)
                self.good.append(file.getvalue())
        self.good.append(pickle.dumps({name: tensor.tolist() for name, tensor in _weights().items()}))

    def __call__(self, rng: Rng) -> None:
        good = rng.choice(self.good)
        whole = good.startswith(b"PK") and rng.random() < 0.7
        self.path.write_bytes(rezipped(rng, good, ("data.pkl",)) if whole else damaged(rng, good))
        _read_all(self.path, self.network)


def _network() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.rand(tensor.shape) for name, tensor in _network().state_dict().items()}


def _read_all(path: Path, network: nn.Module) -> None:
    source = open_weights(path, network)
    for name in source.shapes:
        source.read(name, torch.float32)


def _with(read: Callable[[Rng, Path], None]) -> Callable[[Path], Reader]:
    """A reader of a function that takes a folder too."""
    return lambda folder: lambda rng: read(rng, folder)


READERS: dict[str, Callable[[Path], Reader]] = {
    "manifest": Manifests,
    "archive": Archives,
    "signature": Signatures,
    "safetensors": Safetensors,
    "torch": TorchFiles,
    "report": Reports,
    "baseline": Baselines,
    "record": Records,
    "precision map": PrecisionMaps,
    "picture": _with(read_mutated_picture),
    "npz": _with(read_mutated_npz),
    "run.json": _with(read_mutated_record),
    "onnx": OnnxFiles,
    "onnx bundle": OnnxBundles,
}


@contextmanager
def reader(name: str) -> Iterator[Reader]:
    """A reader in a temporary folder."""
    folder = Path(tempfile.mkdtemp())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield READERS[name](folder)
    finally:
        shutil.rmtree(folder)


def try_one(read: Reader, seed: str) -> bool:
    """Whether the reader took the input of this seed; anything but a printable DexportError passes through."""
    try:
        read(random.Random(seed))
    except DexportError as error:
        f"{error}\n{error.hint}".encode()
        return False
    return True


def main() -> None:
    """Print a line per reader; exit with 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="inputs per reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=list(READERS), action="append", help="default: all")
    arguments = parser.parse_args()
    found = 0
    for name in arguments.reader or READERS:
        started, taken, findings = time.perf_counter(), 0, 0
        with reader(name) as read:
            for number in range(arguments.count):
                seed = f"{name}-{arguments.seed}-{number}"
                try:
                    taken += try_one(read, seed)
                except Exception:  # noqa: BLE001 - whatever it is, it is a finding
                    findings += 1
                    if findings <= 5:
                        print(f"FOUND by {seed}:\n{traceback.format_exc()}", file=sys.stderr)
        seconds = time.perf_counter() - started
        refused = arguments.count - taken - findings
        print(
            f"{name}: {arguments.count} inputs, {refused} refused, {taken} taken, {findings} findings, {seconds:.0f} s"
        )
        found += findings
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
