"""The table of runtimes in docs/exports.md and the rows that it is made from."""

from pathlib import Path
from types import ModuleType

import pytest
from benchmark_scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("runtimes_table")


def test_rows(script: ModuleType, tmp_path: Path) -> None:
    first = script.Row(
        "gptq", 4, "symmetric", "A", "1.0", "tiny", True, True, 479, 480, 0.02, 30.0, 1.2, 0.02, 3.0, 2_000_000
    )
    other = script.Row("gptq", 3, "symmetric", "A", "1.0", "tiny", False, note="no kernel")
    script.put("one", [first, other], tmp_path)
    again = script.Row(*first.key, True, False)
    script.put("one", [again], tmp_path)
    script.put("two", [first], tmp_path)
    assert script.read(tmp_path) == [again, other, first]


def test_table(script: ModuleType) -> None:
    rows = [
        script.Row("gptq", 3, "symmetric", "A", "1.0", "tiny", False, note="no kernel"),
        script.Row(
            "gptq", 4, "symmetric", "A", "1.0", "tiny", True, True, 479, 480, 0.02, 30.0, 1.2, 0.02, 3.0, 2_000_000
        ),
    ]
    assert script.table(rows).splitlines() == [
        "| format | bits | choice | model | runtime | loads | same weights | same greedy tokens "
        "| tokens/s, processor (to 16 bits) | tokens/s, clock (load) | MB | note |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| gptq | 4 | symmetric | tiny | A 1.0 | yes | yes | 479 of 480 (gap 0.02) | 50.0 (3.00) | 30.0 (1.2) | 2 |  |",
        "| gptq | 3 | symmetric | tiny | A 1.0 | no |  |  |  |  |  | no kernel |",
    ]


def test_an_unknown_field(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('[{"format": "gptq", "speed": 3}]')
    with pytest.raises(ValueError, match=r"speed.*a row has format, bits"):
        script.read(tmp_path)


def test_the_document_has_the_table_of_the_results(script: ModuleType) -> None:
    _, found, rest = script.DOCUMENT.read_text().partition(script.MARKS[0])
    written, end, _ = rest.partition(script.MARKS[1])
    assert found and end
    assert written.strip() == script.table(script.all_rows())
