"""Model repositories for Triton: what is written, and that the configurations are what Triton's schema knows."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dexport.bundle import MANIFEST, MODEL, MODEL_DATA, Bundle, hash_files, load_bundle
from dexport.cli import main
from dexport.contract import LATENT, PICTURE, Decoding, Graph, Port, to_json
from dexport.errors import InputError, MachineError, UsageError
from dexport.model_repository import CONFIG, graph_config, pack_for_triton, pipeline_config
from dexport.runtime.opened import OpenProgram


def kind(tensor: Any) -> str:
    """The type of an input or output by its name in the schema."""
    return tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name


def parsed(config: str | Path) -> Any:
    """The configuration as Triton's own schema reads it."""
    pytest.importorskip("grpc", reason="tritonclient's schema needs grpcio")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
    from google.protobuf import text_format

    text = config if isinstance(config, str) else (config / CONFIG).read_text(encoding="utf-8")
    return text_format.Parse(text, schema.ModelConfig())


def with_changes(bundle: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Bundle:
    """A copy of a bundle whose manifest says something else."""
    shutil.copytree(bundle, target)
    manifest = json.loads((target / MANIFEST).read_text())
    change(manifest)
    (target / MANIFEST).write_text(json.dumps(manifest))
    return load_bundle(target)


def engine(flavour: str) -> dict[str, Any]:
    """What a manifest says of an engine whose file is the graph's."""
    shapes = {name: [[1, *rest]] * 3 for name, rest in (("x", [4, 16, 16]), ("t", []), ("y", []))}
    facts = {"file": MODEL, "flavour": flavour, "version": "1", "targets": ["sm89"]}
    return {**facts, "fingerprint": {"shapes": shapes}}


def test_it_writes_the_graph_and_the_pipeline(plain: Path, tmp_path: Path) -> None:
    denoiser, pipeline = pack_for_triton(plain, tmp_path / "models").folders
    assert (denoiser.name, pipeline.name) == (plain.name, f"{plain.name}_pipeline")
    assert sorted(p.relative_to(denoiser).as_posix() for p in denoiser.rglob("*") if p.is_file()) == [
        "1/model.onnx",
        "1/model.onnx.data",
        CONFIG,
    ]
    assert load_bundle(pipeline / "1" / "bundle").manifest == load_bundle(plain).manifest
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == sorted([denoiser.name, pipeline.name])


def test_the_denoisers_configuration(plain: Path, tmp_path: Path) -> None:
    config = parsed(pack_for_triton(plain, tmp_path).folders[0])
    assert (config.name, config.platform, config.max_batch_size) == (plain.name, "onnxruntime_onnx", 4)
    assert [(i.name, kind(i), list(i.dims), i.HasField("reshape")) for i in config.input] == [
        ("x", "TYPE_FP32", [4, 16, 16], False),
        ("t", "TYPE_FP32", [1], True),
        ("y", "TYPE_INT64", [1], True),
    ]
    assert [(o.name, kind(o), list(o.dims)) for o in config.output] == [("out", "TYPE_FP32", [8, 16, 16])]
    assert list(config.dynamic_batching.preferred_batch_size) == [load_bundle(plain).network.manifest["batch"]["opt"]]


def test_the_pipelines_configuration(plain: Path, tmp_path: Path) -> None:
    config = parsed(pack_for_triton(plain, tmp_path).folders[1])
    assert (config.backend, config.max_batch_size) == ("python", 4)
    assert [(i.name, i.optional) for i in config.input] == [
        ("label", False),
        ("seed", False),
        ("steps", True),
        ("cfg_scale", True),
    ]
    assert [(o.name, kind(o), list(o.dims)) for o in config.output] == [("image", "TYPE_UINT8", [32, 32, 1])]
    assert config.parameters["provider"].string_value == "cpu"


def test_a_graph_with_a_scale_for_the_whole_batch_is_in_the_pipeline_only(fused: Path, tmp_path: Path) -> None:
    models = pack_for_triton(fused, tmp_path)
    assert [folder.name for folder in models.folders] == ["fused_pipeline"]
    assert models.left_out == {"fused": "Triton serves no input without dimensions, as its cfg_scale is"}
    parsed(models.folders[0])


def test_a_plan_is_served_where_triton_can_run_it(plain: Path, tmp_path: Path) -> None:
    """Triton has a backend for TensorRT and none for TensorRT-RTX."""
    for flavour, platform in (("tensorrt", "tensorrt_plan"), ("tensorrt-rtx", "onnxruntime_onnx")):

        def give_an_engine(manifest: dict[str, Any], flavour: str = flavour) -> None:
            network = manifest["networks"]["denoiser"]
            network["batch"] = {"min": 1, "opt": 16, "max": 64}
            network["graphs"]["model"]["engine"] = engine(flavour)

        bundle = with_changes(plain, tmp_path / flavour, give_an_engine)
        config = parsed(graph_config("x", bundle.network, "model"))
        assert (config.platform, config.max_batch_size) == (platform, 64)
        model = pack_for_triton(bundle.path, tmp_path / "models").folders[0] / "1"
        assert (model / "model.plan").exists() == (flavour == "tensorrt")


def test_every_network_of_a_stitched_bundle_is_a_model(stitched: Path, tmp_path: Path) -> None:
    *denoisers, pipeline = pack_for_triton(stitched, tmp_path).folders
    bundle = load_bundle(stitched)
    assert [denoiser.name for denoiser in denoisers] == [f"{stitched.name}_0", f"{stitched.name}_1"]
    for denoiser, network in zip(denoisers, bundle.networks.values(), strict=True):
        files = hash_files(denoiser / "1")
        assert files == {name: bundle.manifest["files"][network.file(name)] for name in (MODEL, MODEL_DATA)}
        parsed(denoiser)
    assert list(parsed(pipeline).output[0].dims) == [32, 32, 1]


def test_the_shape_of_pictures_follows_the_decoding(plain: Path) -> None:
    def bundle(decoding: Decoding, state: tuple[int, ...], decoder: Graph | None = None) -> Bundle:
        """The manifest of a bundle whose states and pictures have other shapes."""
        manifest = copy.deepcopy(dict(load_bundle(plain).manifest))
        manifest["program"].update(decoding=to_json(decoding), guidance=None, cfg_scale=1.0)
        manifest["program"]["condition"]["null"] = None
        denoiser = manifest["networks"]["denoiser"]
        ports = denoiser["graphs"]["model"]
        ports["inputs"][0]["shape"] = ["B", *state]
        ports["outputs"][0]["shape"] = ["B", 2 * state[0], *state[1:]]
        if decoder is not None:
            manifest["networks"]["decoder"] = {**denoiser, "graphs": {"model": to_json(decoder)}}
            manifest["files"].update({f"networks/{name}/{MODEL}": {} for name in manifest["networks"]})
        return Bundle(plain, manifest)

    def shape(bundle: Bundle) -> list[int]:
        return list(parsed(pipeline_config("x", OpenProgram(bundle))).output[0].dims)

    vae = Graph(
        (Port("z", "float32", ("B", 4, 32, 32), LATENT),), (Port("image", "float32", ("B", 3, 256, 256), PICTURE),)
    )
    network = Decoding("network", "sd-vae-decoder", 0.18)
    for decoding, state, decoder, expected in [
        (Decoding(), (3, 64, 64), None, [64, 64, 3]),
        (Decoding("pixel-shuffle", factor=2), (4, 16, 20), None, [32, 40, 1]),
        (Decoding("pixel-shuffle", factor=2, tiles=4), (4, 16, 20), None, [32, 40, 1]),
        (network, (4, 64, 32), vae, [512, 256, 3]),  # larger than the decoder's own 32: tiles
    ]:
        assert shape(bundle(decoding, state, decoder)) == expected
    with pytest.raises(UsageError, match="has no decoder") as refused:
        shape(bundle(network, (4, 32, 32)))
    assert "--with-decoder" in refused.value.hint


def test_models_are_replaced_only_when_told_to_and_others_stay(plain: Path, tmp_path: Path) -> None:
    other = tmp_path / "resnet" / CONFIG
    other.parent.mkdir()
    other.write_text('name: "resnet"')
    pack_for_triton(plain, tmp_path)
    before = hash_files(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        pack_for_triton(plain, tmp_path)
    assert hash_files(tmp_path) == before
    pack_for_triton(plain, tmp_path, force=True)
    assert hash_files(tmp_path) == before
    (tmp_path / plain.name / CONFIG).write_text('name: "mine"')
    with pytest.raises(UsageError, match="--force does not replace it"):
        pack_for_triton(plain, tmp_path, force=True)


@pytest.mark.parametrize("inside", ["", "models", "networks/decoder"])
def test_a_repository_in_a_bundle_is_refused(plain: Path, inside: str, tmp_path: Path) -> None:
    bundle = shutil.copytree(plain, tmp_path / "bundle")
    link = tmp_path / "link"
    link.symlink_to(bundle)
    for repository in (bundle / inside, link / inside):
        result = CliRunner().invoke(main, ["pack", str(bundle), "--triton", str(repository)])
        assert result.exit_code == UsageError.exit_code
        assert f"would lie in the bundle {bundle}" in result.stderr
    load_bundle(bundle)


@pytest.mark.parametrize("function", ["copyfileobj", "copyfile"])
def test_a_full_disk_is_one_message(
    plain: Path, tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, function, full)
    result = CliRunner().invoke(main, ["pack", str(plain), "--triton", str(tmp_path / "models")])
    assert result.exit_code == MachineError.exit_code
    assert result.stderr.startswith(f"error: {tmp_path / 'models'} cannot be written: No space left on device\nfix: ")
    assert list((tmp_path / "models").iterdir()) == []


def test_what_makes_no_pictures_is_refused(plain: Path, tmp_path: Path) -> None:
    denoiser = ("networks", "denoiser")
    for path, value, match in (
        (("program",), None, "has no program"),
        ((*denoiser, "graphs"), {}, "graphs is empty"),
        ((*denoiser, "graphs", "model", "inputs"), [], "graphs is not what dexport writes there"),
        ((*denoiser, "graphs", "model", "engine"), 1, "is"),
        ((*denoiser, "batch"), 1, "is"),
    ):

        def change(manifest: dict[str, Any], path: tuple[str, ...] = path, value: Any = value) -> None:
            for key in path[:-1]:
                manifest = manifest[key]
            manifest[path[-1]] = value

        bundle = with_changes(plain, tmp_path / str(len(list(tmp_path.iterdir()))), change)
        with pytest.raises(InputError, match=match):
            pack_for_triton(bundle.path, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_the_command(plain: Path, tmp_path: Path) -> None:
    command = ["pack", str(plain), "--triton", str(tmp_path)]
    result = CliRunner().invoke(main, [*command, "--json"])
    folders = [str(tmp_path / name) for name in (plain.name, f"{plain.name}_pipeline")]
    assert json.loads(result.stdout) == {"folders": folders, "left_out": {}}
    assert f"tritonserver --model-repository {tmp_path}" in CliRunner().invoke(main, [*command, "--force"]).stdout
    assert CliRunner().invoke(main, [*command, "-o", "x"]).exit_code == UsageError.exit_code
