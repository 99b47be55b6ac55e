"""Rows of data sets on the hub, streamed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fewbit.errors import FewbitError, missing_extra
from fewbit.hub_errors import is_unreachable
from fewbit.printable import first_line
from fewbit.text.chat import Chat
from fewbit.text.columns import documents_of
from fewbit.text.rows import Row


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub, as `datasets.load_dataset` takes it.

    column: the one to read; None to choose it. files: some of its files, where it has a script. evaluated: the split
    that is evaluated on; calibration takes `train`.
    """

    path: str
    configuration: str | None = None
    column: str | None = None
    files: str | None = None
    evaluated: str = "test"


HUB = {
    "c4": HubSet("allenai/c4", "en", "text", evaluated="validation"),
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    # Its script no longer runs, and its files are in order of their origin: this is its largest part.
    "redpajama": HubSet(
        "json",
        column="text",
        files="hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/cc_2023-06_sample.jsonl",
        evaluated="train",
    ),
}
"""Short names of data sets."""


def hub_documents(name: str, column: str | None, evaluated: bool, instead: str) -> Iterator[str | Chat]:
    """Documents of a data set in its order, as they come over the network.

    evaluated: of the split that is evaluated on, else of `train`. instead: what to take without a network.
    Raises FewbitError when the data set cannot be fetched or has no such column. No code of a data set is run.
    """
    named = HUB.get(name, HubSet(name))
    return documents_of(
        name, _rows(name, named, named.evaluated if evaluated else "train", instead), column or named.column
    )


def _rows(name: str, named: HubSet, split: str, instead: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "data") from error
    options: dict[str, Any] = {"data_files": named.files, "split": split, "streaming": True}
    if str(getattr(datasets, "__version__", "4")).split(".")[0] in ("2", "3"):
        # Later versions have no loading scripts, and do not know the option.
        options["trust_remote_code"] = False
    try:
        for number, values in enumerate(datasets.load_dataset(named.path, named.configuration, **options), 1):
            yield Row(f"{name}: row {number}", values)
    except Exception as error:
        if not is_unreachable(error):
            raise
        raise FewbitError(
            f"{name}: no such file, and the data set cannot be fetched ({type(error).__name__}: {first_line(error)}): "
            f"without a network, use {instead}"
        ) from error
