"""Tasks through lm-eval against a scorer written by hand: prompts, log-likelihoods, picks, accuracy."""

import json
import math
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, build_tiny, needs_shared, run_cli
from test_bad_input import refused
from test_evaluation import check_page
from test_task_data import GOOD, write

import fewbit
from fewbit.checkpoints.locate import locate
from fewbit.errors import FewbitError
from fewbit.evaluation.task_answers import answer_tasks, summarize
from fewbit.evaluation.task_data import TASKS
from fewbit.evaluation.tasks import OpenTasks, TaskChoice, open_tasks
from fewbit.evaluation.text import read_text
from fewbit.report.html import write_evaluation_page
from fewbit.report.text import evaluation_table

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'fewbit[tasks]'")
COUNT = 30


@dataclass(frozen=True)
class Asked:
    """One question as the hand-written scorer sees it: (context, continuation) of each choice, and the right one."""

    pairs: list[tuple[str, str]]
    choices: list[str]
    right: int


def by_hand(task: str, row: dict[str, Any]) -> Asked:
    """The prompt and choices of a line of a task's published file, written out from the tasks' papers."""
    if task == "piqa":
        choices, right = [row["sol1"], row["sol2"]], row["label"]
        return Asked([(f"Question: {row['goal']}\nAnswer:", f" {c}") for c in choices], choices, right)
    if task.startswith("arc"):
        choices = [choice["text"] for choice in row["question"]["choices"]]
        right = [choice["label"] for choice in row["question"]["choices"]].index(row["answerKey"])
        return Asked([(f"Question: {row['question']['stem']}\nAnswer:", f" {c}") for c in choices], choices, right)
    if task == "winogrande":
        before, after = row["sentence"].split("_", 1)
        choices = [before + row["option1"], before + row["option2"]]
        return Asked([(c, f" {after.strip()}") for c in choices], choices, int(row["answer"]) - 1)
    if task == "hellaswag":
        done, _, begun = row["ctx"].rpartition(". ")
        context = f"{done}. {begun[:1].upper()}{begun[1:]}"
        return Asked([(context, f" {ending}") for ending in row["endings"]], row["endings"], row["label"])
    context, _, word = row["text"].rpartition(" ")
    return Asked([(context, f" {word}")], [word], 0)


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Sum of the log-probabilities of the continuation's tokens, and whether each was the most likely one."""
    whole = tokenizer(context + continuation).input_ids
    start = len(tokenizer(context.rstrip()).input_ids)
    targets = torch.tensor(whole[start:])
    logits = model(torch.tensor([whole])).logits[0, start - 1 : -1].float().log_softmax(-1)
    return float(logits.gather(1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())


def made_up(folder: Path, count: int) -> Path:
    """A folder with `count` questions of every task, cut from the help text of Python, in the published forms."""
    found = re.findall(r"[A-Z][a-z][^.:`*_]{30,90}\.", read_text("topics").content)
    sentences = [one for one in (" ".join(one.split()) for one in found) if len(one.split()) > 6]
    for number, task in enumerate(TASKS):
        first = 3 * number * count
        triples = zip(*(sentences[first + i : first + 3 * count : 3] for i in range(3)), strict=True)
        write(folder, task, *(_question(task, index % 2, *three) for index, three in enumerate(triples)))
    return folder


def _question(task: str, right: int, one: str, other: str, third: str) -> dict[str, Any]:
    begun, rest = " ".join(one.split()[:4]), " ".join(one.split()[4:])
    endings = [rest, " ".join(other.split()[4:])][:: 1 - 2 * right]
    if task == "piqa":
        return {"goal": begun, "sol1": endings[0], "sol2": endings[1], "label": right}
    if task == "winogrande":
        names = {"option1": one.split()[0], "option2": f"{other.split()[0]}s", "answer": str(right + 1)}
        return {"sentence": f"{third[:-1]} if _ {rest}", **names}
    if task == "hellaswag":
        return {"ctx": f"Python: {third} {begun}", "endings": endings, "label": right}
    if task == "lambada_openai":
        return {"text": f"{other} {one[:-1]}"}
    choices = [{"text": text, "label": "AB"[i]} for i, text in enumerate(endings)]
    return {"id": one, "question": {"stem": begun, "choices": choices}, "answerKey": "AB"[right]}


def check_against_hand(
    model: Any, tokenizer: Any, opened: OpenTasks, folder: Path, tolerance: float
) -> dict[str, dict[str, Any]]:
    """Every log-likelihood, pick, accuracy and standard error; returns the figures."""
    scores = {}
    for task, answered in answer_tasks(model, tokenizer, opened).items():
        lines = next(folder.glob(f"{task}*.jsonl")).read_text(encoding="utf-8").splitlines()
        asked = [by_hand(task, json.loads(line)) for line in lines[: len(answered.answers)]]
        count = len(asked)
        right, right_norm = 0, 0
        for question, answer in zip(asked, answered.answers, strict=True):
            pairs = [log_likelihood(model, tokenizer, *pair) for pair in question.pairs]
            sums = [value for value, _ in pairs]
            assert answer.log_likelihoods == pytest.approx(sums, rel=tolerance)
            assert answer.greedy == tuple(greedy for _, greedy in pairs)
            lengths = [len(choice) for choice in question.choices]
            if len(pairs) == 1:
                right += pairs[0][1]
                continue
            assert pick(answer.log_likelihoods) == pick(sums)
            assert pick(answer.log_likelihoods, lengths) == pick(sums, lengths)
            right += pick(sums) == question.right
            right_norm += pick(sums, lengths) == question.right
        scores[task] = score = summarize(answered)
        share = right / count
        assert (score["accuracy"], score["questions"], score["truncated"]) == (share, count, 0)
        assert score["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))
        assert score.get("acc_norm") == (None if task in ("winogrande", "lambada_openai") else right_norm / count)
    return scores


def pick(values: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    return max(range(len(values)), key=lambda i: values[i] / (lengths[i] if lengths else 1))


def score(model: Any, tokenizer: Any, opened: OpenTasks) -> dict[str, dict[str, Any]]:
    return {task: summarize(answered) for task, answered in answer_tasks(model, tokenizer, opened).items()}


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tiny32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 model with room for every question, byte by byte."""
    return build_tiny(tmp_path_factory.mktemp("tasks") / "model", "float32", max_position_embeddings=4096)


@pytest.mark.slow
@pytest.mark.parametrize("questions", ["made up", pytest.param("published", marks=needs_shared)])
def test_all_six_tasks_as_the_hand_written_scorer(questions: str, tiny32: Path, tmp_path: Path) -> None:
    folder = SHARED if questions == "published" else made_up(tmp_path, 8)
    opened = open_tasks(TaskChoice(tuple(TASKS), folder, COUNT))
    check_against_hand(fewbit.load(tiny32), tokenizer_of(tiny32), opened, folder, tolerance=1e-5)


@pytest.mark.real_model
def test_all_six_tasks_with_a_tokenizer_that_merges(tmp_path: Path) -> None:
    # Tokens of several letters could reach over the place where a prompt ends and a choice begins.
    tokenizer = tokenizer_of(locate("smollm2-135m"))
    model = build_tiny(tmp_path / "model", "float32", max_position_embeddings=4096, vocab_size=len(tokenizer))
    opened = open_tasks(TaskChoice(tuple(TASKS), made_up(tmp_path, 5), 5))
    check_against_hand(fewbit.load(model), tokenizer, opened, tmp_path, tolerance=1e-5)


@needs_shared
@pytest.mark.real_model
def test_a_real_model_as_the_hand_written_scorer() -> None:
    model = fewbit.load("smollm2-135m", dtype=torch.float32)
    opened = open_tasks(TaskChoice(("lambada_openai",), SHARED, 20))
    found = check_against_hand(model, tokenizer_of(locate("smollm2-135m")), opened, SHARED, tolerance=1e-4)
    assert found["lambada_openai"]["accuracy"] > 0.1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with six questions of each of five tasks; no model gets all of piqa right."""
    for task, row in GOOD.items():
        write(tmp_path, task, *[{**row, "label": i % 2} if task == "piqa" else row for i in range(6)])
    return tmp_path


@pytest.mark.slow
def test_the_figures_are_those_of_lm_evals_own_loop(
    tiny32: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    opened = open_tasks(TaskChoice(tuple(GOOD), folder, 4))
    model, tokenizer = fewbit.load(tiny32), tokenizer_of(tiny32)
    ours = score(model, tokenizer, opened)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32")
    theirs = evaluate(harness, {"tasks": dict(opened.tasks)}, limit=4, bootstrap_iters=100)
    for task, row in ours.items():
        expected = theirs["results"][task]
        assert row["accuracy"] == expected["acc,none"]
        assert row.get("acc_norm") == expected.get("acc_norm,none")
        assert ("perplexity" in row) == (task == "lambada_openai")
        if "perplexity" in row:
            assert row["perplexity"] == pytest.approx(expected["perplexity,none"], rel=1e-5)
        assert theirs["n-samples"][task]["effective"] == row["questions"] == 4
    assert ours["piqa"]["standard_error"] > 0
    assert ours["piqa"]["standard_error"] == pytest.approx(theirs["results"]["piqa"]["acc_stderr,none"])


@pytest.mark.slow
def test_the_definitions_are_lm_evals(folder: Path) -> None:
    opened = open_tasks(TaskChoice(("piqa", "hellaswag"), folder))
    for name, task in opened.tasks.items():
        assert Path(task.config.metadata["config_source"]).name == f"{name}.yaml"
    assert opened.tasks["hellaswag"].instances[0].args == ("Tai chi: A man bows. The man", " turns.")
    assert opened.requests == 24


@pytest.mark.slow
def test_answers_do_not_depend_on_the_models_asked_before(tiny32: Path, folder: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny32, tmp_path / "two", fewbit.preset("rtn", bits=2))
    choice = TaskChoice(("piqa", "lambada_openai"), folder)
    alone = fewbit.evaluate(tiny32, tasks=choice)["models"][0]["tasks"]
    after = fewbit.evaluate([tmp_path / "two", tiny32], tasks=choice)["models"]
    assert after[1]["tasks"] == alone
    assert after[0]["tasks"]["lambada_openai"]["perplexity"] != alone["lambada_openai"]["perplexity"]


def test_no_request_leaves_with_local_questions(tiny32: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def connect(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []
    opened = open_tasks(TaskChoice(tuple(GOOD), folder))
    answer_tasks(fewbit.load(tiny32), tokenizer_of(tiny32), opened, lambda: seen.append(constants.HF_HUB_OFFLINE))
    assert seen == [True] * opened.requests
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.slow
def test_without_a_hub_the_option_is_named(tiny32: Path) -> None:
    line = refused("eval", tiny32, "--tasks", "winogrande", env={"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"})
    assert line.startswith("winogrande: its questions cannot be fetched from the hub (")
    assert line.endswith("give a folder with the questions (--task-data)")


def test_long_prompts_are_cut_and_counted_and_long_choices_refused(tiny32: Path, tmp_path: Path) -> None:
    short = build_tiny(tmp_path / "short", "float32", max_position_embeddings=64)
    model, tokenizer = fewbit.load(short), tokenizer_of(short)
    long = {**GOOD["piqa"], "goal": "x" * 80}
    write(tmp_path, "piqa", long, GOOD["piqa"])
    row = score(model, tokenizer, open_tasks(TaskChoice(("piqa",), tmp_path)))["piqa"]
    assert (row["truncated"], row["questions"]) == (2, 2)
    write(tmp_path, "piqa", {**GOOD["piqa"], "sol1": "y" * 80})
    with pytest.raises(FewbitError, match=r"a choice of piqa is longer than the model's maximum length \(64 tokens\)"):
        score(model, tokenizer, open_tasks(TaskChoice(("piqa",), tmp_path)))


def test_a_damaged_model_gets_no_figure(tiny32: Path, folder: Path) -> None:
    model = fewbit.load(tiny32)
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(FewbitError, match="a log-likelihood of piqa is NaN or infinite"):
        score(model, tokenizer_of(tiny32), open_tasks(TaskChoice(("piqa",), folder)))


def test_one_question_has_no_standard_error(tiny32: Path, folder: Path) -> None:
    row = fewbit.evaluate(tiny32, tasks=TaskChoice(("piqa",), folder, 1))["models"][0]["tasks"]["piqa"]
    assert row["questions"] == 1
    assert "standard_error" not in row


@pytest.mark.slow
def test_the_command_with_text_and_tasks(tiny32: Path, folder: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny32, tmp_path / "small", fewbit.preset("rtn", bits=4))
    text = ["--data", "topics", "--seq-len", 32, "--windows", 2, "--reference", tiny32]
    tasks = ["--tasks", "piqa, arc_easy", "--task-data", folder, "--task-limit", 3]
    result = run_cli("eval", tiny32, tmp_path / "small", *text, *tasks, "--json", "--html", tmp_path / "page.html")
    assert all(line.startswith("evaluating: ") for line in result.stderr.splitlines()), result.stderr
    data = json.loads(result.stdout)
    for row in data["models"]:
        assert row["perplexity"] > 1
        for found in row["tasks"].values():
            assert {"metric", "accuracy", "acc_norm", "standard_error", "questions"} <= set(found)
            assert (found["metric"], found["questions"], found["truncated"]) == ("acc", 3, 0)
    asked = data["protocol"]["tasks"]
    assert asked["limit"] == 3
    assert asked["data"]["piqa"]["file"] == "piqa.jsonl"
    assert len(asked["data"]["piqa"]["sha256"]) == 64
    check_page(tmp_path / "page.html")
    assert "acc_norm" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_tasks_without_text(tiny32: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = fewbit.evaluate(tiny32, tasks=TaskChoice(("piqa", "winogrande"), folder))
    assert "perplexity" not in result["models"][0]
    evaluation_table(result)
    shown = capsys.readouterr().out
    assert "perplexity" not in shown
    assert "acc_norm" in shown
    assert "questions from local files: piqa 6, winogrande 6" in " ".join(shown.split())
    write_evaluation_page(result, tmp_path / "tasks.html")
    check_page(tmp_path / "tasks.html")
