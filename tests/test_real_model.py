"""Golden figures on the two named models, WikiText-2 raw test in windows of 1,024 tokens, bfloat16.

One original on 24 windows, all else on the first 6: a run of all must end in half an hour on two cores without
bfloat16 arithmetic. `benchmarks/zero_shot_quality.py` has everything on 24.
"""

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, run_cli

import fewbit
from fewbit.checkpoints.source import open_checkpoint
from fewbit.evaluation.perplexity import Protocol
from fewbit.pipeline.run import RunOptions
from fewbit.recipe import recipe_from_choices

pytestmark = pytest.mark.real_model
TEXT = SHARED / "wikitext2_raw_test.txt"
WHOLE, PROTOCOL = Protocol(1024, 24), Protocol(1024, 6)


def perplexity(
    model: str, tmp_path: Path, method: str, protocol: Protocol = PROTOCOL, **choices: Any
) -> tuple[float, float]:
    """(perplexity, bits per weight) of what a method makes of a named model."""
    folder = tmp_path / "out"
    fewbit.quantize(model, folder, recipe_from_choices(method, choices), RunOptions(overwrite=True))
    row = fewbit.evaluate(folder, TEXT, protocol)["models"][0]
    return row["perplexity"], row["bits_per_weight"]


@pytest.mark.parametrize(
    ("model", "protocol", "expected"), [("smollm2-135m", WHOLE, 23.35), ("gemma3-270m", PROTOCOL, 21.97)]
)
def test_figures_of_originals(model: str, protocol: Protocol, expected: float) -> None:
    measured = fewbit.evaluate(model, TEXT, protocol)["models"][0]["perplexity"]
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("expected", "method", "choices"),
    [
        (36.14, "rtn", {"bits": 4, "group_size": "64", "scale_format": "float32"}),
        (96.73, "rtn", {"bits": 3, "group_size": "64", "scale_format": "float32"}),
        (32.20, "adpq", {"bits": 4, "scale_format": "float32"}),
        (108.4, "adpq", {"bits": 3, "scale_format": "float32"}),
    ],
)
def test_figures_of_smollm2(expected: float, method: str, choices: dict[str, Any], tmp_path: Path) -> None:
    measured, _ = perplexity("smollm2-135m", tmp_path, method, **choices)
    assert measured == pytest.approx(expected, rel=0.01)


def test_adpq_plus_on_smollm2_at_3_bits(tmp_path: Path) -> None:
    measured, bits = perplexity("smollm2-135m", tmp_path, "adpq+", bits=3)
    assert bits <= 3.6
    assert measured == pytest.approx(43.48, rel=0.01)


def test_gemma3_and_adpq_plus_against_rounding_at_equal_bytes(tmp_path: Path) -> None:
    short = Protocol(1024, 2)
    ours, bits = perplexity("gemma3-270m", tmp_path, "adpq+", short, bits=3)
    rounded, rounded_bits = perplexity("gemma3-270m", tmp_path, "rtn", short, bits=3, group_size="32")
    assert bits < rounded_bits
    assert ours < 0.5 * rounded


def test_8_bits_cost_nothing(tmp_path: Path) -> None:
    exact = Protocol(512, 6, dtype="float32")
    fewbit.quantize("smollm2-135m", tmp_path / "out", fewbit.preset("adpq+", bits=8))
    original, measured = fewbit.evaluate(["smollm2-135m", tmp_path / "out"], TEXT, exact)["models"]
    assert abs(math.log(measured["perplexity"] / original["perplexity"])) < 0.003


def test_the_cached_model_and_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_cli("quantize", "smollm2-135m", out, "--bits", 8)
    checkpoint = open_checkpoint(out)
    assert len(checkpoint.config["quantization_config"]["weights"]) == 210
    model = fewbit.load(out)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0])
