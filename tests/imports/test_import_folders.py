"""Folders of GPTQ, AWQ and compressed-tensors as native ones: the same weights, and nothing that is not understood."""

import json
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import foreign_models
import numpy as np
import pytest
import torch
from conftest import copy_folder, folder_bytes, run_cli
from foreign_models import Layer, layer_of, weight_bytes
from safetensors.torch import load_file, save_file
from test_import_gguf import refused, weights
from test_native_format import read_weight

import fewbit
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import open_checkpoint
from fewbit.formats.config import weights_of

LAYER = "model.layers.0.mlp.down_proj"


def gptq(folder: Path, bits: int = 4, size: int = 32, sym: bool = False, order: bool = False, version: int = 1) -> Any:
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": sym, "desc_act": order}
    config |= {"checkpoint_format": "gptq" if version == 1 else "gptq_v2", "damp_percent": 0.1, "dynamic": None}
    make = partial(layer_of, bits=bits, size=size, symmetric=sym, order=order, dtype=torch.float16)
    return foreign_models.write(folder, config, make, partial(foreign_models.gptq, bits=bits, version=version))


def awq(folder: Path, size: int = 32) -> Any:
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    make = partial(layer_of, bits=4, size=size, symmetric=False, order=False, dtype=torch.float16)
    return foreign_models.write(folder, config, make, partial(foreign_models.awq, bits=4))


def compressed(
    folder: Path,
    bits: int = 4,
    size: int = 32,
    sym: bool = False,
    order: bool = False,
    dtype: str = "bfloat16",
    whole: bool = False,
) -> Any:
    described = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": "channel" if size == -1 else "group"}
    described |= {"group_size": None if size == -1 else size, "actorder": "group" if order else None, "dynamic": False}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": described, "input_activations": None}},
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    number = getattr(torch, dtype)
    make = partial(layer_of, bits=bits, size=size, symmetric=sym, order=order, dtype=number)
    store = partial(foreign_models.compressed, bits=bits, symmetric=sym, whole=whole)
    return foreign_models.write(folder, config, make, store, dtype)


def same(model: Path, out: Path, wanted: dict[str, torch.Tensor]) -> None:
    """The folder decodes to the weights, loads, and gives the logits of the plain model with these weights."""
    ours = weights(out)
    assert ours.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(ours[name], weight.float()), name
    plain = copy_folder(model, model.with_name(f"{model.name}-plain"))
    config = json.loads((plain / "config.json").read_text())
    config.pop("quantization_config", None)
    (plain / "quantize_config.json").unlink(missing_ok=True)
    (plain / "config.json").write_text(json.dumps(config))
    save_file({name: one.float().contiguous() for name, one in wanted.items()}, plain / "model.safetensors")
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        first, second = (fewbit.load(f, dtype=torch.float32, device="cpu")(ids).logits for f in (out, plain))
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-4)
    fewbit.unpack(out, out.with_name(f"{out.name}-plain"))
    read_by_the_specification(out, wanted)
    unpacked = load_file(out.with_name(f"{out.name}-plain") / "model.safetensors")
    for name, weight in wanted.items():
        assert torch.equal(unpacked[name], weight.to(unpacked[name].dtype)), name


def read_by_the_specification(out: Path, wanted: dict[str, torch.Tensor]) -> None:
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors = {
        name: one.numpy()
        for f in out.glob("*.safetensors")
        for name, one in load_file(f).items()
        if one.dtype not in (torch.bfloat16, torch.float16)
    }
    for module, stored in config["weights"].items():
        parts = {name.removeprefix(f"{module}."): one for name, one in tensors.items() if name.startswith(f"{module}.")}
        found = read_weight(parts, stored, config["schemes"][stored["scheme"]])
        assert np.array_equal(found, wanted[f"{module}.weight"].numpy()), module


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, version: int) -> None:
    model, out = tmp_path / "m", tmp_path / "out"
    wanted = gptq(model, bits, version=version)
    run_cli("import", model, out)
    same(model, out, wanted)
    assert weight_bytes(out) < 1.02 * weight_bytes(model)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "sym"), [(-1, False), (64, True), (16, True)])
