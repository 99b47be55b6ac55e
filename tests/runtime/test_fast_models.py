"""Whole packed models with kernels and without: the same tokens, the same logits, and what can be done with them."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import build, logits
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.runtime.kernels import table
from fewbit.runtime.kernels.cpu import NUMBA
from fewbit.runtime.packed_linear import PackedLinear
from fewbit.runtime.packed_parameter import PackedWeight
from fewbit.runtime.unpack import unpack_modules

PROMPT = torch.arange(3, 9).view(1, 6)
needs_numba = pytest.mark.skipif(
    not table._is_installed(NUMBA.package, NUMBA.oldest), reason="needs numba: pip install 'fewbit[fast]'"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with 3 bits and outliers, in float32."""
    top = tmp_path_factory.mktemp("fast")
    build(top / "model", dtype="float32")
    fewbit.quantize(top / "model", top / "out", fewbit.preset("adpq+", bits=3, group_size="32"))
    return top / "out"


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def steps(model: Any) -> list[Tensor]:
    """The logits of single tokens, one after the other, with a cache."""
    past, found = None, []
    with torch.inference_mode():
        for token in PROMPT[0]:
            out = model(token.view(1, 1), past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits[0, -1])
    return found


def greedy(model: Any, **options: Any) -> list[int]:
    with torch.inference_mode():
        out = model.generate(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=-1, **options)
    return list(map(int, out[0]))


def kernels_used(model: torch.nn.Module) -> set[str]:
    """Names of the kernels of the layers that ran; "" for layers without one."""
    prepared = [m.ready._prepared for m in model.modules() if isinstance(m, PackedLinear | PackedWeight)]
    return {one.kernel.name if one.kernel is not None else "" for one in prepared if one is not None}


@needs_numba
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03), ("float16", 0.004)])
def test_single_tokens_as_in_the_unpacked_model(folder: Path, dtype: str, tolerance: float) -> None:
    packed, plain = load(folder, dtype=dtype), unpack_modules(load(folder, dtype=dtype))
    for found, wanted in zip(steps(packed), steps(plain), strict=True):
        assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())
    assert kernels_used(packed) == {"numba"}


@needs_numba
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_same_greedy_tokens(folder: Path, cache: str) -> None:
    options = {"cache_implementation": "static"} if cache == "static" else {}
    packed = load(folder)
    assert greedy(packed, **options) == greedy(unpack_modules(load(folder)), **options)
    assert kernels_used(packed) == {"numba"}


@needs_numba
def test_used_models_are_saved_copied_and_converted(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    wanted = steps(model)
    copied = copy.deepcopy(model)
    assert kernels_used(copied) == set()
    state = set(model.state_dict())
    assert not any("ready" in name for name in state)
    model.save_pretrained(tmp_path / "saved")
    for other in (copied, load(tmp_path / "saved")):
        assert all(map(torch.equal, steps(other), wanted))
    low = copied.to(torch.bfloat16)
    plain = unpack_modules(copy.deepcopy(low))
    for found, exact in zip(steps(low), steps(plain), strict=True):
        assert found.dtype == torch.bfloat16
        assert float((found - exact).abs().max()) <= 0.03 * float(exact.abs().max())


@needs_numba
def test_parts_that_are_loaded_again(folder: Path) -> None:
    model, other = load(folder), load(folder)
    wanted = steps(other)
    steps(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.packed_codes.zero_()
                module.packed_scales.zero_()
    assert not torch.equal(steps(model)[0], wanted[0])
    model.load_state_dict(other.state_dict())
    assert all(map(torch.equal, steps(model), wanted))


@needs_numba
def test_gradients_of_few_tokens(folder: Path) -> None:
    packed, plain = load(folder), unpack_modules(load(folder))
    found = []
    for model in (packed, plain):
        inputs = model.get_input_embeddings()(PROMPT[:, :3]).detach().requires_grad_()
        model(inputs_embeds=inputs).logits.square().sum().backward()
        found.append(inputs.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@needs_numba
@pytest.mark.parametrize("kind", ["autocast", "forward mode", "functional"])
def test_what_kernels_leave_to_torch(folder: Path, kind: str) -> None:
    packed, plain = load(folder), unpack_modules(load(folder))
    layers = [model.model.layers[0].mlp.up_proj for model in (packed, plain)]
    x, direction = torch.randn(2, 64), torch.randn(2, 64)
    found = []
    with torch.no_grad():
        for layer in layers:
            if kind == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    found.append(layer(x))
            elif kind == "forward mode":
                with torch.autograd.forward_ad.dual_level():
                    dual = torch.autograd.forward_ad.make_dual(x, direction)
                    found.append(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent)
            else:
                found.append(torch.func.jvp(layer, (x,), (direction,))[1])
    assert found[0] is not None and torch.equal(*found)


def test_without_numba(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As before, with one line that says once what would be faster."""
    table._is_installed.cache_clear()
    table._say_missing.cache_clear()
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    packed = load(folder)
    with caplog.at_level(logging.WARNING, "fewbit"):
        found = steps(packed)
        steps(load(folder))
    table._is_installed.cache_clear()
    assert [record.message for record in caplog.records] == [
        "packed weights run many times faster with numba: install it with  pip install 'fewbit[fast]'"
    ]
    assert kernels_used(packed) == {""}
    assert all(map(torch.equal, found, steps(unpack_modules(load(folder)))))
    # What later tests find is asked anew.
    monkeypatch.undo()
    table._is_installed.cache_clear()


@needs_numba
def test_prompts_and_single_tokens_agree(folder: Path) -> None:
    model = load(folder)
    whole = logits(model, PROMPT)[0]
    for found, wanted in zip(steps(model), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    long = PROMPT.repeat(1, 4)
    torch.testing.assert_close(logits(model, long), logits(unpack_modules(load(folder)), long))
