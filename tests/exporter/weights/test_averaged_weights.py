"""Where training code puts averaged weights: they are taken and named, or named as what was not read."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dexport.errors import InputError, UsageError
from dexport.exporter.origin import same_weights
from dexport.exporter.weights.inherit import inherit_weights
from dexport.exporter.weights.loading import open_weights
from dexport.exporter.weights.source import WeightSource

State = dict[str, Any]


class Block(nn.Module):
    """A block, whose parameters have the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(3, 3)
        self.key = nn.Linear(3, 3)


class Net(nn.Module):
    """A network with a frozen parameter and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 3), requires_grad=False)
        self.register_buffer("scale", torch.ones(3))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(3)


def meta_net() -> Net:
    with torch.device("meta"):
        return Net()


def state(seed: int) -> State:
    torch.manual_seed(seed)
    net = Net()
    return {name: tensor if tensor.ndim == 0 else torch.randn_like(tensor) for name, tensor in net.state_dict().items()}


RAW, EMA = state(0), state(1)
PARAMETERS = [name for name, _ in Net().named_parameters()]
TRAINED = [name for name, parameter in Net().named_parameters() if parameter.requires_grad]
MIXED = {**RAW, **{name: EMA[name] for name in PARAMETERS}}
"""An average of parameters, with the model's buffers."""
TRAINED_MIXED = {**RAW, **{name: EMA[name] for name in TRAINED}}


def prefixed(prefix: str, tensors: State) -> State:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def listed(names: list[str] = PARAMETERS) -> list[Tensor]:
    return [EMA[name] for name in names]


def lit_ema(prefix: str = "model_ema.") -> State:
    names = {prefix + name.replace(".", ""): EMA[name] for name in TRAINED}
    return {prefix + "decay": torch.tensor(0.99), prefix + "num_updates": torch.tensor(7), **names}


def inserted(wrapper: str, tensors: State) -> State:
    """``torch.compile`` on each block."""
    return {name.replace("blocks.0.", f"blocks.0.{wrapper}."): tensor for name, tensor in tensors.items()}


