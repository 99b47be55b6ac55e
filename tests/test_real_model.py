"""Golden figures on the two named models, WikiText-2 raw test, 24 windows of 1,024 tokens, bfloat16."""

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
PROTOCOL = Protocol(1024, 24)


def perplexity(model: str, tmp_path: Path, method: str | None = None, **choices: Any) -> tuple[float, float]:
    """(perplexity, bits per weight) of a named model or of what a method makes of it."""
    folder: str | Path = model
    if method:
        folder = tmp_path / "out"
        fewbit.quantize(model, folder, recipe_from_choices(method, choices), RunOptions(overwrite=True))
    row = fewbit.evaluate(folder, TEXT, PROTOCOL)["models"][0]
    return row["perplexity"], row["bits_per_weight"]


@pytest.mark.parametrize(
    ("expected", "method", "choices"),
    [
        (23.35, None, {}),
        (30.9, "rtn", {"bits": 4, "group_size": "64", "scale_format": "float32"}),
        (29.4, "rtn", {"bits": 4, "group_size": "32", "scale_format": "float32"}),
        (80.5, "rtn", {"bits": 3, "group_size": "64", "scale_format": "float32"}),
        (61.1, "rtn", {"bits": 3, "group_size": "32", "scale_format": "float32"}),
        (27.9, "adpq", {"bits": 4, "scale_format": "float32"}),
        (89.2, "adpq", {"bits": 3, "scale_format": "float32"}),
    ],
)
def test_figures_of_smollm2(expected: float, method: str | None, choices: dict[str, Any], tmp_path: Path) -> None:
    measured, _ = perplexity("smollm2-135m", tmp_path, method, **choices)
    assert measured == pytest.approx(expected, rel=0.01)


def test_adpq_plus_on_smollm2_at_3_bits(tmp_path: Path) -> None:
    measured, bits = perplexity("smollm2-135m", tmp_path, "adpq+", bits=3)
    assert bits <= 3.6
    assert measured <= 40


def test_gemma3_and_adpq_plus_against_rounding_at_equal_bytes(tmp_path: Path) -> None:
    original, _ = perplexity("gemma3-270m", tmp_path)
    assert original == pytest.approx(18.63, rel=0.01)
    ours, bits = perplexity("gemma3-270m", tmp_path, "adpq+", bits=3)
    rounded, rounded_bits = perplexity("gemma3-270m", tmp_path, "rtn", bits=3, group_size="32")
    assert bits < rounded_bits
    assert ours < 40 < 100 < rounded


def test_8_bits_cost_nothing(tmp_path: Path) -> None:
    original, _ = perplexity("smollm2-135m", tmp_path)
    measured, _ = perplexity("smollm2-135m", tmp_path, "adpq+", bits=8)
    assert abs(math.log(measured / original)) < 0.002


def test_the_cached_model_and_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_cli("quantize", "smollm2-135m", out, "--bits", 4)
    checkpoint = open_checkpoint(out)
    assert len(checkpoint.config["quantization_config"]["weights"]) == 210
    model = fewbit.load(out)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0])
