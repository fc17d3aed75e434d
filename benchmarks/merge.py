"""What it costs to make one file of a pool's parts: python benchmarks/merge.py --parts 300 3000.

Parts of 192 random completions of 32 tokens are written and merged, each number of parts in a process of its own. Printed: the time to write a part (median,
and the first one, which loads pyarrow), the time to merge, the size of the file, and the highest resident memory over that before the merge.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from klimb.data import Draws, Example, Pool
from klimb.store import begin_parts

PROMPTS, DRAWS, TOKENS = 4, 48, 32


def some_pool(seed):
    """Random tokens and numbers, which no compression makes small."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(49152, (PROMPTS, DRAWS, TOKENS), generator=generator)
    numbers = [torch.randn(PROMPTS, DRAWS, generator=generator) for _ in range(2)]
    draws = Draws(
        [Example(f"Review the bakery number {p} in a few words.") for p in range(PROMPTS)],
        [list(group) for group in ids],
        torch.ones(PROMPTS, DRAWS, dtype=torch.bool),
        texts=[[" ".join(map(str, row.tolist())) for row in group] for group in ids],
        log_q=numbers[0],
        full_support=True,
    )
    tokens = torch.randn(ids.numel(), generator=generator)
    return Pool(draws, numbers[1], numbers[0], {"reward": numbers[1]}, token_log_ref=tokens)


def merged(num_parts):
    """Write, copy, merge; say what it took."""
    with tempfile.TemporaryDirectory() as folder:
        hashes = {"model": "m", "reward": "r"}
        parts = begin_parts(Path(folder, "plan.parquet"), verb="plan", hashes=hashes, depends=hashes)
        seconds = []
        for i in range(num_parts):
            pool = some_pool(i)
            start = time.perf_counter()
            parts.write(range(i * PROMPTS, (i + 1) * PROMPTS), pool)
            seconds.append(time.perf_counter() - start)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        parts.merge()
        took = time.perf_counter() - start
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        size = parts.path.stat().st_size / 2**20
        print(
            f"{num_parts} parts, {num_parts * PROMPTS * DRAWS} draws: a part written in {1e3 * statistics.median(seconds):.1f} ms "
            f"(first {1e3 * seconds[0]:.1f}), merged in {took:.1f} s to {size:.0f} MB, {more:.0f} MB more resident",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, nargs="+", default=[300, 3000])
    for num in parser.parse_args().parts:
        process = multiprocessing.get_context("spawn").Process(target=merged, args=(num,))
        process.start()
        process.join()
