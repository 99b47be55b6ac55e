"""The public surface: what the command line can do, in Python with names from `fewbit` alone; choices of tensors."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import run_cli

import fewbit
from fewbit.architecture.coverage import cover
from fewbit.checkpoints.source import open_checkpoint
from fewbit.cli import app
from fewbit.curvature.store import open_curvature
from fewbit.errors import FewbitError
from fewbit.option_values import checked
from fewbit.options import EVALUATE, PLAN, QUANTIZE, TUNE, Option
from fewbit.options_more import CHAT, CURVATURE, STUDIES, UNPACK
from fewbit.recipe import Recipe, sets_of

TEXT: dict[str, Any] = {"calibration": "random-tokens", "samples": 4, "sequence_length": 32}


def test_all_that_a_run_needs_is_there() -> None:
    for name in fewbit.__all__:
        assert getattr(fewbit, name) is not None
    assert {"quantize", "tune", "evaluate", "unpack", "inspect", "load"} <= set(dir(fewbit))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        fewbit.quantise  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("command", "options"), [("quantize", QUANTIZE), ("plan", PLAN), ("tune", TUNE), ("eval", EVALUATE)]
)
def test_python_and_the_command_line_have_one_description(command: str, options: tuple[Option, ...]) -> None:
    known = {p.name for p in typer.main.get_command(app).commands[command].params}  # type: ignore[attr-defined]
    names = {option.name for option in options}
    assert names <= known
    function = {"eval": "evaluate"}.get(command, command)
    assert names <= set(inspect.signature(getattr(fewbit, function)).parameters)
    said = getattr(fewbit, function).__doc__ or ""
    assert all(option.help in said for option in options if option.part != "data" and option.name != "tasks")


def test_a_whole_run_in_python(tiny: Path, tmp_path: Path) -> None:
    report = fewbit.quantize(tiny, tmp_path / "small", "precal+oac", bits=2, max_fallback=99, **TEXT)
    assert report["recipe"]["bits"] == 2
    assert report["calibration"]["calibration"]["sources"] == "random-tokens"
    same = run_cli("quantize", tiny, tmp_path / "cli", "--method", "precal+oac", "--bits", "2", *flags(TEXT), "--json")
    assert json.loads(same.stdout)["report"]["layers"] == report["layers"]
    tuned = fewbit.tune(
        tmp_path / "small", tmp_path / "tuned", epochs=1, held_out=1, batch_size=1, reference=tiny, **TEXT
    )
    assert tuned["tuning"]["choice"]["epochs"] == 1
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g " * 200)
    found = fewbit.evaluate([tiny, tmp_path / "tuned"], text, windows=2, seq_len=16, reference=tiny)
    assert [row["method"] for row in found["models"]] == ["original", "precal+oac + qaft"]
    assert fewbit.unpack(tmp_path / "tuned", tmp_path / "plain") == tmp_path / "plain"


def flags(choices: dict[str, Any]) -> list[str]:
    return [text for name, value in choices.items() for text in (f"--{name.replace('_', '-')}", str(value))] + [
        "--max-fallback",
        "99",
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, o: fewbit.quantize(m, o, bts=3), "quantize has no option 'bts': did you mean bits?"),
        (lambda m, o: fewbit.quantize(m, o, "adpq++"), "unknown method 'adpq.*did you mean adpq"),
        (lambda m, o: fewbit.quantize(m, o, grid="ternery"), "did you mean ternary?"),
        (lambda m, o: fewbit.quantize(m, o, fewbit.Recipe(), bits=3), "either a Recipe and RunOptions"),
        (lambda m, o: fewbit.quantize(m, o, set=["*:bit=3"]), "unknown choices of tensors: bit: did you mean bits?"),
        (lambda m, o: fewbit.quantize(m, o, set=["*.down_proj.weight"]), "--set must have the form PATTERN:NAME=VALUE"),
        (lambda m, o: fewbit.quantize(m, o, set=["nothing:bits=3"]), "--set nothing: matches no tensor to quantize"),
        (lambda m, o: fewbit.quantize(m, o, set=["*:bits=many"]), "--set: bits must be a number, not 'many'"),
        (lambda m, o: fewbit.quantize(m, o, set=["*:bits=9"]), r"--set \*: bits must be a whole number from 1 to 8"),
        (lambda m, o: fewbit.tune(m, o, epoch=3), "tune has no option 'epoch': did you mean epochs?"),
        (lambda m, o: fewbit.evaluate(m, "topics", window=3), "evaluate has no option 'window': did you mean windows?"),
    ],
)
def test_errors_suggest_the_nearest_name(tiny: Path, tmp_path: Path, call: Any, message: str) -> None:
    with pytest.raises(FewbitError, match=message):
        call(tiny, tmp_path / "out")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"bits": "four"}, "bits must be a number, not 'four'"),
        ({"samples": 1.5}, "samples must be a whole number, not 1.5"),
        ({"samples": float("nan")}, "samples must be a whole number, not nan"),
        ({"overwrite": "yes"}, "overwrite must be True or False, not 'yes'"),
        ({"outlier_fraction": "x"}, "outlier_fraction must be a number, not 'x'"),
        ({"include": 5}, "include must be a string or a list of strings, not 5"),
        ({"calibration": ["a.txt"]}, r"calibration must be a string, not \['a.txt'\]"),
        ({"curvature": 3}, "curvature must be a path, not 3"),
    ],
)
def test_values_of_another_kind_are_named(tiny: Path, tmp_path: Path, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(FewbitError, match=message):
        fewbit.quantize(tiny, tmp_path / "out", "rtn", **choices)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [option.name for option in QUANTIZE])
def test_no_value_of_any_option_is_a_bug_report(tiny: Path, name: str) -> None:
    for value in (object(), -1, 0.5, "", "x", [], ["x"], {}, {"x": 1}, True, float("nan"), 10**30):
        try:
            fewbit.plan(tiny, "precal+oac", **{name: value})
        except FewbitError as error:
            assert "\n" not in str(error)


def test_numbers_paths_and_single_patterns_are_taken_as_they_are_meant(tiny: Path) -> None:
    given = {"group_size": 32, "bits": 3, "exclude": "*.o_proj.weight", "set": {"*.q_proj.weight": {"bits": 5}}}
    said = {"group_size": "32", "bits": 3.0, "exclude": ["*.o_proj.weight"], "set": ["*.q_proj.weight:bits=5"]}
    assert fewbit.plan(tiny, "rtn", **given)["tensors"] == fewbit.plan(tiny, "rtn", **said)["tensors"]
    found = checked("quantize", QUANTIZE, {"device": torch.device("cuda:1"), "seed": 2**60 + 1})
    assert found == {"device": "cuda:1", "seed": 2**60 + 1}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adpq+", "precal+oac", "rtn"])
def test_tensors_with_choices_of_their_own(tiny: Path, tmp_path: Path, method: str) -> None:
    text = {} if method != "precal+oac" else {**TEXT, "max_fallback": 99}
    sets = ["*.mlp.*:bits=5", "*.down_proj.weight:bits=8,group_size=32", "*.layers.0.*.down_proj.weight:bits=2"]
    report = fewbit.quantize(tiny, tmp_path / "out", method, bits=3, set=sets, **text)
    bits = {row["name"]: row["bits"] for row in report["layers"]}
    assert {b for name, b in bits.items() if "self_attn" in name} == {3}
    assert {b for name, b in bits.items() if "up_proj" in name} == {5}
    assert bits["model.layers.0.mlp.down_proj.weight"] == 2
    assert bits["model.layers.1.mlp.down_proj.weight"] == 8
    assert {row["group_size"] for row in report["layers"] if "down_proj" in row["name"]} == {32}
    ids = torch.arange(24).unsqueeze(0) + 3
    packed = fewbit.load(tmp_path / "out", device="cpu")(ids).logits
    plain = fewbit.load(fewbit.unpack(tmp_path / "out", tmp_path / "plain"), device="cpu")(ids).logits
    assert torch.equal(packed, plain)
    assert Recipe.from_dict(report["recipe"]).to_dict() == report["recipe"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {scheme["bits"] for scheme in config["schemes"]} == {2, 3, 5, 6, 8}
    fewbit.tune(tmp_path / "out", tmp_path / "tuned", epochs=1, held_out=1, batch_size=1, reference=tiny, **TEXT)
    again = fewbit.inspect(tmp_path / "tuned")["models"][0]
    assert again["bits_per_weight"] == pytest.approx(report["output"]["bits_per_weight"])


def test_what_a_preset_chooses_by_width_follows_a_tensor_s_own() -> None:
    recipe = fewbit.preset("adpq+", bits=3, sets={"*.wide": {"bits": 6}, "*.mine": {"bits": 6, "grid": "normal-float"}})
    assert recipe.at("a.narrow").grid.name == "normal-float"
    assert recipe.at("a.wide").grid.name == "symmetric"
    assert recipe.at("a.mine").grid.name == "normal-float"
    assert sets_of(["model:a.*:bits=4,group_size=64,auto"]) == (
        ("model:a.*", (("bits", 4), ("group_size", "64,auto"))),
    )


def test_the_plan_says_it_before(tiny: Path) -> None:
    found = json.loads(run_cli("plan", tiny, "--bits", "3", "--set", "*.down_proj.weight:bits=8", "--json").stdout)
    widths = {row["name"]: row["bits_per_weight"] for row in found["tensors"]["quantize"]}
    assert widths["model.layers.0.mlp.down_proj.weight"] > 8 > 5 > widths["model.layers.0.mlp.up_proj.weight"]


def test_group_sizes_of_single_tensors_that_do_not_divide(tiny: Path, tmp_path: Path) -> None:
    wrong = "*.down_proj.weight:group_size=100"
    expected = (
        "group size 100 does not divide 2 layers with 128 columns (model.layers.0.mlp.down_proj, "
        "model.layers.1.mlp.down_proj): sizes that divide every layer: 16, 32, 64; or group_size=auto in --set"
    )
    with pytest.raises(FewbitError, match=re.escape(expected)):
        fewbit.quantize(tiny, tmp_path / "out", set=[wrong])
    both = r"size 48 .*12 layers with 64 columns.*; group size 100 .*2 layers.*--group-size auto and group_size=auto in"
    with pytest.raises(FewbitError, match=both):
        fewbit.quantize(tiny, tmp_path / "out", group_size="48", set=[wrong])
    found = fewbit.plan(tiny, set=[wrong, "*.up_proj.weight:group_size=32"])
    assert found["problems"] == [expected]
    sizes = {row["name"]: row["group_size"] for row in found["tensors"]["quantize"]}
    assert sizes["model.layers.0.mlp.down_proj.weight"] == 128
    assert sizes["model.layers.0.mlp.up_proj.weight"] == 32
    # The base recipe's size does not matter where every tensor has one of its own.
    assert not fewbit.plan(tiny, group_size="48", set=["*:group_size=32"])["problems"]


def test_a_plan_classifies_the_tensors_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.pipeline import plan

    calls = []
    monkeypatch.setattr(plan, "cover", lambda *given: calls.append(given) or cover(*given))
    fewbit.plan(tiny)
    assert len(calls) == 1


def test_a_recipe_from_a_file(tiny: Path, tmp_path: Path) -> None:
    first = fewbit.quantize(tiny, tmp_path / "a", "adpq+", bits=3, set=["*.down_proj.weight:bits=5"])
    (tmp_path / "recipe.json").write_text(json.dumps(first["recipe"]))
    for number, file in enumerate((tmp_path / "recipe.json", tmp_path / "a" / "config.json")):
        again = fewbit.quantize(tiny, tmp_path / f"b{number}", recipe=file)
        assert again["layers"] == first["layers"]
        assert again["recipe"] == first["recipe"]
    with pytest.raises(FewbitError, match="holds all choices: leave out --bits"):
        fewbit.quantize(tiny, tmp_path / "c", recipe=file, bits=3)
    (tmp_path / "recipe.json").write_text(json.dumps({**first["recipe"], "bitz": 3}))
    with pytest.raises(FewbitError, match=r"unknown recipe keys: bitz: did you mean bits\?"):
        fewbit.quantize(tiny, tmp_path / "c", recipe=tmp_path / "recipe.json")
    (tmp_path / "recipe.json").write_text(json.dumps({**first["recipe"], "solver": {"kind": "magic"}}))
    with pytest.raises(FewbitError, match="solver must be one of round, column"):
        fewbit.quantize(tiny, tmp_path / "c", recipe=tmp_path / "recipe.json")


def test_recipes_of_earlier_folders_are_read() -> None:
    flat = fewbit.preset("awq", bits=4).to_dict()
    flat["channel_scales"] = flat.pop("transform")
    assert Recipe.from_dict(flat) == fewbit.preset("awq", bits=4)


COMMANDS = {
    "curvature": CURVATURE,
    "unpack": UNPACK,
    "chat": CHAT,
    **{f"study {name}": table for name, table in STUDIES.items()},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_options_of_their_table(command: str) -> None:
    found: Any = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    table = {option.name: option for option in COMMANDS[command]}
    options = {p.name: p for p in found.params if p.param_type_name == "option"}
    assert options.keys() - table.keys() <= {"as_json", "data"} and table.keys() <= options.keys()
    assert all(options[name].help == option.help for name, option in table.items())
    # An option is called the same in all commands that have it.
    called = {option.name: option.flag for option in (*QUANTIZE, *EVALUATE)}
    assert all(option.flag == called.get(name, option.flag) for name, option in table.items())
    assert all(len(option.help) > 15 and option.help.endswith(".") for option in table.values())


def test_unpack_takes_the_size_of_files(tiny: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, tmp_path / "q", "rtn")
    run_cli("unpack", tmp_path / "q", tmp_path / "u", "--shard-size", "40kB")
    assert len(list((tmp_path / "u").glob("*.safetensors"))) > 1
    assert "--overwrite" in run_cli("unpack", tmp_path / "q", tmp_path / "u", code=2).stderr
    run_cli("unpack", tmp_path / "q", tmp_path / "u", "--overwrite")
    assert len(list((tmp_path / "u").glob("*.safetensors"))) == 1


def test_curvature_options(tiny: Path, tmp_path: Path) -> None:
    drawn = ("--calibration", "random-tokens", "--samples", 4, "--sequence-length", 16, "--exclude", "*.down_proj")
    run_cli("curvature", tiny, tmp_path / "f", *drawn)
    found = open_curvature(tmp_path / "f", open_checkpoint(tiny))
    assert found.choice == fewbit.CurvatureChoice("fisher", "token", gram_share=0.5)
    run_cli("curvature", tiny, tmp_path / "g", *drawn, "--kind", "gram", "--diagonal", "--tempering", "0.5")
    found = open_curvature(tmp_path / "g", open_checkpoint(tiny))
    assert found.choice == fewbit.CurvatureChoice("gram", diagonal=True, tempering=0.5, terms="token")
    assert (
        "tempering must be a finite number"
        in run_cli("curvature", tiny, tmp_path / "h", *drawn, "--tempering", "nan", code=2).stderr
    )
