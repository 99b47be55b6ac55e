"""Operators by which compiled graphs multiply with packed weights (`fewbit/runtime/kernels/operators.py`)."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import build, quantized
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from fewbit.errors import FewbitError
from fewbit.formats.native import part_layout
from fewbit.runtime.kernels import operators
from fewbit.runtime.packed_linear import PackedLinear, parts_of

IDS = torch.arange(3, 9).view(1, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block in float32, with embeddings and head packed."""
    top = tmp_path_factory.mktemp("operators")
    build(top / "model", dtype="float32", num_hidden_layers=1)
    return quantized(top / "model", top / "out", "adpq+", 4, embedding_bits=8)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def a_layer(model: Any) -> PackedLinear:
    return next(module for module in model.modules() if isinstance(module, PackedLinear))


def in_order(layer: PackedLinear) -> list[Tensor]:
    return [parts_of(layer)[name] for name in part_layout(layer.stored)]


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_product_is_that_of_the_layer(folder: Path, tokens: int) -> None:
    layer = a_layer(load(folder))
    x = torch.randn(2, tokens, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = operators.packed_product(x, layer.bias, in_order(layer), layer.ready.number, layer.out_features)
        assert torch.equal(found, layer(x)) and found.is_contiguous()


def test_shapes_are_known_without_data(folder: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = a_layer(load(folder))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, ids = (mode.from_tensor(one) for one in (torch.ones(2, 3, layer.in_features), torch.arange(5)))
        parts = [mode.from_tensor(part) for part in in_order(layer)]
        product = operators.packed_product(x, None, parts, layer.ready.number, layer.out_features)
        rows = operators.packed_rows(ids, parts, layer.ready.number, layer.in_features, torch.bfloat16)
    assert product.shape == (2, 3, layer.out_features) and product.dtype == torch.float32
    assert rows.shape == (5, layer.in_features) and rows.dtype == torch.bfloat16


def test_copies_have_numbers_of_their_own(folder: Path) -> None:
    model = load(folder)
    again = copy.deepcopy(model)
    assert a_layer(model).ready.number != a_layer(again).ready.number
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_a_weight_that_is_gone(folder: Path) -> None:
    model = load(folder)
    layer = a_layer(model)
    parts, place, outputs = in_order(layer), layer.ready.number, layer.out_features
    x = torch.ones(1, layer.in_features)
    del model, layer
    gc.collect()
    with pytest.raises(FewbitError, match="a compiled model was kept longer than the packed weights that it uses"):
        operators.packed_product(x, None, parts, place, outputs)


@pytest.mark.slow
def test_written_by_inductor(folder: Path) -> None:
    """`fullgraph` allows no step outside of the graph."""
    torch._dynamo.reset()
    model = load(folder)
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        wanted = model(IDS).logits
        for _ in range(2):
            torch.testing.assert_close(compiled(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_decoding_is_one_graph(folder: Path) -> None:
    """One token at a time with a static cache: the graph of the first step does for all."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = load(folder)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    with torch.inference_mode():
        for step in (model, compiled):
            cache = StaticCache(config=model.config, max_cache_len=32)
            model(IDS, past_key_values=cache, use_cache=True)
            found.append([step(IDS[:, :1], past_key_values=cache, use_cache=True).logits.clone() for _ in range(3)])
    for one, wanted in zip(*found, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_blocks_that_are_compiled_one_by_one(tmp_path: Path) -> None:
    """They share their code, not the numbers of their weights."""
    torch._dynamo.reset()
    build(tmp_path / "model", dtype="float32", num_hidden_layers=3)
    model = load(quantized(tmp_path / "model", tmp_path / "out", "adpq+", 4))
    with torch.inference_mode():
        wanted = model(IDS).logits
        for block in model.model.layers:
            block.compile(backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_exported_program_has_none(tmp_path: Path) -> None:
    """It runs where this package is not installed."""
    build(tmp_path / "model", dtype="float32", num_hidden_layers=1)
    layer = a_layer(load(quantized(tmp_path / "model", tmp_path / "out", "rtn", 4))).requires_grad_(False)
    x = torch.randn(1, 4, layer.in_features)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        names = {str(node.target) for node in program.graph.nodes}
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)
    assert not any("fewbit" in name for name in names)
