import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_cli

import fewbit
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol, Totals, cut_windows, quantile
from fewbit.evaluation.text import read_text

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_windows_without_and_with_bos() -> None:
    ids = torch.arange(10, 33)
    plain = cut_windows(ids, Protocol(5, 0), None)
    assert plain.tolist() == [list(range(10 + 5 * i, 15 + 5 * i)) for i in range(4)]
    behind = cut_windows(ids, Protocol(5, 2), 1)
    assert behind.tolist() == [[1, 10, 11, 12, 13], [1, 15, 16, 17, 18]]
    with pytest.raises(FewbitError, match="the text has 23 tokens, which is 4 windows of 5, but 5 were requested"):
        cut_windows(ids, Protocol(5, 5), None)
    with pytest.raises(FewbitError, match="1 were requested: use fewer or shorter windows"):
        cut_windows(ids, Protocol(50, 0), None)


def test_totals_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 50, generator=generator)
    reference = logits + 0.3 * torch.randn(300, 50, generator=generator)
    targets = torch.randint(0, 50, (300,), generator=generator)
    totals = Totals()
    totals.add(logits, targets, reference)

    def log_softmax(z: np.ndarray) -> np.ndarray:
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    log_q, log_p = log_softmax(logits.double().numpy()), log_softmax(reference.double().numpy())
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(1)
    assert totals.tokens == 300
    assert totals.nll == pytest.approx(-log_q[np.arange(300), targets].sum(), rel=1e-5)
    assert torch.cat(totals.divergences).numpy() == pytest.approx(divergence, abs=1e-5)
    assert totals.same_top == (log_q.argmax(1) == log_p.argmax(1)).sum()
    assert quantile(totals.divergences, 0.99) == pytest.approx(np.sort(divergence)[296], abs=1e-5)


def test_quantile_is_the_smallest_value_that_enough_do_not_exceed() -> None:
    values = [torch.arange(1.0, 101.0)]
    assert quantile(values, 0.99) == 99.0
    assert quantile(values, 1.0) == 100.0
    assert quantile([torch.tensor([3.0])], 0.99) == 3.0


