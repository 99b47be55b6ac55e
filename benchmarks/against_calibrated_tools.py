"""Other calibrated tools on the same tokens and protocol as `calibrated_quality.py`.

    python -m venv ar && ar/bin/pip install torch==2.13.0 auto-round==0.16.1
    python benchmarks/against_calibrated_tools.py --tool autoround --python ar/bin/python --model gemma3-270m --bits 3

The tool runs in an environment of its own; what its weights decode to is written as a plain folder (of AWQ the packed
one, which fewbit reads) and measured here. AutoRound: asymmetric, 50 steps, 64 sequences of 512 tokens; GPTQModel, AWQ
in it, and GPTQ in llm-compressor: their defaults, 128 sequences. Groups of 64 on smollm2-135m, of 128 on gemma3-270m
where they divide, else the largest divisor. Bits are codes, a 16-bit scale and a zero-point of the codes' width for
each group.
"""

import argparse
import json
import os
import resource
import subprocess
import tempfile
from pathlib import Path

import torch
from calibrated_quality import C4, GROUP, HERE, TEXT

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.tokens import make_set
from fewbit.checkpoints.locate import locate
from fewbit.evaluation.perplexity import Protocol
from fewbit.memory import keep_freed_memory

SAMPLES = {"autoround": 64, "gptqmodel": 128, "awq": 128, "llmcompressor": 128}
STEPS = 50


def tokens(model: str, samples: int, path: Path) -> None:
    """The token ids that fewbit's own runs calibrate on."""
    from transformers import AutoConfig, AutoTokenizer

    folder = locate(model)
    choice = CalibrationChoice(str(C4.resolve()), samples, 512)
    found = make_set(choice, AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder).vocab_size)
    torch.save(found.ids, path)


def main() -> None:
    """Measure one tool on one model at the named bit-widths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", required=True, choices=SAMPLES)
    parser.add_argument("--python", type=Path, required=True, help="the interpreter that has the tool")
    parser.add_argument("--model", required=True, choices=GROUP)
    parser.add_argument("--bits", type=int, action="append", required=True)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "against_calibrated_tools.json")
    arguments = parser.parse_args()
    keep_freed_memory()
    size = GROUP[arguments.model]
    for bits in arguments.bits:
        with tempfile.TemporaryDirectory() as scratch:
            tokens(arguments.model, SAMPLES[arguments.tool], Path(scratch, "tokens.pt"))
            out = Path(scratch, "out")
            command = [str(arguments.python), str(HERE / "run_other_tool.py"), arguments.tool, locate(arguments.model)]
            command += [Path(scratch, "tokens.pt"), out, bits, size, STEPS]
            subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
            found = fewbit.evaluate(out, TEXT, Protocol(1024, 24))["models"][0]
            row = {
                "tool": arguments.tool,
                "model": arguments.model,
                "bits": bits,
                "samples": SAMPLES[arguments.tool],
                "bits_per_weight": bits + (16 + bits) / int(size),
                "perplexity": found["perplexity"],
                "seconds": json.loads(Path(out, "run.json").read_text())["seconds"],
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
                "cores": len(os.sched_getaffinity(0)),
            }
        rows = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
        same = ("tool", "model", "bits")
        rows = [r for r in rows if any(r[key] != row[key] for key in same)]
        arguments.results.write_text(json.dumps([*rows, row], indent=1) + "\n")
        print(f"{arguments.tool} {arguments.model} {bits} bits: {row['perplexity']:.1f}, {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