def test_gptq_groups(tmp_path: Path, size: int, sym: bool) -> None:
    model, out = tmp_path / "m", tmp_path / "out"
    wanted = gptq(model, 4, size, sym)
    run_cli("import", model, out)
    same(model, out, wanted)
    grids = {stored.scheme.grid for stored in weights_of(open_checkpoint(out)).values()}
    assert grids == {"symmetric" if sym else "zero-point"}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_with_act_order(tmp_path: Path, bits: int) -> None:
    model, out, text = tmp_path / "m", tmp_path / "out", tmp_path / "text.txt"
    wanted = gptq(model, bits, order=True)
    run_cli("import", model, out)
    same(model, out, wanted)
    assert {stored.scheme.transform for stored in weights_of(open_checkpoint(out)).values()} == {"column-order"}
    text.write_text("the man and the sand in the land. " * 200)
    run_cli("eval", out, "--data", text, "--windows", 2, "--seq-len", 64)
    run_cli("inspect", out)
    options = ["--calibration", text, "--samples", 6, "--sequence-length", 16, "--held-out", 2, "--batch-size", 2]
    reference = copy_folder(model, tmp_path / "reference")
    config = json.loads((reference / "config.json").read_text())
    del config["quantization_config"]
    (reference / "config.json").write_text(json.dumps(config))
    save_file({name: one.half().contiguous() for name, one in wanted.items()}, reference / "model.safetensors")
    words = ["tune", out, tmp_path / "tuned", "--reference", reference, *options, "--epochs", 1, "--device", "cpu"]
    run_cli(*words)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "tuned"))
    order = f"{LAYER}.transform_order"
    assert torch.equal(before[order], after[order]) and before.keys() == after.keys()
    assert float((weights(tmp_path / "tuned")[f"{LAYER}.weight"] - wanted[f"{LAYER}.weight"]).abs().max()) < 0.1


@pytest.mark.slow
def test_gptq_of_layers_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model, out = tmp_path / "m", tmp_path / "out"
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes)).half().save_pretrained(model)
    make = partial(layer_of, bits=4, size=32, symmetric=False, order=False, dtype=torch.float16)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    wanted = foreign_models.write(model, config, make, partial(foreign_models.gptq, bits=4), is_built=True)
    run_cli("import", model, out)
    fewbit.unpack(out, tmp_path / "plain")
    unpacked = load_file(tmp_path / "plain" / "model.safetensors")
    for name, weight in wanted.items():
        assert torch.equal(unpacked[name], weight.half()), name
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        first, second = (
            fewbit.load(f, dtype=torch.float32, device="cpu")(ids).logits for f in (out, tmp_path / "plain")
        )
    assert torch.allclose(first, second, atol=0.01)


def test_zero_points_of_version_1_that_borrow(tmp_path: Path) -> None:
    """A zero-point 0 is -1 there, and takes a one from its neighbour."""
    random = np.random.default_rng(0)

    def make(weight: torch.Tensor) -> Layer:
        layer = layer_of(weight, 4, 32, False, False, torch.float16)
        layer.zeros = random.integers(0, 3, layer.zeros.shape)
        return layer

    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    wanted = foreign_models.write(tmp_path / "m", config, make, partial(foreign_models.gptq, bits=4))
    run_cli("import", tmp_path / "m", tmp_path / "out")
    same(tmp_path / "m", tmp_path / "out", wanted)


def test_gptq_with_other_bits_in_some_layers(tmp_path: Path) -> None:
    model, used = tmp_path / "m", iter([2, 4, 8] * 10)

    def make(weight: torch.Tensor) -> Layer:
        layer = layer_of(weight, bits := next(used), 32, False, False, torch.float16)
        layer.bits = bits  # type: ignore[attr-defined]
        return layer

    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:.*": {"bits": 8}}}
    wanted = foreign_models.write(model, config, make, lambda layer: foreign_models.gptq(layer, layer.bits))  # type: ignore[attr-defined]
    run_cli("import", model, tmp_path / "out")
    same(model, tmp_path / "out", wanted)