@pytest.mark.slow
@pytest.mark.parametrize("bos", ["never", "always"])
def test_perplexity_against_a_slow_loop(tiny: Path, text: Path, bos: str) -> None:
    result = fewbit.evaluate(tiny, text, Protocol(32, 5, bos))
    model = fewbit.load(tiny)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    losses = []
    for w in range(5):
        window = ids[32 * w : 32 * w + 32]
        window = [tokenizer.bos_token_id, *window[:-1]] if bos == "always" else window
        with torch.no_grad():
            z = model(torch.tensor([window])).logits[0].double().numpy()
        for t in range(1, 32):
            losses.append(np.log(np.exp(z[t - 1]).sum()) - z[t - 1][window[t]])
    row = result["models"][0]
    assert row["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert row["method"] == "original"
    assert row["bits_per_weight"] == 16
    assert "kl_mean" not in row
    assert result["protocol"]["bos"] == bos
    assert result["protocol"]["tokens_scored"] == 155


def test_bos_auto_follows_the_tokenizer(tiny: Path, text: Path) -> None:
    assert fewbit.evaluate(tiny, text, Protocol(32, 1))["protocol"]["bos"] == "never"


@pytest.mark.slow
def test_distance_from_itself_is_zero_and_from_fewer_bits_is_more(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bits in (8, 3):
        fewbit.quantize(tiny, tmp_path / str(bits), fewbit.preset("rtn", bits=bits))
    models = [tiny, tmp_path / "8", tmp_path / "3"]
    kept = fewbit.evaluate(models, text, Protocol(32, 4), reference=tiny)
    same, eight, three = kept["models"]
    assert same["kl_mean"] == 0
    assert same["top1_agreement"] == 1
    assert same["perplexity_ratio"] == 1
    assert eight["kl_mean"] < three["kl_mean"]
    assert three["bits_per_weight"] < 4 < eight["bits_per_weight"]
    monkeypatch.setattr("fewbit.evaluation.score.available_bytes", lambda: 0)
    again = fewbit.evaluate(models, text, Protocol(32, 4), reference=tiny)
    for a, b in zip(kept["models"], again["models"], strict=True):
        assert a["kl_mean"] == b["kl_mean"]


@pytest.mark.slow
def test_json_has_the_stable_keys_and_nothing_else_on_standard_output(tiny: Path, text: Path, tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    result = run_cli(
        "eval", tiny, "--data", text, "--seq-len", 32, "--windows", 2, "--reference", tiny, "--json", "--html", html
    )
    data = json.loads(result.stdout)
    expected = "name method bits_per_weight bytes perplexity nll kl_mean kl_p99 top1_agreement seconds peak_rss_bytes"
    assert set(expected.split()) <= set(data["models"][0])
    assert data["protocol"]["data_sha256"] == read_text(text).sha256
    assert {"fewbit", "torch", "transformers", "python"} <= set(data["versions"])
    check_page(html)


class Page(HTMLParser):
    """Collects tags and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and value and not value.startswith(("#", "data:")):
                self.fetched.append(value)


def check_page(path: Path) -> None:
    """A page with drawings that fetches nothing."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert "svg" in page.tags
    assert "table" in page.tags
    assert "script" not in page.tags
    assert page.fetched == []
    assert "url(http" not in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_models_run_in_the_dtype_that_was_asked_for(tiny: Path, text: Path) -> None:
    own = fewbit.evaluate(tiny, text, Protocol(32, 4), reference=tiny)["models"][0]
    wide = fewbit.evaluate(tiny, text, Protocol(32, 4, dtype="float32"), reference=tiny)["models"][0]
    assert (own["dtype"], wide["dtype"]) == ("bfloat16", "float32")
    assert own["perplexity"] != wide["perplexity"] == pytest.approx(own["perplexity"], rel=0.02)
    assert wide["kl_mean"] == 0


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_text(tmp_path / "a.jsonl").content == "one\n\ntwo"
    (tmp_path / "a.txt").write_bytes(b"kept\r\nas it is\n")
    assert read_text(tmp_path / "a.txt").content == "kept\r\nas it is\n"
    assert len(read_text("topics").content) > 100_000


@pytest.mark.slow
def test_quantize_and_inspect_pages(tiny: Path, tmp_path: Path) -> None:
    run_cli("quantize", tiny, tmp_path / "out", "--html", tmp_path / "q.html")
    check_page(tmp_path / "q.html")
    run_cli("inspect", tmp_path / "out", "--html", tmp_path / "i.html")
    check_page(tmp_path / "i.html")


@pytest.mark.slow
def test_originals_with_rounded_weights_and_inputs(tiny: Path, text: Path) -> None:
    options = ["--data", text, "--seq-len", "64", "--windows", "4", "--reference", tiny]
    source = ["--calibration", "random-tokens", "--samples", "4", "--sequence-length", "32"]
    names = ["w8a8", "smoothquant", "w8a8-dynamic"]
    page = ["--html", text.parent / "page.html", "--json"]
    printed = run_cli("eval", tiny, *options, *source, "--w8a8", ",".join(names), *page).stdout
    original, *rows = json.loads(printed)["models"]
    assert all(name in (text.parent / "page.html").read_text() for name in names)
    assert "smoothquant" in run_cli("eval", tiny, *options, *source, "--w8a8", "smoothquant").stdout
    wide = run_cli("eval", tiny, *options, "--w8a8", "w8a8-dynamic", "--dtype", "float32", "--json").stdout
    assert [row["dtype"] for row in json.loads(wide)["models"]] == ["float32", "float32"]
    assert [row["method"] for row in rows] == names
    assert original["kl_mean"] == 0
    for row in rows:
        assert 8 < row["bits_per_weight"] < 9
        assert 0 < row["kl_mean"] < 0.01
        assert row["perplexity"] == pytest.approx(original["perplexity"], rel=0.02)
        assert ("calibration" in row) == (row["method"] != "w8a8-dynamic")

    # The same figure by hand: inputs and weights rounded in a layer's own call.
    from fewbit.activations.choice import NAMED
    from fewbit.evaluation.score import window_losses
    from fewbit.evaluation.windows import read_windows
    from fewbit.pipeline.network import open_original
    from fewbit.pipeline.w8a8 import rounding_inputs

    _, network = open_original(tiny, "cpu")
    windows, _ = read_windows(tiny, read_text(str(text)), Protocol(64, 4))
    with rounding_inputs(network, NAMED["w8a8-dynamic"]):
        losses = window_losses(network.model, windows, "tiny")
    assert rows[2]["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--w8a8", "w4a4"], "--w8a8 must be one or more of w8a8, smoothquant, w8a8-dynamic, not w4a4"),
        (["--samples", "4"], "--samples: only --w8a8 w8a8 and smoothquant use a calibration set"),
        (["--w8a8", "w8a8-dynamic", "--seed", "3"], "--seed: only --w8a8 w8a8 and smoothquant use a calibration set"),
    ],
)
def test_bad_rounding_of_inputs(tiny: Path, text: Path, options: list[str], message: str) -> None:
    assert message in run_cli("eval", tiny, "--data", text, *options, code=2).stderr


@pytest.mark.slow
def test_quantized_folders_are_not_rounded_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, tmp_path / "rtn", fewbit.preset("rtn", group_size="32"))
    options = ["--data", text, "--seq-len", "64", "--windows", "2", "--w8a8", "w8a8-dynamic"]
    result = run_cli("eval", tmp_path / "rtn", *options, code=2)
    assert "needs an original model, but the given models are all quantized" in result.stderr
    result = run_cli("eval", tiny, tmp_path / "rtn", *options, "--json")
    methods = [row["method"] for row in json.loads(result.stdout)["models"]]
    assert methods == ["original", "w8a8-dynamic", "rtn"]
    result = run_cli("eval", tiny, "--tasks", "piqa", "--w8a8", "w8a8", code=2)
    assert "--w8a8 is evaluated on a text: give --data too" in result.stderr
