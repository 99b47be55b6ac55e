"""Attention of 16-bit models in float32, where a processor has no products of its own."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import fewbit.attention
from fewbit.attention import fast_attention


def attend(native: bool, dtype: torch.dtype, mask: bool) -> list[torch.Tensor]:
    """Outputs and gradients of grouped attention over 12 tokens."""
    generator = torch.Generator().manual_seed(0)
    heads = {"query": 4, "key": 2, "value": 2}
    made = {name: torch.randn(1, count, 12, 8, generator=generator).to(torch.bfloat16) for name, count in heads.items()}
    inputs = {name: value.to(dtype).requires_grad_() for name, value in made.items()}
    allowed = torch.zeros(1, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), -1e9).to(dtype)
    change = torch.randn(1, 4, 12, 8, generator=generator).to(torch.bfloat16).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewbit.attention, "is_native", lambda asked: native or asked == torch.float32)
        with fast_attention():
            where = {"attn_mask": allowed} if mask else {"is_causal": True}
            out = scaled_dot_product_attention(**inputs, **where, enable_gqa=True)
            gradients = torch.autograd.grad(out, list(inputs.values()), change)
    return [out, *gradients]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_gradients(dtype: torch.dtype, mask: bool) -> None:
    exact = attend(True, torch.float64, mask)
    for ours, wanted in zip(attend(False, dtype, mask), exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_where_products_are_native_nothing_changes() -> None:
    query = torch.randn(1, 2, 9, 8).to(torch.bfloat16)
    plain = scaled_dot_product_attention(query, query, query)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewbit.attention, "is_native", lambda asked: True)
        with fast_attention():
            assert torch.equal(scaled_dot_product_attention(query, query, query), plain)
