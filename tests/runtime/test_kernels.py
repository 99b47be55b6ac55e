"""The kernels against products with decoded weights in float64, for everything that can be stored."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from packed_matrices import finish, normal_float, pack
from torch import Tensor

from fewbit.formats import native
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.runtime.kernels import ready, table
from fewbit.runtime.kernels.kernel import Kernel
from fewbit.runtime.kernels.ready import Ready
from fewbit.runtime.kernels.table import KERNELS
from fewbit.solvers.settled import WeightChoices, settle, settle_around

pytest.importorskip("numba", reason="needs numba: pip install 'fewbit[fast]'")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = KERNELS[0]
# The largest relative error of a result in a dtype: half a unit in its last place.
HALF_A_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def prepared(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> object:
    assert CPU.supports(stored)
    return CPU.prepare(parts, stored, dtype)


def check(scheme: Scheme, tokens: int = 3, dtype: torch.dtype = torch.bfloat16, **shape: object) -> None:
    parts, stored = pack(scheme, **shape)  # type: ignore[arg-type]
    check_parts(parts, stored, tokens, (dtype,))


def check_parts(
    parts: Mapping[str, Tensor], stored: StoredWeight, tokens: int = 3, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    for dtype in dtypes:
        form = prepared(parts, stored, dtype)
        weight = native.decode_stored(parts, stored, dtype)
        assert torch.equal(CPU.rows(form, 0, len(weight)), weight)
        assert torch.equal(CPU.rows(form, 5, 9), weight[5:9])
        x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        bias = torch.linspace(-1, 1, len(weight)).to(dtype)
        for shift in (None, bias):
            check_product(CPU.product(form, x, shift), x, weight, shift)


def check_product(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The sum is in float32 in any order, and then rounded to the dtype of x."""
    exact = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = HALF_A_UNIT[x.dtype] * exact.abs() + weight.shape[1] * 2.0**-24 * size
    assert found.dtype == x.dtype and found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= allowed).all())


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [64, 24])
def test_codebooks(bits: int, group_size: int) -> None:
    check(normal_float(bits, group_size))


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [96, 48, 32, 16, 192, 12, 6, 1])
def test_group_sizes(group_size: int) -> None:
    check(normal_float(3, group_size))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_dtypes(bits: int, dtype: torch.dtype) -> None:
    check(normal_float(bits), dtype=dtype)
    check(Scheme(bits, 64, "minimum"), dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("grid", ["zero-point", "symmetric", "minimum"])
def test_evenly_spaced_grids(grid: str, bits: int) -> None:
    check(Scheme(bits, 64, grid))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("grid", ["zero-point", "symmetric", "minimum"])
def test_scales_in_float32(grid: str, bits: int) -> None:
    check(Scheme(bits, 48, grid, scale_format="float32"))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "grid"), [(1.6, "ternary"), (1, "binary")])
@pytest.mark.parametrize("group_size", [64, 24])
def test_grids_with_codes_of_their_own(bits: float, grid: str, group_size: int) -> None:
    check(Scheme(bits, group_size, grid))


def test_salient_columns() -> None:
    """In a binary grid, they have other magnitudes."""
    parts, stored = pack(Scheme(1, 64, "binary"))
    assert int(parts["salient"].count_nonzero()) > 0
    check_parts(parts, stored, dtypes=(torch.float32,))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("group_size", [16, 24])
def test_statistics_of_scales_and_zeros(bits: int, group_size: int) -> None:
    check(Scheme(bits, group_size, "real-zero", scale_format="statistics", statistic_bits=3, statistic_rows=16))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_two_level_scales(bits: int) -> None:
    check(normal_float(bits, scale_format="two-level"))


@pytest.mark.slow
@pytest.mark.parametrize("outlier_grid", ["", "row"])
def test_logarithmic_rows(outlier_grid: str) -> None:
    """Scales, and outliers, of very different sizes in one row."""
    others = {"outlier_grid": outlier_grid, "outlier_bits": 8} if outlier_grid else {}
    scheme = normal_float(3, scale_format="two-level", **others)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(21, 192, generator=generator)
    weight[:, :64] *= 500
    mask = torch.rand(weight.shape, generator=generator) < 0.05
    choices = WeightChoices(scheme)
    settled = settle_around(weight, mask, choices) if others else settle(weight, choices, None, None)
    parts, stored = finish(weight, settled, scheme)
    assert bool((parts["row_scales"].view(torch.bfloat16) < 0).any())
    check_parts(parts, stored, dtypes=(torch.bfloat16,))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.03, 0.002])
@pytest.mark.parametrize(("outlier_grid", "bits"), [("row", 8), ("minmax", 4), ("sign-magnitude", 5), ("float16", 16)])
def test_outliers(outlier_grid: str, bits: int, share: float) -> None:
    """Few of them are further apart than a byte can say."""
    for encoding in ("elias-fano", "bitmap"):
        scheme = normal_float(3, outlier_grid=outlier_grid, outlier_bits=bits)
        check(scheme, columns=1536, share=share, encoding=encoding)
    check(Scheme(1.6, 24, "ternary", outlier_grid=outlier_grid, outlier_bits=bits), columns=1536, share=share)


