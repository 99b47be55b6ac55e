"""Packed layers are prepared when a model is loaded, and prepared again after their parts have changed."""

from pathlib import Path

import pytest
import torch
from runtime_models import IDS, build, logits, quantized

import fewbit
from fewbit.runtime.kernels import table
from fewbit.runtime.kernels.cpu import NUMBA
from fewbit.runtime.packed_linear import PackedLinear, parts_of
from fewbit.runtime.packed_parameter import PackedWeight
from fewbit.runtime.unpack import unpack_modules

pytestmark = pytest.mark.skipif(
    not table._is_installed(NUMBA.package, NUMBA.oldest), reason="needs numba: pip install 'fewbit[fast]'"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block in float32 with outliers, embeddings and head packed."""
    top = tmp_path_factory.mktemp("prepare")
    build(top / "model", dtype="float32", num_hidden_layers=1)
    return quantized(top / "model", top / "out", "adpq+", 3, embedding_bits=6)


def test_all_is_prepared_when_it_is_loaded(folder: Path) -> None:
    model = fewbit.load(folder, device="cpu")
    packed = [module for module in model.modules() if isinstance(module, PackedLinear | PackedWeight)]
    before = [module.ready._prepared for module in packed]
    assert len(packed) == 9 and all(one is not None and one.kernel is not None for one in before)
    logits(model, IDS[:1, :1])
    assert [module.ready._prepared for module in packed] == before


def test_parts_that_change(folder: Path) -> None:
    """In place, by other data, or by another tensor."""
    model = fewbit.load(folder, device="cpu")
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(1, 64)
    with torch.no_grad():
        first = layer(x)
        found = layer.ready.still(layer._buffers, x.dtype)
        assert found is not None and found is layer.ready._prepared
        half = parts_of(layer)["row_scales"].view(torch.bfloat16) / 2
        changed = half.view(layer.packed_row_scales.dtype)
        layer.packed_row_scales.data = changed.clone()
        assert layer.ready.still(layer._buffers, x.dtype) is None
        assert not torch.equal(layer(x), first)
        layer.packed_row_scales = (half * 2).view(changed.dtype)
        assert torch.equal(layer(x), first)
        layer.packed_row_scales.copy_(changed)
        assert not torch.equal(layer(x), first)
        assert layer.ready.still(layer._buffers, torch.bfloat16) is None


def test_inputs_of_another_size(folder: Path) -> None:
    model = fewbit.load(folder, device="cpu")
    for columns in (63, 65, 128):
        with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
            model.model.layers[0].mlp.up_proj(torch.randn(1, columns))


def test_inputs_that_are_rounded(tmp_path: Path) -> None:
    """A prepared layer rounds its inputs as an unpacked one, for one token and for many."""
    build(tmp_path / "model", dtype="float32", num_hidden_layers=1)
    folder = quantized(tmp_path / "model", tmp_path / "out", "w8a8", 8)
    model, plain = fewbit.load(folder, device="cpu"), unpack_modules(fewbit.load(folder, device="cpu"))
    for tokens in (1, 2, 24):
        torch.testing.assert_close(
            logits(model, IDS[:1, :tokens]), logits(plain, IDS[:1, :tokens]), rtol=1e-4, atol=1e-5
        )
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(1, layer.in_features)
    with torch.no_grad():
        assert float((layer(x) - x @ layer.weight.T).norm() / layer(x).norm()) > 1e-3
