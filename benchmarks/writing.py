"""How long a token takes when a model writes calibration text: as transformers does it, and as fewbit does.

    python benchmarks/writing.py --model smollm2-135m

32 sequences side by side, medians of repeats in one run. Attention reads the keys once for all heads that share them,
and keys of earlier tokens are not copied.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch

import fewbit
from fewbit.attention import SharedKeys
from fewbit.calibration.generate import BATCH
from fewbit.calibration.growing_cache import grow_in_place


@torch.inference_mode()
def seconds(model: Any, earlier: int, ours: bool, repeats: int) -> float:
    """The median time of one token after `earlier` ones."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    cache = None
    for _ in range(8):  # In pieces: the first pass over many tokens would need much memory for its logits.
        ids = torch.randint(0, vocabulary, (BATCH, earlier // 8))
        cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    if ours:
        grow_in_place(cache, earlier + repeats + 1)
    taken = []
    with SharedKeys() if ours else nullcontext():
        for _ in range(repeats + 1):
            ids = torch.randint(0, vocabulary, (BATCH, 1))
            began = time.perf_counter()
            model(ids, past_key_values=cache, use_cache=True)
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--earlier", type=int, action="append", help="Default: 128, 256 and 512 tokens.")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print("| model | earlier tokens | transformers, s | fewbit, s | ratio |\n| --- | --- | --- | --- | --- |")
    for name in arguments.model:
        model = fewbit.load(name)
        for earlier in arguments.earlier or (128, 256, 512):
            plain, ours = (seconds(model, earlier, way, arguments.repeats) for way in (False, True))
            print(f"| {name} | {earlier} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
