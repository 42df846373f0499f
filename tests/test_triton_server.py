"""A real Triton Inference Server on loopback serves what ``dexport pack --triton`` writes.

The package's server has the Python backend only. The denoisers' configurations are served by it too, with a few lines
of Python in place of the ONNX Runtime backend: batching, shapes and limits are the server's.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dexport
from dexport.bundle import hash_files
from dexport.model_repository import CONFIG, pack_for_triton
from dexport.runtime.opened import OpenProgram
from dexport.runtime.service import Picture, make_pictures
from tests.golden import assert_golden
from tests.triton_server import Server, serving, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

STEPS = 2
TYPES = {"float32": "FP32", "int64": "INT64", "int32": "INT32"}
IN_PLACE_OF_ONNX_RUNTIME = """
import json
import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from dexport.runtime.triton_model import _tensor

class TritonPythonModel:
    def initialize(self, args):
        self.session = ort.InferenceSession(f"{args['model_repository']}/1/model.onnx")
        self.names = [value.name for value in self.session.get_inputs()]

    def execute(self, requests):
        inputs = [
            {name: np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for name in self.names}
            for request in requests
        ]
        outputs = [self.session.run(None, each)[0] for each in inputs]
        return [pb_utils.InferenceResponse([_tensor("out", output)]) for output in outputs]
"""


@pytest.fixture(scope="module")
def repository(plain: Path, fused: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline and the denoiser of a bundle, and the pipeline of one with fused guidance."""
    models = tmp_path_factory.mktemp("repository")
    denoiser = pack_for_triton(plain, models).folders[0]
    config = (denoiser / CONFIG).read_text().replace('platform: "onnxruntime_onnx"', 'backend: "python"')
    (denoiser / CONFIG).write_text(config)
    (denoiser / "1" / "model.py").write_text(IN_PLACE_OF_ONNX_RUNTIME)
    pack_for_triton(fused, models)
    return models


@pytest.fixture(scope="module")
def server(repository: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = [f"{plain.name}_pipeline", plain.name, "fused_pipeline"]
    with serving(repository, models, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def ask(server: Server, plain: Path) -> Iterator[Callable[..., np.ndarray]]:
    with server.client() as client:
        yield lambda **columns: pictures(client, f"{plain.name}_pipeline", **columns)


def infer(client: Any, model: str, output: str, **arrays: np.ndarray) -> np.ndarray:
    from tritonclient.grpc import InferInput

    inputs = []
    for name, array in arrays.items():
        inputs.append(InferInput(name, array.shape, TYPES[array.dtype.name]))
        inputs[-1].set_data_from_numpy(array)
    return client.infer(model, inputs, client_timeout=60).as_numpy(output)


def pictures(client: Any, model: str, **columns: Any) -> np.ndarray:
    kinds = {"label": np.int64, "seed": np.int64, "cfg_scale": np.float32, "steps": np.int32}
    arrays = {name: np.asarray(values, kinds[name]).reshape(-1, 1) for name, values in columns.items()}
    return infer(client, model, "image", **arrays)


def test_the_server_is_well_and_knows_the_models(server: Server, plain: Path) -> None:
    with server.client() as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        for model in (f"{plain.name}_pipeline", plain.name, "fused_pipeline"):
            assert client.is_model_ready(model)
        metadata = client.get_model_metadata(f"{plain.name}_pipeline", as_json=True)
    assert [value["name"] for value in metadata["inputs"]] == ["label", "seed", "steps", "cfg_scale"]
    assert metadata["outputs"] == [{"name": "image", "datatype": "UINT8", "shape": ["-1", "32", "32", "1"]}]


def test_pictures_are_those_of_the_pipeline(ask: Callable[..., np.ndarray], plain: Path) -> None:
    labels, seeds = [3, 4, 3], [7, 8, 9]
    received = ask(label=labels, seed=seeds, cfg_scale=[1.5] * 3, steps=[STEPS] * 3)
    wanted = [
        Picture(label, seed, {"cfg_scale": 1.5, "steps": STEPS}) for label, seed in zip(labels, seeds, strict=True)
    ]
    (expected,) = make_pictures(OpenProgram.open(plain), [wanted], 4)
    assert isinstance(expected, np.ndarray)
    assert received.shape == (3, 32, 32, 1)
    assert received.dtype == np.uint8
    assert np.abs(received.astype(int) - expected).max() <= 1
    assert np.ptp(received) > 0


@pytest.mark.parametrize("clients", [1, 4, 16])
def test_no_request_of_many_clients_fails(
    clients: int, server: Server, plain: Path, record_property: Callable[[str, object], None]
) -> None:
    each = 48 // clients

    def work(number: int) -> list[np.ndarray]:
        with server.client() as client:
            return [
                pictures(client, f"{plain.name}_pipeline", label=[number % 10], seed=[turn], steps=[STEPS])
                for turn in range(each)
            ]

    work(0)
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(work, range(clients)))
    seconds = time.perf_counter() - started
    assert [len(answer) for answer in answers] == [each] * clients
    (expected,) = make_pictures(OpenProgram.open(plain), [[Picture(0, 0, {"steps": STEPS})]], 4)
    assert np.abs(answers[0][0].astype(int) - expected).max() <= 1
    rate = clients * each / seconds
    record_property(
        "measured", f"Triton, {clients} clients: {clients * each} requests, none failed, {rate:.0f} a second"
    )


def test_a_small_request_does_not_wait_for_a_large_one(server: Server, plain: Path) -> None:
    model, done = f"{plain.name}_pipeline", []

    def work(name: str, count: int, steps: int) -> None:
        with server.client() as client:
            pictures(client, model, label=[0] * count, seed=[0] * count, steps=[steps] * count)
            done.append(name)

    with ThreadPoolExecutor(2) as pool:
        large = pool.submit(work, "large", 4, 1000)
        time.sleep(0.3)
        pool.submit(work, "small", 1, STEPS).result()
        large.result()
    assert done == ["small", "large"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"label": [10], "seed": [0]}, "no class 10: the model has 10"),
    ({"label": [0, -1], "seed": [0, 0]}, "no class -1"),
    ({"label": [0], "seed": [-1]}, "seed -1"),
    ({"label": [0], "seed": [0], "cfg_scale": [0.5]}, "cfg_scale 0.5: Expected `float` >= 1.0"),
    ({"label": [0], "seed": [0], "steps": [0]}, "0 steps"),
    ({"label": [0]}, "'seed'|expected"),
    ({"label": [0, 1], "seed": [0]}, "batch"),
    ({"label": [0] * 5, "seed": [0] * 5}, "batch-size must be <= 4"),
]


