"""The answers of a model to tasks: lm-eval's log-likelihoods and metrics of every question, and their means."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fewbit.errors import FewbitError
from fewbit.evaluation.score import is_of_the_input
from fewbit.evaluation.tasks import OpenTasks, asking
from fewbit.printable import first_line

_LOGITS_BYTES = 1 << 29
_TOKENS_A_CHOICE = 256
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Answer:
    """The answer of a model to one question.

    log_likelihoods: of each choice, in nats. greedy: for each choice, whether greedy decoding would generate it.
    metrics: lm-eval's metrics by name.
    """

    log_likelihoods: tuple[float, ...]
    greedy: tuple[bool, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class TaskAnswers:
    """Answers in the order of the questions, and the number of choices whose prompt was truncated at its beginning."""

    answers: list[Answer]
    truncated: int


def summarize(answered: TaskAnswers) -> dict[str, Any]:
    """The results of one task.

    ``metric``; ``accuracy`` (from 0 to 1) and its ``standard_error``; ``acc_norm`` (log-likelihoods per character of
    the choice) and ``acc_norm_standard_error``, and ``perplexity`` (of the whole choice), where lm-eval defines them;
    ``questions``; ``truncated``, the number of choices whose prompt was truncated at its beginning.
    """
    values = {key: [one.metrics[key] for one in answered.answers] for key in answered.answers[0].metrics}
    row: dict[str, Any] = {"metric": "acc", "accuracy": _mean(values["acc"])}
    if len(answered.answers) > 1:
        row["standard_error"] = _standard_error(values["acc"])
    if "acc_norm" in values:
        row["acc_norm"] = _mean(values["acc_norm"])
        if len(answered.answers) > 1:
            row["acc_norm_standard_error"] = _standard_error(values["acc_norm"])
    if "perplexity" in values and (loss := -_mean(values["perplexity"])) < _LARGEST_EXPONENT:
        row["perplexity"] = math.exp(loss)
    return {**row, "questions": len(answered.answers), "truncated": answered.truncated}


def answer_tasks(
    model: Any, tokenizer: Any, opened: OpenTasks, step: Callable[[], None] | None = None
) -> dict[str, TaskAnswers]:
    """Evaluate a model on every question.

    model: a transformers model, any dtype. step: called after each log-likelihood, :attr:`OpenTasks.requests` times.
    Raises FewbitError if a log-likelihood is NaN or infinite, or if a choice alone is longer than the model's maximum
    length.
    """
    from lm_eval.models.huggingface import HFLM

    with asking(opened):
        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=_batch_size(model),
            softmax_dtype="float32",
        )
        harness.set_cache_hook(_Steps(step))
        return {name: _answer(harness, name, task) for name, task in opened.tasks.items()}


def _answer(harness: Any, name: str, task: Any) -> TaskAnswers:
    truncated = _count_truncated(harness, name, task)
    try:
        replies = harness.loglikelihood(task.instances, disable_tqdm=True)
    except (IndexError, RuntimeError) as error:
        if not is_of_the_input(error):
            raise
        raise FewbitError(f"the model cannot answer {name} ({first_line(error)})") from error
    if not all(math.isfinite(likelihood) for likelihood, _ in replies):
        raise FewbitError(f"a log-likelihood of {name} is NaN or infinite: are the weights damaged?")
    for request, reply in zip(task.instances, replies, strict=True):
        request.resps = [reply]
    task.apply_filters()
    return TaskAnswers(_by_question(task), truncated)


def _by_question(task: Any) -> list[Answer]:
    by_question = defaultdict(list)
    for request in task.instances:
        by_question[request.doc_id].append(request)
    answers = []
    for requests in by_question.values():
        replies = [reply for request in requests for reply in request.filtered_resps.values()]
        metrics = task.process_results(requests[0].doc, replies)
        likelihoods, greedy = zip(*replies, strict=True)
        answers.append(Answer(likelihoods, greedy, {key: float(value) for key, value in metrics.items()}))
    return answers


class _Steps:
    """Takes the place of lm-eval's cache of answers, and is notified of each answer."""

    def __init__(self, step: Callable[[], None] | None) -> None:
        self._step = step

    def add_partial(self, kind: str, request: Any, reply: Any) -> None:
        if self._step is not None:
            self._step()


def _count_truncated(harness: Any, name: str, task: Any) -> int:
    """How many requests exceed the model's maximum length; lm-eval truncates those at their beginning."""
    cut = 0
    for context, continuation in (request.args for request in task.instances):
        # No tokenizer makes more tokens than there are bytes, except for a special token at each end.
        if len((context + continuation).encode("utf-8")) + 2 <= harness.max_length:
            continue
        whole = len(harness.tok_encode(context + continuation))
        if whole - len(harness.tok_encode(context.rstrip())) > harness.max_length:
            raise FewbitError(
                f"a choice of {name} is longer than the model's maximum length ({harness.max_length} tokens)"
            )
        cut += whole > harness.max_length + 1
    return cut


def _batch_size(model: Any) -> int:
    """Number of choices per batch, so that their float32 log-probabilities fit into half a GB."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return max(1, min(16, _LOGITS_BYTES // (4 * _TOKENS_A_CHOICE * vocabulary)))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: list[float]) -> float:
    """Standard error of the mean: the sample's standard deviation divided by the square root of its size."""
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
