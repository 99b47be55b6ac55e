"""The choice of a training: which parameters, which loss, how long."""

from dataclasses import dataclass

from fewbit.choices import check_values, flag_names
from fewbit.errors import FewbitError

LOSSES = ("nll", "kd", "nll+kd")
TRAINED = ("weights", "scales", "codes", "all")


@dataclass(frozen=True, kw_only=True)
class TuningChoice:
    """Quantization-aware fine-tuning of a quantized folder.

    loss: nll (cross-entropy of the next tokens), kd (divergence from the original's predictions), or nll+kd. train:
    weights (latent weights with straight-through rounding to fixed grids), scales (scales and zero-points or minima,
    with fixed codes), codes (as weights, but each code moves by at most one level: learned rounding), or all (weights
    and scales). epochs: passes over the training sequences. lr: learning rate of latent weights, in steps of their grid
    per update (Adam's updates have about unit size). scale_lr: learning rate of scales, relative to their size, and of
    zero-points, in codes. batch_size: sequences per update, over all processes. micro_batch: how many of them run at a
    time; 0 for the largest divisor up to 4. warmup: fraction of updates with a rising learning rate; it then decays as
    a cosine to 5 %. clip: maximum norm of the gradient. held_out: sequences excluded from training, whose loss selects
    the best epoch. patience: stop after this many epochs without improvement. top: number of most likely tokens of the
    original that are stored for kd, with the rest as one probability; 0 for all of them, recomputed each time.
    reconstruction: epochs of training each block to reproduce the original's outputs, before the main training. seed:
    for the order of the sequences. embeddings: also train packed embeddings and heads.
    """

    loss: str = "kd"
    train: str = "all"
    epochs: int = 3
    lr: float = 0.002
    scale_lr: float = 0.003
    batch_size: int = 4
    micro_batch: int = 0
    warmup: float = 0.1
    clip: float = 1.0
    held_out: int = 8
    patience: int = 2
    top: int = 64
    reconstruction: int = 0
    seed: int = 0
    embeddings: bool = True

    def __post_init__(self) -> None:
        check_values(self, flag_names(self))
        if self.loss not in LOSSES:
            raise FewbitError(f"--loss must be one of {', '.join(LOSSES)}, not {self.loss!r}")
        if self.train not in TRAINED:
            raise FewbitError(f"--train must be one of {', '.join(TRAINED)}, not {self.train!r}")
        if self.micro_batch < 0:
            raise FewbitError(f"--micro-batch must be at least 1, not {self.micro_batch}")
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise FewbitError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "scale_lr", "clip"):
            if not getattr(self, name) > 0:
                raise FewbitError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise FewbitError(f"--warmup is a fraction of all updates, from 0 to below 1, not {self.warmup}")
        if self.held_out < 0 or self.top < 0 or self.reconstruction < 0:
            raise FewbitError("--held-out, --top and --reconstruction cannot be negative")
        if self.micro_batch == 0:
            object.__setattr__(self, "micro_batch", max(n for n in (1, 2, 3, 4) if self.batch_size % n == 0))
        if self.batch_size % self.micro_batch:
            raise FewbitError(f"--micro-batch {self.micro_batch} must divide --batch-size {self.batch_size}")

    @property
    def trains_weights(self) -> bool:
        """Whether latent weights are trained."""
        return self.train != "scales"

    @property
    def trains_scales(self) -> bool:
        """Whether scales and offsets are trained."""
        return self.train in ("scales", "all")


def tuning_choice(wanted: bool, epochs: int | None, seed: int | None, report_only: bool) -> TuningChoice | None:
    """The choice for `fewbit quantize --tune`. Raises FewbitError for tuning options without --tune."""
    if not wanted and epochs is not None:
        raise FewbitError("--tune-epochs needs --tune")
    if wanted and report_only:
        raise FewbitError("--tune needs an output folder: omit --report-only")
    return TuningChoice(epochs=TuningChoice.epochs if epochs is None else epochs, seed=seed or 0) if wanted else None