@pytest.mark.parametrize(("columns", "match"), WRONG, ids=[match for _, match in WRONG])
def test_wrong_requests_are_told_and_harm_nothing(
    columns: dict[str, Any], match: str, ask: Callable[..., np.ndarray]
) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match=match):
        ask(**columns)
    assert ask(label=[0], seed=[0], steps=[STEPS]).shape == (1, 32, 32, 1)


def test_wrong_shapes_types_and_models_are_told(server: Server, plain: Path) -> None:
    from tritonclient.utils import InferenceServerException

    pipeline, seed = f"{plain.name}_pipeline", np.zeros((1, 1), np.int64)
    with server.client() as client:
        for label, match in [
            (np.zeros((1, 2), np.int64), "unexpected shape"),
            (np.zeros((1, 1), np.float32), "data-type"),
            (np.zeros(1, np.int64), "shape|dims"),
        ]:
            with pytest.raises(InferenceServerException, match=match):
                infer(client, pipeline, "image", label=label, seed=seed)
        with pytest.raises(InferenceServerException, match="unknown model"):
            infer(client, "other", "image", seed=seed)
        assert client.is_model_ready(pipeline)


def noise(rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, 4, 16, 16), dtype=np.float32)
    return {"x": x, "t": np.linspace(1, 999, rows, dtype=np.float32), "y": np.arange(rows)}


def test_the_denoisers_configuration_fits_its_graph(server: Server, plain: Path) -> None:
    from tritonclient.utils import InferenceServerException

    inputs = noise(3)
    columns = {"x": inputs["x"], "t": inputs["t"][:, None], "y": inputs["y"][:, None]}
    with server.client() as client:
        received = infer(client, plain.name, "out", **columns)
        assert_golden(received, dexport.load(plain)(**inputs)["out"])
        with pytest.raises(InferenceServerException, match="batch-size must be <= 4"):
            infer(client, plain.name, "out", **{n: np.repeat(a, 2, axis=0) for n, a in columns.items()})


def test_guidance_inside_of_the_graph_is_served(server: Server, fused: Path) -> None:
    with server.client() as client:
        received = pictures(client, "fused_pipeline", label=[1, 2], seed=[3, 4], cfg_scale=[2.5] * 2, steps=[STEPS] * 2)
    settings = {"cfg_scale": 2.5, "steps": STEPS}
    wanted = [[Picture(1, 3, settings), Picture(2, 4, settings)]]
    (expected,) = make_pictures(OpenProgram.open(fused), wanted, 4)
    assert isinstance(expected, np.ndarray)
    assert np.abs(received.astype(int) - expected).max() <= 1


def test_a_server_killed_in_the_middle_leaves_the_repository_loadable_and_the_next_one_stops_cleanly(
    repository: Path, plain: Path, tmp_path: Path
) -> None:
    from tritonclient.utils import InferenceServerException

    model = f"{plain.name}_pipeline"
    before = hash_files(repository)
    errors: list[InferenceServerException] = []
    with serving(repository, [model], tmp_path) as first, first.client() as client:

        def work() -> None:
            try:
                pictures(client, model, label=[0], seed=[0], steps=[1000])
            except InferenceServerException as error:
                errors.append(error)

        busy = threading.Thread(target=work)
        busy.start()
        time.sleep(0.3)
        first.kill()
        busy.join(60)
    assert errors  # the killed server was at work
    assert hash_files(repository) == before
    with serving(repository, [model], tmp_path) as second:
        with second.client() as client:
            assert pictures(client, model, label=[0], seed=[0], steps=[STEPS]).shape == (1, 32, 32, 1)
        assert second.stop() == 0


def test_a_changed_bundle_is_not_served(repository: Path, plain: Path, tmp_path: Path) -> None:
    model = f"{plain.name}_pipeline"
    shutil.copytree(repository / model, tmp_path / "models" / model)
    weights = tmp_path / "models" / model / "1" / "bundle" / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    server = Server(tmp_path / "models", [model], tmp_path)
    try:
        assert server.process.wait(60) != 0
    finally:
        server.kill()
    assert "model.onnx.data: sha256 differs" in server.log.read_text()
