"""What quantized embeddings and heads cost: bits of the layers x bits of the embeddings, without data.

    python benchmarks/embedding_bits.py --model smollm2-135m --model gemma3-270m --bits 4 --bits 3

`--data` is the raw test split of WikiText-2. Prints rows of a Markdown table; the figures go to a JSON file.
"""

import argparse
import json
import tempfile
from pathlib import Path

import fewbit
from fewbit.evaluation.perplexity import Protocol
from fewbit.sizes import show_size

HERE = Path(__file__).parent
TEXT = HERE / "../../shared/data/wikitext2_raw_test.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--bits", type=int, action="append", required=True)
    parser.add_argument("--embedding-bits", type=int, action="append", help="default: 16, 8, 6 and 4")
    parser.add_argument("--method", default="adpq+")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--data", type=Path, default=TEXT)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "embedding_bits.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    protocol = Protocol(512, arguments.windows)
    for model in arguments.model:
        for bits in arguments.bits:
            with tempfile.TemporaryDirectory() as scratch:
                folders, seconds = [], []
                for width in arguments.embedding_bits or (16, 8, 6, 4):
                    out = Path(scratch) / str(width)
                    report = fewbit.quantize(model, out, arguments.method, bits=bits, embedding_bits=width)
                    folders.append(out)
                    seconds.append(report["run"]["seconds"])
                found = fewbit.evaluate(folders, arguments.data, protocol, reference=model)["models"]
            for row, took in zip(found, seconds, strict=True):
                named = {"model": model, "bits": bits, "embedding_bits": int(Path(row["name"]).name)}
                results.append({**named, **row, "name": model, "quantize_seconds": took, "windows": arguments.windows})
                print(
                    f"| {model} | {bits} | {named['embedding_bits']} | {row['bits_per_weight']:.2f} | "
                    f"{row['bits_per_weight_all']:.2f} | {show_size(row['bytes'])} | {row['kl_mean']:.4f} | "
                    f"{row['perplexity']:.2f} | {100 * row['top1_agreement']:.1f} % |",
                    flush=True,
                )
            arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
