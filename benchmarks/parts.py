"""The parts of a run beside their peers, on the same work in the same process, in turn: drawing, log-probabilities, a plan, start.

    python benchmarks/parts.py                       # log_probs needs: pip install trl==1.16.0
    python benchmarks/parts.py --only sampling start --rounds 5
    python benchmarks/parts.py --device cuda --model FOLDER

    sampling          64 completions x 64 tokens of 8 prompts           transformers' generate
    sampling, long    the same after prompts of 256 tokens              transformers' generate
    log_probs         with gradient, 64 x 96 tokens, frozen head        TRL's row path (logits of a row at a time)
    plan              128 prompts x 32 draws x 12 tokens                generate, then two forward passes
    start             klimb --help, import klimb                        -

No completion ends early. Both sides warm up once (a plan is long enough). Times differ between machines and hours: the ratio of the medians is the result.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from processor import processor
from step_vs_trl import contiguous_head, peak_memory, prompts

HERE = Path(__file__).resolve().parent
DRAWS, TOKENS, LONG_PROMPT = 8, 64, 256
ROWS, COLUMNS, VOCABULARY, WIDTH = 64, 96, 49152, 576
PLAN_PROMPTS, PLAN_DRAWS, PLAN_TOKENS = 128, 32, 12
PEER_SHARE = 4
"""the peer plans batch by batch, so that a quarter of the prompts takes a quarter of its time"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=THEMES, default=list(THEMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m", help="folder or id; its shape is what is timed")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    import transformers

    print(
        f"{processor()}, {os.cpu_count()} cores, {options.device}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}; median [min, max] of {options.rounds} rounds, seconds\n"
    )
    print("| work | klimb | peer | peer / klimb |\n|---|---|---|---|", flush=True)
    for theme in options.only:
        for line in THEMES[theme](options):
            print(line, flush=True)


def in_turn(work, ours, theirs, options, note=""):
    """One row of the table: both functions, one after the other, `rounds` times after a warm-up."""
    found = {ours: [], theirs: []}
    for round_ in range(options.rounds + 1):
        for function, seconds in found.items():
            start = now(options)
            function()
            if round_ > 0:
                seconds.append(now(options) - start)
    mine, other = (statistics.median(seconds) for seconds in found.values())
    return f"| {work} | {spread(found[ours])} | {spread(found[theirs])} | {other / mine:.2f}{note} |"


def now(options):
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(seconds):
    return f"{statistics.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]"


def loaded(options):
    from klimb.models.hub import load_model
    from klimb.models.policy import CausalPolicy

    model, tokenizer = load_model(options.model, device=options.device)
    model = contiguous_head(model.requires_grad_(False))  # the peer's; klimb reads the head's weight
    return CausalPolicy(model, tokenizer, end=(model.config.vocab_size,))  # no completion ends early


def generated(policy, ids, num_draws, tokens):
    """Transformers' own sampling of the same law: [P * G, L + T] token ids."""
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=policy.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=policy.device)
    with torch.no_grad():
        return policy.model.generate(
            input_ids=padded.repeat_interleave(num_draws, 0),
            attention_mask=mask.repeat_interleave(num_draws, 0),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )


def sampling(options):
    from klimb.data import Example
    from klimb.samplers.ancestral import ancestral

    policy = loaded(options)
    short = [Example(p) for p in prompts()]
    long = [Example("The review said that it was a good one. " * 40 + f"{i}") for i in range(8)]
    for work, examples, cut in (("sampling", short, None), ("sampling, long", long, LONG_PROMPT)):
        ids = [policy.render(example)[-(cut or 10**6) :] for example in examples]
        if cut:
            examples = [Example(policy.tokenizer.decode(row)) for row in ids]
            ids = [policy.render(example) for example in examples]
        yield in_turn(
            f"{work}: 8 prompts of about {len(ids[0])} tokens x {DRAWS} x {TOKENS}",
            lambda examples=examples: ancestral(
                policy,
                examples,
                DRAWS,
                generator=torch.Generator().manual_seed(0),
                max_completion_length=TOKENS,
            ),
            lambda ids=ids: generated(policy, ids, DRAWS, TOKENS),
            options,
        )