NOISE = {"args": argparse.Namespace(lr=1e-4), "step": 7, "opt": {"state": {0: {"exp_avg": torch.ones(3)}}}}
FORMS: dict[str, tuple[State, str, State]] = {
    "raw": (RAW, "", RAW),
    "raw in a container": ({"model": RAW, **NOISE}, "model", RAW),
    "ema": ({"model": RAW, "ema": EMA, **NOISE}, "ema", EMA),
    "model_ema": ({"model": RAW, "model_ema": EMA, **NOISE}, "model_ema", EMA),
    "ema_state_dict": ({"state_dict": RAW, "ema_state_dict": EMA}, "ema_state_dict", EMA),
    "ema_model": ({"model": RAW, "ema_model": EMA}, "ema_model", EMA),
    "ema_params": ({"params": RAW, "ema_params": EMA}, "ema_params", EMA),
    "state_dict_ema of timm": ({"state_dict": RAW, "state_dict_ema": EMA, "arch": "vit"}, "state_dict_ema", EMA),
    "params_ema of BasicSR": ({"params": RAW, "params_ema": EMA}, "params_ema", EMA),
    "named after its decay": ({"model": RAW, "ema_0.9999": EMA}, "ema_0.9999", EMA),
    "modelEMA": ({"model": RAW, "modelEMA": EMA}, "modelEMA", EMA),
    "swa_model": ({"model": RAW, "swa_model": prefixed("module.", EMA)}, "swa_model", EMA),
    "ema.state_dict": ({"model": RAW, "ema": {"state_dict": EMA, "decay": 0.99}}, "ema.state_dict", EMA),
    "ema.model": ({"model": RAW, "ema": {"model": EMA, "updates": 5}}, "ema.model", EMA),
    "ema.module": ({"model": RAW, "ema": {"module": EMA}}, "ema.module", EMA),
    "ema.shadow, parameters": (
        {"model": RAW, "ema": {"shadow": {name: EMA[name] for name in PARAMETERS}, "decay": 0.9}},
        "ema.shadow + model",
        MIXED,
    ),
    "ema.shadow, trained": (
        {"model": RAW, "ema": {"shadow": {name: EMA[name] for name in TRAINED}, "backup": {}}},
        "ema.shadow + model",
        TRAINED_MIXED,
    ),
    "EMAModel of diffusers": (
        {"model": RAW, "ema": {"decay": 0.99, "optimization_step": 3, "shadow_params": listed()}},
        "ema.shadow_params + model",
        MIXED,
    ),
    "torch_ema": (
        {"model": RAW, "ema": {"num_updates": torch.tensor(3), "shadow_params": listed(TRAINED)}},
        "ema.shadow_params + model",
        TRAINED_MIXED,
    ),
    "torch_ema with what it swapped": (
        {"model": RAW, "ema": {"shadow_params": listed(), "collected_params": [RAW[name] for name in PARAMETERS]}},
        "ema.shadow_params + model",
        MIXED,
    ),
    "shadow_params of all": (
        {"model": RAW, "ema": {"shadow_params": list(EMA.values())}},
        "ema.shadow_params",
        EMA,
    ),
    "shadow_params of a wrapped model": (
        {"model": prefixed("module.", inserted("_orig_mod", RAW)), "ema": {"shadow_params": listed()}},
        "ema.shadow_params + model",
        MIXED,
    ),
    "ema_params as a list": ({"model": RAW, "ema_params": tuple(listed())}, "ema_params + model", MIXED),
    "ModelEmaV2 of timm": ({"model": RAW, "model_ema": prefixed("module.", EMA)}, "model_ema", EMA),
    "AveragedModel": ({"n_averaged": torch.tensor(4), **prefixed("module.", EMA)}, "", EMA),
    "AveragedModel in a container": (
        {"model": RAW, "ema": {"n_averaged": torch.tensor(4), **prefixed("module.", EMA)}},
        "ema",
        EMA,
    ),
    "AveragedModel of a compiled one": (
        {"n_averaged": torch.tensor(4), **prefixed("module._orig_mod.", inserted("_orig_mod", EMA))},
        "",
        EMA,
    ),
    "ema-pytorch": (
        {"initted": torch.tensor(True), "step": torch.tensor(9), **prefixed("ema_model.", EMA)},
        "ema_model",
        EMA,
    ),
    "ema-pytorch with the online model": (
        {
            **prefixed("online_model.", RAW),
            **prefixed("ema_model.", EMA),
            "initted": torch.tensor([True]),
            "step": torch.tensor([9]),
        },
        "ema_model",
        EMA,
    ),
    "ema-pytorch in a trainer": (
        {"model": RAW, "opt": {}, "ema": {"initted": torch.tensor(True), **prefixed("ema_model.", EMA)}},
        "ema.ema_model",
        EMA,
    ),
    "ema-pytorch in a trainer, both": (
        {"model": RAW, "ema": {**prefixed("online_model.", RAW), **prefixed("ema_model.module.", EMA)}},
        "ema.ema_model",
        EMA,
    ),
    "Lightning": (
        {"state_dict": prefixed("model.", RAW), "hyper_parameters": {"lr": 1e-4}, "callbacks": {}},
        "state_dict.model",
        RAW,
    ),
    "Lightning with ema.": (
        {"state_dict": {**prefixed("model.", RAW), **prefixed("ema.", EMA)}, "epoch": 3},
        "state_dict.ema",
        EMA,
    ),
    "Lightning with ema.module.": (
        {"state_dict": {**prefixed("net.", RAW), **prefixed("ema.module.", EMA)}, "epoch": 3},
        "state_dict.ema",
        EMA,
    ),
    "Lightning with LitEma": (
        {"state_dict": {**prefixed("model.", RAW), **lit_ema()}, "global_step": 5},
        "state_dict.model_ema + state_dict.model",
        TRAINED_MIXED,
    ),
    "LitEma of the module itself": ({**RAW, **lit_ema()}, "model_ema + the rest", TRAINED_MIXED),
    "Lightning with a callback": (
        {"state_dict": prefixed("model.", RAW), "callbacks": {"EMACallback": {"ema_state_dict": EMA}}},
        "callbacks.EMACallback.ema_state_dict",
        EMA,
    ),
    "Lightning with WeightAveraging": (
        {
            "state_dict": EMA,
            "current_model_state": RAW,
            "averaging_state": {"n_averaged": torch.tensor(3)},
        },
        "state_dict",
        EMA,
    ),
    "several deep": ({"state_dict": {"model": RAW, "ema": {"model": {"module": EMA}}}}, "", EMA),
    "in the optimizer": (
        {"model": RAW, "optimizer_states": [{"state": {}, "ema": listed(TRAINED)}]},
        "optimizer_states.0.ema + model",
        TRAINED_MIXED,
    ),
    "an empty ema": ({"model": RAW, "ema": None}, "model", RAW),
    "an ema of numbers": ({"model": RAW, "ema": {"decay": 0.9}, "ema_stats": {"beta": 0.9}}, "model", RAW),
    "a number inside": ({**RAW, "epoch": 3, "best": 0.5, "none": None, "args": {"a": [1]}, "text": "x"}, "", RAW),
    "a number in a container": ({"model": {**RAW, "step": 3, "version": None}}, "model", RAW),
    "a step of one tensor": ({"model": {**RAW, "step": torch.tensor(3)}}, "model", RAW),
    "the loss beside it": (
        {"model": RAW, "loss": torch.tensor(0.5), "rng": torch.zeros(8).byte()},
        "",
        RAW,
    ),
    "teacher alone": ({"teacher": RAW}, "teacher", RAW),
    "student alone": ({"student": RAW, "teacher": None}, "student", RAW),
    "the same weights twice": ({"model": RAW, "state_dict": RAW}, "model", RAW),
    "FSDP": (prefixed("_fsdp_wrapped_module.", inserted("_fsdp_wrapped_module", RAW)), "", RAW),
    "regional torch.compile": ({"model": inserted("_orig_mod", RAW)}, "model", RAW),
    "regional torch.compile, wrapped": (prefixed("_orig_mod.", inserted("_orig_mod", RAW)), "", RAW),
    "checkpointed blocks": (inserted("_checkpoint_wrapped_module", RAW), "", RAW),
    "DDP inside": (inserted("module", RAW), "", RAW),
}


