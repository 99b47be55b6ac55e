"""What transformers does with a packed model: sampling, beams, caches, tracing, device maps, saving."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import build, packed_weights, quantized
from torch import Tensor
from transformers import AutoModelForCausalLM, cache_utils

import fewbit
from fewbit.runtime.kernels import table
from fewbit.runtime.kernels.cpu import NUMBA
from fewbit.runtime.unpack import unpack_modules

PROMPT = torch.arange(3, 9).view(1, 6)
LONG = torch.arange(2, 50).view(2, 24)
EMBEDDINGS = (16, 8)


@pytest.fixture(scope="module", params=EMBEDDINGS, ids=lambda bits: f"embeddings-{bits}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in float32 with 4 bits, embeddings and head packed or not."""
    top = tmp_path_factory.mktemp("generate")
    build(top / "model", dtype="float32")
    return quantized(top / "model", top / "out", "adpq+", 4, embedding_bits=request.param)


@pytest.fixture(params=["kernels", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With the kernels of numba, and as where numba is not installed."""
    if request.param == "kernels":
        if not table._is_installed(NUMBA.package, NUMBA.oldest):
            pytest.skip("needs numba: pip install 'fewbit[fast]'")
        yield True
        return
    table._is_installed.cache_clear()
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    yield False
    table._is_installed.cache_clear()


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def generate(model: Any, ids: Tensor = PROMPT, **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=10, pad_token_id=0, eos_token_id=-1, **options)
    return out.tolist()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids).logits


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "without a cache": {"use_cache": False, "do_sample": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_as_the_unpacked_model(folder: Path, way: str, kernels: bool) -> None:
    packed = load(folder)
    assert packed_weights(packed) == (14 if packed.config.quantization_config.get("embeddings") is None else 16)
    assert generate(packed, **WAYS[way]) == generate(unpack_modules(load(folder)), **WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
def test_a_batch_with_padding(folder: Path, rows: int, kernels: bool) -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])[:rows]
    options = {"attention_mask": (ids != 0).long(), "do_sample": False}
    assert generate(load(folder), ids, **options) == generate(unpack_modules(load(folder)), ids, **options)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 8, 24])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_less_exact_than_the_unpacked_model(folder: Path, tokens: int, dtype: str, kernels: bool) -> None:
    """Sums may be in another order for few tokens: both are as far from the logits in float64, up to a factor of 2.

    With more tokens, or without kernels, the logits are the same bit for bit.
    """
    ids = LONG[:1, :tokens]
    packed, plain = load(folder, dtype=dtype), unpack_modules(load(folder, dtype=dtype))
    exact = logits(unpack_modules(load(folder, dtype=dtype)).double(), ids)
    found, wanted = logits(packed, ids), logits(plain, ids)
    if not kernels or tokens > 8:
        assert torch.equal(found, wanted)
    scale = float(exact.abs().max())
    errors = [float((one.double() - exact).abs().max()) / scale for one in (found, wanted)]
    # The rounding of a few sums of 64 numbers, where the unpacked model happens to have hardly any.
    assert errors[0] <= 2 * errors[1] + 8 * torch.finfo(getattr(torch, dtype)).eps


def test_quantized_keys_and_values(folder: Path, kernels: bool) -> None:
    """In the backend that transformers has without other packages, and in any that is installed."""
    found = {
        "fp8": hasattr(cache_utils, "Fp8QuantizedLayer"),
        "quanto": cache_utils.is_optimum_quanto_available(),
        "hqq": cache_utils.is_hqq_available(),
    }
    backends = [name for name, is_there in found.items() if is_there]
    if not backends:
        pytest.skip("needs optimum-quanto, hqq, or a version of transformers with a cache in FP8")
    for backend in backends:
        options = {"cache_implementation": "quantized", "cache_config": {"backend": backend}, "do_sample": False}
        assert generate(load(folder), **options) == generate(unpack_modules(load(folder)), **options)


@pytest.mark.slow
def test_traced(one_block: Path, kernels: bool) -> None:
    """What torch.compile does before it writes code: the graphs give the same logits."""
    _compare_compiled(one_block, 6, backend="eager")


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, with embeddings and head packed: tracing takes long."""
    top = tmp_path_factory.mktemp("compiled")
    build(top / "model", dtype="float32", num_hidden_layers=1)
    return quantized(top / "model", top / "out", "rtn", 4, embedding_bits=8)


def _compare_compiled(folder: Path, tokens: int, backend: str) -> None:
    torch._dynamo.reset()
    model, ids = load(folder), LONG[:1, :tokens]
    wanted = logits(model, ids)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(logits(compiled, ids), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(folder: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate")
    model = load(folder, device_map=device_map)
    device = model.device
    assert torch.equal(logits(model, LONG.to(device)), logits(load(folder).to(device), LONG.to(device)))
    assert generate(model, PROMPT.to(device), do_sample=False) == generate(
        load(folder).to(device), PROMPT.to(device), do_sample=False
    )


def test_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    """The same bytes of every part, and the same logits; also after the model has run."""
    model = load(folder)
    wanted = logits(model, LONG)
    generate(model, do_sample=False)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again, LONG), wanted)
    assert _parts(tmp_path / "again") == _parts(folder)


def _parts(folder: Path) -> dict[str, tuple[str, Any, str]]:
    from safetensors.torch import load_file

    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    return {
        name: (
            str(tensor.dtype),
            tensor.shape,
            hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
        )
        for name, tensor in tensors.items()
        if tensor.numel()
    }


@pytest.mark.slow
def test_dequantized(folder: Path, tmp_path: Path, kernels: bool) -> None:
    model = load(folder)
    generate(model, do_sample=False)
    wanted = logits(load(folder), LONG)
    plain = model.dequantize()
    assert not packed_weights(plain)
    assert torch.equal(logits(plain, LONG), wanted)
    assert generate(plain, do_sample=False) == generate(load(folder), do_sample=False)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain"), LONG), wanted)


@pytest.mark.slow
def test_fewbit_load_is_the_same(folder: Path) -> None:
    assert torch.equal(logits(fewbit.load(folder, device="cpu"), LONG), logits(load(folder), LONG))
