"""Products of 16-bit linear layers in float32, where a processor has none of its own."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fewbit
import fewbit.linear
from fewbit.curvature.observe import Watched, replacing, watching


@pytest.fixture(params=[False, True])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is taken for one with 16-bit products."""
    monkeypatch.setattr(fewbit.linear, "is_native", lambda dtype: request.param or dtype == torch.float32)
    return bool(request.param)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 40),
    columns=st.integers(1, 33),
    rows=st.integers(1, 50),
    at_once=st.integers(1, 200),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_products_and_gradients(
    tokens: int, columns: int, rows: int, at_once: int, bias: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens + 100 * rows + columns)
    x, weight = (torch.randn(n, columns, generator=generator).to(dtype) for n in (tokens, rows))
    shift = torch.randn(rows, generator=generator).to(dtype) if bias else None
    leaves = [tensor.requires_grad_() for tensor in (x, weight, shift) if tensor is not None]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    wanted = nn.functional.linear(*exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewbit.linear, "is_native", lambda dtype: False)
        patch.setattr(fewbit.linear, "_FEWEST_TOKENS", 0)
        patch.setattr(fewbit.linear, "_WIDENED_AT_ONCE", at_once)
        found = fewbit.linear.linear(x[None], weight, shift)[0]
    assert found.dtype == dtype and found.shape == (tokens, rows)
    torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)
    change = torch.randn(tokens, rows, generator=generator).to(dtype)
    gradients = torch.autograd.grad(found, leaves, change)
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, exact, change.double()), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_a_loaded_model_keeps_its_weights_and_names(tiny: Path, native: bool) -> None:
    model = fewbit.load(tiny, device="cpu")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, nn.Linear) and layer.weight.dtype == torch.bfloat16
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear
    assert list(plain.state_dict()) == list(model.state_dict())
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0.03, atol=0.03)


def test_layers_are_seen_and_replaced(native: bool) -> None:
    layer = nn.Linear(6, 4, bias=False, dtype=torch.bfloat16)
    layer.requires_grad_(False)
    layer.__class__ = fewbit.linear.Linear
    watched = [Watched("layer", layer, "weight")]
    x = torch.randn(12, 6, dtype=torch.bfloat16, requires_grad=True)
    seen: list[tuple[Tensor, Tensor | None]] = []
    with watching(watched, lambda key, inputs, gradient: seen.append((inputs, gradient)), backward=True):
        layer(x).float().sum().backward()
    ((inputs, gradient),) = seen
    assert torch.equal(inputs, x) and gradient is not None and torch.equal(gradient, torch.ones(12, 4).bfloat16())
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0, keepdim=True).expand(12, 6), rtol=0.02, atol=0.02)
    with replacing(watched, lambda key, inputs, weight, bias: inputs[:, :4]):
        assert torch.equal(layer(x), x[:, :4])


def test_what_is_native_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fewbit.linear.is_native(torch.float32)
    assert isinstance(fewbit.linear.is_native(torch.bfloat16), bool)

    def refuse(*_: object) -> None:
        raise AssertionError("widened")

    monkeypatch.setattr(fewbit.linear._Widened, "apply", refuse)
    monkeypatch.setattr(fewbit.linear, "is_native", lambda dtype: False)
    few = torch.ones(2, 3, dtype=torch.bfloat16)
    assert torch.equal(fewbit.linear.linear(few, few), nn.functional.linear(few, few))
    monkeypatch.setattr(fewbit.linear, "is_native", lambda dtype: True)
    many = torch.ones(64, 3, dtype=torch.bfloat16)
    assert torch.equal(fewbit.linear.linear(many, many), nn.functional.linear(many, many))
