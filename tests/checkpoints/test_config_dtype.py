"""The dtype that a config states."""

from typing import Any

import pytest
import torch

from fewbit.checkpoints.config_dtype import stated_dtype


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, None),
        ({"dtype": None, "torch_dtype": "float16"}, torch.float16),
        ({"dtype": "auto", "torch_dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}, torch.float32),
        ({"text_config": {"dtype": "float16"}, "vision_config": {"dtype": "float32"}}, torch.float16),
        ({"llm_config": {"torch_dtype": "bfloat16"}, "text_config": 3}, torch.bfloat16),
        ({"vision_config": {"dtype": "float32"}}, None),
        ({"dtype": "float8_e4m3fn"}, None),
        ({"dtype": ["bfloat16"]}, None),
    ],
)
def test_the_model_s_own_comes_first_and_then_that_of_its_text_part(config: dict[str, Any], wanted: Any) -> None:
    assert stated_dtype(config) == wanted
