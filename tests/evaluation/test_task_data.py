"""Questions from local files, and every way in which they can be wrong."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from test_bad_input import refused

import fewbit
from fewbit.errors import FewbitError
from fewbit.evaluation.task_data import TASKS, read_questions
from fewbit.evaluation.tasks import TaskChoice, choose_tasks

GOOD: dict[str, Any] = {
    "piqa": {"goal": "open a jar", "sol1": "turn the lid", "sol2": "turn the table", "label": 0},
    "arc_easy": {
        "id": "x",
        "question": {
            "stem": "What is wet?",
            "choices": [{"text": "water", "label": "1"}, {"text": "sand", "label": "2"}],
        },
        "answerKey": "1",
    },
    "winogrande": {"sentence": "Ann met Eve, so _ smiled.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    "hellaswag": {"ctx": "Tai chi: A man bows. the man", "endings": ["turns.", "melts."], "label": 1},
    "lambada_openai": {"text": "he gave her the ring"},
}


def write(folder: Path, task: str, *rows: Any) -> Path:
    path = folder / f"{task}.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("task", GOOD)
def test_the_published_form_becomes_the_columns_of_the_hub(task: str, tmp_path: Path) -> None:
    write(tmp_path, task, GOOD[task], "", GOOD[task])
    rows = read_questions(tmp_path, task).rows
    expected = {
        "piqa": GOOD["piqa"],
        "arc_easy": {
            "question": "What is wet?",
            "choices": {"text": ["water", "sand"], "label": ["1", "2"]},
            "answerKey": "1",
        },
        "winogrande": GOOD["winogrande"],
        "hellaswag": {
            "activity_label": "Tai chi",
            "ctx_a": "A man bows.",
            "ctx_b": "the man",
            "endings": ["turns.", "melts."],
            "label": "1",
        },
        "lambada_openai": GOOD["lambada_openai"],
    }[task]
    assert rows == [expected, expected]
    write(tmp_path, task, expected)
    assert read_questions(tmp_path, task).rows == [expected], "the hub's own columns are taken as they are"


@pytest.mark.parametrize(
    ("context", "first", "last"),
    [
        ("Sumo: Two men bow. two men", "Two men bow.", "two men"),
        ("Music: How to sing: Breathe in. Breathe out.", "How to sing: Breathe in. Breathe out.", ""),
        ('Chess: She says "no!" then', 'She says "no!"', "then"),
        ("Sax: 1 a guy plays. 2 a guy", "1 a guy plays. 2 a guy", ""),
    ],
)
def test_the_unfinished_sentence_is_found_again(context: str, first: str, last: str, tmp_path: Path) -> None:
    write(tmp_path, "hellaswag", {**GOOD["hellaswag"], "ctx": context})
    row = read_questions(tmp_path, "hellaswag").rows[0]
    assert (row["ctx_a"], row["ctx_b"]) == (first, last)


@pytest.mark.parametrize(
    ("task", "changes", "reason"),
    [
        ("piqa", {"label": 2}, "label is '2', not one of 0, 1"),
        ("piqa", {"sol2": None}, "sol2 is None, not a string"),
        ("arc_easy", {"answerKey": "C"}, "answerKey is 'C', not one of 1, 2"),
        ("arc_easy", {"question": "What?"}, "its choices are missing"),
        ("winogrande", {"sentence": "no gap"}, "sentence has no _"),
        ("hellaswag", {"endings": ["only one"]}, "endings is not a list of at least two"),
        ("hellaswag", {"label": 2}, "label is '2', not one of 0, 1"),
        ("hellaswag", {"ctx": "no activity"}, 'ctx is not "activity: context"'),
        ("lambada_openai", {"text": "word"}, "text is not a passage, a space and its last word"),
        ("lambada_openai", {"text": "ends in a space "}, "text is not a passage, a space and its last word"),
    ],
)
def test_a_malformed_question_names_file_line_and_reason(
    task: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path, task, GOOD[task], {**GOOD[task], **changes})
    message = f"{path}:2: not a question of {task} ({reason}): a line needs {TASKS[task].needs}"
    with pytest.raises(FewbitError, match=f"^{re.escape(message)}$"):
        read_questions(tmp_path, task)


def test_files_that_are_not_questions(tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match=f"^{tmp_path}: contains no file piqa.jsonl or piqa_\\*.jsonl: put the quest"):
        read_questions(tmp_path, "piqa")
    path = write(tmp_path, "piqa", "{")
    with pytest.raises(FewbitError, match=f"{path}:1: not a question of piqa \\(not JSON\\): a line needs goal"):
        read_questions(tmp_path, "piqa")
    write(tmp_path, "piqa", {"goal": "x", "label": 0})
    with pytest.raises(FewbitError, match=r"\(no 'sol1'\)"):
        read_questions(tmp_path, "piqa")
    write(tmp_path, "piqa", [1])
    with pytest.raises(FewbitError, match=r"\(not a JSON object\)"):
        read_questions(tmp_path, "piqa")
    path.write_text("\n")
    with pytest.raises(FewbitError, match=f"{path}: contains no questions"):
        read_questions(tmp_path, "piqa")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FewbitError, match=f"{path}: not UTF-8 text"):
        read_questions(tmp_path, "piqa")
    path.rename(tmp_path / "piqa_a.jsonl")
    (tmp_path / "piqa_b.jsonl").write_text("")
    with pytest.raises(FewbitError, match=r"piqa_a.jsonl and piqa_b.jsonl could both be piqa: rename the one to use"):
        read_questions(tmp_path, "piqa")


def test_choices_that_are_none() -> None:
    with pytest.raises(FewbitError, match=r"^no task 'boolq': choose from piqa, arc_easy, arc_challenge, winogrande, "):
        TaskChoice(("piqa", "boolq"))
    with pytest.raises(FewbitError, match="each task can be named only once"):
        TaskChoice(("piqa", "piqa"))
    with pytest.raises(FewbitError, match="the number of questions cannot be -1"):
        TaskChoice(("piqa",), limit=-1)


def test_options_that_do_not_go_together(tiny: Path) -> None:
    with pytest.raises(FewbitError, match=r"^--task-data and --task-limit need --tasks: name the tasks$"):
        choose_tasks(None, None, 5)
    assert choose_tasks(None, None, 0) is None
    assert choose_tasks(" piqa, winogrande", None, 0) == TaskChoice(("piqa", "winogrande"))
    with pytest.raises(FewbitError, match=r"^nothing to evaluate: give --data, --tasks or both$"):
        fewbit.evaluate(tiny)
    with pytest.raises(FewbitError, match=r"^--reference compares models on a text: give --data too$"):
        fewbit.evaluate(tiny, reference=tiny, tasks=TaskChoice(("piqa",)))


def test_the_command_refuses_in_one_line(tiny: Path, tmp_path: Path) -> None:
    assert refused("eval", tiny, "--tasks", "boolq").startswith("no task 'boolq': choose from piqa, arc_easy, ")
    line = refused("eval", tiny, "--tasks", "piqa", "--task-data", tmp_path / "nowhere")
    assert line.startswith(f"{tmp_path}/nowhere: no such folder: --task-data needs a folder with the questions")


def test_without_lm_eval_the_extra_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "piqa", GOOD["piqa"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(FewbitError, match=r"this needs the package lm_eval: install it with  pip install 'fewbit\[tas"):
        fewbit.evaluate(tiny, tasks=TaskChoice(("piqa",), tmp_path))
