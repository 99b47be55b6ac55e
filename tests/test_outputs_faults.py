"""What the command line says of exceptions: one line where the cause is known, a report where it is not."""

import errno
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, run_cli

import fewbit
from fewbit import cli, faults
from fewbit.errors import FewbitError, WorkKeptError, is_out_of_memory
from fewbit.faults import fault_report, line_for
from fewbit.printable import one_line
from fewbit.runtime.load_errors import known_cause


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantization ends with `error`."""

    def run(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("fewbit.pipeline.run.make_plan", run)


def guarded(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    code = cli.guarded([str(word) for word in words])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [KeyError("output"), RuntimeError("a\nfault"), AttributeError("no x"), OSError("no number"), EOFError("end"),
     AssertionError(), RecursionError("deep"), ConnectionError("reset"), ValueError("\x1b[2Jodd"), TypeError("no")],
)  # fmt: skip
def test_a_fault_is_reported_and_is_not_bad_input(
    tiny: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(error, monkeypatch)
    code, said = guarded(capsys, "quantize", tiny, tmp_path / "out", "--method", "rtn")
    assert code == 1
    lines = said[said.index("fewbit: a bug in fewbit") :].splitlines()
    assert lines[0].startswith(f"fewbit: a bug in fewbit: {type(error).__name__}: ")
    assert re.match(r"  where: fewbit/pipeline/run\.py:\d+ quantize", lines[1])
    assert "test_outputs_faults.py" in lines[2]
    assert any(line.startswith("  versions: fewbit ") and "torch" in line and "python" in line for line in lines)
    assert "report these lines" in lines[-2] and len(lines) < 12
    assert "Traceback" not in said and "\x1b[2J" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_one_line_with_what_to_lower(
    tiny: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(error, monkeypatch)
    code, said = guarded(capsys, "quantize", tiny, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "Traceback" not in said
    assert re.match(r"fewbit: not enough memory \(.*\): lower --workers, --memory, ", said.splitlines()[-1])
    wrapped = ValueError("something else")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)
    assert "--micro-batch" in (line_for(error, ["tune", "q", "out"]) or "")
    assert "--seq-len" in (line_for(error, ["eval", "q"]) or "")


def test_the_disk_and_rights_are_known_and_other_system_errors_are_not() -> None:
    assert line_for(PermissionError(13, "Permission denied", "out"), []) == "out: Permission denied"
    assert line_for(OSError(28, "No space left on device"), []) == "output: No space left on device"
    assert line_for(OSError("Can't load the tokenizer"), []) is None
    assert line_for(OSError(errno.ECONNRESET, "reset"), []) is None
    assert not is_out_of_memory(RuntimeError("the size of tensor a must match"))
    assert line_for(FewbitError("two\nlines \x1b[31m"), []) == r"two lines \x1b[31m"
    assert one_line("names like \u0644 stay, \u202e does not") == r"names like ل stay, \u202e does not"


def test_a_report_says_where_and_from_what() -> None:
    def fail() -> None:
        try:
            fewbit.preset("rtn", bits=4)
            faults._ADVICE["nothing"]
        except KeyError as error:
            raise RuntimeError("above") from error

    with pytest.raises(RuntimeError) as caught:
        fail()
    said = fault_report(caught.value)
    assert "raised from: KeyError: 'nothing'" in said and "where: outside of fewbit" in said


@pytest.mark.slow
def test_a_fault_ends_the_process_with_one(tiny: Path, tmp_path: Path) -> None:
    program = (
        "import sys, fewbit.pipeline.run as run\n"
        "def fail(*arguments): raise KeyError('lost')\n"
        "run.make_plan = fail\n"
        "from fewbit.cli import main\n"
        "main()"
    )
    command = [sys.executable, "-c", program, "quantize", tiny, tmp_path / "out", "--method", "rtn", "--json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and "a bug in fewbit: KeyError: 'lost'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 32}, "the shapes of its weights differ from config.json"),
        ({"model_type": "nope"}, "does not recognize this architecture"),
        ({"hidden_act": "nope"}, "'nope'"),
        ({"num_attention_heads": 3}, "Class validation error"),
        ({"num_attention_heads": 0}, "modulo"),
        ({"hidden_size": "abc"}, "hidden_size"),
    ],
)
def test_what_transformers_cannot_load_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    import json

    model = build_tiny(tmp_path / "model", shard_size="1GB")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FewbitError, match="transformers cannot load it") as caught:
        fewbit.load(model)
    assert said in str(caught.value)


@pytest.mark.slow
def test_faults_inside_transformers_are_not_refusals(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "llama", "hidden_act": "silu"}
    for error in (RuntimeError("odd"), KeyError("other"), AttributeError("x has no y"), ZeroDivisionError("zero")):
        assert known_cause(error, config) is None
    assert known_cause(KeyError("silu"), config) == "'silu'"
    assert known_cause(MemoryError(), config) is None

    def fail(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", fail)
    with pytest.raises(RuntimeError, match="allocate"):
        fewbit.load(tiny)
    assert "not enough memory" in run_cli("eval", tiny, "--data", "topics", code=2).stderr


def test_a_model_that_runs_out_of_memory_is_not_told_that_its_text_is_wrong(tiny: Path) -> None:
    from fewbit.evaluation.score import window_logits

    def fail(error: Exception) -> Any:
        class Model:
            device = torch.device("cpu")

            def __call__(self, *arguments: Any, **more: Any) -> None:
                raise error

        return Model()

    window = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(FewbitError, match="cannot run a window of 4 tokens"):
        window_logits(fail(IndexError("index out of range in self")), window)
    for error in (RuntimeError("a fault"), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(type(error)):
            window_logits(fail(error), window)


def test_a_run_that_kept_its_work_is_bad_luck_not_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert line_for(WorkKeptError("the disk is full"), []) == "the disk is full"
    assert guarded(capsys, "quantize", "--nonsense")[0] == 2
    assert guarded(capsys, "--version")[0] == 0


def test_a_package_that_is_there_and_broken_is_not_called_missing() -> None:
    from fewbit.errors import missing_extra

    def said(error: ImportError) -> str:
        try:
            raise error
        except ImportError:
            return str(missing_extra("datasets", "data"))

    assert "this needs the package datasets" in said(ModuleNotFoundError("No module named 'datasets'"))
    assert "cannot be imported (libfoo.so: no such file)" in said(ImportError("libfoo.so: no such file"))
    with pytest.raises(ImportError, match="map segment"):
        said(ImportError("failed to map segment from shared object: Cannot allocate memory"))
