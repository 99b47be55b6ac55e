"""What a sequence of the output Fisher costs against a plain backward pass, and losses on logits by rows at a time.

python benchmarks/passes.py
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.fisher import measure_fisher
from fewbit.evaluation import perplexity
from fewbit.memory import keep_freed_memory
from fewbit.pipeline.network import open_network
from fewbit.pipeline.plan import cover_original


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """The median over repeats, after one that is not counted."""
    run()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return sorted(found)[repeats // 2]


def main() -> None:
    """Print both."""
    keep_freed_memory()
    checkpoint = open_checkpoint(locate("smollm2-135m"))
    network = open_network(checkpoint, cover_original(checkpoint), "cpu")
    layers = list({s.watched.key: s.watched for block in network.sites for s in block}.values())
    ids = torch.randint(0, 40_000, (1, 512), generator=torch.Generator().manual_seed(0))
    choice = CurvatureChoice("fisher", terms="token")

    def plain() -> None:
        network.model(ids, labels=ids, use_cache=False).loss.backward()
        network.model.zero_grad()

    network.model.requires_grad_(True)
    base = seconds(plain)
    for again in (True, False):
        took = seconds(partial(measure_fisher, network.model, network.blocks, layers, ids, choice, None, again))
        print(f"Fisher, blocks run again {again}: {took:.2f} s, {took / base:.2f} x a forward and backward pass")
    for vocabulary in (49_152, 262_144):
        logits, targets = torch.randn(511, vocabulary).bfloat16(), torch.randint(0, vocabulary, (511,))
        chosen = perplexity.rows_at_once
        add = partial(perplexity.Totals().add, logits, targets, None)
        small = seconds(add)
        perplexity.rows_at_once = lambda matrix: 256
        large = seconds(add)
        perplexity.rows_at_once = chosen
        print(f"losses on 511 x {vocabulary} logits: 256 rows at a time {large:.2f} s, a cacheful {small:.2f} s")


if __name__ == "__main__":
    main()
