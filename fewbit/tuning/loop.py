"""The training loop: sequences in a fixed order, one update a batch, the best epoch kept; goes on where it stopped.

Written for one process or several (data parallel or sharded, through Accelerate): a batch's sequences are dealt out
over the processes, gradients are averaged, so any number of them gives the same weights within float tolerance.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import FewbitError
from fewbit.progress import Progress
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.losses import mean_loss
from fewbit.tuning.not_finite import TrainingStoppedError, first_gradient, first_output, first_scale
from fewbit.tuning.snapshots import Snapshots
from fewbit.tuning.teacher import Teacher
from fewbit.tuning.tuned_model import optimizer_for, set_rates, trained

_LAST_RATE = 0.05
_AFTER_A_WORSE_EPOCH = 0.5


@dataclass
class History:
    """Losses of all updates, held-out losses after every epoch (the first before any), and the best epoch.

    Without held-out sequences there are no such losses, and the last epoch is the best.

    share: what all rates are multiplied by; halved whenever an epoch made the held-out loss worse and was taken back.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best_epoch: int = 0
    stopped: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class Sequences:
    """Token ids `(sequences, length)`; the last `held_out` of them are not trained on."""

    ids: Tensor
    held_out: int

    @property
    def training(self) -> int:
        return self.ids.shape[0] - self.held_out


