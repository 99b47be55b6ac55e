"""The page of a study, drawn from its `study.json` and nothing else."""

import json
from pathlib import Path
from typing import Any

from fewbit.report.html import Section, write_page
from fewbit.studies.study import Result, Study


def write_study_page(study: Study, result: Result, path: Path) -> None:
    """Write the self-contained page; FewbitError when it cannot be written."""
    sections = [
        Section("What we see", result["conclusion"]),
        *study.draw(result),
        Section("How it was measured", columns=["what", "value"], rows=_flat(result["protocol"])),
        Section(
            "Findings",
            [f"{len(result['rows']):,} rows of data are in study.json beside this page."],
            data=json.dumps(result["findings"], indent=1),
        ),
    ]
    write_page(path, f"{study.title}: {result['choice']['model']}", study.about, sections)


def _flat(values: dict[str, Any], before: str = "") -> list[list[str]]:
    """Nested values as rows of name and text."""
    rows: list[list[str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{before}{key} ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append([f"{before}{key}".replace("_", " "), shown])
    return rows
