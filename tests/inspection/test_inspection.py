import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_cli

import fewbit
from fewbit.inspection import statistics


def test_statistics_against_numpy() -> None:
    w = torch.randn(4000, generator=torch.Generator().manual_seed(0)).bfloat16()
    w[7] = 9.0
    parts = [lambda: w[:1500], lambda: w[1500:]]
    x = w.double().numpy()
    span = statistics.measure_range(parts)
    assert (span.count, span.low, span.high) == (4000, x.min(), x.max())
    centred = x - x.mean()
    assert statistics.kurtosis(parts, span) == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2, rel=1e-4)
    squares = np.sort(x**2)[::-1]
    shares = statistics.energy_shares(parts, 4000)
    for share in (0.001, 0.01, 0.05):
        expected = squares[: int(4000 * share)].sum() / squares.sum()
        assert shares[f"energy_top_{share:g}"] == pytest.approx(expected, rel=1e-5)
    counts = statistics.histogram(parts, span)
    expected_counts, _ = np.histogram(x.astype(np.float32), 256, (span.low, span.high))
    assert np.abs(counts - expected_counts).sum() <= 4
    p = expected_counts / 4000
    assert statistics.entropy(counts) == pytest.approx(-(p[p > 0] * np.log2(p[p > 0])).sum(), abs=0.01)


def test_divergences() -> None:
    p, q = np.array([1.0, 3.0]), np.array([2.0, 2.0])
    assert statistics.kl_divergence(p, p) == pytest.approx(0, abs=1e-5)
    assert statistics.kl_divergence(p, q) == pytest.approx(0.25 * np.log2(0.5) + 0.75 * np.log2(1.5), abs=1e-4)
    assert statistics.jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(1)
    assert statistics.jensen_shannon(p, q) == statistics.jensen_shannon(q, p)


def test_inspection_of_an_original_and_its_quantized_folder(tiny: Path, tmp_path: Path) -> None:
    before = fewbit.inspect(tiny)
    assert len([t for t in before["tensors"] if t["action"] == "quantize"]) == 14
    report = fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("adpq", bits=3))
    after = json.loads(run_cli("inspect", tmp_path / "out", "--json").stdout)
    assert after["reference"] == str(tiny)
    assert "256 equal bins" in after["protocol"]["estimator"]
    rows = {t["name"]: t for t in after["tensors"] if t["action"] == "quantized"}
    assert len(rows) == 15
    for layer in (*report["layers"], *report["embeddings"]):
        row = rows[layer["name"]]
        assert row["relative_squared_error"] == pytest.approx(layer["relative_squared_error"], rel=1e-3)
        assert row["bits"] == pytest.approx(layer["bits_per_weight"])
        assert 0 < row["jensen_shannon_bits"] < 1
        assert row["kl_divergence_bits"] > 0
        assert row["entropy_bits"] < row["entropy_bits_original"]
    assert "kurtosis" in run_cli("inspect", tiny).stdout
