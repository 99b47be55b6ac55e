"""`--for` and `export`: what cannot be done is said before anything is computed, and nothing is left beside OUT."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli
from gguf_models import build
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.errors import FewbitError

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("refusals") / "model", "llama", intermediate_size=128)


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"target": "llama.cpp", "bits": 9}, "has no type of 9 bits: use --bits 8 or less"),
        ({"target": "llama.cpp", "bits": 2, "grid": "q4_k_m"}, "q4_k_m has its own bits: leave --bits out"),
        ({"target": "llama.cpp", "symmetric": False}, "leave out --symmetric/--asymmetric"),
        ({"target": "llama.cpp", "embedding_bits": 9}, "embedding bits must be from 1 to 8, or 16"),
        ({"target": "llama.cpp", "shard_size": "1GB"}, "leave out --shard-size"),
        ({"target": "mlx", "shard_size": "1GB"}, "leave out --shard-size"),
        ({"target": "transformers", "scale_format": "float16"}, "in the model's dtype, bfloat16, not float16"),
    ],
)
def test_choices_are_refused_and_not_ignored(choices: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match=says):
        fewbit.quantize(model, tmp_path / "out", "rtn", **choices)
    assert not list(tmp_path.iterdir())


def test_what_a_file_needs_is_checked_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbit.api.run_quantize", lambda *_: pytest.fail("quantized first"))
    done = run_cli("quantize", model, tmp_path / "out.gguf", "--for", "llama.cpp", code=2)
    assert "give a folder" in done.stderr
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    for command in (("quantize", bare, tmp_path / "out"), ("plan", bare)):
        assert "bare: no tokenizer.json" in run_cli(*command, "--for", "llama.cpp", code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


@pytest.mark.parametrize("target", ["mlx", "transformers"])
def test_a_config_without_a_dtype(target: str, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if "dtype" not in key}))
    report = fewbit.quantize(folder, tmp_path / "out", target=target)
    assert report["recipe"]["scale_format"] == "bfloat16"


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_scales_that_a_format_lacks(target: str, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][:4] *= 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    command = ("quantize", folder, tmp_path / "out", "--for", target)
    done = run_cli(*command, code=2)
    assert f"{folder}: model.layers.0.mlp.up_proj: it has scales that float16 does not have" in done.stderr
    assert f"--for {target} --bits 4 --scale-format float16" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    run_cli(*command, "--scale-format", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("own", [{"beta_fast": 16.0}, {"attention_factor": 2.0}, {"truncate": False}, {}])
def test_parameters_of_yarn_that_a_file_does_not_hold(own: dict[str, Any], tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    folder = build(tmp_path / "model", "qwen2", rope_parameters={**rope, **own})
    done = run_cli("export", folder, tmp_path / "out", code=2 if own else 0)
    assert not own or f"of the type yarn with {next(iter(own))}" in done.stderr


def test_the_card_of_a_model_that_is_only_converted(model: Path, tmp_path: Path) -> None:
    run_cli("export", model, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\n# model as gguf\n" in text and "Its weights were converted with fewbit" in text
    assert "quantized" not in text and "Recipe" not in text


def test_the_card_of_an_import(model: Path, tmp_path: Path) -> None:
    run_cli("quantize", model, tmp_path / "out", "--for", "llama.cpp", "--method", "rtn")
    (tmp_path / "files").mkdir()
    shutil.copy(tmp_path / "out" / "out.gguf", tmp_path / "files" / "mine.gguf")
    (tmp_path / "files" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    run_cli("import", tmp_path / "files" / "mine.gguf", tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    assert "quantized by another tool (GGUF) and read by fewbit" in text
    assert "README.original.md" not in text and not (tmp_path / "a" / "README.original.md").exists()
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    run_cli("quantize", model, tmp_path / "gptq", "--for", "gptq", "--method", "rtn")
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "gptq").rename(snapshot)
    for name in ("README.md", "fewbit_report.json", "fewbit_run.json"):
        (snapshot / name).unlink(missing_ok=True)
    run_cli("import", snapshot, tmp_path / "b")
    assert "\n# owner/name, quantized\n" in (tmp_path / "b" / "README.md").read_text()
