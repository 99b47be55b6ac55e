"""The study of outliers end to end on tiny models, and its parts against direct computation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, byte_tokenizer
from study_cases import look_at
from test_architectures import build
from test_evaluation import check_page

from fewbit.activations.rounding import range_of, round_inputs, round_weight
from fewbit.activations.site_record import SiteRecord
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.pipeline.layer_fixes import FIXES, apply_fix, fixed_error, inverse_diagonal, keep_sensitive, w8a8_error
from fewbit.pipeline.network import open_network
from fewbit.pipeline.plan import cover_original, scheme_for
from fewbit.recipe import preset
from fewbit.studies.outliers import STUDY, chosen_blocks
from fewbit.studies.outliers_measure import profile
from fewbit.studies.outliers_summary import summarize
from fewbit.studies.registry import make_choice
from fewbit.studies.run import run_study
from fewbit.studies.sets import all_sets, as_options, parse_set, read_sets

WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps under some old tree until the sun is up again "
GIVEN = {"windows": 2, "sequence_length": 32, "samples": 3, "sample_length": 32, "sources": "random-tokens"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "words.txt").write_text(WORDS * 20)
    (folder / "code.txt").write_text("def f(x):\n    return {x: [y for y in x]}\n" * 40)
    (folder / "hindi.txt").write_text("यह एक छोटा वाक्य है और फिर एक और। " * 40)
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three blocks whose first norm of block 1 makes channel 5 an outlier."""
    folder = build_tiny(tmp_path_factory.mktemp("planted") / "model", num_hidden_layers=3, shard_size="1GB")
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.input_layernorm.weight"][5] = 60.0
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def choice_of(model: Path, out: Path, texts: Path, **given: Any) -> Any:
    return make_choice(STUDY, str(model), out, str(texts / "words.txt"), {**GIVEN, "size": "quick", **given})


