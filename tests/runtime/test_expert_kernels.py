"""Mixtures of experts run packed in the kernels: the same logits, and only what a token needs is decoded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import IDS, build, logits, quantized

import fewbit
from fewbit.runtime.kernels import table
from fewbit.runtime.kernels.cpu import NUMBA
from fewbit.runtime.packed_linear import PackedLinear
from fewbit.runtime.packed_parameter import PackedWeight
from fewbit.runtime.unpack import unpack_modules

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not table._is_installed(NUMBA.package, NUMBA.oldest), reason="needs numba: pip install 'fewbit[fast]'"
    ),
]
SIZES = {"num_hidden_layers": 1}
# What each type of model needs, and whether its checkpoints have a tensor for each expert.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, True),
    "qwen3_moe": ({"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2}, True),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_decoded_by_kernels(kind: str, tmp_path: Path) -> None:
    needs, is_single = KINDS[kind]
    build(tmp_path / "model", kind, dtype="float32", **SIZES, **needs)
    exclude = ("*_bias",) if kind == "gpt_oss" else ()
    quantized(tmp_path / "model", tmp_path / "out", "adpq+", 4, exclude=exclude)
    packed = fewbit.load(tmp_path / "out", device="cpu")
    plain = unpack_modules(fewbit.load(tmp_path / "out", device="cpu"))
    experts = {name: m for name, m in packed.named_modules() if isinstance(m, PackedWeight) and "experts" in name}
    one = IDS[:1, :1]
    torch.testing.assert_close(logits(packed, one), logits(plain, one), rtol=1e-4, atol=1e-5)
    used = {name for name, module in experts.items() if module.ready._prepared is not None}
    if is_single:
        # Of one token, two experts.
        assert 0 < len(used) < len(experts)
    assert _kernels(packed) == {"numba"}
    torch.testing.assert_close(logits(packed, IDS), logits(plain, IDS), rtol=1e-4, atol=1e-5)
    assert _kernels(packed) == {"numba"}


def _kernels(model: torch.nn.Module) -> set[str]:
    """Names of the kernels of what was prepared; "" for weights without one."""
    prepared = [m.ready._prepared for m in model.modules() if isinstance(m, PackedLinear | PackedWeight)]
    return {one.kernel.name if one.kernel is not None else "" for one in prepared if one is not None}
