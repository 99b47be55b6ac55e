"""The sets of the studies `calibration-sets` and `outliers` from the shared data, as a file for --set-file.

    python benchmarks/study_sets.py sets.json
    fewbit study calibration-sets smollm2-135m out --data ../shared/data/wikitext2_raw_test.txt \
        --calibration ../shared/data/c4_rp_sample1.jsonl --set-file sets.json

Train-like text only: of the question tasks only test and validation files are at hand, and nothing is calibrated on
those, so the set `questions` is Stack Exchange. English is on the axis of languages as well, so that a language is
compared with the same news in English. `--languages` chooses others of the files `ntrex_*.txt`.
"""

import argparse
import json
from pathlib import Path

DATA = Path(__file__).parent / "../../shared/data"
CONTENT = {
    "prose": "wikitext2_raw_train_head.txt",
    "code": "redpajama_github.jsonl",
    "science": "redpajama_arxiv.jsonl",
    "questions": "redpajama_stackexchange.jsonl",
}
LANGUAGES = ("eng", "deu", "zho-CN", "arb", "hin")


def study_sets(data: Path, languages: tuple[str, ...] = LANGUAGES) -> dict[str, dict[str, str]]:
    """Axis -> name -> source, with the paths below `data`."""
    return {
        "content": {name: str(data / file) for name, file in CONTENT.items()},
        "language": {language: str(data / f"ntrex_{language}.txt") for language in languages},
    }


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--languages", default=",".join(LANGUAGES), help="codes of ntrex_*.txt, with commas")
    arguments = parser.parse_args()
    sets = study_sets(arguments.data.resolve(), tuple(arguments.languages.split(",")))
    missing = [path for group in sets.values() for path in group.values() if not Path(path).is_file()]
    if missing:
        parser.error(f"{missing[0]}: no such file")
    arguments.out.write_text(json.dumps(sets, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
