"""A bundle's ONNX file in programs that know nothing of dexport; each test skips where its program is not here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors import safe_open

import dexport
from tests.bundles import trained_inputs
from tests.golden import assert_golden

ROOT = Path(__file__).parent.parent
WEB = ROOT / "node_modules" / "onnxruntime-web" / "dist"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)

TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm", ".html": "text/html"}
PAGE = """<script type="module">
try {
  const ort = await import("/web/ort.wasm.min.mjs");
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = "/web/";
  const bytes = async (path) => (await fetch(path)).arrayBuffer();
  const session = await ort.InferenceSession.create("/bundle/model.onnx", {
    executionProviders: ["wasm"],
    externalData: [{ path: "model.onnx.data", data: "/bundle/model.onnx.data" }],
  });
  const { out } = await session.run({
    x: new ort.Tensor("float32", new Float32Array(await bytes("/inputs/x")), [3, 4, 16, 16]),
    t: new ort.Tensor("float32", new Float32Array(await bytes("/inputs/t")), [3]),
    y: new ort.Tensor("int64", new BigInt64Array(await bytes("/inputs/y")), [3]),
  });
  await fetch("/out", { method: "POST", body: out.data });
} catch (error) {
  await fetch("/error", { method: "POST", body: `${error}` });
}
</script>"""


@pytest.fixture(scope="module")
def expected(trained: Path) -> np.ndarray:
    return dexport.load(trained)(**trained_inputs())["out"]


def test_names_are_the_modules(trained: Path) -> None:
    """What Netron shows: nodes and weights carry the names that the checkpoint has."""
    graph = onnx.load(trained / "model.onnx", load_external_data=False).graph
    nodes = [node.name for node in graph.node]
    assert len(set(nodes)) == len(nodes)
    assert all(any(name.startswith(f"blocks.{block}.attn.qkv") for name in nodes) for block in range(6))
    modules = ("blocks.", "x_embedder", "t_embedder", "y_embedder", "final_layer")
    assert sum(name.startswith(modules) for name in nodes) > 0.9 * len(nodes)
    with safe_open(ROOT / "checkpoints" / "dit-fashion-s.safetensors", "np") as file:
        named = {name.rpartition(".")[0] for name in list(file.keys())}
    weights = [tensor.name for tensor in graph.initializer if int(np.prod(tensor.dims)) > 1000]
    assert weights
    assert all(any(name.startswith(module) for module in named) for name in weights)


def test_polygraphy_runs_it(trained: Path, expected: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("polygraphy", reason="polygraphy is not installed (extra rtx)")
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    save_json([trained_inputs()], str(tmp_path / "inputs.json"))
    files = ["--load-inputs", tmp_path / "inputs.json", "--save-outputs", tmp_path / "outputs.json"]
    program = Path(sys.executable).with_name("polygraphy")
    command = [sys.executable, program, "run", trained / "model.onnx", "--onnxrt", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ((_, (iteration,)),) = RunResults.load(str(tmp_path / "outputs.json"))
    assert_golden(iteration["out"], expected)


def test_openvino_runs_it(trained: Path, expected: np.ndarray) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed (pip install openvino)")
    model = openvino.Core().compile_model(trained / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (received,) = model(trained_inputs()).values()
    assert_golden(received, expected)


@contextmanager
def web_server(bundle: Path, received: dict[str, bytes], done: threading.Event) -> Iterator[str]:
    """The page, the package, the bundle and the inputs on loopback; what the page posts goes to ``received``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            folder, _, name = self.path.strip("/").partition("/")
            content = PAGE.encode()
            if folder == "inputs":
                content = trained_inputs()[name].tobytes()
            elif folder in ("web", "bundle"):
                file = {"web": WEB, "bundle": bundle}[folder] / Path(name).name
                if not file.is_file():
                    self.send_error(404)
                    return
                content = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", TYPES.get(Path(name).suffix or ".html", "application/octet-stream"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            received[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(204)
            self.end_headers()
            done.set()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
@pytest.mark.skipif(not WEB.is_dir(), reason="onnxruntime-web is not here (npm install onnxruntime-web in the clone)")
def test_a_browser_runs_it(trained: Path, expected: np.ndarray, tmp_path: Path) -> None:
    received: dict[str, bytes] = {}
    done = threading.Event()
    with web_server(trained, received, done) as address:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path}"]
        browser = subprocess.Popen([CHROMIUM, *options, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert done.wait(120), "the page did not answer"
        finally:
            browser.kill()
            browser.wait(30)
    assert "/error" not in received, received["/error"].decode()
    out = np.frombuffer(received["/out"], np.float32).reshape(expected.shape)
    assert_golden(out, expected)
