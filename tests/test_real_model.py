"""Golden figures on the two named models, WikiText-2 raw test in windows of 1,024 tokens, bfloat16.

On 24 windows where the processor has bfloat16 products. Without, products take five times as long: one original on 24,
all else on the first 6 or 2, and fewer rows, so that a run of all ends in half an hour on two cores.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, run_cli

import fewbit
from fewbit.checkpoints.source import open_checkpoint
from fewbit.evaluation.perplexity import Protocol
from fewbit.linear import is_native
from fewbit.pipeline.run import RunOptions
from fewbit.recipe_choices import recipe_from_choices

pytestmark = pytest.mark.real_model
TEXT = SHARED / "wikitext2_raw_test.txt"
NATIVE = is_native(torch.bfloat16)
WHOLE = Protocol(1024, 24)
PROTOCOL, SHORT = (WHOLE, WHOLE) if NATIVE else (Protocol(1024, 6), Protocol(1024, 2))


def perplexity(
    model: str, tmp_path: Path, method: str, protocol: Protocol = PROTOCOL, **choices: Any
) -> tuple[float, float]:
    """(perplexity, bits per weight) of what a method makes of a named model."""
    folder = tmp_path / "out"
    fewbit.quantize(model, folder, recipe_from_choices(method, choices), RunOptions(overwrite=True))
    row = fewbit.evaluate(folder, TEXT, protocol)["models"][0]
    return row["perplexity"], row["bits_per_weight"]


@pytest.mark.parametrize(
    ("model", "protocol", "expected"),
    [("smollm2-135m", WHOLE, 23.35), ("gemma3-270m", SHORT, 18.63 if NATIVE else 15.15)],
)
def test_figures_of_originals(model: str, protocol: Protocol, expected: float) -> None:
    measured = fewbit.evaluate(model, TEXT, protocol)["models"][0]["perplexity"]
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("on_24", "on_6", "method", "choices"),
    [
        (30.9, None, "rtn", {"bits": 4, "group_size": "64", "scale_format": "float32"}),
        (29.4, None, "rtn", {"bits": 4, "group_size": "32", "scale_format": "float32"}),
        (80.5, 96.73, "rtn", {"bits": 3, "group_size": "64", "scale_format": "float32"}),
        (61.1, None, "rtn", {"bits": 3, "group_size": "32", "scale_format": "float32"}),
        (27.9, 32.20, "adpq", {"bits": 4, "scale_format": "float32"}),
        (89.2, None, "adpq", {"bits": 3, "scale_format": "float32"}),
    ],
)
def test_figures_of_smollm2(
    on_24: float, on_6: float | None, method: str, choices: dict[str, Any], tmp_path: Path
) -> None:
    if not NATIVE and on_6 is None:
        pytest.skip("left to processors with bfloat16 products")
    measured, _ = perplexity("smollm2-135m", tmp_path, method, **choices)
    assert measured == pytest.approx(on_24 if NATIVE else on_6, rel=0.01)


def test_adpq_plus_on_smollm2_at_3_bits(tmp_path: Path) -> None:
    measured, bits = perplexity("smollm2-135m", tmp_path, "adpq+", bits=3)
    assert bits <= 3.6
    assert measured <= 40 if NATIVE else measured == pytest.approx(43.48, rel=0.01)


def test_gemma3_and_adpq_plus_against_rounding_at_equal_bytes(tmp_path: Path) -> None:
    ours, bits = perplexity("gemma3-270m", tmp_path, "adpq+", SHORT, bits=3)
    rounded, rounded_bits = perplexity("gemma3-270m", tmp_path, "rtn", SHORT, bits=3, group_size="32")
    assert bits < rounded_bits
    assert ours < 0.4 * rounded


def test_8_bits_cost_nothing(tmp_path: Path) -> None:
    exact = Protocol(512, 12 if NATIVE else 6, dtype="float32")
    fewbit.quantize("smollm2-135m", tmp_path / "out", fewbit.preset("adpq+", bits=8))
    original, measured = fewbit.evaluate(["smollm2-135m", tmp_path / "out"], TEXT, exact)["models"]
    assert abs(math.log(measured["perplexity"] / original["perplexity"])) < 0.003


def test_the_cached_model_and_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_cli("quantize", "smollm2-135m", out, "--bits", 4 if NATIVE else 8)
    checkpoint = open_checkpoint(out)
    assert len(checkpoint.config["quantization_config"]["weights"]) == 210
    model = fewbit.load(out)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0])
