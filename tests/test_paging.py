"""Tensors that are mapped from a file: they leave memory, and come back as they were."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewbit.paging import page_in, page_out, page_out_between

ROWS, COLUMNS = 64, 64 * 1024
SIZE = ROWS * COLUMNS // 1024
"""Of each tensor, in kilobytes."""


def mapped(folder: Path) -> dict[str, torch.Tensor]:
    """Three tensors of 4 MB that follow each other in a file."""
    made = {name: torch.full((ROWS, COLUMNS), place, dtype=torch.uint8) for place, name in enumerate("abc")}
    save_file(made, folder / "some.safetensors")
    with (folder / "some.safetensors").open("rb+") as written:
        # What is not on the disk yet stays in memory.
        os.fsync(written)
    with safe_open(folder / "some.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in "abc"}


def resident(tensor: torch.Tensor) -> int:
    """Kilobytes of a tensor that are in this process's memory, about: those of the mapping around its address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            first, _, last = name.partition("-")
            inside = int(first, 16) <= tensor.data_ptr() < int(last, 16)
        elif inside and name == "Rss:":
            return int(rest[0])
    raise AssertionError("no mapping has this address")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="advice to the system is Linux's")
def test_pages_leave_and_come_back(tmp_path: Path) -> None:
    some = mapped(tmp_path)
    for one in some.values():
        page_in(one)
    whole = resident(some["a"])
    if whole < 3 * SIZE:
        pytest.skip("this system does not read what it is asked to (before Linux 5.14)")
    page_out_between([some["c"], some["b"]])
    if resident(some["a"]) == whole:
        pytest.skip("this file system keeps all in memory")
    # Linux may keep pages that it has put together with others, up to 2 MB of them.
    after = resident(some["a"])
    assert SIZE <= whole - after <= 2 * SIZE
    page_out(some["a"])
    assert resident(some["a"]) <= after - SIZE // 2
    for place, name in enumerate("abc"):
        assert (some[name] == place).all()


def test_other_memory_stays_as_it_is() -> None:
    plain, none = torch.arange(100_000), torch.empty(0)
    for one in (plain, none):
        page_in(one)
        page_out(one)
    page_out_between([plain, none, plain[:10]])
    page_out_between([])
    assert torch.equal(plain, torch.arange(100_000))
