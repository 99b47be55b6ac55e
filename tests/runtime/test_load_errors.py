"""Exceptions of transformers: known where its own code raised them, unknown from anywhere else."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny

import fewbit
from fewbit.errors import FewbitError
from fewbit.runtime.load_errors import known_cause


@pytest.mark.parametrize("error", [kind("odd") for kind in (ValueError, OSError, AssertionError)])
def test_exceptions_from_elsewhere_are_unknown(tiny: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_cause(error, {"model_type": "llama"}) is None

    def fail(*arguments: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", fail)
    with pytest.raises(type(error), match="odd"):
        fewbit.load(tiny)


def test_a_package_that_cannot_be_imported_is_known_unless_fewbit_asked() -> None:
    with pytest.raises(ImportError) as caught:
        exec("raise ImportError('broken.so: undefined symbol')", {"__name__": "flash_attn.kernels"})
    assert known_cause(caught.value, {}) == "broken.so: undefined symbol"
    with pytest.raises(ImportError) as caught:
        exec("from transformers import nothing_of_this_name", {"__name__": "fewbit.runtime.load"})
    assert known_cause(caught.value, {}) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": -4}, r"cannot load it \(.*negative dimension"),
        ({"pad_token_id": 9999}, r"cannot load it \(Padding_idx must be within"),
        ({"attn_implementation": "nope"}, "cannot load it .*is not supported"),
        ({"_attn_implementation": "flash_attention_2"}, "cannot load it "),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot load it "),
        *(
            ({"architectures": value}, r"config\.json: its architectures must be a list of strings, not ")
            for value in (5, [5])
        ),
        ({"auto_map": 5}, r"config\.json: its auto_map must be an object, not 5"),
        ({"id2label": 5}, r"config\.json: its id2label must be an object, not 5"),
        ({"dtype": 5}, r"config\.json: its dtype must be a string, not 5"),
    ],
)
def test_configs_that_cannot_be_loaded(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    model = build_tiny(tmp_path / "model", shard_size="1GB")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FewbitError, match=said):
        fewbit.load(model)
