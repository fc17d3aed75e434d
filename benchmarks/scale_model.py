"""What a step costs on other machines: a model of its parts, fitted to measured steps, and how wrong it is where it can be checked.

    python benchmarks/scale_model.py                    # the table of predictions
    python benchmarks/scale_model.py --check            # fits one rank of one thread here, predicts other steps and two ranks; 12 minutes

A step of P prompts x G completions of T tokens a rank, N parameters in K layers, n ranks:

    draw      T x (K x layer + max(2 N R / (rate x draws), (2 N + memory of R rows) / bytes)),  R = P G rows
    score     2 N x tokens / (rate x reads)
    train     (4 N with adapters, 6 N with all weights) x tokens / (rate x learns)
    talk      adapters: a sum of their gradients, 2 (n - 1)/n x bytes / link;   split layers: they are gathered for the draw, for the score and
              twice for each chunk of training, each (n - 1)/n x 2 N bytes / link, and gradients scattered; and a latency each time

`rate` is the machine's measured rate of bfloat16 products; draws, reads and learns are the shares of it that klimb reaches, and the only
things fitted. What is not in it: rewards, overlap of talking with computing (it is all counted), slow ranks, checkpoints. Of GPUs only
one has been measured, with a small model, where launching decides; their rows below rest on data sheets and are untested.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, replace

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """One rank's share of it: products a second, bytes a second of memory and between ranks, seconds, bytes."""

    name: str
    rate: float
    bytes: float
    link: float
    latency: float
    layer: float
    memory: float
    draws: float
    reads: float
    learns: float
    wide_link: float | None = None
    near: int = 8
    """ranks that `link` joins; more go over `wide_link`"""


@dataclass(frozen=True)
class Model:
    """A decoder: parameters, layers, bytes that a token leaves in memory."""

    name: str
    parameters: float
    layers: int
    width: int
    kv_bytes: float


@dataclass(frozen=True)
class Work:
    """A step: prompts a rank, completions a prompt, tokens of a prompt and of a completion; whether all weights are trained; ranks."""

    prompts: int = 8
    generations: int = 8
    prompt_tokens: int = 30
    tokens: int = 32
    full: bool = False
    split: bool = False
    ranks: int = 1
    adapter_share: float = 0.035
    chunk: int = 512
    """completion tokens in one pass (max_chunk_tokens)"""


MODELS = [
    Model("0.135 B", 0.135e9, 30, 576, 2 * 2 * 30 * 192),
    Model("1.7 B", 1.7e9, 24, 2048, 2 * 2 * 24 * 2048),
    Model("8 B", 8.0e9, 32, 4096, 2 * 2 * 32 * 1024),
    Model("32 B", 32.8e9, 64, 5120, 2 * 2 * 64 * 1024),
    Model("70 B", 70.6e9, 80, 8192, 2 * 2 * 80 * 1024),
]
H100 = Machine(
    "H100 (data sheet, 40 % of its products and 60 % of its bytes)",
    rate=989e12,
    bytes=0.6 * 3.35e12,
    link=450e9,
    latency=2e-5,
    layer=3e-4,  # 64 recorded steps of 30 layers took 0.59 s on an H200 (README), little of it products
    memory=80 * GB,
    draws=0.3,
    reads=0.4,
    learns=0.4,
    wide_link=50e9,
)
THREAD = Machine(
    "one thread of this processor",
    rate=215e9,
    bytes=10e9,
    link=2e9,
    latency=5e-4,
    layer=0.0,
    memory=24 * GB,
    draws=0.5,
    reads=0.7,
    learns=0.5,
)


def seconds(machine, model, work):
    """Seconds of each part of a step, and what the rank sends and holds, bytes."""
    rows = work.prompts * work.generations
    drawn = rows * work.tokens
    read = drawn + work.prompts * work.prompt_tokens
    n, flops = model.parameters, 2 * model.parameters
    whole = 2 * n
    memory_of_rows = rows * (work.prompt_tokens / work.generations + work.tokens / 2) * model.kv_bytes
    product = flops * rows / (machine.rate * machine.draws)
    draw = work.tokens * (
        model.layers * machine.layer + max(product, (whole + memory_of_rows) / machine.bytes)
    )
    times = 3 if work.full else 2
    link = machine.link if work.ranks <= machine.near else (machine.wide_link or machine.link)
    others = (work.ranks - 1) / work.ranks
    trained = n if work.full else work.adapter_share * n
    if work.split:
        gathers = 2 + 2 * passes(work)  # draw and score once; each pass forward and backward
        sent = others * whole * (gathers + (1 if work.full else 0)) + (
            0 if work.full else 2 * others * 2 * trained
        )
        talks = model.layers * (gathers + 1)
    else:
        sent, talks = 2 * others * 2 * trained, 1
    talk = sent / link + (talks * machine.latency if work.ranks > 1 else 0.0)
    return {
        "draw": draw,
        "score": flops * read / (machine.rate * machine.reads),
        "train": times * flops * read / (machine.rate * machine.learns),
        "talk": talk,
        "sent": sent,
        "held": held(model, work),
    }