def held_out_last(ids: Tensor, count: int) -> Tensor:
    """Sequences `(sequences, length)` with `count` of them, taken at equal distances, moved to the end.

    Sources follow one another in a calibration set: each is held out in proportion to its sequences.
    """
    total = ids.shape[0]
    if not 0 < count < total:
        return ids
    taken = [(2 * index + 1) * total // (2 * count) for index in range(count)]
    kept = sorted(set(range(total)) - set(taken))
    return ids[torch.tensor(kept + taken)]


def learning_rate(step: int, total: int, warmup: float) -> float:
    """Share of the full rate at update `step` of `total`: a linear rise, then a cosine down to 5 %."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def order_of(epoch: int, sequences: int, batch_size: int, seed: int) -> list[list[int]]:
    """Batches of an epoch: numbers of sequences in random order, the last batch filled up from the front."""
    generator = torch.Generator().manual_seed(seed * 10_007 + epoch)
    order = torch.randperm(sequences, generator=generator).tolist()
    while len(order) % batch_size:
        order += order[: batch_size - len(order) % batch_size]
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


class Trainer:
    """One run of fine-tuning on a model that :func:`make_trainable` has prepared."""

    def __init__(
        self,
        model: nn.Module,
        sequences: Sequences,
        teacher: Teacher | None,
        choice: TuningChoice,
        snapshots: Snapshots,
        accelerator: Any,
    ) -> None:
        self._choice, self._sequences, self._teacher = choice, sequences, teacher
        self._accelerator, self._snapshots = accelerator, snapshots
        self.model, self._optimizer = accelerator.prepare(model, optimizer_for(model, choice))
        self.history = History()

    def run(self, progress: Progress | None = None) -> History:
        """Train; the model ends with the weights of the best epoch. Raises FewbitError when the loss is no number."""
        choice, history = self._choice, self.history
        batches = len(order_of(0, self._sequences.training, choice.batch_size, 0))
        total = batches * choice.epochs
        begun = self._snapshots.resume(self.model, self._optimizer, history)
        if not begun:
            self._judge()
            self._snapshots.keep_best(self.model)
        for step in range(begun, total):
            if history.stopped:
                break
            epoch, batch = divmod(step, batches)
            numbers = order_of(epoch, self._sequences.training, choice.batch_size, choice.seed)[batch]
            rate = learning_rate(step, total, choice.warmup)
            rate *= history.share
            history.losses.append(self._update(numbers, rate, step))
            if progress:
                held = f", held out {history.held_out[-1]:.3f}" if history.held_out else ""
                full = choice.lr if choice.trains_weights else choice.scale_lr
                progress(step + 1, total, f"loss {_recent(history.losses):.3f}{held}, rate {rate * full:.2g}")
            if batch + 1 == batches:
                self._end_epoch(epoch + 1)
            self._snapshots.keep(self.model, self._optimizer, history, step + 1, last=batch + 1 == batches)
        self._snapshots.load_best(self.model)
        return history

    def _end_epoch(self, epoch: int) -> None:
        history = self.history
        self._judge()
        if not history.held_out or history.held_out[-1] < history.held_out[history.best_epoch]:
            history.best_epoch = epoch
            self._snapshots.keep_best(self.model)
            return
        history.stopped = epoch - history.best_epoch >= self._choice.patience
        if not history.stopped:
            self._snapshots.load_best(self.model)
            history.share *= _AFTER_A_WORSE_EPOCH

    def _update(self, numbers: list[int], rate: float, step: int) -> float:
        set_rates(self._optimizer, rate)
        accelerator = self._accelerator
        mine = numbers[accelerator.process_index :: accelerator.num_processes]
        try:
            total = self._backward(mine)
        except FewbitError as error:
            raise TrainingStoppedError(
                f"the scales of {first_scale(self.model)} left the valid range at update {step + 1}: lower --scale-lr"
            ) from error
        if not math.isfinite(total):
            # Alone: a pass that other processes take no part in could wait for them for ever.
            alone = accelerator.num_processes == 1
            where = first_output(self.model, lambda: self._loss(mine)) if alone else "the loss"
            raise TrainingStoppedError(
                f"{where} is NaN or infinite at update {step + 1}: lower --lr, or check the text"
            )
        norm = _whole(accelerator.clip_grad_norm_(list(trained(self.model).values()), self._choice.clip))
        if not math.isfinite(norm):
            # Clipping has made all gradients like the norm: only another pass can tell whose it was.
            self._optimizer.zero_grad(set_to_none=True)
            self._backward(mine)
            where = first_gradient(self.model)
            raise TrainingStoppedError(f"the gradient of {where} is NaN or infinite at update {step + 1}: lower --lr")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return _mean_over_processes(accelerator, total)

    def _backward(self, mine: list[int]) -> float:
        """Gradients of the mean loss over this process's sequences, some at a time; returns that loss."""
        size = min(self._choice.micro_batch, len(mine))
        parts = [mine[first : first + size] for first in range(0, len(mine), size)]
        total = 0.0
        for index, part in enumerate(parts):
            with _no_sync(self._accelerator, self.model, wanted=index + 1 < len(parts)):
                loss = self._loss(part) * (len(part) / len(mine))
                self._accelerator.backward(loss)
            total += float(loss.detach())
        return total

    def _loss(self, numbers: list[int]) -> Tensor:
        ids = self._sequences.ids[numbers].to(self._accelerator.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        prediction = self._teacher(numbers) if self._teacher is not None else None
        if prediction is not None:
            prediction = prediction.to(logits.device)
        flat = logits.reshape(-1, logits.shape[-1])
        return mean_loss(flat, ids[:, 1:].reshape(-1), prediction, self._choice.loss)

    @torch.no_grad()
    def _judge(self) -> None:
        """Note the mean loss of the held-out sequences, which every process computes, where there are any."""
        first, count = self._sequences.training, self._sequences.held_out
        if count:
            self.history.held_out.append(sum(float(self._loss([first + index])) for index in range(count)) / count)


def _whole(norm: Tensor) -> float:
    """A norm that may be spread over processes."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _no_sync(accelerator: Any, model: nn.Module, wanted: bool) -> Any:
    import contextlib

    return accelerator.no_sync(model) if wanted else contextlib.nullcontext()


def _mean_over_processes(accelerator: Any, value: float) -> float:
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), reduction="mean"))


def _recent(losses: list[float]) -> float:
    last = losses[-8:]
    return sum(last) / len(last)
