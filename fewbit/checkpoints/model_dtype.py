"""The floating-point dtype of an original model."""

import torch

from fewbit.checkpoints.config_dtype import stated_dtype
from fewbit.checkpoints.source import Checkpoint


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the config states, or else that of most weights; bfloat16 without any."""
    stated = stated_dtype(checkpoint.config)
    if stated is not None:
        return stated
    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        if entry.dtype in (torch.bfloat16, torch.float16, torch.float32):
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.numel
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.bfloat16)
