"""Fine-tuning in several processes: the results of one process, with whole and with shared parameters."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import build_tiny, run_cli, with_tests
from test_tuning import GENTLE, TEXT, rounded

from fewbit.errors import FewbitError
from fewbit.tuning import run as tuning_run
from fewbit.tuning.run import TuneOptions, tune


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama, rounded to 2 bits."""
    model = tmp_path_factory.mktemp("processes") / "model"
    return rounded(build_tiny(model, dtype="float32", shard_size="100KB", initializer_range=0.1))


def launch(processes: int, *arguments: Any) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "fewbit.tuning", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_give_what_one_gives(folder: Path, tmp_path: Path) -> None:
    choices = ["--calibration", "random-tokens", "--samples", 36, "--sequence-length", 32, "--epochs", 2, "--top", 16]
    choices += ["--held-out", 4, "--lr", 0.02, "--scale-lr", 0.01, "--device", "cpu"]
    launch(2, folder, tmp_path / "two", *choices)
    run_cli("tune", folder, tmp_path / "one", *choices)
    one, two = (
        json.loads((tmp_path / name / "fewbit_report.json").read_text())["tuning"]["history"] for name in ("one", "two")
    )
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-3)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=2e-3)


SHARDED = """
import sys
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from fewbit.tuning import run
from test_tuning import GENTLE, HARSH, TEXT
original = run._accelerator
def sharding(device):
    # Accelerate's own launcher shards on accelerators only; from here on everything is as it is there.
    found = original(device)
    found.state.distributed_type = DistributedType.FSDP
    found.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    return found
run._accelerator = sharding
for name, choice in (("gentle", GENTLE), ("harsh", HARSH)):
    run.tune(sys.argv[1], sys.argv[2] + name, choice, run.TuneOptions(calibration=TEXT, device="cpu"))
"""


@pytest.mark.slow
def test_two_processes_that_share_the_parameters(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "sharded.py"), str(folder), str(tmp_path / "two-")]
    environment = with_tests(ACCELERATE_USE_CPU="true")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    # Then embeddings and head stay as they are.
    choice = replace(GENTLE, embeddings=False)
    one = tune(folder, tmp_path / "one", choice, TuneOptions(calibration=TEXT, device="cpu"))["tuning"]["history"]
    gentle, harsh = (
        json.loads((tmp_path / f"two-{name}" / "fewbit_report.json").read_text())["tuning"]["history"]
        for name in ("gentle", "harsh")
    )
    assert gentle["held_out"] == pytest.approx(one["held_out"], rel=5e-3)
    # Weights that made it worse were put back, sharded as they are.
    assert harsh["stopped"] and harsh["best_epoch"] < len(harsh["held_out"]) - 1


def test_the_first_version_of_sharding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: SimpleNamespace(state=state))
    with pytest.raises(FewbitError, match="launch with --fsdp_version 2"):
        tuning_run._accelerator("cpu")
