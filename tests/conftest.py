"""Tiny models built on the spot, and text: what every Python has, and files beside the checkout where there are any."""

import atexit
import io
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _own_cache() -> None:
    """A cache that the tests begin empty and remove: only fetched models stay in the user's (workers inherit it)."""
    mark = "FEWBIT_TESTS_CACHE"
    if mark in os.environ:
        return
    from fewbit.checkpoints.cache import cache_folder

    models, cache = cache_folder() / "models", Path(tempfile.mkdtemp(prefix="fewbit-tests-"))
    with suppress(OSError):
        models.mkdir(parents=True, exist_ok=True)
        (cache / "models").symlink_to(models.resolve(), target_is_directory=True)
    os.environ["FEWBIT_CACHE"] = os.environ[mark] = str(cache)
    atexit.register(shutil.rmtree, cache, ignore_errors=True)


_own_cache()
# Text and questions that are not part of the project; tests that need them skip without, and others run on
# `pydoc_data.topics`, which changes with the version of Python: they compare, and know no figures.
TESTS = Path(__file__).parent
SHARED = TESTS / "../../shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the texts and questions in ../shared/data")


def build_tiny(folder: Path, dtype: str = "bfloat16", shard_size: str = "60KB", **changes: Any) -> Path:
    """A random Llama of two blocks with a tokenizer, saved in several shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes; `<s>` is its BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:254]
    vocabulary = {"<s>": 0, "<unk>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sharded bfloat16 Llama with tied weights."""
    return build_tiny(tmp_path_factory.mktemp("tiny") / "model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on real models first: they take longest, and no core should wait for the other at the end."""
    items.sort(key=lambda item: item.get_closest_marker("real_model") is None)


def run_cli(*arguments: Any, env: dict[str, str] | None = None, code: int | None = 0) -> subprocess.CompletedProcess:
    """Run the command line; fails unless it ends with `code` (None: any). With `env`, in a process of its own.

    Without, in this one: a process spends several seconds on starting, where two cores have much else to do.
    """
    words = list(map(str, arguments))
    if env is None:
        from fewbit.cli import run

        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = run(words)
        result = subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
    else:
        command = [sys.executable, "-m", "fewbit.cli", *words]
        result = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **env}, stdin=subprocess.DEVNULL
        )
    assert code is None or result.returncode == code, f"{result.returncode}: {result.stderr}{result.stdout}"
    return result


def with_tests(**changes: str) -> dict[str, str]:
    """The environment of a process that imports from the tests, wherever it starts."""
    folders = sorted({str(path.parent) for path in TESTS.rglob("*.py")})
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, *([before] if before else [])]), **changes}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of an output but the one that holds times and memory."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "fewbit_run.json"}


def copy_folder(source: Path, target: Path) -> Path:
    """A copy of a model's folder that a test may change."""
    return Path(shutil.copytree(source, target))
