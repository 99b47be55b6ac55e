"""FP8 checkpoints are read as products of codes and scales, in every arrangement that a description can mean."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, copy_folder, run_cli
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbit
from fewbit.checkpoints import safetensors_io
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError

E4M3 = torch.float8_e4m3fn
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 48]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}


def blocks(weight: Tensor, rows: int, columns: int) -> Tensor:
    """The largest magnitude of each block over 448, with shorter blocks at the ends."""
    out = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            out[i, j] = part.abs().max() / 448
    return out


def spread(scale: Tensor, rows: int, columns: int, shape: torch.Size) -> Tensor:
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def in_fp8(source: Path, folder: Path, kind: str, changed: str = "layers.1.") -> tuple[Path, dict[str, Tensor]]:
    """A copy with some layers in FP8, and what its tensors should be read as."""
    model = copy_folder(source, folder)
    tensors = load_file(model / "model.safetensors")
    read = dict(tensors)
    for name in [n for n, t in tensors.items() if changed in n and t.dim() == 2]:
        weight = tensors[name].float()
        if kind == "blocks":
            ending, scale = "_scale_inv", blocks(weight, 32, 48)
            full = spread(scale, 32, 48, weight.shape)
        elif kind == "channels":
            ending, scale = "_scale", (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
            full = scale.float()
        else:
            ending, scale = "_scale", weight.abs().max() / 448
            full = scale
            tensors[name.replace("weight", "input_scale")] = torch.tensor(0.5)
        tensors[name] = (weight / full).to(E4M3)
        tensors[name + ending] = scale
        read[name] = (tensors[name].float() * full).bfloat16()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model, read


def describe(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("fp8") / "m", shard_size="1GB", hidden_size=80, intermediate_size=112)


@pytest.fixture(scope="module", params=["blocks", "channels", "tensor"])
def model(request: pytest.FixtureRequest, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An FP8 folder and a 16-bit one that holds its products."""
    folder, read = in_fp8(plain, tmp_path_factory.mktemp("kind") / request.param, request.param)
    if request.param == "blocks":
        describe(folder, quantization_config=DEEPSEEK)
    elif request.param == "channels":
        describe(folder, quantization_config=COMPRESSED)
    else:
        (folder / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    other = copy_folder(plain, folder.with_name("read"))
    save_file(read, other / "model.safetensors", {"format": "pt"})
    return folder, other


def test_tensors_and_config(model: tuple[Path, Path]) -> None:
    folder, other = model
    found, wanted = open_checkpoint(folder), load_file(other / "model.safetensors")
    assert set(found.entries) == set(wanted) and found.quantization is None
    assert found.config == json.loads((other / "config.json").read_text())
    assert "hf_quant_config.json" not in {companion.name for companion in found.companions}
    with FileReader() as reader:
        for name, entry in found.entries.items():
            assert (entry.dtype, entry.shape) == (wanted[name].dtype, tuple(wanted[name].shape))
            assert torch.equal(reader.tensor(entry), wanted[name])


def test_pieces_are_those_of_the_whole(model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "_AT_ONCE", 200)
    checkpoint = open_checkpoint(model[0])
    entry = checkpoint.entries["model.layers.1.mlp.down_proj.weight"]
    with FileReader() as reader:
        whole = reader.tensor(entry).view(-1)
        for first, count in ((0, 1), (111, 2), (112, 112), (5, 1000), (entry.numel - 3, 3), (7, 0), (0, entry.numel)):
            assert torch.equal(reader.read(entry, first, count), whole[first : first + count])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "adpq", "gptq"])
