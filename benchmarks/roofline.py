"""How near a training pass comes to what the processor multiplies, and what takes the rest.

    python benchmarks/roofline.py                   # 8 prompts x 8 x 32 tokens
    python benchmarks/roofline.py --long            # 4 prompts x 8 x 256, completions end where they end

The pass is klimb's learning from one batch (forward, backward, the optimizer's step) in the step of step_vs_trl.py: SmolLM2-135M,
LoRA r=16 on all linear layers, on a CPU. Its floating point operations are counted from the shapes: products with the weights forward
and back, with the adapters forward, back and for their gradients, with the head forward and back; not attention, nor what is formed
twice. The processor's rate is that of torch's products in the same dtype, measured just before each pass: the best of three square
ones, and those with the weights of a layer at the pass's own number of rows, one after the other. Rates differ between hours by a
factor of two or more: a share is of one round.
"""

import argparse
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from unittest.mock import patch

import step_vs_trl
import torch

SQUARES = (1024, 2048, 4096)
SECONDS = 0.3
"""for so long each product is repeated"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", action="store_true")
    options = parser.parse_args()
    if options.long:
        vars(step_vs_trl).update(step_vs_trl.LONG)
    from klimb import train

    clock, rounds = Clock(), []
    inside = train.learn

    def measured(policy, draws, *args, **more):
        """Learn from the batch; before it the processor's rate, around it the clock."""
        lengths = draws.lengths.sum().item()
        rows = sum(len(policy.render(e)) for e in draws.examples) + lengths - draws.lengths.numel()
        square = max(rate(n, n, n, policy.model.dtype) for n in SQUARES)
        own = rate_of_layer(policy.model, rows)
        clock.on = clock.warm
        begin = time.perf_counter()
        found = inside(policy, draws, *args, **more)
        seconds = time.perf_counter() - begin
        if clock.on:
            done = operations(policy, rows, lengths)
            rounds.append({"seconds": seconds, "rate": done / seconds, "square": square, "own": own})
        clock.on, clock.warm = False, True
        return found

    train.learn = measured
    with clock.watching():
        step_vs_trl.klimb_worker(options.rounds, "smollm2-135m", "cpu")
    report(rounds, clock.spent)


def report(rounds, spent):
    """Print both tables."""
    print(
        f"\n{torch.__version__}, {torch.get_num_threads()} threads, {len(rounds)} passes, median [min, max]\n"
    )
    print("| | |\n|---|---|")
    for name, of in (
        ("a training pass, seconds", lambda r: r["seconds"]),
        ("a training pass, TFLOP/s", lambda r: r["rate"] / 1e12),
        ("the best square product, TFLOP/s", lambda r: r["square"] / 1e12),
        ("products of a layer, TFLOP/s", lambda r: r["own"] / 1e12),
        ("the pass's share of the best square product's", lambda r: r["rate"] / r["square"]),
        ("its share of the products' of a layer", lambda r: r["rate"] / r["own"]),
    ):
        values = [of(r) for r in rounds]
        print(f"| {name} | {statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}] |")
    total = sum(r["seconds"] for r in rounds)
    spent["everything else"] = total - sum(spent.values())
    print("\n| where the time goes | ms a pass | |\n|---|---|---|")
    for name, seconds in spent.most_common():
        print(f"| {name} | {seconds / len(rounds) * 1000:.0f} | {seconds / total:.0%} |")


class Clock:
    """Seconds inside the functions that a pass consists of, each without those that it calls."""

    def __init__(self):
        self.spent, self.inner, self.on, self.warm = Counter(), [], False, False

    def watching(self):
        """Watch klimb's functions on the packed road of a CPU, until the context is left."""
        from klimb.models import logprob, products, shared_attention, tiled_attention, written_out

        parts = {
            "products with weights and adapters, forward": [(products.Product, "forward")],
            "products with weights and adapters, back": [(products.Product, "backward")],
            "gradients of adapters": [(products.Product, "collect")],
            "head and its gradient": [(logprob._FrozenHead, "forward")],
            "attention": [(road, "attend") for road in (tiled_attention, shared_attention)],
            "attention, back": [(road, "attend_backward") for road in (tiled_attention, shared_attention)],
            "gates, norms, angles, forward and once more": [
                (written_out, name) for name in ("gated", "norm", "added_norm", "turned")
            ],
            "gates, norms, angles, back": [
                (written_out, name) for name in ("gated_backward", "norm_backward", "turned_back")
            ],
            "the optimizer": [(torch.optim.AdamW, "step")],
        }
        stack = ExitStack()
        for part, functions in parts.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, self.timed(part, getattr(owner, name))))
        return stack

    def timed(self, part, function):
        """The same function, on this clock."""

        def run(*args, **more):
            if not self.on:
                return function(*args, **more)
            self.inner.append(0.0)
            begin = time.perf_counter()
            found = function(*args, **more)
            seconds = time.perf_counter() - begin
            self.spent[part] += seconds - self.inner.pop()
            if self.inner:
                self.inner[-1] += seconds
            return found

        return run


def rate(rows, width, columns, dtype):
    """Operations a second of torch's product [rows, width] x [width, columns], the weight as a linear layer has it."""
    x, w = torch.randn(rows, width).to(dtype), torch.randn(columns, width).to(dtype)
    y, seconds = torch.empty(rows, columns, dtype=dtype), []
    while sum(seconds) < SECONDS or len(seconds) < 3:
        begin = time.perf_counter()
        torch.mm(x, w.t(), out=y)
        seconds.append(time.perf_counter() - begin)
    return 2 * rows * width * columns / statistics.median(seconds)


def rate_of_layer(model, rows):
    """The same of a layer's products: queries, keys and values side by side, output, gate and up side by side, down."""
    config = model.config
    width, inner = config.hidden_size, config.intermediate_size
    own = width // config.num_attention_heads
    shapes = (
        (width, width + 2 * own * config.num_key_value_heads),
        (width, width),
        (width, 2 * inner),
        (inner, width),
    )
    seconds = sum(2 * rows * a * b / rate(rows, a, b, model.dtype) for a, b in shapes)
    return 2 * rows * sum(a * b for a, b in shapes) / seconds


def operations(policy, rows, predicted):
    """Floating point operations of a pass over so many rows, of which some predict."""
    head = policy.model.get_output_embeddings().weight
    weights = [layer.weight for layer in policy.model.modules() if isinstance(layer, torch.nn.Linear)]
    frozen = sum(w.numel() for w in weights if not w.requires_grad and w is not head)
    adapters = sum(w.numel() for w in weights if w.requires_grad)
    return 2 * (rows * (2 * frozen + 3 * adapters) + 2 * predicted * head.numel())


if __name__ == "__main__":
    main()
