"""Greedy tokens and log-probabilities of folders from vLLM itself, in one process.

Run by `vllm_client.py` in an environment of its own, which has vLLM:

    python vllm_runner.py JOBS.json ANSWERS.jsonl

A job is {"name", "folder", "prompts": [[...]], "greedy": N, "texts": [[...]], "inputs_in_8_bits": false}. Each answer
is a line of JSON: the N tokens that follow each prompt by always taking the most likely one, the natural
log-probability of every token but the first of each text, how fast it generates for one prompt (see `stopwatch.py`),
the kernels that vLLM's log names, and versions; or the error with which vLLM ends. A line is written before the next
job begins, so that a crash loses only one job.
"""

import gc
import json
import logging
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stopwatch import STEPS, speed_of

# In one process: starting a second one takes minutes on a slow machine. Read when vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
_KERNEL = re.compile(r"(?:Using|Selected) (\S*Kernel\S*)")
_LENGTH = 1024


class Kernels(logging.Handler):
    """The names of kernels in log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a name that is not there yet."""
        match = _KERNEL.search(record.getMessage())
        if match and match[1] not in self.seen:
            self.seen.append(match[1])


def speed(engine: Any, prompt: list[int]) -> dict[str, float]:
    """How fast tokens follow one prompt, one by one."""
    from vllm import SamplingParams

    # The first step reads the prompt.
    sampling = SamplingParams(temperature=0, max_tokens=STEPS + 1, ignore_eos=True)
    engine.add_request("speed", {"prompt_token_ids": prompt}, sampling)
    engine.step()
    found = speed_of(engine.step)
    while engine.has_unfinished_requests():
        engine.step()
    return found


def answer(job: dict[str, Any], kernels: Kernels) -> dict[str, Any]:
    """Load a folder and run a job."""
    os.environ["VLLM_CPU_INT4_W4A8"] = "1" if job["inputs_in_8_bits"] else "0"
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(
            job["folder"],
            max_model_len=_LENGTH,
            max_num_seqs=8,
            enforce_eager=True,
            distributed_executor_backend="uni",
            enable_prefix_caching=False,
            logprobs_mode="raw_logprobs",
        )
        greedy = SamplingParams(temperature=0, max_tokens=job["greedy"], ignore_eos=True)
        made = llm.generate([{"prompt_token_ids": one} for one in job["prompts"]], greedy, use_tqdm=False)
        scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        texts = llm.generate([{"prompt_token_ids": one} for one in job["texts"]], scored, use_tqdm=False)
        return {
            "generated": [list(one.outputs[0].token_ids) for one in made],
            "logprobs": [
                [found[token].logprob for token, found in zip(ids[1:], one.prompt_logprobs[1:], strict=True)]
                for ids, one in zip(job["texts"], texts, strict=True)
            ],
            **speed(llm.llm_engine, job["prompts"][0]),
            "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "kernels": kernels.seen,
        }
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> None:
    """Run the jobs that have no answer yet."""
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    import vllm
    from vllm import LLM  # noqa: F401

    # The import above sets up vLLM's log, which is needed before a handler is added.
    versions = {name: version(name) for name in ("vllm-cpu", "torch", "transformers", "compressed-tensors")}
    done = {json.loads(line)["name"] for line in out.read_text().splitlines()} if out.exists() else set()
    for job in jobs:
        if job["name"] in done:
            continue
        kernels = Kernels()
        logger = logging.getLogger(vllm.__name__)
        logger.addHandler(kernels)
        try:
            found = answer(job, kernels)
        except Exception as error:
            # What vLLM does not run is a result.
            found = {"error": f"{type(error).__name__}: {error}"[:2000], "kernels": kernels.seen}
        finally:
            logger.removeHandler(kernels)
        with out.open("a") as file:
            file.write(json.dumps({"name": job["name"], "versions": versions, **found}) + "\n")


if __name__ == "__main__":
    main()