def test_quantized_as_the_products_are(model: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    (tmp_path / "a.txt").write_text("some words and more of them. " * 100)
    more = ["--calibration", tmp_path / "a.txt", "--samples", 4, "--sequence-length", 16] if method == "gptq" else []
    for name, folder in zip(("fp8", "read"), model, strict=True):
        run_cli("quantize", folder, tmp_path / name, "--method", method, "--bits", 3, "--group-size", 16, *more)
    # Their order is that of the files, in which codes stand behind longer numbers.
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("fp8", "read"))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_loaded_as_the_products_are(model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found, wanted = (fewbit.load(folder, device="cpu")(ids).logits for folder in model)
    assert torch.equal(found, wanted)
    copies = list((tmp_path / "plain").iterdir())
    fewbit.load(model[0], device="cpu")
    assert list((tmp_path / "plain").iterdir()) == copies
    # Kept tensors are copied as they are read, too.
    fewbit.quantize(
        model[0], tmp_path / "q", fewbit.preset("rtn", bits=8, group_size="row", exclude=("*.down_proj.weight",))
    )
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(
        load_file(tmp_path / "q/model.safetensors")[name], load_file(model[1] / "model.safetensors")[name]
    )


@pytest.mark.slow
def test_other_commands(model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some words and more of them. " * 100)
    shown = [json.loads(run_cli("inspect", folder, "--json").stdout)["tensors"] for folder in model]
    assert sorted(shown[0], key=lambda row: row["name"]) == sorted(shown[1], key=lambda row: row["name"])
    plans = [json.loads(run_cli("plan", folder, "--json").stdout)["output"] for folder in model]
    assert plans[0]["bytes"] == plans[1]["bytes"] and plans[0]["bits_per_weight"] == plans[1]["bits_per_weight"]
    run_cli("quantize", model[0], tmp_path / "q", "--method", "rtn", "--bits", 8)
    scored = ("--data", tmp_path / "a.txt", "--seq-len", 16, "--windows", 2, "--reference", model[0], "--json")
    rows = json.loads(run_cli("eval", model[0], model[1], tmp_path / "q", *scored).stdout)["models"]
    assert rows[0]["kl_mean"] == rows[1]["kl_mean"] == 0 and rows[0]["nll"] == rows[1]["nll"]
    assert 0 < rows[2]["kl_mean"] < 1e-3
    compared = json.loads(run_cli("inspect", tmp_path / "q", "--json").stdout)
    assert compared["reference"] == str(model[0])
    assert all(row.get("relative_squared_error", 0) < 1e-3 for row in compared["tensors"])


def test_the_same_weights_as_transformers_reads(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    source = build_tiny(tmp_path / "s", shard_size="1GB", hidden_size=96, intermediate_size=192, num_attention_heads=2)
    folder, _ = in_fp8(source, tmp_path / "m", "blocks", "layers.")
    describe(folder, quantization_config=DEEPSEEK)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 48)),
    ).state_dict()
    with FileReader() as reader:
        for name, entry in open_checkpoint(folder).entries.items():
            assert torch.equal(reader.tensor(entry), theirs[name]), name


