"""The calibration tokens of a run."""

from typing import Any

from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.source import DOCUMENTS, parse_sources
from fewbit.calibration.tokens import CalibrationSet, make_set
from fewbit.checkpoints.own_code import open_tokenizer
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError, NoTokenizerError
from fewbit.pipeline.stages import check_length
from fewbit.progress import Progress


def calibration_set(
    checkpoint: Checkpoint, choice: CalibrationChoice, model: Any, progress: Progress | None = None
) -> CalibrationSet:
    """The calibration set, tokenized with the model's own tokenizer."""
    try:
        tokenizer = open_tokenizer(checkpoint.folder)
    except NoTokenizerError as error:
        # Not every calibration set needs a tokenizer.
        if any(source.kind in DOCUMENTS for source in parse_sources(choice.sources)):
            raise FewbitError(f"{error}: add one, or use --calibration random-tokens") from error
        tokenizer = None
    check_length(model.config, choice.sequence_length)
    return make_set(choice, tokenizer, model.get_input_embeddings().weight.shape[0], model, progress)
