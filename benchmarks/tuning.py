"""Fine-tuning from quantized folders, on the sequences that they were calibrated on.

    python benchmarks/tuning.py --folder /somewhere/with/space --model smollm2-135m --start precal+oac:2 --epochs 4

Shares the folder, curvatures, text and protocol of calibrated_quality.py. One row for every start and choice in
`results/tuning.json`; rows that are there are not measured again.
"""

import argparse
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from calibrated_quality import C4, GROUP, HERE, TEXT, command, quantize

import fewbit
from fewbit.calibration.choice import choice_from
from fewbit.evaluation.perplexity import Protocol
from fewbit.memory import keep_freed_memory
from fewbit.progress import progress_line
from fewbit.tuning.choice import LOSSES, TRAINED, TuningChoice
from fewbit.tuning.run import TuneOptions, tune
from fewbit.tuning.tuned_weight import MARGIN

TEXTS = {"c4": C4, "wikitext2-train": HERE / "../../shared/data/wikitext2_raw_train_head.txt"}
FIELDS = ("epochs", "lr", "scale_lr", "batch_size", "micro_batch", "held_out", "top", "reconstruction")


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", required=True, choices=GROUP)
    parser.add_argument(
        "--start",
        action="append",
        required=True,
        help="METHOD:BITS, e.g. precal+oac:2; METHOD may be followed by options of quantize, within quotation marks",
    )
    parser.add_argument("--loss", choices=LOSSES, default=TuningChoice.loss)
    parser.add_argument("--train", choices=TRAINED, default=TuningChoice.train)
    for name in FIELDS:
        default = getattr(TuningChoice, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--text", choices=TEXTS, default="c4", help="What the start is calibrated and then tuned on.")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--group-size", choices=("64", "128"), help="Default: 64 for smollm2-135m, 128 for gemma3-270m."
    )
    parser.add_argument("--also", default="", help="More to tune on beside C4, as in --calibration: self:64")
    parser.add_argument("--keep", action="store_true", help="Keep the tuned folders, as tuned-….")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "tuning.json")
    arguments = parser.parse_args()
    keep_freed_memory()
    given = {name: getattr(arguments, name) for name in ("loss", "train", *FIELDS)}
    choice = replace(TuningChoice(seed=arguments.seed), **given)
    group_size = arguments.group_size or GROUP[arguments.model]
    source = str(TEXTS[arguments.text].resolve())
    source = f"{source}:{arguments.samples},{arguments.also}" if arguments.also else source
    drawn = {"sources": source, "sequence_length": arguments.length, "seed": arguments.seed}
    text = choice_from(drawn, arguments.samples)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for start in arguments.start:
        method, bits = start.split(":")
        row = {"model": arguments.model, "method": method, "bits": int(bits), "seed": arguments.seed}
        preset, *options = method.split()
        curvature = fewbit.preset(preset).curvature
        share = curvature.gram_share if curvature is not None else 0.0
        if "--gram-share" in options:
            share = float(options[options.index("--gram-share") + 1])
        row |= {"samples": arguments.samples, "length": arguments.length, "gram_share": share, "margin": MARGIN}
        row |= {"group_size": group_size, "text": arguments.text, "also": arguments.also, "choice": asdict(choice)}
        rows = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
        if any(all(known.get(key) == value for key, value in row.items()) for known in rows):
            continue
        other = "" if arguments.text == "c4" else f"-{arguments.text}"
        name = f"start-{arguments.model}-{method.replace(' ', '')}-{bits}-{arguments.seed}"
        name += f"-g{share:g}-of-{group_size}{other}"
        begin = arguments.folder / name
        figures = begin.with_name(begin.name + ".json")
        if not figures.exists():
            if other:
                take = [*options, "--bits", bits, "--group-size", f"{group_size},auto", "--overwrite"]
                take += ["--embedding-bits", 16]
                chosen = ["--calibration", TEXTS[arguments.text].resolve(), "--samples", 128, "--sequence-length", 512]
                command(
                    "quantize", arguments.model, begin, "--method", preset, *take, *chosen, "--seed", arguments.seed
                )
            else:
                quantize(arguments.model, method, int(bits), arguments.seed, arguments.folder, begin, group_size)
            before = fewbit.evaluate(begin, TEXT, Protocol(1024, 24))["models"][0]["perplexity"]
            figures.write_text(json.dumps({"perplexity": before}))
        out = arguments.folder / f"tuned-{os.getpid()}"
        with progress_line(f"{start} {choice.loss} {choice.train}") as progress:
            report = tune(
                begin, out, choice, TuneOptions(reference=arguments.model, calibration=text, device="cpu"), progress
            )
        found = fewbit.evaluate(out, TEXT, Protocol(1024, 24))["models"][0]
        if arguments.keep:
            shutil.rmtree(begin.with_name(begin.name.replace("start-", "tuned-")), ignore_errors=True)
            out.rename(begin.with_name(begin.name.replace("start-", "tuned-")))
        else:
            shutil.rmtree(out)
        row.update(
            before=json.loads(figures.read_text())["perplexity"],
            perplexity=found["perplexity"],
            bits_per_weight=found["bits_per_weight"],
            held_out=report["tuning"]["history"]["held_out"],
            best_epoch=report["tuning"]["history"]["best_epoch"],
            seconds=report["run"]["seconds"],
            peak_rss_bytes=report["run"]["peak_rss_bytes"],
            cores=len(os.sched_getaffinity(0)),
        )
        rows = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
        arguments.results.write_text(json.dumps([*rows, row], indent=1) + "\n")
        print(f"{arguments.model} {start} {row['before']:.1f} -> {row['perplexity']:.2f}, {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
