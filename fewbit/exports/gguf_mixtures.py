"""llama.cpp's mixtures of block types: rows of data, by the names that its quantizer gives them.

A mixture gives most layers one type, and those that lose most a wider one. The rules are those of its quantizer, for
models without mixtures of experts.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A type for layers whose names end so, in some of the blocks. blocks(index, count): whether in this one."""

    layers: tuple[str, ...]
    grid: str
    blocks: Callable[[int, int], bool] = lambda index, count: True


@dataclass(frozen=True)
class Mixture:
    """A mixture: the type of a layer is that of the first rule for it, otherwise `most`."""

    name: str
    most: str
    rules: tuple[Rule, ...]

    def grid_of(self, layer: str, index: int, count: int) -> str:
        """The type of a layer of the block `index` out of `count`."""
        for rule in self.rules:
            if layer.endswith(rule.layers) and rule.blocks(index, count):
                return rule.grid
        return self.most


def _first(parts: int) -> Callable[[int, int], bool]:
    return lambda index, count: index < count // parts


def _below(end: int) -> Callable[[int, int], bool]:
    return lambda index, count: index < end


def _spread(index: int, count: int) -> bool:
    """The first and last eighth of the blocks, and every third between them."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


_VALUE, _OUTPUT, _DOWN, _FUSED = ("v_proj",), ("o_proj",), ("down_proj",), ("qkv_proj",)
"""Of the attention: values, output, and queries, keys and values in one layer; the last layer of the feed-forward."""

MIXTURES: dict[str, Mixture] = {
    one.name: one
    for one in (
        Mixture("q2_k_s", "q2_k", (Rule(_DOWN, "q4_k", _first(8)),)),
        # llama.cpp calls this one Q2_K; here, that is the type itself.
        Mixture("q2_k_m", "q2_k", (Rule(_VALUE, "q3_k"), Rule(_OUTPUT, "q3_k"), Rule(_DOWN, "q3_k"))),
        Mixture("q3_k_s", "q3_k", ()),
        Mixture(
            "q3_k_m",
            "q3_k",
            (
                Rule(_VALUE, "q5_k", _below(2)),
                Rule(_VALUE, "q4_k"),
                Rule(_DOWN, "q5_k", _first(16)),
                Rule((*_DOWN, *_OUTPUT, *_FUSED), "q4_k"),
            ),
        ),
        Mixture("q3_k_l", "q3_k", (Rule((*_VALUE, *_DOWN, *_OUTPUT), "q5_k"), Rule(_FUSED, "q4_k"))),
        Mixture("q4_k_s", "q4_k", (Rule(_VALUE, "q5_k", _below(4)), Rule(_DOWN, "q5_k", _first(8)))),
        Mixture("q4_k_m", "q4_k", (Rule((*_VALUE, *_DOWN), "q6_k", _spread), Rule(_FUSED, "q5_k"))),
        Mixture("q5_k_s", "q5_k", ()),
        Mixture("q5_k_m", "q5_k", (Rule((*_VALUE, *_DOWN), "q6_k", _spread), Rule(_FUSED, "q6_k"))),
    )
}