@pytest.mark.slow
def test_the_study_end_to_end(planted: Path, texts: Path, tmp_path: Path) -> None:
    sets = [parse_set(f"content/code={texts / 'code.txt'}"), parse_set(f"language/hindi={texts / 'hindi.txt'}")]
    sets.append(parse_set(f"language/english={texts / 'words.txt'}"))
    choice = choice_of(planted, tmp_path / "out", texts, bits=(4,), options={"sets": as_options(sets)})
    stopped: list[str] = []

    def stop(cell: dict[str, Any], opened: Any, tell: Any) -> Any:
        if cell["part"] == "errors":
            raise KeyboardInterrupt
        stopped.append(cell["set"])
        return STUDY.run_cell(cell, opened, tell)

    with pytest.raises(KeyboardInterrupt):
        run_study(replace(STUDY, run_cell=stop), choice)
    assert stopped == ["default", "nonsense", "code", "hindi", "english"]

    def rest(cell: dict[str, Any], opened: Any, tell: Any) -> Any:
        assert cell["part"] != "statistics"
        return STUDY.run_cell(cell, opened, tell)

    result = run_study(replace(STUDY, run_cell=rest), choice)
    straight = run_study(STUDY, replace(choice, out=tmp_path / "straight"))
    assert result["rows"] == straight["rows"] and result["findings"] == straight["findings"]
    rows = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    sites = {(r["set"], r["block"], r["site"]): r for r in rows if r["table"] == "site"}
    assert len(sites) == 5 * 3 * 4
    hurt = sites["default", 1, "attention in"]
    assert hurt["outlier_channels"] == "5" and hurt["top_share"] > 0.9 and hurt["kurtosis"] > 20
    assert sites["default", 0, "attention in"]["outliers"] == 0
    assert float(hurt["profile"].split()[5]) > 1.5
    overlap = {(r["one"], r["other"]): r for r in result["findings"]["overlap"]}
    assert {sites[name, 1, "attention in"]["outlier_channels"] for name in ("default", "code", "hindi")} == {"5"}
    assert len(overlap) == 10
    assert overlap["default", "hindi"]["jaccard"] > 2 * overlap["default", "hindi"]["by_chance"]
    errors = {(r["block"], r["site"], r["granularity"], r["ranges"]): r["error"] for r in rows if r["table"] == "w8a8"}
    assert len(errors) == 3 * 4 * 4
    assert errors[1, "attention in", "tensor", "static"] > 10 * errors[0, "attention in", "tensor", "static"]
    fixes = {(r["block"], r["site"], r["inputs"], r["fix"]): r for r in rows if r["table"] == "fix"}
    assert {key[3] for key in fixes} == set(FIXES) and len(fixes) == 3 * 4 * 2 * 5
    plain, awq = (fixes[1, "attention in", "16 bits", name]["error"] for name in ("none", "awq"))
    assert awq < 0.5 * plain
    models = [r for r in rows if r["table"] == "model"]
    assert len(models) == 1 + 7 + 4 * 4 and {r["sites"] for r in models} >= {"none", "all", "mlp out"}
    assert any("Overlap of outlier channels" in line for line in result["conclusion"])
    assert any("Between languages" in line for line in result["conclusion"])
    check_page(tmp_path / "out" / "study.html")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_experts_that_see_few_tokens_and_weights_that_are_transposed(name: str, texts: Path, tmp_path: Path) -> None:
    model = build(name, tmp_path / name, vocab_size=260)
    byte_tokenizer().save_pretrained(model)
    text = texts / "low.txt"
    text.write_text("".join(chr(33 + i % 60) for i in range(600)))
    given = {**GIVEN, "size": "quick", "bits": (4,), "methods": ("smoothquant",)}
    choice = make_choice(STUDY, str(model), tmp_path / "out", str(text), given)
    opened, rows = STUDY.open(choice), []
    for cell in STUDY.cells(choice):
        if cell["set"] == "default":
            rows += STUDY.run_cell(cell, opened, lambda share, what: None)
    assert {row["table"] for row in rows} == {"site", "weights", "states", "w8a8", "fix", "model"}
    assert {row["fix"] for row in rows if row["table"] == "fix"} == {"none", "smoothquant"}
    errors = [row["error"] for row in rows if row["table"] == "w8a8"]
    assert all(0 < error < 0.01 for error in errors)
    assert summarize(rows, choice).conclusion


@pytest.mark.slow
def test_the_page_in_a_browser(planted: Path, texts: Path, tmp_path: Path) -> None:
    options = {"sets": as_options([parse_set(f"language/hindi={texts / 'hindi.txt'}")])}
    run_study(STUDY, choice_of(planted, tmp_path / "out", texts, bits=(4,), methods=("awq",), options=options))
    seen = look_at(tmp_path / "out" / "study.html", tmp_path)
    for heading in (
        "Layer against channel",
        "Where inputs are large",
        "Massive activations",
        "W8A8 by site",
        "How much each remedy recovers",
    ):
        assert f"<h2>{heading}</h2>" in seen
    assert seen.count("<svg") == 4 + 1 + 2 + 1 + 2 and seen.count("<image") == 4 + 1 + 1


