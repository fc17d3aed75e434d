"""What a smaller chunk and gradient checkpointing save: peak memory and time of one forward and backward pass.

    python benchmarks/memory.py      # alone on two cores, about eight minutes

SmolLM2-135M, bfloat16, LoRA r 16 on all layers, random completions. Each case runs in a process of its own, twice; memory is the largest
the process had, beside what it had after a pass of twenty tokens.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace

CASES = [  # completions, tokens of each, tokens that go through the model together, checkpointing
    *((1, 2000, 4096, saving) for saving in (False, True)),
    *((1, 4000, 4096, saving) for saving in (False, True)),
    *((16, 128, 2048, saving) for saving in (False, True)),
    (16, 128, 256, False),
]


def peak():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def one(rows, tokens, chunk, saving):
    import torch

    from klimb.backward import column_pieces
    from klimb.data import Draws, Example, pick
    from klimb.models.families import lora
    from klimb.models.hub import load_model

    model, words = load_model("smollm2-135m", dtype=torch.bfloat16)
    policy = replace(lora(model, words, r=16, max_chunk_tokens=chunk)[0], gradient_checkpointing=saving)
    generator = torch.Generator().manual_seed(0)

    def made_up(rows, tokens):
        group = [torch.randint(10, 40000, (tokens,), generator=generator) for _ in range(rows)]
        return Draws([Example("Write a long story about a dog.")], [group], torch.ones(1, rows) > 0)

    def learn(draws):
        for tensor in policy.parameters():
            tensor.grad = None
        start = time.perf_counter()
        for columns in column_pieces(draws, chunk):
            policy.log_prob(pick(draws, columns[None])).sum().backward()
        return round(time.perf_counter() - start, 1)

    learn(made_up(1, 20))
    before, draws = peak(), made_up(rows, tokens)
    seconds = [learn(draws) for _ in range(2)]
    norm = sum(p.grad.double().square().sum() for p in policy.parameters()).sqrt().item()
    found = {"rows": rows, "tokens": tokens, "chunk": chunk, "checkpointing": saving, "before_mb": before}
    print(json.dumps({**found, "peak_mb": peak(), "seconds": seconds, "grad_norm": norm}), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(*(json.loads(x) for x in sys.argv[1:]))
    else:
        for case in CASES:
            subprocess.run([sys.executable, __file__, *map(json.dumps, case)], check=True)