def test_descriptions_of_older_releases(tmp_path: Path) -> None:
    model, out = tmp_path / "m", tmp_path / "out"
    wanted = gptq(model)
    config = json.loads((model / "config.json").read_text())
    found = config.pop("quantization_config")
    (model / "config.json").write_text(json.dumps(config))
    assert "no quantization_config describes its codes" in refused(model, tmp_path)
    (model / "quantize_config.json").write_text(json.dumps(found))
    run_cli("import", model, out)
    same(model, out, wanted)
    assert not (out / "quantize_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 64, -1])
def test_awq(tmp_path: Path, size: int) -> None:
    model, out = tmp_path / "m", tmp_path / "out"
    wanted = awq(model, size)
    run_cli("import", model, out)
    same(model, out, wanted)
    assert weight_bytes(out) < 1.02 * weight_bytes(model)


@pytest.mark.slow
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("bits", "size", "dtype", "whole"),
    [
        (2, 32, "bfloat16", False),
        (3, 32, "bfloat16", False),
        (3, 32, "bfloat16", True),
        (4, 64, "float16", False),
        (4, -1, "bfloat16", False),
        (6, 32, "bfloat16", True),
        (8, 32, "float32", False),
        (8, -1, "bfloat16", False),
    ],
)
def test_compressed_tensors(tmp_path: Path, bits: int, size: int, dtype: str, whole: bool, sym: bool) -> None:
    model, out = tmp_path / "m", tmp_path / "out"
    wanted = compressed(model, bits, size, sym, dtype=dtype, whole=whole)
    run_cli("import", model, out)
    same(model, out, wanted)
    assert weight_bytes(out) < 1.02 * weight_bytes(model)


def test_compressed_tensors_with_act_order(tmp_path: Path) -> None:
    wanted = compressed(tmp_path / "m", order=True)
    run_cli("import", tmp_path / "m", tmp_path / "out")
    same(tmp_path / "m", tmp_path / "out", wanted)


def test_weights_are_those_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    # Since 0.18, codes of 3 bits lie across two words.
    whole = tuple(map(int, version("compressed-tensors").split(".")[:2])) < (0, 18)
    for bits, sym in ((2, True), (3, False), (4, False), (8, True), (8, False)):
        model, out = tmp_path / f"m{bits}{sym}", tmp_path / f"out{bits}{sym}"
        compressed(model, bits, sym=sym, whole=whole)
        group = json.loads((model / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        fewbit.import_model(model, out)
        tensors, checkpoint = load_file(model / "model.safetensors"), open_checkpoint(out)
        with FileReader() as reader:
            for module, stored in weights_of(checkpoint).items():
                own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{module}.weight_")}
                theirs = PackedQuantizationCompressor.decompress(own, QuantizationScheme.model_validate(group))
                parts = {p: reader.tensor(checkpoint.entries[f"{module}.{p}"]) for p in fewbit_parts(stored)}
                assert torch.equal(decoded(parts, stored), theirs["weight"]), (bits, sym, module)


def fewbit_parts(stored: Any) -> list[str]:
    from fewbit.formats.native import part_layout

    return list(part_layout(stored))


def decoded(parts: Any, stored: Any) -> torch.Tensor:
    from fewbit.formats.native import decode

    return decode(parts, stored, torch.bfloat16)


def test_an_order_that_is_damaged(tmp_path: Path) -> None:
    gptq(tmp_path / "m", order=True)
    run_cli("import", tmp_path / "m", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.transform_order"][0] = 2**30
    save_file(tensors, file, {"format": "pt"})
    line = run_cli("unpack", tmp_path / "out", tmp_path / "plain", code=2).stderr
    assert "does not have every column once" in line


def test_the_order_of_columns_is_no_choice_of_a_recipe(tiny: Path, tmp_path: Path) -> None:
    line = run_cli("quantize", tiny, tmp_path / "out", "--transform", "column-order", code=2).stderr
    assert "transform must be one of none, awq, smoothquant" in line


def test_several_shards_resume_and_are_the_same(tmp_path: Path) -> None:
    wanted = gptq(tmp_path / "m")

    def stop(done: int, total: int, what: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fewbit.import_model(tmp_path / "m", tmp_path / "out", shard_size=30_000, progress=stop)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.fewbit-partial").exists()
    fewbit.import_model(tmp_path / "m", tmp_path / "other", shard_size=30_000)
    run_cli("import", tmp_path / "m", tmp_path / "out", "--shard-size", "30KB")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "other")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    same(tmp_path / "m", tmp_path / "out", wanted)
