"""A real Triton Inference Server on loopback: the binary and the Python backend of the package nvidia-pytriton."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
READY_SECONDS = 60.0
STOP_SECONDS = 30.0


def why_not() -> str:
    """Why there is no server here; empty where there is one."""
    for package in ("pytriton", "tritonclient", "grpc"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (`make` installs it: nvidia-pytriton, tritonclient, grpcio)"
    stub = _package() / "python_backend_stubs" / _version() / "triton_python_backend_stub"
    if not stub.is_file():
        return f"nvidia-pytriton has no Python backend for Python {_version()}"
    linked = subprocess.run(["ldd", stub], capture_output=True, text=True, check=False, env=_environment())
    missing = [line.split()[0] for line in linked.stdout.splitlines() if "not found" in line]
    return f"the Python backend needs {', '.join(missing)}" if missing or linked.returncode else ""


class Server:
    """One running server.

    Attributes:
        address: of its gRPC endpoint.
        log: what it prints.
    """

    def __init__(self, repository: Path, models: Sequence[str], folder: Path) -> None:
        http, grpc = _free_port(), _free_port()
        self.address = f"{HOST}:{grpc}"
        self.log = folder / "server.log"
        command: list[Any] = [
            _package() / "bin" / "tritonserver",
            *("--model-repository", repository, "--model-control-mode", "explicit"),
            *(argument for model in models for argument in ("--load-model", model)),
            *("--backend-directory", _backends(folder), "--allow-metrics", "false", "--exit-timeout-secs", "10"),
            *("--http-address", HOST, "--http-port", http, "--grpc-address", HOST, "--grpc-port", grpc),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(each) for each in command], stdout=log, stderr=log, env=_environment(), start_new_session=True
            )

    def client(self) -> Any:
        """A client of the gRPC endpoint."""
        from tritonclient.grpc import InferenceServerClient

        return InferenceServerClient(self.address)

    def wait(self) -> None:
        """Until it is ready, or has ended."""
        from tritonclient.utils import InferenceServerException

        deadline = time.monotonic() + READY_SECONDS
        with self.client() as client:
            while time.monotonic() < deadline and self.process.poll() is None:
                with contextlib.suppress(InferenceServerException):
                    if client.is_server_ready():
                        return
                time.sleep(0.1)
        raise AssertionError(f"the server did not get ready:\n{self.log.read_text(errors='replace')[-4000:]}")

    def stop(self) -> int:
        """Ask it to stop; its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """The whole process group, as a machine that loses power would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_SECONDS)


@contextlib.contextmanager
def serving(repository: Path, models: Sequence[str], folder: Path) -> Iterator[Server]:
    """A server that is ready; ended at the latest when the block ends."""
    server = Server(repository, models, folder)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def _package() -> Path:
    # Found, not imported: its client asks for packages that nothing here uses.
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tritonserver"


def _version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _backends(folder: Path) -> Path:
    backends = folder / "backends"
    if not backends.exists():
        python = shutil.copytree(_package() / "backends" / "python", backends / "python")
        stubs = _package() / "python_backend_stubs" / _version()
        shutil.copy(stubs / "triton_python_backend_stub", python)
    return backends


def _environment() -> dict[str, str]:
    libraries = _package().parent.parent / "nvidia_pytriton.libs"
    paths = [str(Path(__file__).parent.parent), *(path for path in sys.path if path)]
    return {
        **os.environ,
        # The embedded interpreter takes its prefix from the `python3` that it finds first.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "LD_LIBRARY_PATH": str(libraries),
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
