"""The format read by someone who knows docs/format.md and nothing of the package."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.errors import FewbitError
from fewbit.formats.config import read_weights
from fewbit.formats.native import check_scheme, stored_bytes
from fewbit.grids.floats import FLOAT_GRIDS
from fewbit.grids.ggml import GGML_GRIDS
from fewbit.grids.scheme import Scheme
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.run import RunOptions
from fewbit.recipe import Recipe
from fewbit.recipe_choices import recipe_from_choices
from fewbit.runtime.unpack import unpack

# --- a reader from the specification alone: NumPy and the standard library -----------------------------------------


def read_file(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    kinds = {"U8": "u1", "I16": "<i2", "I32": "<i4", "F32": "<f4", "BF16": "<u2", "F16": "<f2"}
    header = {k: v for k, v in json.loads(data[8 : 8 + size]).items() if k != "__metadata__"}
    return {
        name: np.frombuffer(data[8 + size :][slice(*h["data_offsets"])], kinds[h["dtype"]]).reshape(h["shape"])
        for name, h in header.items()
    }


def bits_of(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    codes, start, shift = np.zeros((*packed.shape[:-1], count), np.int64), 0, 0
    for width in [w for w in (8, 4, 2, 1) if bits & w]:
        size = (count * width + 7) // 8
        plane = np.unpackbits(packed[..., start : start + size], axis=-1, bitorder="little")[..., : count * width]
        codes |= (plane.reshape(*codes.shape, width) << np.arange(width)).sum(-1) << shift
        start, shift = start + size, shift + width
    return codes


def wide_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    if bits <= 8:
        return bits_of(packed, bits, count) if bits else np.zeros(count, np.int64)
    return bits_of(packed[:count], 8, count) | wide_bits(packed[count:], bits - 8, count) << 8


def floats(pattern: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bfloat16":
        return (pattern.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return pattern.view(np.float16 if kind == "float16" else np.float32).astype(np.float32)


def outlier_places(data: np.ndarray, how: str, weights: int, count: int, group: int) -> np.ndarray:
    if how == "bitmap":
        return np.flatnonzero(bits_of(data, 1, weights))
    if how == "indices":
        inside = wide_bits(data, max(1, (group - 1).bit_length()), count)
        return np.arange(count) // (count * group // weights) * group + inside
    low = int(np.log2(weights / count))
    size = sum((count * w + 7) // 8 for width in ([8] * (low // 8) + [low % 8]) for w in (8, 4, 2, 1) if width & w)
    ones = np.flatnonzero(np.unpackbits(data[size:], bitorder="little"))[:count]
    return (ones - np.arange(count)) << low | wide_bits(data[:size], low, count)


def statistics(parts: dict[str, np.ndarray], name: str, s: dict[str, Any], groups: int) -> np.ndarray:
    code = bits_of(parts[f"{name}s"], s["statistic_bits"], groups).astype(np.float32)
    second = floats(parts[f"{name}_statistics"], "float16")[np.arange(len(code)) // s["statistic_rows"]]
    return code * second[..., 1] + second[..., 0]


LEVELS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def block_scales(parts: dict[str, np.ndarray], name: str, s: dict[str, Any], groups: int) -> np.ndarray:
    bits, below = {"block-4": (4, 0), "block-6": (6, 0), "block-6-signed": (6, 32), "block-8-signed": (8, 128)}[
        s["scale_format"]
    ]
    code = (bits_of(parts[f"{name}s"], bits, groups) - below).astype(np.float32)
    return np.repeat(floats(parts[f"block_{name}s"], "float16"), 256 // s["group_size"], axis=1) * code


def e4m3(code: np.ndarray) -> np.ndarray:
    exponent, fraction = (code & 127) >> 3, code & 7
    size = np.where(exponent, (1 + fraction / 8) * 2.0 ** (exponent.astype(int) - 7), fraction / 8 * 2.0**-6)
    return np.where(code & 128, -size, size).astype(np.float32)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def read_weight(parts: dict[str, np.ndarray], w: dict[str, Any], s: dict[str, Any]) -> np.ndarray:
    (rows, columns), bits, group = w["shape"], s["bits"], s["group_size"]
    groups, kind = columns // group, s["scale_format"] if s["scale_format"] in ("float32", "bfloat16") else "float16"
    if s["grid"] == "ternary":
        digits = parts["codes"].astype(np.int64)[:, :, None] // 3 ** np.arange(5) % 3
        codes = digits.reshape(rows, -1)[:, :columns].reshape(rows, groups, group)
        bits, s = 0, {**s, "grid": "codebook", "levels": [-1.0, 0.0, 1.0]}
    else:
        codes = bits_of(parts["codes"], bits, columns).reshape(rows, groups, group)
    if s["grid"] == "binary":
        a, b, c, d = (floats(parts["scales"], "float16")[:, :, None, i] for i in range(4))
        second = bits_of(parts["second"], 1, columns).reshape(codes.shape)
        salient = bits_of(parts["salient"], 1, columns).reshape(1, groups, group)
        size = np.where(salient, np.where(second, c + d, np.abs(c - d)), np.where(second, b, a))
        return np.where(codes, -size, size).reshape(rows, columns)
    if s["scale_format"] == "statistics":
        scale, zero = (statistics(parts, name, s, groups) for name in ("scale", "zero"))
    elif s["scale_format"] == "two-level":
        code = bits_of(parts["scales"], 7, groups)
        row = floats(parts["row_scales"], "bfloat16")[:, None]
        wide = 2.0 ** (parts["row_scales"][:, None] & 3)
        log = np.where(code & 63, 2.0 ** (wide * ((code & 63) / 5 - 63 / 5)), 0).astype(np.float32) * -row
        size = np.where(row < 0, log, (code & 63).astype(np.float32) * (row / np.float32(63)))
        scale = np.where(code >= 64, -1, 1).astype(np.float32) * size
    elif s["scale_format"].startswith("block-"):
        scale = block_scales(parts, "scale", s, groups)
    elif s["scale_format"] == "e8m0":
        scale = (2.0 ** (parts["scales"].astype(int) - 127)).astype(np.float32)
    elif s["scale_format"] == "e4m3":
        scale = e4m3(parts["scales"]) / floats(parts["tensor_scale"], "float32")
    else:
        scale = floats(parts["scales"], kind)
    scale, value = scale[..., None], codes.astype(np.float32)
    if s["grid"] == "codebook":
        weight = np.array(s["levels"], np.float32)[codes] * scale
    elif s["grid"] in ("iq4_nl", "iq4_xs", "tq2_0"):
        weight = np.array([-1, 0, 1] if s["grid"] == "tq2_0" else LEVELS, np.float32)[codes] * scale
    elif s["grid"] == "fp8":
        weight = e4m3(codes) * scale
    elif s["grid"] in ("mxfp4", "nvfp4"):
        weight = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7]) * scale
    elif s["grid"] in ("q2_k", "q4_k", "q5_k"):
        weight = value * scale - block_scales(parts, "minimum", s, groups)[..., None]
    elif s["grid"] in ("minimum", "q4_1", "q5_1"):
        weight = value * scale + floats(parts["minima"], kind)[..., None]
    elif s["grid"] == "real-zero":
        weight = (value - zero[..., None]) * scale
    elif s["grid"] == "zero-point":
        weight = (value - bits_of(parts["zeros"], bits, groups)[..., None].astype(np.float32)) * scale
    else:
        weight = (value - np.float32(2 ** (bits - 1))) * scale
    weight = weight.reshape(-1)
    if s["outlier_grid"] != "none" and w["outliers"]:
        place = outlier_places(parts["outlier_positions"], w["positions"], rows * columns, w["outliers"], group)
        code, wide = codes.reshape(-1)[place], s["outlier_bits"]
        if s["outlier_grid"] != "float16" and wide > bits:
            code = (code if bits else 0) | bits_of(parts["outlier_codes"], wide - bits, w["outliers"]) << bits
        value, half = code.astype(np.float32), 2 ** (wide - 1)
        if s["outlier_grid"] == "float16":
            weight[place] = floats(parts["outlier_values"], "float16")
        elif s["outlier_grid"] == "row":
            row, size = floats(parts["outlier_scales"], "bfloat16")[place // columns], code % half
            spread = 2.0 ** (parts["outlier_scales"] & 3)[place // columns]
            level = np.where(size, 2.0 ** (-12.7 * spread * (half - 1 - size) / (half - 1)), 0).astype(np.float32)
            log = level * (-row * (half - 1))
            weight[place] = np.where(row < 0, np.where(code >= half, -log, log), (value - half) * row)
        else:
            step = floats(parts["outlier_scales"], kind).reshape(-1)[place // group]
            least = floats(parts["outlier_minima"], kind).reshape(-1)[place // group]
            if s["outlier_grid"] == "minmax":
                weight[place] = value * step + least
            else:
                weight[place] = np.where(code >= half, -1, 1) * ((code % half).astype(np.float32) * step + least)
    weight = weight.reshape(rows, columns)
    if s.get("transform") == "column-order":
        ordered, weight = weight, np.empty_like(weight)
        weight[:, parts["transform_order"]] = ordered
    return weight


# --- the tests ---------------------------------------------------------------------------------------------------

CASES = [
    ("rtn", {}),
    ("rtn", {"symmetric": True, "scale_format": "float32"}),
    ("rtn", {"scale_format": "bfloat16"}),
    ("adpq", {"scale_format": "bfloat16"}),
    ("rtn", {"symmetric": True, "scale_format": "two-level"}),
    ("adpq", {"scale_format": "bfloat16"}),
    ("rtn", {"grid": "signed", "scale_format": "bfloat16", "clip_search": True}),
    ("adpq+", {"grid": "signed"}),
    ("rtn", {"group_size": "row", "clip_search": True}),
    ("adpq", {}),
    ("adpq", {"scale_format": "float32", "outlier_fraction": 0.4}),
    ("adpq", {"outlier_grid": "sign-magnitude", "outlier_scope": "group"}),
    ("adpq", {"grid": "zero-point", "outlier_bits": 8}),
    ("adpq", {"outlier_fraction": 0.0005}),
    ("adpq+", {}),
    ("rtn", {"bits": 1.6, "grid": "ternary"}),
    ("adpq+", {"bits": 1.6, "grid": "ternary"}),
    ("adpq", {"bits": 1.6, "grid": "ternary", "outlier_grid": "float16"}),
    ("adpq", {"bits": 1.6, "grid": "ternary", "outlier_grid": "sign-magnitude", "outlier_bits": 5}),
    ("adpq+", {"outlier_fraction": 0.0, "column_weights": "norm-gain"}),
    ("gptq", {"group_size": "16"}),
    ("spqr", {}),
    ("precal+gptq", {"group_size": "32"}),
    ("precal+spqr", {}),
    ("oac+spqr", {"group_size": "32"}),
    ("precal+oac", {}),
    ("precal+oac", {"bits": 1}),
    ("adpq+", {"bits": 1}),
    ("oac+billm", {"bits": 1}),
]
CALIBRATION = CalibrationOptions(CalibrationChoice("random-tokens", 2, 32))


def read_again(model: Path, tmp_path: Path, method: str, choices: dict[str, Any]) -> tuple[float, float, Recipe]:
    """Quantize, read by the specification alone, compare with `unpack`; the squared error, norm, and the recipe."""
    out = tmp_path / "out"
    recipe = recipe_from_choices(method, choices)
    report = fewbit.quantize(model, out, recipe, RunOptions(shard_size=60_000, calibration=CALIBRATION))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(out.glob("*.safetensors")):
        tensors.update(read_file(path))
    unpack(out, tmp_path / "plain")
    plain: dict[str, np.ndarray] = {}
    for path in sorted((tmp_path / "plain").glob("*.safetensors")):
        plain.update(read_file(path))
    error = norm = 0.0
    original: dict[str, np.ndarray] = {}
    for path in sorted(model.glob("*.safetensors")):
        original.update(read_file(path))
    assert len(config["weights"]) == 15 and config["embeddings"] == ["model.embed_tokens"]
    sizes = {record["name"]: record["bytes"] for record in (*report["layers"], *report["embeddings"])}
    for module, w in config["weights"].items():
        prefix = f"{module}."
        parts = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        weight = read_weight(parts, w, config["schemes"][w["scheme"]])
        rounded = torch.from_numpy(weight).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(rounded, plain[f"{module}.weight"])
        assert sum(v.nbytes for v in parts.values()) == sizes[f"{module}.weight"]
        if module in config["embeddings"]:
            continue
        before = floats(original[f"{module}.weight"].view(np.int16), "bfloat16").astype(np.float64)
        error += ((weight - before) ** 2).sum()
        norm += (before**2).sum()
    reported = [r["relative_squared_error"] for r in report["layers"]]
    average = np.average(reported, weights=[r["weights"] for r in report["layers"]])
    assert abs(error / norm - average) < 0.2 * error / norm
    return error, norm, recipe


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("method", "choices"), CASES)
def test_a_reader_from_the_specification_gets_the_same_weights(
    tiny: Path, tmp_path: Path, method: str, choices: dict[str, Any], bits: int
) -> None:
    error, norm, recipe = read_again(tiny, tmp_path, method, {"bits": bits, **choices})
    assert error / norm < 4.0 ** (2.0 - recipe.bits), error / norm


@pytest.mark.slow
@pytest.mark.parametrize("grid", [grid.name for grid in GGML_GRIDS])
def test_the_same_for_the_block_types_of_ggml(tmp_path: Path, grid: str) -> None:
    model = build_tiny(tmp_path / "model", hidden_size=256, intermediate_size=256)
    error, norm, recipe = read_again(model, tmp_path, "adpq+", {"grid": grid})
    assert error / norm < 4.0 ** (1.2 - recipe.bits), error / norm


@pytest.mark.slow
@pytest.mark.parametrize("grid", [grid.name for grid in FLOAT_GRIDS])
@pytest.mark.parametrize("method", ["rtn", "adpq+", "precal+oac"])
def test_the_same_for_floating_point_numbers(tiny: Path, tmp_path: Path, grid: str, method: str) -> None:
    error, norm, recipe = read_again(tiny, tmp_path, method, {"grid": grid})
    # Of the bits of fp8, four are for the exponent.
    assert error / norm < (0.002 if recipe.bits == 8 else 0.03), error / norm


def test_bits_per_weight_is_bytes_on_disk(tiny: Path, tmp_path: Path) -> None:
    report = fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("adpq+", bits=3))
    weights = read_weights(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    tables = stored_bytes(weights.pop("model.embed_tokens"))
    size = sum(stored_bytes(w) for w in weights.values())
    assert report["output"]["bits_per_weight"] == 8 * size / sum(w.weights for w in weights.values())
    assert report["output"]["embedding_bytes"] == tables
    header = struct.unpack("<Q", (tmp_path / "out" / "model.safetensors").read_bytes()[:8])[0]
    total = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert total == report["output"]["file_bytes"] == size + tables + report["output"]["kept_bytes"] + 8 + header


def test_config_of_another_version_or_damaged_is_refused(tiny: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("rtn", bits=4))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    with pytest.raises(FewbitError, match="embeddings lists lm_head, but weights does not"):
        read_weights({**config, "embeddings": ["lm_head"]})
    del config["embeddings"]
    with pytest.raises(FewbitError, match="format version 3: this fewbit reads versions 1 and 2"):
        read_weights({**config, "format_version": 3})
    with pytest.raises(FewbitError, match="damaged quantization_config: unknown keys"):
        read_weights({**config, "schemes": [{**config["schemes"][0], "surprise": 1}]})
    with pytest.raises(FewbitError, match="damaged"):
        read_weights({**config, "weights": {"a": {"scheme": 7, "shape": [4, 64]}}})
    with pytest.raises(FewbitError, match="damaged"):
        read_weights({**config, "weights": {"a": {"scheme": 0, "shape": [4, 65]}}})
    scheme = {"bits": 4, "group_size": 32, "grid": "zero-point", "outlier_grid": "row", "outlier_bits": 8}
    one = {"scheme": 0, "shape": [4, 64], "outliers": 8}
    assert read_weights({**config, "schemes": [scheme], "weights": {"a": {**one, "positions": "indices"}}})
    for change in (
        {"positions": "indices", "outliers": 7},
        {"positions": "indices", "outliers": 0},
        {"positions": "x"},
    ):
        with pytest.raises(FewbitError, match=r"damaged quantization_config: positions of \d outliers cannot be"):
            read_weights({**config, "schemes": [scheme], "weights": {"a": {**one, **change}}})


def test_schemes_check_themselves() -> None:
    good = Scheme(3, 64, "zero-point")
    assert Scheme.from_dict(good.to_dict()) == good
    for change in ({"bits": 9}, {"grid": "x"}, {"scale_format": "two-level"}, {"levels": (1.0,)}):
        with pytest.raises(ValueError, match="cannot have this"):
            check_scheme(replace(good, **change))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("larger", [500, 30_000, 1e7])
@pytest.mark.parametrize("method", ["adpq+", "precal+oac"])
def test_rows_with_groups_of_very_different_sizes(tmp_path: Path, method: str, larger: float) -> None:
    """Channels that were made large and small before: scales and outliers of such rows are logarithmic."""
    model = build_tiny(tmp_path / "model")
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "mlp" in name:
                tensor[:, 32:] /= larger
        save_file(tensors, path, {"format": "pt"})
    read_again(model, tmp_path, method, {"bits": 4, "group_size": "16"})
    report = json.loads((tmp_path / "out" / "fewbit_report.json").read_text())
    if method == "adpq+":
        # The column solver makes small weights pay for errors of large ones.
        assert max(row["mean_group_error"] for row in report["layers"]) < 0.02


@pytest.mark.slow
def test_folders_of_version_1_are_read(tiny: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, tmp_path / "new", "adpq+", bits=3, embedding_bits=16)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    for path in (tmp_path / "old").glob("*.safetensors"):
        tensors = {name: tensor for name, tensor in load_file(path).items() if tuple(tensor.shape) != (0,)}
        save_file(tensors, path, {"format": "pt"})
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    del config["quantization_config"]["recipe"]["embedding_bits"]
    config["quantization_config"]["recipe"]["channel_scales"] = config["quantization_config"]["recipe"].pop("transform")
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    ids = torch.arange(24).unsqueeze(0) + 3
    expected = fewbit.load(tmp_path / "new", device="cpu")(ids).logits
    assert torch.equal(fewbit.load(tmp_path / "old", device="cpu")(ids).logits, expected)
    fewbit.unpack(tmp_path / "old", tmp_path / "plain")
    assert torch.equal(fewbit.load(tmp_path / "plain", device="cpu")(ids).logits, expected)
    text = {"calibration": "random-tokens", "samples": 4, "sequence_length": 16}
    fewbit.tune(tmp_path / "old", tmp_path / "tuned", epochs=1, held_out=1, batch_size=1, reference=tiny, **text)
    assert fewbit.inspect(tmp_path / "tuned")["models"][0]["method"] == "adpq+ + qaft"
