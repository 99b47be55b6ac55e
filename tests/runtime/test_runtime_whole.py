"""A packed folder that lacks something, or holds something else, loads nowhere; a class may do without a head."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import IDS, build, logits, packed_weights, quantized
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForCausalLM,
)

import fewbit
from fewbit.errors import FewbitError

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama with an untied, packed head, in one file."""
    place = tmp_path_factory.mktemp("whole")
    build(place / "model", attention_bias=True)
    return quantized(place / "model", place / "packed", "adpq", 4, include=("lm_head.weight",))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sharded")
    build(place / "model")
    fewbit.quantize(
        place / "model",
        place / "packed",
        fewbit.preset("rtn", bits=4, group_size="32"),
        run_options(shard_size=20_000),
    )
    assert len(list((place / "packed").glob("*.safetensors"))) > 2
    return place / "packed"


def run_options(**options: Any) -> Any:
    from fewbit.pipeline.run import RunOptions

    return RunOptions(**options)


def part(tensors: dict[str, torch.Tensor], module: str) -> str:
    """The largest part of a module."""
    names = [name for name in tensors if name.startswith(f"{module}.") and not tensors[name].is_floating_point()]
    return max(names, key=lambda name: tensors[name].numel())


def missing(t: dict[str, torch.Tensor]) -> None:
    t.pop(part(t, UP))


def all_missing(t: dict[str, torch.Tensor]) -> None:
    for name in [name for name in t if name.startswith(f"{UP}.")]:
        t.pop(name)


def bias_missing(t: dict[str, torch.Tensor]) -> None:
    t.pop("model.layers.1.self_attn.q_proj.bias")


def other_shape(t: dict[str, torch.Tensor]) -> None:
    name = part(t, UP)
    t[name] = t[name][:-1].clone()


def other_dtype(t: dict[str, torch.Tensor]) -> None:
    name = part(t, UP)
    t[name] = t[name].view(torch.int8).clone()


def stray(t: dict[str, torch.Tensor]) -> None:
    name = part(t, UP)
    t[name.replace("layers.0", "layers.9")] = t[name].clone()


def plain_instead(t: dict[str, torch.Tensor]) -> None:
    all_missing(t)
    t[f"{UP}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "a part is missing": (missing, "missing"),
    "a weight is missing": (all_missing, "missing"),
    "a packed layer's bias is missing": (bias_missing, "missing"),
    "another shape": (other_shape, "damaged"),
    "another dtype": (other_dtype, "damaged"),
    "parts of nothing": (stray, "does not belong to any weight"),
    "a plain weight instead": (plain_instead, "missing"),
}


def damaged(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_every_loader_refuses_a_damaged_folder(folder: Path, tmp_path: Path, name: str) -> None:
    change, said = DAMAGES[name]
    place = damaged(folder, tmp_path / "damaged", change)
    loaders: list[Callable[[Path], Any]] = [
        fewbit.load,
        AutoModelForCausalLM.from_pretrained,
        LlamaForCausalLM.from_pretrained,
        AutoModel.from_pretrained,
        lambda path: AutoModelForSequenceClassification.from_pretrained(path, num_labels=2),
        lambda path: AutoModelForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True, device_map="cpu"),
    ]
    for load in loaders:
        with pytest.raises(FewbitError, match=said):
            load(place)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_weight_that_the_config_forgot_is_noticed(folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "damaged"))
    edit_config(place, lambda config: config["quantization_config"]["weights"].pop(UP))
    for load in (fewbit.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(FewbitError, match="does not belong to any weight in config"):
            load(place)


@pytest.mark.parametrize("damage", ["cut", "gone", "swapped", "another model's", "empty"])
def test_shards_that_are_not_what_the_index_says(sharded: Path, tmp_path: Path, damage: str) -> None:
    place = Path(shutil.copytree(sharded, tmp_path / "damaged"))
    first, second = sorted(place.glob("*.safetensors"))[:2]
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-100])
    elif damage == "gone":
        first.unlink()
    elif damage == "swapped":
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)
    elif damage == "another model's":
        tensors = {f"other.{name}": tensor for name, tensor in load_file(first).items()}
        save_file(tensors, first, {"format": "pt"})
    else:
        first.write_bytes(b"")
    with pytest.raises(FewbitError):
        fewbit.load(place)
    with pytest.raises((FewbitError, OSError)):
        AutoModelForCausalLM.from_pretrained(place)


