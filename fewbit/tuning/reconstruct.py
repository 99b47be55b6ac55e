"""Before training end to end: every block by itself learns to give the original block's outputs.

A block gets what the trained blocks before it give, and aims at what the original gives at that depth (as in block-wise
reconstruction, BRECQ, arXiv 2102.05426, and EfficientQAT, arXiv 2407.11062). The error of a token is taken relative to
the length of its target, so that tokens with massive activations do not decide alone:

    mean_t |y_t - y*_t|^2 / |y*_t|^2
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewbit.architecture.network import find_blocks
from fewbit.checkpoints.whole_file import save_whole
from fewbit.checkpoints.workdir import SOLVED
from fewbit.memory import available_bytes
from fewbit.pipeline.walk import Walk
from fewbit.progress import Progress
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.loop import Sequences, learning_rate, order_of
from fewbit.tuning.not_finite import TrainingStoppedError
from fewbit.tuning.tuned_model import load_state, optimizer_for, set_rates, trained

SUFFIX = f".block{SOLVED}"


def relative_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """``mean_t |y_t - y*_t|^2 / |y*_t|^2`` over the tokens of `(..., tokens, hidden)`, in float32."""
    errors = (outputs.float() - targets.float()).square().sum(dim=-1)
    return (errors / targets.float().square().sum(dim=-1).clamp(min=1e-20)).mean()


def reconstruct_blocks(
    model: Any,
    original: Any,
    sequences: Sequences,
    choice: TuningChoice,
    folder: Path,
    progress: Progress | None = None,
) -> list[tuple[float, float]]:
    """Train the blocks of `model` one after another, in place; `choice.reconstruction` passes over the sequences each.

    Finished blocks are kept in `folder` and not trained again. Returns each block's error before and after (of the
    held-out sequences, or the training ones where none are held out).
    """
    blocks, theirs = list(find_blocks(model)), list(find_blocks(original))
    memory = available_bytes() // 4
    walk = Walk(model, blocks, sequences.ids, memory)
    target = Walk(original, theirs, sequences.ids, memory)
    batches = len(order_of(0, sequences.training, choice.batch_size, choice.seed))
    updates, found = batches * choice.reconstruction, []
    judged = range(sequences.training, sequences.ids.shape[0]) if sequences.held_out else range(sequences.training)
    for index, block in enumerate(blocks):
        target.advance(index, _nothing)

        def error(number: int, at: int = index) -> Tensor:
            states = walk.states(number).to(model.device)
            return relative_error(walk.call(at, states), target.states(number).to(model.device))

        kept = folder / f"{index}{SUFFIX}"
        before = _mean(error, judged)
        if kept.is_file():
            load_state(block, load_file(kept))
        else:
            optimizer = optimizer_for(block, choice)
            for step in range(updates):
                epoch, batch = divmod(step, batches)
                numbers = order_of(epoch, sequences.training, choice.batch_size, choice.seed)[batch]
                set_rates(optimizer, learning_rate(step, updates, choice.warmup))
                for number in numbers:
                    (error(number) / len(numbers)).backward()
                norm = torch.nn.utils.clip_grad_norm_(list(trained(block).values()), choice.clip)
                if not bool(torch.isfinite(norm)):
                    raise TrainingStoppedError(
                        f"the gradient of block {index + 1} is NaN or infinite at its update {step + 1}: lower --lr"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if progress:
                    done = index * updates + step + 1
                    progress(done, len(blocks) * updates, f"block {index + 1} of {len(blocks)}, was {before:.2%}")
            state = {name: parameter.detach().cpu().contiguous() for name, parameter in trained(block).items()}
            save_whole(state, kept)
        found.append((before, _mean(error, judged)))
        walk.advance(index, _nothing)
    return found


@torch.no_grad()
def _mean(error: Callable[[int], Tensor], numbers: range) -> float:
    return sum(float(error(number)) for number in numbers) / len(numbers)


def _nothing() -> None:
    """Walks show no progress of their own here."""