@pytest.mark.slow
def test_outliers_stored_by_their_index_in_a_group() -> None:
    scheme = normal_float(3, 32, outlier_grid="row", outlier_bits=8)
    weight = torch.randn(10, 192, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(10, 6, 32, dtype=torch.bool)
    mask[..., 0] = mask[..., 31] = True
    parts, stored = finish(weight, settle_around(weight, mask.view(10, 192), WeightChoices(scheme)), scheme, "indices")
    assert stored.outliers == 120
    check_parts(parts, stored, dtypes=(torch.bfloat16,))


def test_outliers_outside_the_weight_are_refused() -> None:
    parts, stored = pack(normal_float(3, outlier_grid="row", outlier_bits=8), encoding="elias-fano")
    # All low bits set: neighbours are no longer in order, or the last one lies behind the end.
    for damaged in (parts["outlier_positions"] | 0x1F, parts["outlier_positions"].flip(0)):
        with pytest.raises(ValueError, match="positions of outliers"):
            prepared({**parts, "outlier_positions": damaged}, stored, torch.float32)


@pytest.mark.parametrize("tokens", range(1, 10))
def test_numbers_of_tokens(tokens: int) -> None:
    check(normal_float(3, outlier_grid="row", outlier_bits=8), tokens)
    check(Scheme(8, 64, "symmetric"), tokens)


@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(1, 26, 13), (9, 2, 2), (8, 16, 16), (17, 50, 10), (3, 6, 6)]
)
@pytest.mark.parametrize("bits", [3, 5])
def test_shapes(rows: int, columns: int, group_size: int, bits: int) -> None:
    parts, stored = pack(Scheme(bits, group_size, "zero-point"), rows, columns)
    form = prepared(parts, stored, torch.bfloat16)
    weight = native.decode_stored(parts, stored, torch.bfloat16)
    assert torch.equal(CPU.rows(form, 0, rows), weight)
    x = torch.randn(2, columns).bfloat16()
    check_product(CPU.product(form, x, None), x, weight, None)


def ready_product(x: Tensor, scheme: Scheme | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The product that a layer computes, and the decoded weight."""
    parts, stored = pack(scheme or normal_float(3, outlier_grid="row", outlier_bits=8))
    found = ready.product(Ready(stored), parts, stored, x, bias)
    return found, native.decode_stored(parts, stored, x.dtype)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_not_contiguous(tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(192, tokens).to(dtype).t()
    found, weight = ready_product(x)
    check_product(found, x, weight, None)
    wide = torch.randn(tokens, 400).to(dtype)[:, 3:195]
    found, weight = ready_product(wide)
    check_product(found, wide, weight, None)


def test_inputs_of_any_shape() -> None:
    for shape in ((192,), (1, 192), (2, 3, 192), (1, 1, 1, 192), (0, 192), (2, 0, 192)):
        x = torch.randn(shape)
        found, weight = ready_product(x)
        assert found.shape == (*shape[:-1], 21)
        check_product(found.reshape(-1, 21), x.reshape(-1, 192), weight, None)


def test_float64_is_computed_as_before() -> None:
    x = torch.randn(1, 192, dtype=torch.float64)
    found, weight = ready_product(x)
    assert torch.equal(found, x @ weight.t())


def test_many_tokens_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KERNELS", (replace(CPU, weights_at_once=192 * 4),))
    x, bias = torch.randn(2, 20, 192), torch.randn(21)
    found, weight = ready_product(x, bias=bias)
    check_product(found.view(-1, 21), x.view(-1, 192), weight, bias)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_give_equal_results(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.runtime.kernels import cpu

    monkeypatch.setattr(cpu, "_WORTH_A_THREAD", 1)
    parts, stored = pack(normal_float(3, outlier_grid="row", outlier_bits=8), rows=75)
    form = prepared(parts, stored, dtype)
    x = torch.randn(2, 192).to(dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((CPU.product(form, x, None), CPU.rows(form, 0, 75)))
    finally:
        torch.set_num_threads(before)
    for product, rows in found[1:]:
        assert torch.equal(product, found[0][0]) and torch.equal(rows, found[0][1])


def test_what_is_prepared_follows_its_parts() -> None:
    parts, stored = pack(normal_float(3))
    other, _ = pack(normal_float(3), columns=192)
    form, x = Ready(stored), torch.randn(1, 192)
    first = ready.product(form, parts, stored, x, None)
    kept = form.get(parts, stored, x.dtype)
    assert form.get(parts, stored, x.dtype) is kept
    # Changed in place, as when a state dict is loaded.
    parts["scales"].copy_((other["scales"].view(torch.float16) * 2).view(torch.int16))
    assert torch.allclose(ready.product(form, parts, stored, x, None), 2 * first, rtol=1e-3)
    assert form.get(parts, stored, x.dtype) is not kept


def test_a_table_of_objects_that_say_what_they_are() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    assert all(isinstance(kernel, Kernel) and kernel.summary and kernel.extra for kernel in KERNELS)