def test_a_folder_of_another_size_is_no_noise(folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "damaged"))
    edit_config(place, lambda config: config.update(intermediate_size=128))
    with pytest.raises(FewbitError, match=r"down_proj is packed as \[64, 64\], but LlamaForCausalLM has \[64, 128\]"):
        AutoModelForCausalLM.from_pretrained(place)


def test_weights_that_fill_nothing_while_others_are_empty(folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "damaged"))
    tensors = {name.replace("layers.", "stages."): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, place / "model.safetensors", {"format": "pt"})

    def rename(config: dict[str, Any]) -> None:
        weights = config["quantization_config"]["weights"]
        renamed = {name.replace("layers.", "stages."): weight for name, weight in weights.items()}
        config["quantization_config"]["weights"] = renamed

    edit_config(place, rename)
    with pytest.raises(FewbitError, match=r"has no module for the packed model\.stages\.0"):
        AutoModelForCausalLM.from_pretrained(place)


def test_a_head_that_a_class_lacks_or_adds_is_allowed(folder: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModel.from_pretrained(folder)
    assert (packed_weights(whole), packed_weights(base)) == (15, 14)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        model = auto.from_pretrained(folder, num_labels=3)
        assert packed_weights(model) == 14
        assert torch.isfinite(logits(model)).all()


def test_a_state_dict_that_lacks_parts_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=dict(tensors))
    assert torch.equal(logits(model), logits(fewbit.load(folder, device="cpu")))
    missing(tensors)
    with pytest.raises(FewbitError, match="missing"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)


# One before the other as a whole: test_runtime.py, with a folder that is loaded.
ORDERS = {
    "the hook first": "import fewbit.runtime.hf_quantizer",
    "transformers' registry first": "import transformers.quantizers.auto, fewbit",
    "asked for and not imported": "import fewbit, importlib.util as u; u.find_spec('transformers.quantizers.auto')",
    "imported twice": "import fewbit, importlib, transformers.quantizers.auto as a; importlib.reload(a)",
    "in threads": (
        "import fewbit, importlib, threading\n"
        "names = 'fewbit.runtime.hf_quantizer', 'transformers.quantizers.auto', 'fewbit.runtime.load', 'transformers'\n"
        "threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]\n"
        "[thread.start() for thread in threads], [thread.join() for thread in threads]"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_format_is_registered_in_any_order_of_imports(order: str) -> None:
    program = (
        f"{ORDERS[order]}\nfrom transformers.quantizers import auto\nprint('fewbit' in auto.AUTO_QUANTIZER_MAPPING)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr


POSITIONS = {
    "elias-fano": ("adpq", {}),
    "indices": ("adpq+", {"outlier_fraction": 0.1}),
    "bitmap": ("adpq", {"outlier_fraction": 0.4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("encoding", POSITIONS)
def test_damaged_positions_of_outliers_are_refused(tmp_path: Path, encoding: str, fill: int) -> None:
    method, choices = POSITIONS[encoding]
    build(tmp_path / "model")
    folder = quantized(tmp_path / "model", tmp_path / "packed", method, 4, **choices)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]["weights"][UP]
    assert stored["positions"] == encoding

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.outlier_positions"].fill_(fill)

    place = damaged(folder, tmp_path / "damaged", change)
    refused_by_all(place, tmp_path / "plain", f"{UP}: .*positions of outliers.*: the folder is damaged")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "adpq", "adpq+"])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, method: str) -> None:
    build(tmp_path / "model")
    folder = quantized(tmp_path / "model", tmp_path / "packed", method, 4)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        patterns = [n for n in tensors if n.startswith(f"{UP}.") and tensors[n].dtype in (torch.int16, torch.int32)]
        tensors[patterns[0]].view(-1)[-1] = {torch.int16: 0x7FFF, torch.int32: 0x7FFFFFFF}[tensors[patterns[0]].dtype]

    place = damaged(folder, tmp_path / "damaged", change)
    refused_by_all(place, tmp_path / "plain", f"{UP}: .*not finite: the folder is damaged")


def refused_by_all(place: Path, out: Path, said: str) -> None:
    """Every loader, and unpacking, stop with an error; unpacking leaves nothing."""
    for load in (fewbit.load, AutoModelForCausalLM.from_pretrained, lambda path: fewbit.unpack(path, out)):
        with pytest.raises(FewbitError, match=said):
            load(place)
    assert not out.exists()
