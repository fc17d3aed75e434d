"""What a second rank is worth: completion tokens a second of one rank and of two, at fixed work a rank and one thread each.

    python benchmarks/scale.py                 # alone on two cores, about six minutes
    python benchmarks/scale.py --shard true    # with layers split over the ranks

Three ways, in turn, in every round: one rank with P prompts a step; two runs of one rank each at the same time, which have
nothing to say to each other (what the machine itself loses when both its cores are busy); two ranks of one run with 2 P prompts.
Efficiency is tokens a second of two ranks over twice those of one; the first step of each run, a warm-up, is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
REWARD = "def length(completions, **columns):\n    return [len(c if isinstance(c, str) else c[-1]['content']) / 100 for c in completions]\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4, help="a rank")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shard", default="false")
    options = parser.parse_args()
    print(
        f"{options.model}, {options.prompts} prompts a rank x 8 x {options.tokens} tokens, shard {options.shard}\n"
    )
    print("| round | one rank | two runs at once | two ranks | efficiency | of the machine alone |")
    print("|---|---|---|---|---|---|", flush=True)
    shares, machine = [], []
    for number in range(options.rounds):
        one = tokens_per_second([started(options, 1)])
        apart = tokens_per_second([started(options, 1), started(options, 1)])
        two = tokens_per_second([started(options, 2)])
        shares.append(two / (2 * one))
        machine.append(two / apart)
        print(
            f"| {number + 1} | {one:.1f} | {apart:.1f} | {two:.1f} | {shares[-1]:.2f} | {machine[-1]:.2f} |",
            flush=True,
        )
    for name, found in (("efficiency", shares), ("against two runs at once", machine)):
        print(f"{name}: {statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]")


def started(options, nproc):
    """A run in a folder of its own: its process and its metrics."""
    folder = Path(tempfile.mkdtemp(prefix="klimb-scale-"))
    (folder / "reward.py").write_text(REWARD)
    settings = {
        "model_name_or_path": options.model,
        "dataset_name": str(ROOT / "examples/data/reviews.jsonl"),
        "reward_funcs": f"{folder / 'reward.py'}:length",
        "beta": 0.3,
        "method": "rloo",
        "num_replay": 0,
        "num_generations": 8,
        "max_completion_length": options.tokens,
        "prompts_per_step": options.prompts * nproc,
        "max_steps": options.steps + 1,
        "shard": options.shard,
        "output_dir": str(folder / "run"),
    }
    command = [sys.executable, "-m", "klimb", "train", "-q", *(["--nproc", "2"] if nproc == 2 else [])]
    command += [part for name, x in settings.items() for part in (f"--{name}", str(x))]
    quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    return subprocess.Popen(command, **quiet), folder / "run" / "metrics.jsonl"


def tokens_per_second(runs):
    """Of runs at the same time: the sum of their rates."""
    total = 0.0
    for process, metrics in runs:
        assert process.wait() == 0
        steps = [json.loads(line) for line in metrics.read_text().splitlines()][1:]
        total += sum(step["tokens"] for step in steps) / sum(sum(step["seconds"].values()) for step in steps)
    return total


if __name__ == "__main__":
    main()
