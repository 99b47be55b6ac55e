"""Products of bfloat16 with weights that are decoded 64 columns at a time, in an order of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_matrices import finish, normal_float, pack

from fewbit.formats import native
from fewbit.grids.scheme import Scheme
from fewbit.runtime.kernels.order import BLOCK, by_halves, by_words
from fewbit.solvers.settled import WeightChoices, settle, settle_around

pytest.importorskip("numba", reason="needs numba: pip install 'fewbit[fast]'")
from test_kernels import CPU, check_parts, check_product, prepared

from fewbit.runtime.kernels import half_lanes
from fewbit.runtime.kernels.look_up import features
from fewbit.runtime.kernels.pair_lanes import block_order

Order = Callable[[tuple[int, ...], bool], list[int]]
needs_blocks = pytest.mark.skipif(block_order() is None, reason="needs a processor with AVX2 or AVX512-BF16")
BFLOAT = (torch.bfloat16,)


def reading(parts: object, stored: object, dtype: torch.dtype = torch.bfloat16) -> bool:
    return bool(prepared(parts, stored, dtype).reading.by_blocks)  # type: ignore[attr-defined, arg-type]


@pytest.mark.parametrize("widths", [(1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (8,)])
@pytest.mark.parametrize("by_table", [True, False])
@pytest.mark.parametrize("order", [by_words, by_halves])
def test_every_column_has_one_place(order: Order, widths: tuple[int, ...], by_table: bool) -> None:
    assert sorted(order(widths, by_table)) == list(range(BLOCK))


@needs_blocks
@pytest.mark.parametrize(
    "scheme",
    [
        normal_float(4, scale_format="two-level", outlier_grid="row", outlier_bits=8),
        normal_float(3, 128, scale_format="two-level", outlier_grid="row", outlier_bits=8),
        normal_float(2, outlier_grid="minmax", outlier_bits=4),
        normal_float(1),
        Scheme(5, 64, "zero-point", outlier_grid="row", outlier_bits=8),
        Scheme(6, 128, "symmetric"),
        Scheme(7, 64, "minimum"),
        Scheme(8, 64, "symmetric", scale_format="two-level"),
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [0.05, 0.001])
def test_products(scheme: Scheme, share: float) -> None:
    """Outliers close to each other, and further apart than a byte can say."""
    parts, stored = pack(scheme, rows=19, columns=640, share=share)
    assert reading(parts, stored) and not reading(parts, stored, torch.float32)
    check_parts(parts, stored, 2, BFLOAT)


@needs_blocks
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(5, 64, "zero-point"),
        Scheme(6, 128, "symmetric", scale_format="two-level"),
        Scheme(7, 64, "minimum"),
        Scheme(8, 64, "symmetric", scale_format="two-level"),
        Scheme(8, 128, "zero-point"),
    ],
    ids=str,
)
def test_without_outliers(scheme: Scheme) -> None:
    """One input, and several."""
    parts, stored = pack(scheme, rows=19, columns=640, share=0)
    assert reading(parts, stored)
    for tokens in (1, 3):
        check_parts(parts, stored, tokens, BFLOAT)


@needs_blocks
def test_outliers_at_the_ends() -> None:
    """In the first and last column of rows, in one row only, and in all columns of a row."""
    scheme = normal_float(4, outlier_grid="row", outlier_bits=8)
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 8, 17):
        weight, mask = torch.randn(rows, 576, generator=generator), torch.zeros(rows, 576, dtype=torch.bool)
        mask[:, 0] = mask[:, -1] = True
        mask[rows // 2] = True
        parts, stored = finish(weight, settle_around(weight, mask, WeightChoices(scheme)), scheme)
        assert reading(parts, stored)
        whole = prepared(parts, stored, torch.bfloat16)
        wanted = native.decode_stored(parts, stored, torch.bfloat16)
        for first in range(0, rows, 5):
            assert torch.equal(CPU.rows(whole, first, rows), wanted[first:])
        x = torch.randn(1, 576, generator=generator).bfloat16()
        check_product(CPU.product(whole, x, None), x, wanted, None)


@pytest.mark.parametrize(("size", "group_size", "columns"), [(2.0**-110, 64, 192), (1.0, 32, 192), (1.0, 96, 192)])
def test_what_does_not_fit(size: float, group_size: int, columns: int) -> None:
    """Weights that such products would take for zeros, and groups that are no whole blocks."""
    scheme = Scheme(4, group_size, "symmetric", scale_format="float32")
    weight = torch.randn(9, columns, generator=torch.Generator().manual_seed(0)) * size
    parts, stored = finish(weight, settle(weight, WeightChoices(scheme), None, None), scheme)
    assert not reading(parts, stored)
    check_parts(parts, stored, 2, BFLOAT)


@pytest.mark.slow
@needs_blocks
def test_what_is_compiled_is_found_again(tmp_path: Path) -> None:
    """By the next process, for weights with tables, with outliers, and with neither."""
    code = """
import torch
from test_kernels import CPU, normal_float, pack, prepared
from fewbit.grids.scheme import Scheme
for scheme, share in ((normal_float(3, outlier_grid="row", outlier_bits=8), 0.05), (Scheme(6, 64, "zero-point"), 0)):
    form = prepared(*pack(scheme, rows=8, columns=64, share=share), torch.bfloat16)
    CPU.product(form, torch.ones(1, 64, dtype=torch.bfloat16), None)
    print(sum(form.run.stats.cache_hits.values()), sum(form.run.stats.cache_misses.values()))
"""
    found = []
    for _ in range(2):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        words = [sys.executable, "-c", code]
        ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        found.append(ended.stdout.split())
    assert found == [["0", "1"] * 2, ["1", "0"] * 2]


AVX2 = "+64bit,+avx,+avx2,+bmi,+bmi2,+cmov,+f16c,+fma,+lzcnt,+popcnt,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2"


@pytest.mark.slow
@pytest.mark.skipif(not features() >= half_lanes.NEEDED, reason="needs a processor with AVX2")
def test_with_avx2_alone(tmp_path: Path) -> None:
    """The tests above, on a processor that has AVX-512."""
    limits = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2, "NUMBA_CACHE_DIR": str(tmp_path)}
    chosen = "test_outliers_at_the_ends or test_without_outliers or (test_products and 0.05)"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    ended = subprocess.run(words, env={**os.environ, **limits}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and ended.stdout.startswith("." * 14), ended.stdout + ended.stderr
