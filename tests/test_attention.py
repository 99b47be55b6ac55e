"""Attention of 16-bit models in float32, where a processor has no products of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import fewbit
import fewbit.attention
from fewbit.architecture.network import find_blocks
from fewbit.attention import fast_attention


class Block(nn.Module):
    """Grouped attention and nothing else."""

    def forward(self, *inputs: torch.Tensor, **where: Any) -> torch.Tensor:
        return scaled_dot_product_attention(*inputs, **where, enable_gqa=True)


def attend(native: bool, dtype: torch.dtype, mask: bool, recompute: bool = False) -> list[torch.Tensor]:
    """Outputs and gradients of grouped attention over 12 tokens."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, heads, 12, 8, generator=generator).to(torch.bfloat16) for heads in (4, 2, 2)]
    inputs = [value.to(dtype).requires_grad_() for value in made]
    allowed = torch.zeros(1, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), -1e9).to(dtype)
    change = torch.randn(1, 4, 12, 8, generator=generator).to(torch.bfloat16).to(dtype)
    where = {"attn_mask": allowed} if mask else {"is_causal": True}
    block = Block()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewbit.attention, "is_native", lambda asked: native or asked == torch.float32)
        with fast_attention([block]):
            out = checkpoint(block, *inputs, use_reentrant=False, **where) if recompute else block(*inputs, **where)
            gradients = torch.autograd.grad(out, inputs, change)
    assert "forward" not in block.__dict__
    return [out, *gradients]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_gradients(dtype: torch.dtype, mask: bool, recompute: bool) -> None:
    exact = attend(True, torch.float64, mask)
    for ours, wanted in zip(attend(False, dtype, mask, recompute), exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_where_products_are_native_nothing_changes() -> None:
    block, query = Block(), torch.randn(1, 2, 9, 8).to(torch.bfloat16)
    plain = block(query, query, query)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewbit.attention, "is_native", lambda asked: True)
        with fast_attention([block]):
            assert torch.equal(block(query, query, query), plain) and "forward" not in block.__dict__


def test_blocks_that_transformers_checkpoints(tiny: Path) -> None:
    ids = torch.arange(12).unsqueeze(0) + 3
    found = []
    for checkpointing in (False, True):
        model = fewbit.load(tiny, device="cpu").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fewbit.attention, "is_native", lambda asked: asked == torch.float32)
            with fast_attention(find_blocks(model)):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None and torch.equal(gradient, found[1][name]), name
