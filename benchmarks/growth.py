"""How the cost of drawing, scoring and learning grows.

    python benchmarks/growth.py                        # about ten minutes on two cores
    python benchmarks/growth.py --only lengths model --rounds 3
    python benchmarks/growth.py --svg growth.svg       # needs the extra report

    lengths        4 prompts x 4 generations x 32 ... 512 tokens
    generations    4 prompts x 4 ... 32 x 32 tokens
    prompts        8 ... 128 prompts x 4 x 16 tokens
    vocabulary     a random model of 4 layers, 4096 ... 131072 words
    model          random models of 2 to 30 layers, 64 to 576 wide

No completion ends early. Seconds are the median of the rounds after a warm-up; what counts is seconds per token along a row: flat, or
falling, is growth no faster than the tokens. Attention over a completion's own tokens is the one part whose work per token
grows with its length.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from step_vs_trl import prompts

GRID = {
    "lengths": [(4, 4, tokens) for tokens in (32, 64, 128, 256, 512)],
    "generations": [(4, draws, 32) for draws in (4, 8, 16, 32)],
    "prompts": [(number, 4, 16) for number in (8, 32, 128)],
}
VOCABULARIES = (4096, 16384, 65536, 131072)
MODELS = ((2, 64), (4, 128), (8, 256), (16, 384), (30, 576))
"""layers and width"""
PARTS = ("draw", "score", "learn")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    themes = [*GRID, "vocabulary", "model"]
    parser.add_argument("--only", nargs="+", choices=themes, default=themes)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--svg", help="draw the rows into this file")
    options = parser.parse_args()
    import transformers

    print(
        f"{os.cpu_count()} cores, {options.device}; torch {torch.__version__}, transformers {transformers.__version__}; "
        f"milliseconds a completion token, median of {options.rounds}\n"
    )
    print("| what grows | tokens | draw | score | learn |\n|---|---|---|---|---|", flush=True)
    rows = []
    for theme in options.only:
        for name, size, seconds, tokens in measured(theme, options):
            each = {part: 1e3 * seconds[part] / tokens for part in PARTS}
            rows += [{"what": theme, "size": size, "part": p, "ms": each[p], "tokens": tokens} for p in PARTS]
            print(f"| {name} | {tokens} | " + " | ".join(f"{each[p]:.2f}" for p in PARTS) + " |", flush=True)
    if options.svg:
        drawn(rows, options.svg)


def measured(theme, options):
    """Name, size, seconds of each part, and completion tokens of each point of a row."""
    if theme in GRID:
        model = loaded(options)
        for shape in GRID[theme]:
            size = shape[("prompts", "generations", "lengths").index(theme)]
            seconds, tokens = timed(*model, shape, options)
            yield f"{theme}: {shape[0]} x {shape[1]} x {shape[2]}", size, seconds, tokens
    elif theme == "vocabulary":
        for words in VOCABULARIES:
            seconds, tokens = timed(*made_up(4, 128, words, options), (8, 8, 32), options)
            yield f"vocabulary: {words}", words, seconds, tokens
    else:
        for layers, width in MODELS:
            policy, reference = made_up(layers, width, 8192, options)
            size = sum(p.numel() for p in policy.model.parameters())
            seconds, tokens = timed(policy, reference, (8, 8, 32), options)
            yield f"model: {layers} layers, {width} wide, {size / 1e6:.1f}M", size, seconds, tokens


def never_ending(policy):
    from dataclasses import replace

    return replace(policy, end=(policy.model.config.vocab_size,))


def loaded(options):
    from klimb.models.families import lora
    from klimb.models.hub import load_model

    model, tokenizer = load_model(options.model, device=options.device)
    policy, reference = lora(model, tokenizer, r=16, alpha=32)
    return never_ending(policy), never_ending(reference)


def made_up(layers, width, words, options):
    """A Llama of random weights, with SmolLM2's tokenizer folded into its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from klimb.models.families import lora
    from klimb.models.hub import default_dtype

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(width // 96, 1),
        head_dim=32,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    while config.num_attention_heads % config.num_key_value_heads:
        config.num_key_value_heads -= 1
    model = LlamaForCausalLM(config).to(options.device, default_dtype(options.device))
    policy, reference = lora(model, Letters(words), r=16, alpha=32)
    return never_ending(policy), never_ending(reference)


class Letters:
    """A tokenizer of letters, as far as a policy asks one: a text to ids, ids to a text."""

    chat_template, eos_token_id, name_or_path = None, 0, "letters"

    def __init__(self, words):
        self.words = words

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % self.words for letter in text]}

    def decode(self, ids, **_):
        return "".join(chr(97 + int(i) % 26) for i in ids)


def examples(number):
    from klimb.data import Example

    texts = [p[-1]["content"] for p in prompts()]
    return [Example(texts[i % len(texts)]) for i in range(number)]


def timed(policy, reference, shape, options):
    """Seconds of each part for P x G x T, and the tokens."""
    from klimb.data import chunks
    from klimb.samplers.ancestral import ancestral

    number, num_draws, tokens = shape

    def draw():
        return ancestral(
            policy,
            examples(number),
            num_draws,
            generator=torch.Generator().manual_seed(0),
            max_completion_length=tokens,
        )

    draws = draw()

    @torch.no_grad()
    def score():
        reference.log_prob(draws)

    def learn():
        for group in chunks(draws, policy.chunk_tokens):
            policy.log_prob(group).sum().backward()
        for weight in policy.parameters():
            weight.grad = None

    return {
        part: seconds_of(work, options) for part, work in zip(PARTS, (draw, score, learn), strict=True)
    }, number * num_draws * tokens


def seconds_of(work, options):
    found = []
    for _ in range(options.rounds + 1):
        start = now(options)
        work()
        found.append(now(options) - start)
    return statistics.median(found[1:])


def now(options):
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def drawn(rows, path):
    """Lines of milliseconds a token, one small picture for each thing that grows."""
    import altair as alt

    base = alt.Chart(alt.Data(values=rows)).mark_line(point=True)
    chart = base.encode(
        x=alt.X(
            "size:Q",
            scale=alt.Scale(type="log", nice=False, padding=12),
            axis=alt.Axis(grid=False, tickCount=3, format="~s"),
            title=None,
        ),
        y=alt.Y("ms:Q", scale=alt.Scale(zero=True), title="ms a completion token"),
        color=alt.Color("part:N", title=None),
    ).properties(width=220, height=160)
    whole = chart.facet(facet=alt.Facet("what:N", title=None), columns=3)
    whole.resolve_scale(x="independent", y="independent").save(str(Path(path)))


if __name__ == "__main__":
    main()
