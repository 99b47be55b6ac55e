"""A tokenizer that is not the model's, logits that overflow, and the same documents whatever else runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, byte_tokenizer, run_cli, with_tests
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.generate import generate_sequences
from fewbit.calibration.tokens import make_set
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol, Totals
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.runtime.load import load

TEXT = "plain words that go on and on. " * 200


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path, text: Path) -> None:
    with pytest.raises(
        FewbitError, match="the model: its tokenizer has token ids up to 255, but its embedding has 200 rows"
    ):
        make_set(CalibrationChoice(str(text), 2, 16), byte_tokenizer(), 200)
    model = build_tiny(tmp_path / "model", vocab_size=200)
    for words in (
        ("eval", model, "--data", text, "--seq-len", 32),
        ("quantize", model, tmp_path / "out", "--method", "gptq", "--calibration", text, "--sequence-length", 32),
    ):
        line = run_cli(*words, code=2).stderr.strip().splitlines()[-1]
        assert "its tokenizer has token ids up to 255, but its embedding has 200 rows" in line


def test_added_tokens_beyond_the_embedding_matter_where_a_text_has_them(tmp_path: Path, text: Path) -> None:
    model = build_tiny(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(model)
    assert make_set(CalibrationChoice(str(text), 2, 16), tokenizer, 256).ids.shape == (2, 16)
    assert read_windows(model, read_text(text), Protocol(32, 2))[0].shape == (2, 32)
    text.write_text("<image>" * 200)
    message = "the token '<image>' of the text has the id 256, but the embedding has 256 rows"
    with pytest.raises(FewbitError, match=message):
        make_set(CalibrationChoice(str(text), 2, 16), tokenizer, 256)
    with pytest.raises(FewbitError, match=message):
        read_windows(model, read_text(text), Protocol(32, 2))


def test_a_tokenizer_with_no_special_tokens(text: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    for source in (str(text), f"{text}:1,random-tokens"):
        assert make_set(CalibrationChoice(source, 2, 16), tokenizer, 256).ids.shape == (2, 16)


def overflowing(folder: Path) -> Path:
    from transformers import LlamaForCausalLM

    source = build_tiny(folder / "source", dtype="float16")
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float16)
    for name, parameter in model.named_parameters():
        if "gate_proj" in name or "up_proj" in name:
            parameter.data *= 1500
    model.save_pretrained(folder / "large")
    byte_tokenizer().save_pretrained(folder / "large")
    return folder / "large"


@pytest.mark.slow
def test_logits_that_overflow(tmp_path: Path, text: Path) -> None:
    model = overflowing(tmp_path / "model")
    with pytest.raises(
        FewbitError, match=r"logits are NaN or infinite .* in float16\): save the model in bfloat16 or float32"
    ):
        generate_sequences(load(model, device="cpu"), 0, (2, 8), 0)
    sizes = ("--samples", 2, "--sequence-length", 16)
    expected = {
        ("precal+oac", "self"): "the model's logits are NaN or infinite",
        ("awq", "random-tokens"): "its inputs contain NaN or infinity",
        ("gptq", "random-tokens"): "its inputs contain NaN or infinity",
    }
    for (method, source), message in expected.items():
        out = tmp_path / method
        result = run_cli("quantize", model, out, "--method", method, "--calibration", source, *sizes, code=2)
        assert message in result.stderr.strip().splitlines()[-1]
        assert not out.exists()


@pytest.mark.slow
def test_losses_that_are_no_numbers(tiny: Path, tmp_path: Path, text: Path) -> None:
    model = overflowing(tmp_path / "model")
    words = ("--data", text, "--seq-len", 32, "--windows", 2, "--json")
    for chosen in ((model,), (tiny, "--reference", model)):
        line = run_cli("eval", *chosen, *words, code=2).stderr.strip().splitlines()[-1]
        assert f"{model}: its loss is nan:" in line
        assert "try --dtype float32" in line
    row = json.loads(run_cli("eval", model, "--dtype", "float32", *words).stdout)["models"][0]
    assert row["perplexity"] > 1


def test_tokens_that_both_rule_out_cost_nothing() -> None:
    torch.manual_seed(0)
    logits, reference, targets = torch.randn(5, 9), torch.randn(5, 9), torch.zeros(5, dtype=torch.int64)
    logits[:, 8] = reference[:, 8] = float("-inf")
    ruled_out, without = Totals(), Totals()
    ruled_out.add(logits, targets, reference)
    without.add(logits[:, :8], targets, reference[:, :8])
    torch.testing.assert_close(torch.cat(ruled_out.divergences), torch.cat(without.divergences))


DRAW = """
import sys
from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.tokens import make_set
from conftest import byte_tokenizer
print(make_set(CalibrationChoice(sys.argv[1], 20, 64, 3), byte_tokenizer(), 256).sha256)
"""


@pytest.mark.slow
def test_the_same_documents_whatever_the_number_of_workers(tmp_path: Path) -> None:
    for part in range(3):
        rows = (json.dumps({"text": f"{part} {row} " + TEXT[: 20 * row]}) + "\n" for row in range(40))
        (tmp_path / f"{part}.jsonl").write_text("".join(rows))
    here = make_set(CalibrationChoice(str(tmp_path), 20, 64, 3), byte_tokenizer(), 256).sha256
    limits = {"RAYON_NUM_THREADS": "3", "OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "3", "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", DRAW, str(tmp_path)]
    found = subprocess.run(command, env=with_tests(**limits), capture_output=True, text=True, check=True)
    assert found.stdout.strip() == here


def test_progress_is_told(tiny: Path, text: Path) -> None:
    told: list[Any] = []
    text.write_text(TEXT * 400)
    read = read_text(text, lambda *words: told.append(words))
    assert told[0] == (1 << 20, len(TEXT) * 400, "checking text.txt")
    read_windows(tiny, read, Protocol(32, 2), lambda *words: told.append(words))
    assert told[-1][2] == "reading text.txt"
    make_set(CalibrationChoice(str(text), 2, 16), byte_tokenizer(), 256, None, lambda *words: told.append(words))
    assert told[-1] == (32, 32, f"reading {text}")