def write(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def assert_weights(source: WeightSource, expected: State) -> None:
    assert set(source.shapes) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source._read(name), tensor), name


@pytest.mark.parametrize("form", FORMS)
def test_the_averaged_weights_are_taken(tmp_path: Path, form: str) -> None:
    value, container, expected = FORMS[form]
    source = open_weights(write(tmp_path / "w.pt", value), meta_net())
    assert_weights(source, expected)
    if container:
        assert source.origin.container == container


FLAT_FORMS = [name for name, (value, *_) in FORMS.items() if all(isinstance(v, Tensor) for v in value.values())]


@pytest.mark.parametrize("form", FLAT_FORMS)
def test_the_same_in_safetensors(tmp_path: Path, form: str) -> None:
    value, container, expected = FORMS[form]
    save_file({name: tensor.clone() for name, tensor in value.items()}, tmp_path / "w.safetensors")
    source = open_weights(tmp_path / "w.safetensors", meta_net())
    assert_weights(source, expected)
    assert source.origin.container == container


def test_what_torch_itself_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        averaged.update_parameters(net)
    path = write(tmp_path / "w.pt", {"model": net.state_dict(), "ema": averaged.state_dict()})
    assert_weights(open_weights(path, meta_net()), averaged.module.state_dict())
    compiled = copy.deepcopy(net)
    compiled.blocks[0] = torch.compile(compiled.blocks[0])  # type: ignore[call-overload]
    assert_weights(open_weights(write(tmp_path / "c.pt", compiled.state_dict()), meta_net()), net.state_dict())


