"""GPTQ, AWQ and MLX in the programs that read them, where they are installed (see docs/exports.md)."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integer_models import build
from test_integer_experts import EXPERTS, mixtral, qwen
from test_integer_formats import decoded, make

import fewbit

pytestmark = pytest.mark.slow
LAYER = "model.layers.0.mlp.up_proj"
KEPT = "model.layers.1.mlp.up_proj"
LARGEST_KL = 1e-5
needs_gptqmodel = pytest.mark.skipif(
    not (find_spec("gptqmodel") and find_spec("optimum")), reason="needs gptqmodel and optimum"
)
needs_mlx = pytest.mark.skipif(not (find_spec("mlx") and find_spec("mlx_lm")), reason="needs mlx and mlx-lm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("readers") / "model")


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Compiling takes minutes, and changes no weights."""
    with torch._dynamo.config.patch(disable=True):
        yield


def made(model: Path, tmp_path: Path, name: str, grid: str, bits: int) -> tuple[Path, Path]:
    """A native folder in which one layer is kept, and the exported one."""
    native = make(model, tmp_path / "native", grid, bits, 64, exclude=[f"{KEPT}.weight"])
    fewbit.export(native, tmp_path / "out", name)
    return native, tmp_path / "out"


def divergence(native: Path, logits: Any) -> float:
    """Mean divergence per token of `logits(ids)` from those of the native folder in float32."""
    ids = torch.randint(2, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = torch.log_softmax(fewbit.load(native, dtype=torch.float32, device="cpu")(ids).logits.double(), dim=-1)
        theirs = torch.log_softmax(logits(ids).double(), dim=-1)
    return float((ours.exp() * (ours - theirs)).sum(dim=-1).mean())


@needs_gptqmodel
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("grid", "bits"), [("symmetric", 2), ("symmetric", 3), ("symmetric", 4), ("symmetric", 8), ("zero-point", 4)]
)
def test_gptq_in_transformers(grid: str, bits: int, model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPTQConfig

    native, out = made(model, tmp_path, "gptq", grid, bits)
    torch_kernel = GPTQConfig(bits=bits, backend="gptq_torch")
    loaded = AutoModelForCausalLM.from_pretrained(out, quantization_config=torch_kernel)
    assert type(loaded.get_submodule(KEPT)) is torch.nn.Linear
    weight = loaded.get_submodule(LAYER).dequantize_weight().T
    assert np.array_equal(weight.numpy(), decoded(native)[LAYER].astype(np.float16))
    assert divergence(native, lambda ids: loaded(ids).logits) < LARGEST_KL


@needs_gptqmodel
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("grid", ["symmetric", "zero-point"])
def test_awq_in_transformers(grid: str, model: Path, tmp_path: Path) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoModelForCausalLM, AwqConfig

    native, out = made(model, tmp_path, "awq", grid, 4)
    loaded = AutoModelForCausalLM.from_pretrained(out, quantization_config=AwqConfig(backend="torch_awq"))
    assert type(loaded.get_submodule(KEPT)) is torch.nn.Linear
    layer = loaded.get_submodule(LAYER)
    weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 64).T
    assert np.array_equal(weight.numpy(), decoded(native)[LAYER].astype(np.float16))
    assert divergence(native, lambda ids: loaded(ids).logits) < LARGEST_KL


@needs_mlx
@pytest.mark.parametrize("grid", ["minimum", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx(bits: int, grid: str, model: Path, tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import load_model

    native, out = made(model, tmp_path, "mlx", grid, bits)
    loaded, _ = load_model(out)
    assert type(loaded.model.layers[1].mlp.up_proj) is nn.Linear
    layer = loaded.model.layers[0].mlp.up_proj
    scales, biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
    weight = np.array(mx.dequantize(layer.weight, scales, biases, layer.group_size, layer.bits))
    assert np.array_equal(weight, decoded(native)[LAYER])

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.array(loaded(mx.array(ids.numpy())).astype(mx.float32)))

    assert divergence(native, logits) < LARGEST_KL


@needs_mlx
@pytest.mark.parametrize("build_experts", [qwen, mixtral])
def test_experts_in_mlx(build_experts: Any, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    native = make(build_experts(tmp_path / "model"), tmp_path / "native", "minimum", 2, 32)
    fewbit.export(native, tmp_path / "out", "mlx")
    loaded, _ = load_model(tmp_path / "out")
    assert divergence(native, lambda ids: torch.from_numpy(np.array(loaded(mx.array(ids.numpy()))))) < LARGEST_KL


@needs_gptqmodel
@pytest.mark.usefixtures("uncompiled")
def test_experts_in_gptqmodel(tmp_path: Path) -> None:
    """Its own loader reads experts that are stored one by one; transformers does not."""
    from gptqmodel import BACKEND, GPTQModel

    native = make(qwen(tmp_path / "model"), tmp_path / "native", "symmetric", 2, 32)
    fewbit.export(native, tmp_path / "out", "gptq")
    loaded = GPTQModel.load(str(tmp_path / "out"), backend=BACKEND.GPTQ_TORCH, device="cpu").model
    assert sum(hasattr(module, "qweight") for module in loaded.modules()) == 2 * (4 + 3 * EXPERTS)
    assert divergence(native, lambda ids: loaded(ids).logits) < LARGEST_KL