def head_and_states(device):
    """A frozen head of SmolLM2's size, hidden states and tokens, all made up: only their shapes count."""
    from klimb.models.hub import default_dtype
    from klimb.models.logprob import Head

    dtype = default_dtype(device)
    # in place: whatever the making needs beside them would hide what is measured
    weight = torch.empty(VOCABULARY, WIDTH, device=device, dtype=dtype).normal_(std=0.05)
    hidden = torch.empty(ROWS * COLUMNS, WIDTH, device=device, dtype=dtype).normal_()
    return Head(weight), hidden, torch.randint(VOCABULARY, (ROWS * COLUMNS,), device=device)


def our_gradient(head, hidden, tokens):
    from klimb.models.logprob import token_log_prob

    h = hidden.clone().requires_grad_()
    token_log_prob(h, head, tokens).sum().backward()
    return h.grad


def their_gradient(head, hidden, tokens):
    from trl.trainer.utils import selective_log_softmax

    h = hidden.clone().requires_grad_()
    logits = torch.nn.functional.linear(h, head.weight).reshape(ROWS, COLUMNS, -1)
    selective_log_softmax(logits, tokens.reshape(ROWS, COLUMNS)).sum().backward()
    return h.grad


def log_probs(options):
    work = head_and_states(options.device)
    ours, theirs = partial(our_gradient, *work), partial(their_gradient, *work)
    apart = ((ours().float() - theirs().float()).norm() / theirs().float().norm()).item()
    mine, other = (grown(options, name) for name in ("our_gradient", "their_gradient"))
    note = (
        f"; gradients {apart:.1e} apart; extra memory {mine:.2f} and {other:.2f} GB, {other / mine:.0f} times"
    )
    yield in_turn(f"log_probs: {ROWS} x {COLUMNS} tokens, V = {VOCABULARY}", ours, theirs, options, note)


def grown(options, name):
    """GB by which one side's peak memory passes what it began with, in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import parts; parts.grow({name!r}, {options.device!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def grow(name, device):
    """Of a process of its own: print the GB that one side needs beside its inputs."""
    head, hidden, tokens = head_and_states(device)
    small = hidden[:1].clone().requires_grad_()
    torch.nn.functional.linear(
        small, head.weight
    ).sum().backward()  # what the first product sets up is not counted
    before = peak_memory(device)
    globals()[name](head, hidden, tokens)
    print(max(peak_memory(device) - before, 1e-3))


def plan(options):
    from klimb.data import Example
    from klimb.plan import plan as planned
    from klimb.samplers.ancestral import ancestral

    policy = loaded(options)
    examples = [Example(p) for p in prompts() for _ in range(PLAN_PROMPTS // 8)]
    ids = [policy.render(example) for example in examples]

    def reward(completions, **columns):
        return [float(len(c if isinstance(c, str) else c[0]["content"]) % 17) for c in completions]

    def ours():
        planned(
            examples,
            policy,
            reward,
            partial(ancestral, max_completion_length=PLAN_TOKENS),
            num_draws=PLAN_DRAWS,
            generator=torch.Generator().manual_seed(0),
        )

    def theirs():
        """What a script does: draw, then the log-probabilities of policy and reference, 192 rows at a time."""
        for start in range(0, len(ids) // PEER_SHARE, 6):
            whole = generated(policy, ids[start : start + 6], PLAN_DRAWS, PLAN_TOKENS)
            for _ in range(2):
                with torch.no_grad():
                    logits = policy.model(whole, logits_to_keep=PLAN_TOKENS + 1).logits[:, :-1]
                    logits.log_softmax(-1).gather(2, whole[:, -PLAN_TOKENS:, None])

    seconds = []
    for side in (ours, theirs):
        begin = now(options)
        side()
        seconds.append(now(options) - begin)
    mine, other = seconds[0], PEER_SHARE * seconds[1]
    work = f"plan: {PLAN_PROMPTS} prompts x {PLAN_DRAWS} x {PLAN_TOKENS} (the peer on one in {PEER_SHARE} prompts, times {PEER_SHARE})"
    yield f"| {work} | {mine:.1f} | {other:.1f} | {other / mine:.2f} |"


def start(options):
    for what, command in (
        ("klimb --help", [sys.executable, "-m", "klimb", "--help"]),
        ("import klimb", [sys.executable, "-c", "import klimb"]),
        ("python alone", [sys.executable, "-c", "pass"]),
    ):
        seconds = []
        for _ in range(options.rounds + 1):
            begin = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - begin)
        yield f"| start: {what} | {spread(seconds[1:])} | | |"


THEMES = {"sampling": sampling, "log_probs": log_probs, "plan": plan, "start": start}

if __name__ == "__main__":
    main()
