"""Questions of the tasks from local files, in the columns that lm-eval's task definitions read.

A file is JSON lines with one question per line, either with the columns of the data set on the hub or in the form that
the task's authors published; :data:`TASKS` lists both.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError
from fewbit.text.files import TextFile

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskSource:
    """folder: lm-eval's folder of the task. needs: keys that a line must have. convert: a line to the hub's columns."""

    folder: str
    needs: str
    convert: Callable[[Row], Row]


@dataclass(frozen=True)
class Questions:
    """The questions of one task from one file, in the hub's columns."""

    path: Path
    sha256: str
    rows: list[Row]


def read_questions(folder: Path, task: str) -> Questions:
    """Read `TASK.jsonl`, or otherwise the only `TASK_*.jsonl`, in `folder`.

    task: a name in :data:`TASKS`. Raises FewbitError with the folder, or the file and the line, if there is no such
    file, more than one, or a line that is not a question of this task.
    """
    path = _find(folder, task)
    source = TASKS[task]
    text, digest = TextFile(path), hashlib.sha256()
    text.hash_into(digest)
    rows = []
    for number, line in enumerate(text.read().split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(source.convert(_json_object(line)))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise FewbitError(
                f"{path}:{number}: not a question of {task} ({reason}): a line needs {source.needs}"
            ) from error
    if not rows:
        raise FewbitError(f"{path}: contains no questions")
    return Questions(path, digest.hexdigest(), rows)


def _find(folder: Path, task: str) -> Path:
    if not folder.is_dir():
        raise FewbitError(
            f"{folder}: no such folder: --task-data needs a folder with the questions in TASK*.jsonl files"
        )
    if (exact := folder / f"{task}.jsonl").is_file():
        return exact
    found = sorted(folder.glob(f"{task}_*.jsonl"))
    if not found:
        raise FewbitError(
            f"{folder}: contains no file {task}.jsonl or {task}_*.jsonl: put the questions of {task} there"
        )
    if len(found) > 1:
        names = " and ".join(path.name for path in found[:2])
        raise FewbitError(f"{folder}: {names} could both be {task}: rename the one to use to {task}.jsonl")
    return found[0]


def _json_object(line: str) -> Row:
    try:
        row = json.loads(line)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("it contains half of a surrogate pair") from error
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {value!r}, not a string")
    return value


def _choices(row: Row, key: str) -> list[str]:
    values = row[key]
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{key} is not a list of at least two")
    return [_text({key: value}, key) for value in values]


def _one_of(row: Row, key: str, allowed: Sequence[str]) -> str:
    value = str(row[key])
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}, not one of {', '.join(allowed)}")
    return value


def _piqa(row: Row) -> Row:
    label = int(_one_of(row, "label", ("0", "1")))
    return {**{key: _text(row, key) for key in ("goal", "sol1", "sol2")}, "label": label}


def _arc(row: Row) -> Row:
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        row = {**row, "question": question["stem"]}
        choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
    if not isinstance(choices, dict):
        raise ValueError("its choices are missing")
    texts, labels = _choices(choices, "text"), _choices(choices, "label")
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} choices but {len(labels)} labels")
    answer = _one_of(row, "answerKey", labels)
    return {"question": _text(row, "question"), "choices": {"text": texts, "label": labels}, "answerKey": answer}


def _winogrande(row: Row) -> Row:
    found = {key: _text(row, key) for key in ("sentence", "option1", "option2")}
    if "_" not in found["sentence"]:
        raise ValueError("sentence has no _")
    return {**found, "answer": _one_of(row, "answer", ("1", "2"))}


def _hellaswag(row: Row) -> Row:
    endings = _choices(row, "endings")
    label = _one_of(row, "label", [str(i) for i in range(len(endings))])
    if "ctx_a" in row or "activity_label" in row:
        parts = {"activity_label": _text(row, "activity_label"), "ctx_a": str(row["ctx_a"]), "ctx_b": str(row["ctx_b"])}
    else:
        parts = _split_context(_text(row, "ctx"))
    return {**parts, "endings": endings, "label": label}


def _split_context(context: str) -> Row:
    """The hub's columns from "activity: context".

    lm-eval capitalizes the unfinished last sentence (`ctx_b`), so it must be found: it is the text after the last end
    of a sentence, if that begins in lower case. A context that ends with a complete sentence has none.
    """
    activity, colon, rest = context.partition(": ")
    if not colon:
        raise ValueError('ctx is not "activity: context"')
    unfinished = re.fullmatch(r"(.*[.!?][\"')]*) ([a-z][^.!?]*)", rest, re.DOTALL)
    first, last = unfinished.groups() if unfinished else (rest, "")
    return {"activity_label": activity, "ctx_a": first, "ctx_b": last}


def _lambada(row: Row) -> Row:
    text = _text(row, "text")
    context, _, word = text.rpartition(" ")
    if not context.strip() or not word.strip():
        raise ValueError("text is not a passage, a space and its last word")
    return {"text": text}


_ARC_NEEDS = "question (stem, choices with text and label) and answerKey, or question, choices and answerKey"

TASKS: dict[str, TaskSource] = {
    "piqa": TaskSource("piqa", "goal, sol1, sol2 and label", _piqa),
    "arc_easy": TaskSource("arc", _ARC_NEEDS, _arc),
    "arc_challenge": TaskSource("arc", _ARC_NEEDS, _arc),
    "winogrande": TaskSource("winogrande", "sentence, option1, option2 and answer", _winogrande),
    "hellaswag": TaskSource(
        "hellaswag", "ctx, endings and label, or activity_label, ctx_a, ctx_b, endings and label", _hellaswag
    ),
    "lambada_openai": TaskSource("lambada", "text", _lambada),
}
