"""Sampling from the model: attention to shared keys, and keys that are not copied."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny
from torch.nn.functional import scaled_dot_product_attention

import fewbit.calibration.generate as generate
from fewbit.attention import SharedKeys
from fewbit.calibration.growing_cache import grow_in_place
from fewbit.runtime.load import load


@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (4, 4), (3, 1)])
def test_heads_that_share_keys_against_float64(heads: int, shared: int) -> None:
    torch.manual_seed(heads)
    query, key, value = (torch.randn(2, n, t, 8) for n, t in ((heads, 1), (shared, 11), (shared, 11)))
    seen = (torch.arange(11) > 4).view(1, 1, 1, 11)
    with SharedKeys():
        found = scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=0.3)
        masked = scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
    each = heads // shared
    for head in range(heads):
        scores = query[:, head].double() @ key[:, head // each].double().transpose(1, 2) * 0.3
        wanted = scores.softmax(dim=-1) @ value[:, head // each].double()
        torch.testing.assert_close(found[:, head].double(), wanted, rtol=1e-5, atol=1e-6)
    plain = scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
    assert torch.equal(masked, plain)


@pytest.mark.parametrize("window", [0, 6])
def test_a_growing_cache_gives_what_the_whole_sequence_gives(tmp_path: Path, window: int) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = MistralConfig(**sizes, intermediate_size=64, vocab_size=64, sliding_window=window or None)
    model = MistralForCausalLM(config).eval()
    ids = torch.randint(0, 64, (3, 14), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(ids).logits
        out = model(ids[:, :4], use_cache=True)
        cache = out.past_key_values
        grow_in_place(cache, 14)
        held = []
        for first, behind in ((4, 5), (5, 8), *((place, place + 1) for place in range(8, 14))):
            with SharedKeys():
                out = model(ids[:, first:behind], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits, whole[:, first:behind], rtol=1e-4, atol=1e-4)
            held.append([layer.keys.untyped_storage().data_ptr() for layer in cache.layers])
            assert all(layer.keys.shape[2] == (min(behind, window - 1) if window else behind) for layer in cache.layers)
    assert cache.get_seq_length() == 14
    assert all(where == held[0] for where in held), "keys were copied"


def test_what_is_sampled_does_not_depend_on_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(build_tiny(tmp_path / "model"), device="cpu").float()
    found = generate.generate_sequences(model, 1, (3, 16), 5)

    def left_alone(cache: Any, length: int) -> None:
        """Keys are copied for every token, as transformers does."""

    monkeypatch.setattr(generate, "grow_in_place", left_alone)
    assert torch.equal(generate.generate_sequences(model, 1, (3, 16), 5), found)


def test_caches_of_other_kinds_are_left_alone() -> None:
    from transformers import StaticCache
    from transformers.models.llama import LlamaConfig

    cache = StaticCache(config=LlamaConfig(num_hidden_layers=2), max_cache_len=4)
    for other in (None, (("keys", "values"),), cache):
        grow_in_place(other, 4)
    assert not any("update" in vars(layer) for layer in cache.layers)