def test_fixes_against_direct_computation(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    network = open_network(checkpoint, cover_original(checkpoint), "cpu")
    site = network.sites[0][-1]
    x = torch.randn(40, site.columns, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 30
    record = SiteRecord.empty(site.columns, 40)
    record.add(x)
    weight = site.read().float()
    assert torch.allclose(record.gram, x.t() @ x, rtol=1e-4, atol=1e-2)
    assert torch.equal(record.largest, x.abs().amax(0))
    expected = x @ weight.t()
    for granularity in ("tensor", "token"):
        found = round_inputs(x, range_of(x, granularity), 8, True) @ round_weight(weight, 8).decode().t()
        wanted = float((found - expected).square().sum() / expected.square().sum())
        assert w8a8_error([site], record, [x[:20], x[20:]], granularity, "dynamic") != wanted or granularity == "token"
        assert w8a8_error([site], record, [x], granularity, "dynamic") == pytest.approx(wanted, rel=1e-3)
        assert w8a8_error([site], record, [x], granularity, "static") == pytest.approx(wanted, rel=1e-3)
    errors = {}
    for fix in FIXES:
        fixed = apply_fix(fix, [site], record, 3)
        scales = torch.ones(site.columns) if fixed.scales is None else fixed.scales
        found = (x / scales) @ fixed.weights[0].t()
        errors[fix] = fixed_error([site], fixed, record, [x], None)
        assert errors[fix] == pytest.approx(
            float((found - expected).square().sum() / expected.square().sum()), rel=1e-3
        )
        assert 3 < fixed.bits_per_weight < 5
    assert all(errors[fix] < errors["none"] for fix in ("adaptive-lasso", "awq", "sensitivity"))
    inverse = inverse_diagonal(record.gram)
    damped = record.gram.double()
    damped = damped / damped.diagonal().mean()
    damped.diagonal().add_(1.0)
    assert torch.allclose(inverse.double(), torch.linalg.inv(damped).diagonal(), rtol=1e-3)
    split = {"outliers": "adaptive-lasso", "outlier_fraction": 0.02, "outlier_grid": "float16"}
    recipes = [preset("rtn", bits=3), preset("rtn", bits=3, **split)]
    choices = [recipe.for_weight(scheme_for(site.columns, recipe)) for recipe in recipes]
    kept, mask = keep_sensitive(weight, inverse, *choices)
    assert int(mask.sum()) == int(0.02 * weight.numel()) and torch.equal(kept[mask], weight[mask].half().float())
    dearest = ((apply_fix("none", [site], record, 3).weights[0] - weight).square() / inverse).flatten()
    assert float(dearest[mask.flatten()].min()) >= float(dearest[~mask.flatten()].max())


def test_profiles_and_blocks() -> None:
    size = torch.ones(10)
    size[7] = 100.0
    assert profile(size, 5) == pytest.approx([0, 0, 0, 2, 0]) and len(profile(size, 96)) == 10
    assert chosen_blocks(30, 3) == [0, 14, 29] and chosen_blocks(2, 3) == [0, 1] and chosen_blocks(4, 0) == [0, 1, 2, 3]


def test_sets_are_read_and_checked(texts: Path, tmp_path: Path) -> None:
    choice = choice_of(texts, tmp_path / "out", texts, sources=str(texts / "code.txt"))
    made = all_sets(
        choice.calibration, ("mixed", "nonsense"), as_options([parse_set("quality/nonsense=random-tokens")])
    )
    assert [(one.axis, one.name) for one in made] == [
        ("default", "default"), ("quality", "mixed"), ("quality", "nonsense"),
    ]  # fmt: skip
    assert made[1].sources.endswith("code.txt,nonsense:1") and made[2].sources == "random-tokens"
    path = tmp_path / "sets.json"
    path.write_text(json.dumps({"language": {"hindi": str(texts / "hindi.txt")}, "content": {"odd": "nonsense"}}))
    assert [one.name for one in read_sets(path)] == ["hindi", "odd"]
    path.write_text("[1]")
    with pytest.raises(FewbitError, match="not a JSON file of the form"):
        read_sets(path)
    for text in ("code", "code=x.txt", "content/code=", "/x=nonsense"):
        with pytest.raises(FewbitError, match="write AXIS/NAME=SRC"):
            parse_set(text)
    with pytest.raises(FewbitError, match="no such file"):
        parse_set("content/code=./missing.txt")
    with pytest.raises(FewbitError, match="two sets have this name"):
        all_sets(choice.calibration, (), as_options([parse_set("a/b=nonsense"), parse_set("c/b=nonsense")]))
    with pytest.raises(FewbitError, match="--factor must be above 1"):
        STUDY.cells(choice_of(build_tiny(tmp_path / "t"), tmp_path / "o", texts, options={"factor": 0.5}))
    with pytest.raises(FewbitError, match="no remedy 'magic'"):
        STUDY.cells(choice_of(tmp_path / "t", tmp_path / "o", texts, methods=("magic",)))
