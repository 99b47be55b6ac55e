"""The Triton kernels against products with decoded weights in float64: on a GPU, or else in Triton's interpreter.

The interpreter cuts bfloat16 off where a GPU rounds it, and cannot multiply matrices of it.
"""

import os
from dataclasses import replace

import pytest
import torch
from packed_matrices import normal_float, pack
from torch import Tensor

from fewbit.formats import native
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.runtime.kernels import ready
from fewbit.runtime.kernels.cuda import TRITON
from fewbit.runtime.kernels.ready import Ready
from fewbit.runtime.kernels.table import can_gather, kernel_for

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # Before Triton is imported for the first time.
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="needs triton: pip install 'fewbit[triton]'")
tl = pytest.importorskip("triton.language")
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_A_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0 ** -(8 if ON_GPU else 7), torch.float16: 2.0**-11}


@triton.jit
def _count(out, times):  # type: ignore[no-untyped-def]
    total = tl.zeros((16,), tl.int32)
    for one in range(times):
        total += one
    tl.store(out + tl.arange(0, 16), total)


def _runs() -> bool:
    """Whether Triton is usable here: it may have been imported without its interpreter, or not know this NumPy."""
    out = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    try:
        _count[(1,)](out, 3)
    except Exception:
        if ON_GPU:
            raise
        return False
    return int(out[0]) == 3


pytestmark = pytest.mark.skipif(not _runs(), reason="Triton's interpreter does not run here")


def there(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.to(DEVICE) for name, part in parts.items()}


def check(
    scheme: Scheme, tokens: tuple[int, ...] = (1, 3), dtype: torch.dtype = torch.float16, **shape: object
) -> None:
    parts, stored = pack(scheme, **shape)  # type: ignore[arg-type]
    check_parts(there(parts), stored, tokens, dtype)


