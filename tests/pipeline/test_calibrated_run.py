"""Calibrated runs end to end: interruption, refresh, memory, fallbacks, what the report says."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, folder_bytes, run_cli, with_tests

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.errors import FewbitError
from fewbit.pipeline import walk
from fewbit.pipeline.calibration_options import CalibrationOptions, parse_refresh
from fewbit.pipeline.network import Network
from fewbit.pipeline.run import RunOptions

CHOICE = CalibrationChoice("random-tokens", samples=16, sequence_length=48)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four blocks."""
    return build_tiny(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4, shard_size="1GB")


def options(**choices: Any) -> RunOptions:
    return RunOptions(shard_size=60_000, calibration=CalibrationOptions(CHOICE, **choices))


SLOW = """
import sys, time
import fewbit, fewbit.pipeline.solve_blocks as blocks
from test_calibrated_run import options
original = blocks.solve_alike
def slow(*arguments):
    time.sleep(0.1)
    return original(*arguments)
blocks.solve_alike = slow
recipe = fewbit.preset(sys.argv[3], bits=3, group_size="32")
fewbit.quantize(sys.argv[1], sys.argv[2], recipe, options(refresh=int(sys.argv[4])))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "refresh"), [("gptq", 0), ("awq", 0), ("precal+oac", 0), ("oac+spqr", 1), ("oac", 3)]
)
def test_a_killed_run_goes_on_and_gives_the_same_bytes(deep: Path, tmp_path: Path, method: str, refresh: int) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.fewbit-partial"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(deep), str(out), method, str(refresh)],
        stderr=subprocess.PIPE,
        env=with_tests(),
    )
    deadline = time.monotonic() + 120
    while len(list(partial.glob("*_proj.weight.solved"))) < 10 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    finished = {p.name: p.stat().st_mtime_ns for p in partial.glob("*_proj.weight.solved")}
    assert 10 <= len(finished) < 28
    recipe = fewbit.preset(method, bits=3, group_size="32")
    with pytest.raises(FewbitError, match="other arguments was interrupted here"):
        fewbit.quantize(deep, out, fewbit.preset(method, bits=4, group_size="32"), options(refresh=refresh))
    fewbit.quantize(deep, out, recipe, options(refresh=refresh))
    fewbit.quantize(deep, tmp_path / "straight", recipe, options(refresh=refresh))
    assert folder_bytes(out) == folder_bytes(tmp_path / "straight")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "straight"]
    assert not list(out.glob("*.solved"))


@pytest.mark.slow
def test_refresh_sees_the_blocks_before_it_quantized(deep: Path, tmp_path: Path) -> None:
    recipe = fewbit.preset("oac", bits=2, group_size="32")
    found = {}
    for refresh in (0, 1, 2):
        report = fewbit.quantize(
            deep, None, recipe, RunOptions(report_only=True, calibration=options(refresh=refresh).calibration)
        )
        found[refresh] = {r["name"]: r["relative_squared_error"] for r in report["layers"]}
        assert report["calibration"]["refresh"] == refresh
    first = [n for n in found[0] if ".layers.0." in n]
    last = [n for n in found[0] if ".layers.3." in n]
    assert all(found[0][n] == found[1][n] for n in first)
    assert all(found[0][n] != found[1][n] for n in last)
    assert all(found[1][n] != found[2][n] for n in last)
    assert [parse_refresh(text) for text in ("once", "block", "5")] == [0, 1, 5]
    with pytest.raises(FewbitError, match="--refresh must be once, block or a number of blocks, not 'never'"):
        parse_refresh("never")


@pytest.mark.slow
def test_little_memory_gives_the_same_weights(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Enough for the matrices of one block: the Fisher takes four passes, the Gram's hidden states go to the disk.
    allocated: list[bool] = []
    original = walk._allocate

    def note(shape: tuple[int, ...], *rest: Any) -> torch.Tensor:
        allocated.append(rest[2] < 2 * math.prod(shape))
        return original(shape, *rest)

    monkeypatch.setattr(walk, "_allocate", note)
    # Little memory lets fewer sequences run side by side, which changes the order of float sums.
    monkeypatch.setattr(walk.Walk, "_workers", lambda *_: 1)
    for method in ("oac", "gptq"):
        recipe = fewbit.preset(method, bits=3, group_size="32")
        fewbit.quantize(deep, tmp_path / f"{method}-little", recipe, options(memory_bytes=190_000))
        fewbit.quantize(deep, tmp_path / f"{method}-much", recipe, options())
        little, much = (folder_bytes(tmp_path / f"{method}-{name}") for name in ("little", "much"))
        assert little == much
    assert allocated == [True, False]


@pytest.mark.slow
def test_the_gram_is_that_of_the_quantized_prefix_or_of_the_original(deep: Path) -> None:
    recipe = fewbit.preset("gptq", bits=2, group_size="32")
    found = []
    for original in (False, True):
        calibration = CalibrationOptions(CHOICE, original_inputs=original)
        report = fewbit.quantize(deep, None, recipe, RunOptions(report_only=True, calibration=calibration))
        found.append({r["name"]: r["relative_squared_error"] for r in report["layers"]})
    assert all(found[0][n] == found[1][n] for n in found[0] if ".layers.0." in n)
    assert any(found[0][n] != found[1][n] for n in found[0] if ".layers.3." in n)


def test_fallbacks_are_counted_and_named(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fewbit.solvers.weight as solving

    monkeypatch.setattr(solving, "factor", lambda prepared, damping: None)
    recipe = fewbit.preset("gptq", bits=4, group_size="32")
    with pytest.raises(FewbitError, match=r"28 weights fell back to rounding: model\.layers\.0\..*--max-fallback"):
        fewbit.quantize(deep, tmp_path / "out", recipe, options())
    report = fewbit.quantize(deep, tmp_path / "out", recipe, options(max_fallback=28))
    assert {r["path"] for r in report["layers"]} == {"fallback: the curvature has no Cholesky factor"}


def test_a_fisher_that_underflowed_is_an_error(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fewbit.curvature.fisher as fisher

    def nothing(logits: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, float]:
        return torch.zeros_like(logits), 0.0

    monkeypatch.setattr(fisher, "_loss_gradient", nothing)
    with pytest.raises(FewbitError, match=r"(head|model\.layers\..*): its gradients are all 0 although it had inputs"):
        fewbit.quantize(deep, tmp_path / "out", fewbit.preset("oac", bits=4, group_size="32"), options())


def test_a_layer_whose_gradients_underflowed_is_an_error(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fewbit.curvature.accumulate as accumulate

    original = accumulate.Accumulator.observe

    def lost(self: Any, key: str, x: torch.Tensor, gradient: torch.Tensor | None) -> None:
        assert gradient is not None
        original(self, key, x, gradient * (0 if "layers.1.self_attn.q_proj" in key or "layers.1.attn" in key else 1))

    monkeypatch.setattr(accumulate.Accumulator, "observe", lost)
    run = RunOptions(report_only=True, calibration=options().calibration)
    with pytest.raises(FewbitError, match=r"q_proj.*: its gradients are all 0 although it had inputs"):
        fewbit.quantize(deep, None, fewbit.preset("oac", bits=4, group_size="32"), run)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["oac", "gptq"])
def test_progress_goes_on_while_blocks_are_solved(deep: Path, method: str) -> None:
    shown: list[tuple[int, int, str]] = []
    run = RunOptions(report_only=True, progress=lambda *line: shown.append(line), calibration=options().calibration)
    fewbit.quantize(deep, None, fewbit.preset(method, bits=4, group_size="32"), run)
    solving = [line for line in shown if " error " in line[2]]
    assert {text.split(",")[0] for _, _, text in solving} == {f"block {index} of 4" for index in range(1, 5)}
    calibrated = shown[: shown.index(solving[-1]) + 1]
    assert [done for done, _, _ in calibrated] == sorted(done for done, _, _ in calibrated)
    assert all(done < total for done, total, text in solving if not text.startswith("block 4"))


@pytest.mark.slow
def test_a_full_disk_while_calibrating(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    recipe, little = fewbit.preset("gptq", bits=4, group_size="32"), options(memory_bytes=190_000)
    with monkeypatch.context() as patched:
        patched.setattr("os.posix_fallocate", raise_full)
        with pytest.raises(FewbitError, match=r"the disk is full: free .* and run the same command again"):
            fewbit.quantize(deep, tmp_path / "out", recipe, little)

    def full(*arguments: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fewbit.checkpoints.whole_file.save_file", full)
    with pytest.raises(FewbitError, match=r"solved: the disk is full: free .* and run the same command again"):
        fewbit.quantize(deep, tmp_path / "out", recipe, little)
    text = ("--calibration", "random-tokens", "--samples", "4", "--sequence-length", "32")
    result = run_cli("curvature", deep, tmp_path / "fisher", *text, code=2)
    assert "safetensors: the disk is full: free some space and run the same command again" in result.stderr


def raise_full(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_the_report_names_tokens_and_paths(deep: Path, tmp_path: Path) -> None:
    run_cli(
        *["quantize", deep, tmp_path / "out", "--method", "precal+oac", "--bits", "3", "--group-size", "32"],
        *["--calibration", "random-tokens", "--samples", "4", "--sequence-length", "32", "--seed", "7"],
    )
    report = json.loads((tmp_path / "out" / "fewbit_report.json").read_text())
    assert report["calibration"]["calibration"]["seed"] == 7
    assert len(report["calibration"]["calibration"]["tokens_sha256"]) == 64
    assert report["calibration"]["calibration"]["tokens"] == 128
    assert {layer["path"] for layer in report["layers"]} == {"solved"}
    assert all(0 < layer["relative_curvature_error"] < 1 for layer in report["layers"])


def test_weights_outside_the_blocks_are_rounded(deep: Path, tmp_path: Path) -> None:
    recipe = fewbit.preset("gptq", bits=4, group_size="32", include=("model.embed_tokens.weight",))
    report = fewbit.quantize(deep, None, recipe, RunOptions(report_only=True, calibration=options().calibration))
    paths = {layer["name"]: layer["path"] for layer in report["layers"]}
    assert paths["model.embed_tokens.weight"] == "rounded: no input seen"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "rtn", "--damping", "0.1"], "--damping: applies only to methods with a curvature"),
        (["--method", "gptq", "--damping", "0"], "damping must be above 0"),
        (["--method", "gptq", "--tempering", "2"], "tempering must be from 0 to 1, not 2.0"),
        (["--method", "spqr", "--act-order"], "sensitivity outliers are found when the solver reaches their group"),
        (["--method", "oac", "--fisher-terms", "some"], "curvature terms must be one of sequence, token, not 'some'"),
        (["--method", "gptq", "--fisher-terms", "token"], "--fisher-terms: gptq does not use it: omit it"),
        (["--method", "billm", "--bits", "4"], "the binary grid has 1 bit, not 4: leave --bits out"),
        (["--method", "oac", "--refresh", "0"], "--refresh must be once, block or a number of blocks"),
        (["--method", "gptq", "--refresh", "2"], "--refresh: only a Fisher that is measured in this run"),
        (["--method", "oac", "--original-inputs"], "--original-inputs: applies only to a Gram"),
        (
            ["--calibration", "self", "--samples", "3"],
            "--calibration, --samples: adpq+ uses no data",
        ),
        (["--method", "awq", "--damping", "0.1"], "--damping: awq does not use it: omit it"),
        (["--method", "precal+spqr", "--outlier-bits", "8"], "--outlier-bits: precal+spqr does not use it: omit it"),
        (["--method", "spqr", "--outlier-fraction", "0.1"], "--outlier-fraction: spqr does not use it: omit it"),
        (["--method", "billm", "--act-order"], "the binary grid is fitted block by block: omit --act-order"),
        (["--method", "billm", "--scale-format", "float32"], "--scale-format: billm does not use it: omit it"),
        (
            ["--method", "precal+oac", "--no-act-order", "--refit-groups"],
            "two-level scales share data among all groups of a row, so grids cannot be refitted",
        ),
        (["--method", "gptq", "--samples", "0"], "calibration needs at least 1 sample of at least 2 tokens"),
        (["--method", "gptq", "--curvature", "nowhere"], "nowhere: contains no curvature: make one with"),
    ],
)
def test_bad_choices(tiny: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run_cli("quantize", tiny, tmp_path / "out", *arguments, code=2)
    assert message in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_plan_says_what_a_run_does(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other work on the machine must not change what is compared.
    monkeypatch.setattr("fewbit.pipeline.forecast._speed", lambda: 1e10)
    plan = json.loads(run_cli("plan", tiny, "--method", "rtn", "--bits", "3", "--group-size", "32", "--json").stdout)
    report = fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("rtn", bits=3, group_size="32"))
    assert plan["output"]["bits_per_weight"] == report["output"]["bits_per_weight"]
    written = report["output"]
    assert plan["output"]["bytes"] == written["bytes"] + written["embedding_bytes"] + written["kept_bytes"]
    assert {t["name"] for t in plan["tensors"]["quantize"]} == {r["name"] for r in report["layers"]}
    assert plan["problems"] == []
    assert all(plan["needs"][key] > 0 for key in ("seconds", "memory_bytes", "disk_bytes"))
    text = ("--samples", "2000", "--sequence-length", "128", "--calibration")
    times = {
        source: json.loads(run_cli("plan", tiny, "--method", "gptq", *text, source, "--json").stdout)["needs"][
            "seconds"
        ]
        for source in ("self", "nonsense")
    }
    assert times["self"] > times["nonsense"]
    oac = ("plan", tiny, "--method", "oac", "--sequence-length", "64", "--json", "--memory")
    little, much, none = (json.loads(run_cli(*oac, size).stdout) for size in ("220KB", "1GB", "1KB"))
    assert little["needs"]["seconds"] >= much["needs"]["seconds"]
    assert little["needs"]["memory_bytes"] < much["needs"]["memory_bytes"]
    assert none["problems"] == ["block 1: its curvature takes 0.2 MB, but --memory allows 0.0 MB: give at least 0.2 MB"]
    odd = run_cli("plan", tiny, "--method", "precal+oac", "--bits", "2", "--group-size", "48").stdout
    assert "problem: group size 48 does not divide" in odd
    assert "can be written as: fewbit" in odd


def test_a_walk_owns_the_weights_of_one_block_at_a_time(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: dict[int, set[int]] = {}
    owned: list[set[int]] = []
    taken, released = Network.take, Network.release

    def addresses(network: Network, index: int) -> set[int]:
        return {p.data_ptr() for p in network.blocks[index].parameters() if p.numel()}

    def take(network: Network, index: int) -> None:
        if not mapped:
            mapped.update({i: addresses(network, i) for i in range(len(network.blocks))})
        taken(network, index)
        now = [addresses(network, i) for i in range(len(network.blocks))]
        owned.append({i for i, found in enumerate(now) if found and not found & mapped[i]})

    def release(network: Network, index: int) -> None:
        released(network, index)
        assert not addresses(network, index)

    monkeypatch.setattr(Network, "take", take)
    monkeypatch.setattr(Network, "release", release)
    fewbit.quantize(deep, None, fewbit.preset("gptq", group_size="32"), replace(options(), report_only=True))
    assert owned == [{0}, {1}, {2}, {3}]
