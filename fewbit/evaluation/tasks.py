"""lm-eval's tasks with their questions, ready to be run zero-shot on any number of models.

The questions come from the hub or from local files; the prompts are the same.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fewbit.choices import check_values
from fewbit.errors import FewbitError, missing_extra
from fewbit.evaluation.task_data import TASKS, Questions, read_questions
from fewbit.hub_errors import is_unreachable
from fewbit.printable import first_line
from fewbit.quiet import quiet_loggers


@dataclass(frozen=True)
class TaskChoice:
    """Which tasks and questions to evaluate.

    names: of :data:`fewbit.evaluation.task_data.TASKS`. data: a folder with the questions, None for the hub. limit: use
    only the first N questions of each task, 0 for all. Raises FewbitError for an invalid choice.
    """

    names: tuple[str, ...]
    data: Path | None = None
    limit: int = 0

    def __post_init__(self) -> None:
        check_values(self, {"limit": "--task-limit"})
        for name in self.names:
            if name not in TASKS:
                raise FewbitError(f"no task {name!r}: choose from {', '.join(TASKS)}")
        if not self.names or len(set(self.names)) < len(self.names):
            raise FewbitError(f"each task can be named only once; the tasks are {', '.join(TASKS)}")
        if self.limit < 0:
            raise FewbitError(f"the number of questions cannot be {self.limit}")


def choose_tasks(names: str | None, data: Path | None, limit: int) -> TaskChoice | None:
    """The choice from options: `names` separated by commas, None for no tasks. Raises FewbitError."""
    if names is not None:
        return TaskChoice(tuple(name.strip() for name in names.split(",")), data, limit)
    if data is not None or limit:
        raise FewbitError("--task-data and --task-limit need --tasks: name the tasks")
    return None


@dataclass(frozen=True)
class OpenTasks:
    """lm-eval's tasks with their questions, ready to be run on any number of models."""

    choice: TaskChoice
    tasks: dict[str, Any]
    files: dict[str, Questions]

    @property
    def requests(self) -> int:
        """Number of log-likelihoods that one model has to compute."""
        return sum(len(task.instances) for task in self.tasks.values())

    def protocol(self) -> dict[str, Any]:
        """Everything that determines the results, for the report."""
        data = {
            name: {"file": self.files[name].path.name, "sha256": self.files[name].sha256}
            if name in self.files
            else {"hub": task.config.dataset_path}
            for name, task in self.tasks.items()
        }
        return {
            "harness": f"lm-eval {version('lm-eval')}",
            "shots": 0,
            "limit": self.choice.limit,
            "data": data,
            "log_likelihood": "sum over the tokens of the choice, float32; BOS if the tokenizer adds one",
        }


def open_tasks(choice: TaskChoice) -> OpenTasks:
    """Read the questions and build all prompts.

    Raises FewbitError if a file is missing or invalid, if the hub cannot be reached, or if lm-eval is not installed.
    """
    files = {name: read_questions(choice.data, name) for name in choice.names} if choice.data is not None else {}
    try:
        from lm_eval import tasks as definitions
    except ImportError as error:
        raise missing_extra(error.name or "lm-eval", "tasks") from error
    root = Path(definitions.__file__).parent
    folders: list[str | Path] = [root / folder for folder in sorted({TASKS[name].folder for name in choice.names})]
    opened = OpenTasks(choice, {}, files)
    with asking(opened), contextlib.redirect_stderr(io.StringIO()):
        # Only these folders, because indexing all of lm-eval's tasks takes seconds.
        manager = definitions.TaskManager(include_defaults=False, include_path=folders)
        for name in choice.names:
            opened.tasks[name] = _load(manager, name, files.get(name))
            opened.tasks[name].set_config("num_fewshot", 0)
            opened.tasks[name].build_all_requests(limit=choice.limit or None, rank=0, world_size=1)
    return opened


def _load(manager: Any, name: str, questions: Questions | None) -> Any:
    spec: Any = name
    if questions is not None:
        # To change a field of a task that lm-eval defines, the task must be named inside a group.
        spec = {"group": "local", "task": [{"task": name, "custom_dataset": _dataset(questions)}]}
    try:
        return manager.load(spec)["tasks"][name]
    except Exception as error:
        if questions is not None or not is_unreachable(error):
            raise
        raise FewbitError(
            f"{name}: its questions cannot be fetched from the hub ({first_line(error)}): give a folder with the "
            "questions (--task-data)"
        ) from error


def _dataset(questions: Questions) -> Callable[..., dict[str, Any]]:
    """A data set in which every split contains these questions; without few-shot examples, only one split is used."""
    from datasets import Dataset

    rows = Dataset.from_list(questions.rows)

    def splits(**metadata: Any) -> dict[str, Any]:
        return {"train": rows, "validation": rows, "test": rows}

    return splits


@contextlib.contextmanager
def asking(opened: OpenTasks) -> Iterator[None]:
    """Suppress lm-eval's messages, and with local questions also every request to the hub."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_loggers("lm_eval", "datasets", "huggingface_hub"))
        if opened.choice.data is not None:
            stack.enter_context(offline())
        yield


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """While active, the hub's client and `datasets` refuse every request, independently of environment variables."""
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before