def cut(names: State, name: str = "blocks.0.query.weight") -> State:
    return {**names, name: names[name][:2]}


UNREADABLE: dict[str, tuple[State, str]] = {
    "another number of tensors": ({"model": RAW, "ema": {"shadow_params": listed()[:-1]}}, "ema.shadow_params"),
    "another order": ({"model": RAW, "ema": {"shadow_params": listed()[::-1]}}, "ema.shadow_params"),
    "other shapes": ({"model": RAW, "ema": cut(EMA)}, "ema"),
    "other names": ({"model": RAW, "ema": prefixed("encoder.", EMA)}, "ema"),
    "one flat tensor": ({"model": RAW, "ema": {"shadow": torch.ones(9)}}, "ema"),
    "a flat list": ({"model": RAW, "ema_params": [torch.ones(99)]}, "ema_params"),
    "lists for several decays": ({"model": RAW, "ema_params": [listed(), [t + 1 for t in listed()]]}, "ema_params"),
    "sparse": ({"model": RAW, "ema": {**EMA, "scale": torch.ones(3).to_sparse()}}, "ema"),
    "prefix": ({"state_dict": {**prefixed("model.", RAW), **prefixed("ema.", cut(EMA))}}, "state_dict.ema"),
    "in a callback": ({"state_dict": RAW, "callbacks": {"EMA": {"weights": cut(EMA)}}}, "callbacks.EMA.weights"),
}


@pytest.mark.parametrize("form", UNREADABLE)
def test_an_average_that_cannot_be_read_is_named(tmp_path: Path, form: str) -> None:
    value, label = UNREADABLE[form]
    path = write(tmp_path / "w.pt", value)
    with pytest.raises(InputError, match=r"averaged weights|several weights") as caught:
        open_weights(path, meta_net())
    assert label in str(caught.value)
    address = caught.value.hint.rpartition("::")[2]
    if "not averaged" in caught.value.hint:
        assert_weights(open_weights(f"{path}::{address}", meta_net()), RAW)


@pytest.mark.parametrize(
    "value",
    [
        {"ema_0.999": EMA, "ema_0.9999": RAW},
        {"student": RAW, "teacher": EMA},
        {"model": RAW, "state_dict": EMA},
        {"model": RAW, "ema": {"fast": EMA, "slow": RAW}},
    ],
    ids=["decays", "teacher", "raw", "nested"],
)
def test_several_weights_that_fit_are_named(tmp_path: Path, value: State) -> None:
    path = write(tmp_path / "w.pt", value)
    with pytest.raises(InputError, match="several weights that fit: ") as caught:
        open_weights(path, meta_net())
    for address in str(caught.value).rpartition(": ")[2].split(", "):
        source = open_weights(f"{path}::{address}", meta_net())
        assert source.origin.container == address


def test_weights_are_chosen_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pt", {"model": RAW, "ema": EMA, "best so far": RAW})
    assert_weights(open_weights(f"{path}::model", meta_net()), RAW)
    assert_weights(open_weights(f"{path}::ema", meta_net()), EMA)
    source = open_weights(f"{path}::best so far", meta_net())
    assert (source.origin.path, source.origin.container) == (str(path), "best so far")
    with pytest.raises(UsageError, match="holds no weights 'last'") as caught:
        open_weights(f"{path}::last", meta_net())
    assert caught.value.hint == "choose from: ema, model, best so far"