def check_parts(parts: dict[str, Tensor], stored: StoredWeight, tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    assert TRITON.supports(stored)
    form, wanted = TRITON.prepare(parts, stored, dtype), native.decode_stored(parts, stored, dtype)
    weight = TRITON.rows(form, 0, len(wanted))
    exact = ON_GPU or dtype != torch.bfloat16
    assert torch.equal(weight, wanted) if exact else torch.allclose(weight, wanted, rtol=2**-7, atol=0)
    middle = range(len(weight))[5:9]
    if middle:
        assert torch.equal(TRITON.rows(form, middle.start, middle.stop), weight[5:9])
    bias = torch.linspace(-1, 1, len(weight), device=DEVICE).to(dtype)
    for count in tokens if exact else (1,):
        x = torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
        for shift in (None, bias):
            check_product(TRITON.product(form, x, shift), x, weight, shift)


def check_product(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The sum is in float32 in any order, and then rounded to the dtype of x."""
    exact = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = HALF_A_UNIT[x.dtype] * exact.abs() + weight.shape[1] * 2.0**-24 * size
    assert found.dtype == x.dtype and found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_codebooks(bits: int) -> None:
    check(normal_float(bits), dtype=torch.bfloat16 if bits % 2 else torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype) -> None:
    check(normal_float(2), dtype=dtype)
    check(Scheme(8, 64, "symmetric"), dtype=dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", ["zero-point", "symmetric", "minimum"])
def test_evenly_spaced_grids(grid: str, bits: int) -> None:
    check(Scheme(bits, 64, grid), dtype=torch.bfloat16)


@pytest.mark.parametrize(("bits", "grid"), [(1.6, "ternary"), (1, "binary")])
@pytest.mark.parametrize("group_size", [64, 12])
def test_grids_with_codes_of_their_own(bits: float, grid: str, group_size: int) -> None:
    check(Scheme(bits, group_size, grid))


@pytest.mark.parametrize(("bits", "group_size", "columns"), [(3, 24, 192), (4, 12, 192), (5, 13, 26), (3, 6, 6)])
def test_columns_that_are_read_byte_by_byte(bits: int, group_size: int, columns: int) -> None:
    check(Scheme(bits, group_size, "zero-point"), columns=columns)


def test_words_that_would_lie_across_others() -> None:
    """In a row of 8 codes of 5 bits, the second plane ends in the middle of a word of the first one."""
    parts, stored = pack(normal_float(5, 8), columns=8)
    form = TRITON.prepare(there(parts), stored, torch.float16)
    assert form.reading.unit == 1
    check_parts(there(parts), stored, (1, 2), torch.float16)


@pytest.mark.parametrize("bits", [2, 4])
def test_two_level_scales(bits: int) -> None:
    parts, stored = pack(normal_float(bits, scale_format="two-level"))
    form = TRITON.prepare(there(parts), stored, torch.float16)
    assert form.packed.scale.dtype == torch.int8
    check_parts(there(parts), stored, (1, 2), torch.float16)


def test_statistics_of_scales_and_zeros() -> None:
    check(Scheme(3, 16, "real-zero", scale_format="statistics", statistic_bits=3, statistic_rows=16))


@pytest.mark.parametrize("share", [0.2, 0.002])
@pytest.mark.parametrize(("outlier_grid", "bits"), [("row", 8), ("minmax", 4), ("float16", 16)])
def test_outliers(outlier_grid: str, bits: int, share: float) -> None:
    scheme = normal_float(3, outlier_grid=outlier_grid, outlier_bits=bits)
    check(scheme, columns=768, share=share)
    check(Scheme(1.6, 24, "ternary", outlier_grid=outlier_grid, outlier_bits=bits), (1,), columns=768, share=share)


def test_outliers_beside_eight_bits() -> None:
    check(Scheme(8, 64, "symmetric", outlier_grid="row", outlier_bits=8), dtype=torch.float32)


def test_outliers_outside_the_weight_are_refused() -> None:
    parts, stored = pack(normal_float(3, outlier_grid="row", outlier_bits=8), encoding="elias-fano")
    for damaged in (parts["outlier_positions"] | 0x1F, parts["outlier_positions"].flip(0)):
        with pytest.raises(ValueError, match="positions of outliers"):
            TRITON.prepare(there({**parts, "outlier_positions": damaged}), stored, torch.float32)


@pytest.mark.parametrize("tokens", [2, 7, 8, 15, 16])
def test_numbers_of_tokens(tokens: int) -> None:
    check(normal_float(3, outlier_grid="row", outlier_bits=8), (tokens,))


@pytest.mark.parametrize("rows", [1, 9, 64, 65])
def test_numbers_of_rows(rows: int) -> None:
    check(normal_float(4), (1, 2), rows=rows, columns=512)


def test_columns_divided_among_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.runtime.kernels import triton_products

    monkeypatch.setattr(triton_products, "_PROGRAMS", 1 << 20)
    scheme = normal_float(4, outlier_grid="row", outlier_bits=8)
    check(scheme, (1, 5), columns=1536)
    check(scheme, (1,), columns=1344, dtype=torch.float32)


def test_inputs_that_are_not_contiguous_or_aligned() -> None:
    parts, stored = pack(normal_float(4))
    form, weight = (
        TRITON.prepare(there(parts), stored, torch.float16),
        native.decode_stored(parts, stored, torch.float16),
    )
    wide = torch.randn(3, 400).half().to(DEVICE)
    for x in (wide[:, 3:195], wide[:1, 3:195], wide.view(-1)[1:193], wide[:, :192].t().contiguous().t()):
        found = TRITON.product(form, x, None)
        assert found.shape == (*x.shape[:-1], 21)
        check_product(found.view(-1, 21), x.reshape(-1, 192), weight.to(DEVICE), None)


@pytest.mark.parametrize("scheme", [Scheme(8, 64, "symmetric"), normal_float(6, 24), normal_float(3)])
def test_rows_of_tokens(scheme: Scheme) -> None:
    parts, stored = pack(scheme, rows=70)
    form, weight = (
        TRITON.prepare(there(parts), stored, torch.float16),
        native.decode_stored(parts, stored, torch.float16),
    )
    for ids in ([0], [69, 3, 3], list(range(70))):
        assert TRITON.gather is not None
        assert torch.equal(TRITON.gather(form, torch.tensor(ids, device=DEVICE)).cpu(), weight[ids])
    beyond = TRITON.gather(form, torch.tensor([-1, 70, 2], device=DEVICE)).cpu()
    assert bool(beyond[:2].isnan().all()) and torch.equal(beyond[2], weight[2])


def test_what_a_module_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the table of kernels: few tokens, many, and rows."""
    if not ON_GPU:
        monkeypatch.setattr("fewbit.runtime.kernels.table.KERNELS", (replace(TRITON, device="cpu"),))
    parts, stored = pack(normal_float(4), rows=40)
    parts, weight = there(parts), native.decode_stored(parts, stored, torch.float16).to(DEVICE)
    assert can_gather(DEVICE)
    found = kernel_for(stored, DEVICE, torch.float16)
    assert found is not None and found.name == "triton"
    prepared = Ready(stored)
    for tokens in (1, 16, 17, 40):
        x = torch.randn(tokens, 192).half().to(DEVICE)
        check_product(ready.product(prepared, parts, stored, x, None), x, weight, None)
    ids = torch.tensor([3, 1], device=DEVICE)
    assert torch.equal(ready.gather(prepared, parts, stored, ids, torch.float16), weight[ids])