def test_experts_fused_in_one_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = copy_folder(build_tiny(tmp_path / "s", shard_size="1GB"), tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    weight, name = torch.randn(3, 40, 64), "model.layers.0.mlp.experts.gate_up_proj"
    forms = {"_a": torch.rand(3, 2, 3), "_b": torch.rand(3, 1, 1), "_c": torch.rand(3, 40, 1), "_d": torch.rand(3)}
    for ending, scale in forms.items():
        tensors[f"{name}{ending}"] = weight.to(E4M3)
        tensors[f"{name}{ending}_scale_inv"] = scale
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    describe(model, quantization_config={**DEEPSEEK, "weight_block_size": [32, 24]})
    entries = open_checkpoint(model).entries
    full = {
        **forms,
        "_a": forms["_a"].repeat_interleave(32, 1).repeat_interleave(24, 2)[:, :40, :64],
        "_d": forms["_d"][:, None, None],
    }
    with FileReader() as reader:
        for ending, scale in full.items():
            wanted = (weight.to(E4M3).float() * scale).bfloat16()
            assert torch.equal(reader.tensor(entries[f"{name}{ending}"]), wanted)


def test_scales_that_are_powers_of_two_and_the_other_format(plain: Path, tmp_path: Path) -> None:
    model = copy_folder(plain, tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e5m2)
    exponents = torch.tensor([[126, 127], [128, 120]], dtype=torch.uint8)
    tensors[f"{name}_scale_inv"] = exponents.view(torch.float8_e8m0fnu)
    safe = {n: t for n, t in tensors.items() if t.dtype != torch.float8_e8m0fnu}
    writer = safetensors_io.ShardWriter(model / "model.safetensors", safetensors_io.header_room(list(tensors)))
    for key, tensor in {**safe, f"{name}_scale_inv": tensors[f"{name}_scale_inv"]}.items():
        writer.add(key, tensor)
    writer.close()
    describe(model, quantization_config={**DEEPSEEK, "fmt": "e5m2", "weight_block_size": [64, 64]}, dtype="float32")
    entry = open_checkpoint(model).entries[name]
    factors = spread(2.0 ** (exponents.float() - 127), 64, 64, torch.Size(entry.shape))
    with FileReader() as reader:
        assert torch.equal(reader.tensor(entry), tensors[name].float() * factors)


def test_what_does_not_fit_is_refused(plain: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def changed(number: int, what: Any, quantization: Any = DEEPSEEK) -> Path:
        folder, _ = in_fp8(plain, tmp_path / str(number), "blocks")
        tensors = load_file(folder / "model.safetensors")
        what(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        describe(folder, **({"quantization_config": quantization} if quantization else {}))
        return folder

    cases = [
        (changed(0, lambda t: t.pop(f"{name}_scale_inv")), "is in FP8 but has no scale beside it"),
        (changed(1, lambda t: t.update({f"{name}_scale": torch.ones(1)})), "is in FP8 but has two scales beside it"),
        (changed(2, lambda t: t.update({f"{name}_scale_inv": torch.ones(3, 2)})), r"scales \[3, 2\] do not fit"),
        (
            changed(3, lambda t: t.update({f"{name}_scale_inv": torch.ones(4, 2).int()})),
            "cannot contain scales: its dtype is int32",
        ),
    ]
    for folder, message in cases:
        for act in (open_checkpoint, fewbit.load):
            with pytest.raises(FewbitError, match=message):
                act(folder)


def test_fp8_that_nothing_describes_is_refused_everywhere(plain: Path, tmp_path: Path) -> None:
    folder, _ = in_fp8(plain, tmp_path / "m", "blocks")
    (tmp_path / "a.txt").write_text("some words and more of them. " * 100)
    for command in (
        ("quantize", folder, tmp_path / "q"),
        ("plan", folder),
        ("inspect", folder),
        ("eval", folder, "--data", tmp_path / "a.txt", "--seq-len", 16, "--windows", 1),
    ):
        line = run_cli(*command, code=2).stderr
        assert "already quantized (FP8; see tensor model.layers.1.mlp.down_proj.weight_scale_inv)" in line
    # Codes with no scales at all.
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.endswith("_scale_inv")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "float8_e4m3fn codes without known scales" in run_cli("quantize", folder, tmp_path / "q", code=2).stderr


def test_other_descriptions_of_fp8(plain: Path, tmp_path: Path) -> None:
    rows, _ = in_fp8(plain, tmp_path / "rows", "channels")
    for number, quantization in enumerate(
        (
            {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
            {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
            {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        )
    ):
        folder = copy_folder(rows, tmp_path / str(number))
        describe(folder, quantization_config=quantization)
        assert open_checkpoint(folder).foreign is None and open_checkpoint(folder).is_products
    groups = COMPRESSED["config_groups"]
    assert isinstance(groups, dict)
    weights = groups["group_0"]["weights"]
    for number, changes in enumerate(({"num_bits": 4}, {"type": "int"}, {"symmetric": False})):
        folder = copy_folder(rows, tmp_path / f"not{number}")
        group = {"group_0": {**groups["group_0"], "weights": {**weights, **changes}}}
        describe(folder, quantization_config={**COMPRESSED, "config_groups": group})
        with pytest.raises(FewbitError, match=r"already quantized \(compressed-tensors; see quantization_config"):
            fewbit.quantize(folder, tmp_path / "q", fewbit.preset("rtn"))
