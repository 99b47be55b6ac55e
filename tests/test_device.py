"""Devices by name: what torch cannot compute on here is refused in one line that says what is possible."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_cli

from fewbit.device import check_device, device_count
from fewbit.errors import FewbitError

OTHERS = [
    *("hpu", "privateuseone", "meta", "xla", "vulkan", "mtia", "ipu", "lazy", "fpga", "maia", "ve", "hip", "mkldnn"),
    *("opengl", "opencl", "ideep", "npu", "nonsense", "", "0", "cuda:x", "cpu:cpu"),
]


def test_the_cpu() -> None:
    assert check_device("cpu") == torch.device("cpu")
    assert device_count("cpu") == 1


@pytest.mark.filterwarnings("ignore:'mkldnn'")
@pytest.mark.parametrize("name", OTHERS)
def test_devices_that_are_not_here(name: str) -> None:
    with pytest.raises(FewbitError, match=r"^device .* cannot be used here: .*use cpu( or \w+)*$") as caught:
        check_device(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_accelerators_of_other_machines(kind: str) -> None:
    if device_count(kind):
        assert check_device(kind).type == kind
        return
    with pytest.raises(FewbitError, match=rf"^device '{kind}' cannot be used here: use cpu"):
        check_device(kind)


def with_two_gpus(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    def zeros(*arguments: Any, **more: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, device_count=lambda: 2))
    monkeypatch.setattr(torch, "zeros", zeros)


def test_a_number_beyond_the_last_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with_two_gpus(monkeypatch)
    assert check_device("cuda:1").index == 1
    with pytest.raises(
        FewbitError, match=r"^device 'cuda:7' cannot .*: the cuda devices of this machine are cuda:0, cuda:1$"
    ):
        check_device("cuda:7")


@pytest.mark.parametrize("count", [0, 1])
def test_modules_that_only_count_their_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch, "mps", SimpleNamespace(device_count=lambda: count))
    assert device_count("mps") == count


def test_only_what_the_driver_reports_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    with_two_gpus(monkeypatch, RuntimeError("CUDA error: all CUDA-capable devices are busy\nmore"))
    with pytest.raises(FewbitError, match=r"\(CUDA error: all CUDA-capable devices are busy\): use cpu or cuda$"):
        check_device("cuda")
    with_two_gpus(monkeypatch, RuntimeError("HIP error: invalid device function\nmore"))
    with pytest.raises(FewbitError, match=r"\(HIP error: invalid device function\): use cpu or cuda$"):
        check_device("cuda")
    for error in (RuntimeError("odd"), NotImplementedError("odd"), AssertionError("odd"), MemoryError("odd")):
        with_two_gpus(monkeypatch, error)
        with pytest.raises(type(error), match="odd"):
            check_device("cuda")


def test_the_command_line_says_what_is_possible(tiny: Any, tmp_path: Any) -> None:
    said = run_cli("quantize", tiny, tmp_path / "out", "--method", "rtn", "--device", "hpu", code=2).stderr
    assert said.startswith("fewbit: device 'hpu' cannot be used here: use cpu") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