def test_a_bundle_goes_back_to_the_weights_that_were_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pt", {**RAW, "ema": cut(EMA)})
    with pytest.raises(InputError, match="averaged weights"):
        open_weights(path, meta_net())
    chosen = open_weights(f"{path}::.", meta_net())
    assert_weights(chosen, RAW)
    address = same_weights(asdict(chosen.origin))
    assert address == f"{path}::."
    assert_weights(open_weights(address, meta_net()), RAW)
    for value, expected in ((FORMS["LitEma of the module itself"][0], TRAINED_MIXED), ({"ema": EMA}, EMA)):
        source = open_weights(write(path, value), meta_net())
        again = open_weights(same_weights(asdict(source.origin)), meta_net(), sha256=source.origin.sha256)
        assert_weights(again, expected)
        assert again.origin == source.origin


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the checkpoint that the bundle was built from"):
        open_weights(write(tmp_path / "w.pt", RAW), meta_net(), sha256="0" * 64)


def test_a_file_may_have_the_separator_in_its_name(tmp_path: Path) -> None:
    assert_weights(open_weights(write(tmp_path / "a::b.pt", {"ema": EMA}), meta_net()), EMA)


def test_an_unknown_container_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no state dict; its keys are: nonsense") as caught:
        open_weights(write(tmp_path / "w.pt", {"nonsense": RAW}), meta_net())
    assert caught.value.hint.endswith("w.pt::nonsense")


def test_an_average_of_another_network_in_the_file_is_left_alone(tmp_path: Path) -> None:
    """A Stable Diffusion checkpoint has LitEma's weights of the denoiser beside the autoencoder."""
    others = {"model_ema.diffusioninput00weight": torch.ones(2), "model_ema.decay": torch.tensor(0.9)}
    whole = {**others, **prefixed("model.", RAW)}
    assert_weights(open_weights(write(tmp_path / "w.pt", {"state_dict": whole}), meta_net()), RAW)


def test_control_characters_of_a_key_are_escaped(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pt", {"model": RAW, "ema \x1b]0;x\n": {"shadow": torch.ones(9)}})
    with pytest.raises(InputError, match="averaged weights") as caught:
        open_weights(path, meta_net())
    assert "\x1b" not in str(caught.value) + caught.value.hint


def nested(depth: int, width: int) -> State:
    value: State = {"w": torch.ones(1)}
    for _ in range(depth):
        value = {f"ema{n}": value for n in range(width)}
    return value


@pytest.mark.parametrize("value", [nested(30, 2), nested(7, 16)], ids=["deep", "wide"])
def test_containers_that_share_each_other_end(tmp_path: Path, value: State) -> None:
    with pytest.raises(InputError):
        open_weights(write(tmp_path / "w.pt", value), meta_net())


class Tied(nn.Module):
    """Two names of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_of_save_model(tmp_path: Path) -> None:
    tied = Tied()
    save_model(tied, str(tmp_path / "w.safetensors"))
    with torch.device("meta"):
        both, one = Tied(), nn.ModuleDict({"embed": nn.Embedding(4, 3)})
    assert_weights(open_weights(tmp_path / "w.safetensors", both), tied.state_dict())
    assert_weights(open_weights(tmp_path / "w.safetensors", one), {"embed.weight": tied.embed.weight})


def test_a_list_names_tied_weights_once(tmp_path: Path) -> None:
    tied = Tied()
    path = write(tmp_path / "w.pt", {"model": tied.state_dict(), "ema": {"shadow_params": [torch.ones(4, 3)]}})
    with torch.device("meta"):
        source = open_weights(path, Tied())
    assert_weights(source, {"embed.weight": torch.ones(4, 3), "head.weight": torch.ones(4, 3)})


@pytest.mark.parametrize("save", [lambda value, path: torch.save(value, path)])
def test_what_is_inherited_is_the_average_too(tmp_path: Path, save: Callable[[Any, Path], None]) -> None:
    save({"model": RAW, "ema": {"shadow_params": listed()}}, tmp_path / "w.pt")
    source = inherit_weights(str(tmp_path / "w.pt"), meta_net(), ["blocks.1"], seed=0)
    assert source.origin.container == "ema.shadow_params + model"
    assert torch.equal(source._read("blocks.0.query.weight"), EMA["blocks.0.query.weight"])
