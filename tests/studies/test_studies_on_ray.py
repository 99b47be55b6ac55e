"""Every study on Ray: the rows that it has on this machine. One cluster of one worker, since a worker imports torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from study_cases import study_choice

import fewbit
from fewbit.errors import FewbitError
from fewbit.studies.registry import find_study
from fewbit.studies.run import run_study

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.slow
QUIET = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
FEW: dict[str, dict[str, Any]] = {
    "objectives": {"methods": ("rtn", "oac"), "bits": (3,)},
    "calibration-sets": {"methods": ("gptq",), "bits": (3,), "options": {"seeds": [1, 1]}},
    "landscape": {"methods": ("rtn",), "bits": (2,), "options": {"directions": 1}},
    "outliers": {"methods": ("awq",), "bits": (4,)},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray.init(num_cpus=1, **QUIET):
        yield


@pytest.mark.parametrize("name", FEW)
def test_the_rows_are_the_same(cluster: None, tiny: Path, tmp_path: Path, name: str) -> None:
    local = run_study(find_study(name), study_choice(name, tiny, tmp_path / "local", **FEW[name]))
    spread = run_study(find_study(name), study_choice(name, tiny, tmp_path / "ray", engine="ray", **FEW[name]))
    assert spread["rows"] == local["rows"]
    assert spread["findings"] == local["findings"]
    assert spread["run"]["engine"] == "ray"


def test_an_error_in_a_worker_is_said_and_the_cluster_stays(cluster: None, tiny: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    fewbit.quantize(tiny, damaged, fewbit.preset("rtn", bits=3, group_size="16"))
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    given = {**FEW["objectives"], "folders": (str(damaged),), "methods": ("rtn",)}
    choice = study_choice("objectives", tiny, tmp_path / "error", engine="ray", **given)
    with pytest.raises(FewbitError, match=r"damaged: .*missing weights .model.norm.weight.*finished cells are kept"):
        run_study(find_study("objectives"), choice)
    assert ray.is_initialized()


def test_without_a_cluster_one_is_started_and_stopped(
    cluster: None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    # The study finds none, and "starts" the one that is there.
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(ray, "init", lambda **given: calls.append(given))
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    given = {**FEW["objectives"], "methods": ("rtn",)}
    choice = study_choice("objectives", tiny, tmp_path / "ray", engine="ray", **given)
    assert run_study(find_study("objectives"), choice)["run"]["engine"] == "ray"
    assert calls == [QUIET, "shutdown"]