def held(model, work):
    """Bytes a rank needs: weights, what training keeps beside them, the rows' memory, and a chunk's activations."""
    over = work.ranks if work.split else 1
    weights = 2 * model.parameters / over
    state = (14 * model.parameters / over) if work.full else 14 * work.adapter_share * model.parameters
    reference = weights if work.full else 0.0
    gathered = 2 * 2 * model.parameters / model.layers if work.split else 0.0
    rows = work.prompts * work.generations * (work.tokens + work.prompt_tokens / work.generations)
    return (
        weights
        + state
        + reference
        + gathered
        + rows * model.kv_bytes
        + work.chunk * model.layers * model.width * 34
    )


def passes(work):
    """Forward and backward passes that a rank's share of the step takes."""
    return max(1, -(-work.prompts * work.generations * work.tokens // work.chunk))


def total(found):
    return sum(found[part] for part in ("draw", "score", "train", "talk"))


def fitted(machine, model, work, measured):
    """The machine with the three shares that make the model say the measured seconds."""
    said = seconds(replace(machine, draws=1.0, reads=1.0, learns=1.0), model, work)
    return replace(
        machine,
        draws=said["draw"] / measured["draw"],
        reads=said["score"] / measured["score"],
        learns=said["train"] / measured["update"],
    )


def fits(model, work, memory=0.9 * H100.memory):
    """The work as it fits: layers split only if they must be, then in the largest chunks that leave room; or None."""
    for split in (False, True):
        for chunk in (8192, 4096, 2048, 1024, 512):
            tried = replace(work, split=split and work.ranks > 1, chunk=chunk)
            if held(model, tried) <= memory:
                return tried
    return None


def predictions():
    """Tokens a second and efficiency of 1 to 512 GPUs, each model on as few as hold it, and more."""
    print(f"{H100.name}; LoRA and all weights, 8 prompts x 8 x 512 tokens a rank; untested\n")
    print(
        "| model | trained | ranks | seconds a step | draw | score | train | talk | tokens a second | a rank, of the first row's | chunk | GB a rank |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for full in (False, True):
            alone = None
            for ranks in (1, 8, 64, 512):
                work = fits(model, Work(tokens=512, prompt_tokens=200, full=full, ranks=ranks))
                if work is None:
                    continue
                found = seconds(H100, model, work)
                rate = ranks * work.prompts * work.generations * work.tokens / total(found)
                alone = alone or rate / ranks
                parts = " | ".join(f"{found[part]:.1f}" for part in ("draw", "score", "train", "talk"))
                print(
                    f"| {model.name} | {'all' if full else 'LoRA'}{', split' if work.split else ''} | {ranks} | {total(found):.1f} | {parts} | "
                    f"{rate:,.0f} | {rate / ranks / alone:.2f} | {work.chunk} | {found['held'] / GB:.0f} |"
                )


def check():
    """Fit one rank's step here, then predict others; how far off each prediction is."""
    import scale

    small = MODELS[0]

    def measured(ranks=1, prompts=4, tokens=16, split=False):
        options = argparse.Namespace(
            model="smollm2-135m", prompts=prompts, tokens=tokens, steps=3, shard=str(split).lower()
        )
        process, metrics = scale.started(options, ranks)
        assert process.wait() == 0
        steps = [json.loads(line) for line in metrics.read_text().splitlines()][1:]
        parts = {
            p: statistics.median(s["seconds"].get(p, 0.0) for s in steps) for p in ("draw", "score", "update")
        }
        # completions end by themselves: the model is asked about as many tokens as were drawn
        mean = statistics.median(step["tokens"] for step in steps) / (ranks * prompts * 8)
        return parts, Work(prompts=prompts, tokens=mean, ranks=ranks, split=split)

    found, work = measured()
    machine = fitted(THREAD, small, work, found)
    print(
        f"fitted: draws {machine.draws:.2f}, reads {machine.reads:.2f}, learns {machine.learns:.2f} of {machine.rate / 1e9:.0f} GFLOP/s\n"
    )
    print("| step | measured | predicted | error |\n|---|---|---|---|")
    cases = [
        {"prompts": 8},
        {"tokens": 32},
        {"ranks": 2},
        {"ranks": 2, "split": True},
    ]
    for case in cases:
        found, work = measured(**case)
        real, said = sum(found.values()), total(seconds(machine, small, work))
        print(f"| {case} | {real:.1f} s | {said:.1f} s | {said / real - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    (check if parser.parse_args().check else predictions)()
