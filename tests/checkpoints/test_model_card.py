"""Model cards: what they say, where their facts come from, and that no folder tells where it was made."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny, copy_folder, run_cli
from safetensors import safe_open

import fewbit
from fewbit.calibration.source import public_text
from fewbit.checkpoints.front_matter import front_matter, read_front_matter
from fewbit.checkpoints.json_file import read_json
from fewbit.checkpoints.model_card import Written, base_of, card
from fewbit.checkpoints.origins import origin_of
from fewbit.checkpoints.public_names import hub_name_of, public_config, public_model
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.pipeline.records import published
from fewbit.tuning.report import report_of

RTN = fewbit.preset("rtn", bits=4)
SECRET = "where-nobody-looks"
OF_THE_ORIGINAL = """---
license: Apache-2.0
license_link: https://example.org/LICENSE
tags:
- chat
---
# The original
"""


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a card, in a folder whose name no output may contain; the cache is elsewhere."""
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "cache"))
    model = build_tiny(tmp_path / SECRET / "llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": f"/fsx/{SECRET}/run7"}))
    (model / "README.md").write_text(OF_THE_ORIGINAL)
    (model.parent / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    return model


def written_bytes(folder: Path) -> dict[str, bytes]:
    """All files but the weights, of which the headers are taken."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found[path.name] = f"{file.metadata()} {list(file.keys())}".encode()
        elif path.is_file():
            found[path.name] = path.read_bytes()
    return found


def check_private(folder: Path, top: Path) -> None:
    """No file names the folders above the model and the text, the home folder or the folder of the output."""
    for name, data in written_bytes(folder).items():
        for secret in (SECRET, str(top), str(Path.home()) + os.sep, str(top.resolve())):
            # What the tokenizers library writes about itself is of the original's own files.
            assert secret.encode() not in data, (folder.name, name, secret)


@pytest.mark.slow
def test_no_folder_tells_where_it_was_made(private: Path, tmp_path: Path) -> None:
    text = ("--calibration", f"{private.parent / 'text.txt'}:6", "--sequence-length", 16)
    run_cli("quantize", private, tmp_path / "q", "--html", tmp_path / "q" / "page.html")
    run_cli("quantize", private, tmp_path / "gptq", "--method", "gptq", *text)
    run_cli("curvature", private, tmp_path / "kept", *text)
    run_cli("quantize", private, tmp_path / "stored", "--method", "oac", "--curvature", tmp_path / "kept")
    train = ("--epochs", 1, "--held-out", 2, "--batch-size", 2, "--device", "cpu")
    run_cli("tune", tmp_path / "gptq", tmp_path / "tuned", *text, *train)
    run_cli("unpack", tmp_path / "tuned", tmp_path / "plain")
    for name in ("q", "gptq", "stored", "tuned", "plain"):
        check_private(tmp_path / name, tmp_path)
    # What was done is still said, without folders.
    report = json.loads((tmp_path / "tuned" / "fewbit_report.json").read_text())
    assert report["model"] == "llama" and report["model_is_local"] is True
    assert report["calibration"]["calibration"]["sources"] == report["tuning"]["calibration"]["sources"] == "text.txt:6"
    shown = (tmp_path / "tuned" / "README.md").read_text()
    assert "text.txt:6, 6 sequences of 16 tokens" in shown and "held-out loss before and after tuning" in shown
    # The original is found all the same on this machine, and nowhere else.
    assert origin_of(tmp_path / "q") == origin_of(tmp_path / "tuned") == private
    assert json.loads(run_cli("inspect", tmp_path / "q", "--json").stdout)["reference"]


def test_what_the_card_of_a_folder_says(private: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = fewbit.quantize(private, out, RTN)
    head = read_front_matter(out / "README.md")
    assert head == {
        "license": "apache-2.0",
        "license_link": "https://example.org/LICENSE",
        "library_name": "transformers",
        "tags": ["fewbit", "quantized", "4-bit"],
    }
    text = (out / "README.md").read_text()
    assert "# llama, quantized to 4 bits" in text
    assert f"| bits per weight of the linear layers | {report['output']['bits_per_weight']:.2f} |" in text
    assert '"bits": 4' in text and 'from_pretrained("FOLDER")' in text and "fewbit chat FOLDER" in text
    assert "perplexity" not in text.lower()
    assert (out / "README.original.md").read_text() == OF_THE_ORIGINAL
    listed = json.loads((out / "fewbit_run.json").read_text())["files"]
    assert {"README.md", "README.original.md"} <= set(listed)
    again = tmp_path / "again"
    fewbit.quantize(private, again, RTN)
    assert (again / "README.md").read_bytes() == (out / "README.md").read_bytes()


def test_cards_of_what_is_made_from_a_folder(private: Path, tmp_path: Path) -> None:
    fewbit.quantize(private, tmp_path / "q", RTN)
    fewbit.unpack(tmp_path / "q", tmp_path / "plain")
    head = read_front_matter(tmp_path / "plain" / "README.md")
    assert head["license"] == "apache-2.0" and head["tags"] == ["fewbit"]
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "# llama, quantized and unpacked to 16 bits" in text and "vllm serve FOLDER" in text
    # The card of the original goes with it, and is not the card of a card.
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {"README.md", "README.original.md"} <= names and not [name for name in names if "-2" in name]
    assert (tmp_path / "plain" / "README.original.md").read_text() == OF_THE_ORIGINAL


def test_the_card_of_a_gguf_folder(private: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gguf_models import build

    model = build(tmp_path / SECRET / "for-gguf", "llama")
    fewbit.export(model, tmp_path / "small")
    check_private(tmp_path / "small", tmp_path)
    text = (tmp_path / "small" / "README.md").read_text()
    assert "llama-server -m small.gguf" in text and "FROM ./small.gguf" in text
    assert read_front_matter(tmp_path / "small" / "README.md")["library_name"] == "gguf"


@pytest.mark.parametrize("names", [["README.md"], ["readme.md"], ["README.md", "README.original.md"]])
def test_the_original_keeps_its_card(tiny: Path, tmp_path: Path, names: list[str]) -> None:
    model = copy_folder(tiny, tmp_path / "m")
    for name in names:
        (model / name).write_text(f"this is {name}")
    fewbit.quantize(model, tmp_path / "out", RTN)
    texts = {path.read_text() for path in (tmp_path / "out").glob("README.*") if path.name != "README.md"}
    assert texts == {f"this is {name}" for name in names}
    assert "fewbit wrote this card" in (tmp_path / "out" / "README.md").read_text()


def test_a_card_of_the_user_is_not_replaced(tiny: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", fewbit.RunOptions(overwrite=True)
    fewbit.quantize(tiny, out, RTN)
    fewbit.quantize(tiny, out, RTN, again)
    ours = (out / "README.md").read_text()
    (out / "README.md").write_text("mine")
    with pytest.raises(FewbitError, match=r"contains README\.md, which fewbit did not write"):
        fewbit.quantize(tiny, out, RTN, again)
    assert (out / "README.md").read_text() == "mine"
    (out / "README.md").write_text(ours)
    (out / "fewbit_run.json").unlink()
    fewbit.quantize(tiny, out, RTN, again)


def test_base_models(tmp_path: Path) -> None:
    named = base_of(tmp_path, "smollm2-135m", {})
    assert named.hub == "HuggingFaceTB/SmolLM2-135M-Instruct" and named.licence == {"license": "apache-2.0"}
    assert base_of(tmp_path, "gemma3-270m", {}).licence == {"license": "gemma"}
    assert base_of(tmp_path, "owner/name", {"license": "MIT"}).licence == {"license": "mit"}
    assert base_of(tmp_path, "owner/name", {}).hub == "owner/name"
    local = base_of(tmp_path, "llama", {"license": {"x": 1}, "_name_or_path": "owner/other"})
    assert local.hub is None and local.licence == {}
    text = card(named, Written("native", {"recipe": {"bits": 3}}, 1000))
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\nbase_model_relation: quantized\n" in text
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    assert hub_name_of(snapshot) == public_model(snapshot) == "owner/name"
    # A form that has no row yet.
    assert "## Use it" not in card(named, Written("other", {}, 1000))


def test_names_from_outside_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        '---\nlicense: "mit\\nevil: 1"\nlicense_name: <script>\nlicense_link: javascript:x\nbase_model: [a, "b"]\n---\n'
    )
    assert base_of(tmp_path, "m", {}).licence == {}
    text = card(base_of(tmp_path, "a|b](http://x)\x1b[2J<i>", {}), Written("native", {"method": "x|y\n# z"}, 1))
    assert "\x1b" not in text and "<i>" not in text and "\n# z" not in text and r"x\|y" in text


@pytest.mark.parametrize(
    "values",
    [
        {"license": "mit", "tags": ["a", "b c", "no", "1.5", "x: y"]},
        {"base_model": "Owner/Name-1.5", "license_name": 'a "quoted" # name', "empty": []},
        {"a": "é\n---\nb"},
    ],
)
def test_front_matter_is_read_as_it_was_written(tmp_path: Path, values: dict[str, Any]) -> None:
    text = front_matter(values)
    (tmp_path / "README.md").write_text(f"{text}\nrest: 1\n", encoding="utf-8")
    assert read_front_matter(tmp_path / "README.md") == {key: value for key, value in values.items() if value != []}
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(text.removeprefix("---\n").rsplit("---\n", 1)[0]) == {
        key: value if value != [] else None for key, value in values.items()
    }


@pytest.mark.parametrize(
    "text", ["", "# card", "---\nlicense: mit", "---\n: x\n- y\nlicense: |\n  mit\n---", "---\n---"]
)
def test_front_matter_that_is_none(tmp_path: Path, text: str) -> None:
    assert read_front_matter(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_text(text)
    assert read_front_matter(tmp_path / "README.md") == {}


def test_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert public_model(tmp_path / "model") == public_model(".") == public_model("../model") == "model"
    assert public_model("owner/name") == "owner/name"
    assert public_model("/gone/model.gguf") == public_model(r"C:\gone\model.gguf") == "model.gguf"
    config = {"_name_or_path": "/a/b", "text_config": {"_name_or_path": "owner/name"}, "x": [{"name_or_path": "./y"}]}
    assert public_config(config) == {"text_config": {"_name_or_path": "owner/name"}, "x": [{}]}
    (tmp_path / "t.txt").write_text("x")
    sources = f"{tmp_path / 't.txt'}:4,self:2,/gone/data.jsonl:column,owner/set:text"
    assert public_text([{"sources": sources}]) == [{"sources": "t.txt:4,self:2,data.jsonl:column,owner/set:text"}]


def test_reports_of_earlier_versions_hold_paths(private: Path, tmp_path: Path) -> None:
    fewbit.quantize(private, tmp_path / "q", RTN)
    path = tmp_path / "q" / "fewbit_report.json"
    old = {**json.loads(path.read_text()), "model": str(private), "calibration": {"sources": f"/{SECRET}/t.txt:3"}}
    path.write_text(json.dumps(old))
    checkpoint = open_checkpoint(tmp_path / "q")
    found = report_of(checkpoint, open_checkpoint(private)).to_dict()
    assert found["model"] == "llama" and found["model_is_local"] and found["calibration"] == {"sources": "t.txt:3"}
    assert SECRET not in json.dumps(published(old))
    assert base_of(tmp_path / "q", "q", {}).name == "llama"


def test_a_cache_that_cannot_be_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "file" / "cache"))
    fewbit.quantize(tiny, tmp_path / "out", RTN)
    assert origin_of(tmp_path / "out") is None
    assert read_json(tmp_path / "out" / "fewbit_run.json")["origin"]
