"""Embeddings and head chosen by the column solver on the inputs of the head, against rounding: what each costs alone.

    python benchmarks/head_curvature.py --bits 4 --bits 6

The layers stay in 16 bits. The Gram is that of the final hidden states on the calibration text (`--text`). The
divergence from the original is measured on other text (`--data`). With a tied head, the table is used on both sides
("both"), on the side of the embeddings alone, or on that of the head alone. Prints rows of a Markdown table.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fewbit
from fewbit.checkpoints.locate import locate
from fewbit.evaluation.perplexity import Protocol, Totals
from fewbit.evaluation.score import window_logits
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.grids.embeddings import embedding_grid
from fewbit.pipeline.plan import scheme_for
from fewbit.recipe import Recipe
from fewbit.solvers.choice import SolverChoice
from fewbit.solvers.settled import WeightChoices
from fewbit.solvers.weight import solve_weight

SHARED = Path(__file__).parent / "../../shared/data"
SOLVERS = {
    "round": None,
    "column": SolverChoice("column", act_order=True),
    "column, more damped": SolverChoice("column", damping=1.0, act_order=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--bits", type=int, action="append", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--text", type=Path, default=SHARED / "wikitext2_raw_train_head.txt")
    parser.add_argument("--data", type=Path, default=SHARED / "wikitext2_raw_test.txt")
    arguments = parser.parse_args()
    model = fewbit.load(arguments.model, device="cpu")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = embedding.weight.detach(), head.weight.detach()
    folder = locate(arguments.model)
    gram = gram_of(model, head, read_windows(folder, read_text(arguments.text), Protocol(512, arguments.samples))[0])
    windows = read_windows(folder, read_text(arguments.data), Protocol(512, arguments.windows))[0]
    tied = bool(model.config.tie_word_embeddings)
    print("| model | bits | solver | side | squared error | KL | perplexity |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    originals = [window_logits(model, window) for window in windows]
    for bits in arguments.bits:
        for name, solver in SOLVERS.items():
            table = solved(last.float(), gram, bits, solver)
            error = float((table - last.float()).square().sum() / last.float().square().sum())
            for side in ("both", "embeddings", "head") if tied else ("head",):
                total = Totals()
                low = table.to(last.dtype)
                put(embedding, head, low if side != "head" else first, low if side != "embeddings" else last)
                for window, expected in zip(windows, originals, strict=True):
                    total.add(window_logits(model, window), window[1:], expected)
                kl = float(torch.cat(total.divergences).double().mean())
                found = f"{error:.2e} | {kl:.4f} | {math.exp(total.nll / total.tokens):.2f}"
                print(f"| {arguments.model} | {bits} | {name} | {side} | {found} |", flush=True)


def put(embedding: Any, head: Any, first: torch.Tensor, last: torch.Tensor) -> None:
    embedding.weight = torch.nn.Parameter(first, requires_grad=False)
    head.weight = torch.nn.Parameter(last, requires_grad=False)


@torch.no_grad()
def gram_of(model: Any, head: Any, windows: torch.Tensor) -> torch.Tensor:
    """The Gram `(in, in)` of the head's inputs."""
    total = torch.zeros(head.weight.shape[1], head.weight.shape[1], dtype=torch.float64)

    def add(module: Any, inputs: Any) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        total.add_((x.t() @ x).double())

    handle = head.register_forward_pre_hook(add)
    for window in windows:
        model(input_ids=window.unsqueeze(0), use_cache=False)
    handle.remove()
    return total


def solved(weight: torch.Tensor, gram: torch.Tensor, bits: int, solver: SolverChoice | None) -> torch.Tensor:
    """The decoded table on the grid of embeddings."""
    grid, scales = embedding_grid(bits, weight.shape[1])
    recipe = Recipe("embeddings", grid=grid, scales=scales)
    choices = WeightChoices(scheme_for(weight.shape[1], recipe), grid.search)
    if solver is None:
        return solve_weight(weight, None, choices).decoded
    return solve_weight(weight, gram, replace(choices, solver=solver)).decoded


if __name__ == "__main__":
    main()
