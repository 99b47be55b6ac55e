"""What all studies share: the model, the texts, the seed, how much is measured, and where it runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fewbit.calibration.choice import CalibrationChoice
from fewbit.choices import check_values, flag_names
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol

SIZES = ("quick", "standard", "large")
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class StudyChoice:
    """The choices of one study.

    study: its name. model: as for :func:`fewbit.quantize`. out: the folder of its results. data: the evaluation text,
    as for :func:`fewbit.evaluation.text.read_text`. protocol: how that text becomes windows. calibration: the default
    calibration set. seed: of everything random. size: quick, standard or large. methods, bits: empty for those of the
    size. folders: quantized folders that take part. engine: local or ray. device: where the models run.
    options: what one study alone knows, plain JSON values.
    """

    study: str
    model: str
    out: Path
    data: str
    protocol: Protocol = field(default_factory=Protocol)
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)
    seed: int = 0
    size: str = "standard"
    methods: tuple[str, ...] = ()
    bits: tuple[int, ...] = ()
    folders: tuple[str, ...] = ()
    engine: str = "local"
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_values(self, flag_names(self))
        if self.size not in SIZES:
            raise FewbitError(f"--size must be one of {', '.join(SIZES)}, not {self.size!r}")
        if self.engine not in ENGINES:
            raise FewbitError(f"--engine must be one of {', '.join(ENGINES)}, not {self.engine!r}")
        if self.seed < 0:
            raise FewbitError(f"--seed cannot be {self.seed}")

    @property
    def work(self) -> Path:
        """Where a study keeps what it needs on the way; removed when the study is finished."""
        return self.out / "work"

    def describe(self) -> dict[str, Any]:
        """What of this fixes the result, as plain JSON."""
        return {
            "study": self.study,
            "model": self.model,
            "data": self.data,
            "protocol": asdict(self.protocol),
            "calibration": asdict(self.calibration),
            "seed": self.seed,
            "size": self.size,
            "methods": list(self.methods),
            "bits": list(self.bits),
            "folders": list(self.folders),
            "device": self.device,
            "options": dict(self.options),
        }
