"""Accuracy on tasks as the table that the terminal and the page share."""

from typing import Any

from fewbit.evaluation.task_data import TASKS

_METRICS = (("acc", "accuracy", "standard_error"), ("acc_norm", "acc_norm", "acc_norm_standard_error"))


def measured_tasks(result: dict[str, Any]) -> list[str]:
    """The tasks of an evaluation, in the order of :data:`TASKS`; empty if it had none."""
    asked = result["protocol"].get("tasks", {}).get("data", {})
    return [name for name in TASKS if name in asked]


def asked_models(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an evaluation with answers to tasks; rows with rounded inputs have none."""
    return [row for row in result["models"] if "tasks" in row]


def task_cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column titles, and a row for each model and metric: per cent correct ± one standard error."""
    names = measured_tasks(result)
    rows = []
    for row in asked_models(result):
        for metric, key, error in _METRICS:
            if any(key in row["tasks"][name] for name in names):
                rows.append([row["name"], metric, *(_cell(row["tasks"][name], key, error) for name in names)])
    return ["model", "metric", *names], rows


def _cell(found: dict[str, Any], key: str, error: str) -> str:
    if key not in found:
        return ""
    return f"{100 * found[key]:.1f}" + (f" ± {100 * found[error]:.1f}" if error in found else "")


def task_notes(result: dict[str, Any]) -> str:
    """A short description of the questions and how they were asked."""
    protocol, first = result["protocol"]["tasks"], asked_models(result)[0]["tasks"]
    counts = ", ".join(f"{name} {first[name]['questions']}" for name in measured_tasks(result))
    source = "local files" if any("file" in data for data in protocol["data"].values()) else "the hub"
    how = f"{protocol['harness']}, zero-shot, questions from {source}"
    line = f"Accuracy in per cent ± one standard error; {how}: {counts}"
    cut = sum(found["truncated"] for row in asked_models(result) for found in row["tasks"].values())
    return line + (f"; {cut} choices with a prompt truncated at its beginning" if cut else "")
