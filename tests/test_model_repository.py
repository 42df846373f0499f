"""Model repositories for Triton: what is written, and that the configurations are what Triton's schema knows."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dexport.bundle import MANIFEST, Bundle, hash_files, load_bundle
from dexport.cli import main
from dexport.errors import InputError, MachineError, UsageError
from dexport.model_repository import CONFIG, denoiser_config, pack_for_triton, picture_shape


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


def with_changes(bundle: Path, target: Path, **changes: Any) -> Bundle:
    """A copy of a bundle whose manifest says something else."""
    shutil.copytree(bundle, target)
    manifest = json.loads((target / MANIFEST).read_text())
    (target / MANIFEST).write_text(json.dumps({**manifest, **changes}))
    return load_bundle(target)


def test_it_writes_the_denoiser_and_the_pipeline(plain: Path, tmp_path: Path) -> None:
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
        ("cfg_scale", True),
        ("steps", True),
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
        engine = {"flavour": flavour, "file": "model.onnx"}
        bundle = with_changes(plain, tmp_path / flavour, engine=engine, batch={"min": 1, "opt": 16, "max": 64})
        config = parsed(denoiser_config("x", bundle))
        assert (config.platform, config.max_batch_size) == (platform, 64)
        model = pack_for_triton(bundle.path, tmp_path / "models").folders[0] / "1"
        assert (model / "model.plan").exists() == (flavour == "tensorrt")


def test_a_stitched_bundle_has_a_denoiser_per_part(stitched: Path, tmp_path: Path) -> None:
    *denoisers, pipeline = pack_for_triton(stitched, tmp_path).folders
    parts = [part for part, _ in load_bundle(stitched).stitch]
    assert [d.name for d in denoisers] == [f"{stitched.name}_{part.path.name}" for part in parts]
    for denoiser, part in zip(denoisers, parts, strict=True):
        assert hash_files(denoiser / "1")["model.onnx"] == part.manifest["files"]["model.onnx"]
        parsed(denoiser)
    assert list(parsed(pipeline).output[0].dims) == [32, 32, 1]


def test_the_shape_of_pictures_follows_the_decoder(plain: Path) -> None:
    def bundle(decoder: str, latent: tuple[int, ...], parts: tuple[str, ...] = ()) -> Any:
        io = {"inputs": [{"shape": ["B", *latent]}], "outputs": [{"shape": ["B", 3, 256, 256]}]}
        inside = {"decoder": bundle("none", (4, 32, 32))} if parts else {}
        facts = {"sampling": {"decoder": decoder}, "io": io}
        return type("Fake", (), {"manifest": facts, "parts": inside, "path": plain})()

    for decoder, latent, parts, shape in [
        ("none", (3, 64, 64), (), (64, 64, 3)),
        ("pixel-shuffle-2", (4, 16, 20), (), (32, 40, 1)),
        ("pixel-shuffle-2-tiles-4", (4, 16, 20), (), (32, 40, 1)),
        ("sd-vae-decoder", (4, 64, 32), ("decoder",), (512, 256, 3)),  # larger than the decoder's own 32: tiles
    ]:
        fake = bundle(decoder, latent, parts)
        assert picture_shape(fake, [fake]) == shape
    lone = bundle("sd-vae-decoder", (4, 32, 32))
    with pytest.raises(UsageError, match="has no decoder"):
        picture_shape(lone, [lone])


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


@pytest.mark.parametrize("inside", ["", "models", "parts/decoder"])
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
    for changes, match in (
        ({"sampling": None}, "makes no pictures"),
        ({"io": {}}, "is incomplete"),
        ({"batch": 1}, "is"),
    ):
        bundle = with_changes(plain, tmp_path / str(len(list(tmp_path.iterdir()))), **changes)
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
