"""How fast each method comes to the target, at equal generated samples, where every completion can be summed over.

    python benchmarks/convergence.py                    # the toy's whole table, a few minutes
    python benchmarks/convergence.py --methods log_variance grpo --samples 480

One prompt, 341 strings (vocabulary 5, at most 4 tokens), an autoregressive policy that can be anything, Adam. Two rewards: binary and dense. Each
method is tuned over the same five learning rates, each with 12 seeds; the rate of the best mean at the end counts. What
a method draws before training (a plan's pool) is counted. The number is KL(pi||p) in nats, its mean over seeds, with
twice its standard error; 0 is the target.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from klimb.exact import all_strings, kl, log_prob, normalise, random_logits
from klimb.methods import METHODS
from klimb.objectives import bind

SPACE = all_strings(5, 4)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
SEEDS, DRAWS, POOL, REPLAY = 12, 8, 256, 24
PROBLEMS = {"binary": 0.35, "dense": 0.5}  # beta of each


def problem(name):
    """log_ref's table [S, V], reward [Y] and beta; about one nat and one and a half from the reference."""
    generator = torch.Generator().manual_seed(7)
    ref = random_logits(SPACE.num_prefixes, SPACE.vocab_size, generator=generator)
    reward = torch.randn(SPACE.size, generator=generator, dtype=torch.float64)
    if name == "binary":
        reward = (reward > 1.0).double()
    return ref, reward, PROBLEMS[name]


def token_log_prob(tables):
    """[R, S, V] tables -> [R, Y, T] log-probabilities of each token, 0 at the padding."""
    per_token = torch.log_softmax(tables, -1)[:, SPACE.prefixes, SPACE.strings]
    return per_token.masked_fill(~SPACE.mask, 0.0)


def numbers(tables, ref, reward, beta, which, log_q, token_log_old):
    """What an objective may ask for: R runs stand where a batch has P prompts."""
    runs, draws = which.shape
    mask = SPACE.mask[which].reshape(-1, SPACE.mask.shape[1])
    every = torch.arange(runs)[:, None]
    token_log_pi = token_log_prob(tables)[every, which]
    token_log_ref = token_log_prob(ref[None])[0][which]
    pack = lambda x: x.reshape(-1, x.shape[-1])[mask]  # noqa: E731
    log_ref = token_log_ref.sum(2)
    log_target = log_ref + reward[which] / beta
    return {
        "log_pi": token_log_pi.sum(2),
        "token_log_pi": pack(token_log_pi),
        "log_ref": log_ref,
        "token_log_ref": pack(token_log_ref),
        "token_log_old": pack(token_log_old),
        "token_log_q": pack(token_log_old),
        "log_old": token_log_old.sum(2),
        "log_q": log_q,
        "log_target": log_target,
        "log_w": log_target - log_q,
        "reward": reward[which],
        "beta": torch.tensor(beta, dtype=torch.float64),
        "lengths": SPACE.lengths[which],
        "row": torch.arange(runs * draws).repeat_interleave(SPACE.lengths[which].flatten()),
    }


def sample(tables, num_draws, generator):
    """[R, num_draws] strings, drawn from each run's own policy."""
    law = token_log_prob(tables).sum(2).exp()
    return torch.multinomial(law, num_draws, replacement=True, generator=generator)


def climb(method, problem_name, *, samples, replay=False, pool=0, seed=0):
    """KL(pi||p) [rates, seeds, checkpoints] of one method; all rates and seeds side by side."""
    ref, reward, beta = problem(problem_name)
    log_p = normalise(log_prob(ref, SPACE) + reward / beta)
    runs = len(RATES) * SEEDS
    generator = torch.Generator().manual_seed(seed)
    tables = ref.expand(runs, -1, -1).clone().requires_grad_()
    rate = torch.tensor(RATES, dtype=torch.float64).repeat_interleave(SEEDS)[:, None, None]
    first, second = torch.zeros_like(tables), torch.zeros_like(tables)
    start = token_log_prob(ref[None]).expand(runs, -1, -1)
    every = torch.arange(runs)[:, None]
    kept, kept_old = None, None
    if pool:
        kept = sample(ref.expand(runs, -1, -1), pool, generator)
        kept_old = start[every, kept]
    found, drawn, step = [], pool, 0
    row = METHODS[method]
    while drawn < samples:
        fresh = sample(tables.detach(), DRAWS, generator)
        drawn += DRAWS
        step += 1
        which, old = fresh, token_log_prob(tables.detach())[every, fresh]
        if replay and kept is not None:
            columns = torch.randint(kept.shape[1], (runs, REPLAY), generator=generator)
            which = torch.cat([which, kept.gather(1, columns)], 1)
            old = torch.cat([old, kept_old[every, columns]], 1)
        known = numbers(tables, ref, reward, beta, which, old.sum(2), old)
        for name, function in row.derived.items():
            known[name] = function(**bind(function, {k: x.detach() for k, x in known.items()}))
        value = row.objective(**bind(row.objective, known))
        (gradient,) = torch.autograd.grad(value.sum(), tables)
        with torch.no_grad():
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            tables -= rate * move
        if replay:
            kept = fresh if kept is None else torch.cat([kept, fresh], 1)
            kept_old = old[:, :DRAWS] if kept_old is None else torch.cat([kept_old, old[:, :DRAWS]], 1)
        if drawn in (480, samples):
            with torch.no_grad():
                found.append(kl(token_log_prob(tables).sum(2), log_p).reshape(len(RATES), SEEDS))
    return torch.stack(found, -1)


# name in the table -> (method, whether kept draws are used again, draws made before training)
ROWS = {
    "log_variance, replay, the plan's pool first": ("log_variance", True, POOL),
    "log_variance, replay": ("log_variance", True, 0),
    "log_variance": ("log_variance", False, 0),
    "reverse_kl": ("reverse_kl", False, 0),
    "reverse_kl, replay, the plan's pool first": ("reverse_kl", True, POOL),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=2400)
    parser.add_argument("--methods", nargs="*", help="only rows whose name begins so")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for name, (method, replay, pool) in ROWS.items():
        if options.methods and not any(name.startswith(m) for m in options.methods):
            continue
        record, clock = {"row": name}, time.perf_counter()
        for which in PROBLEMS:
            found = climb(method, which, samples=options.samples, replay=replay, pool=pool)
            means = found.mean(1)  # rates x checkpoints
            best = int(torch.nan_to_num(means[:, -1], nan=torch.inf).argmin())
            error = 2 * found[best].std(0) / SEEDS**0.5
            record[which] = {
                "rate": RATES[best],
                "kl": means[best].tolist(),
                "two_standard_errors": error.tolist(),
            }
        record["seconds"] = time.perf_counter() - clock
        records.append(record)
        cells = [
            f"{m:.3f} ± {e:.3f}"
            for w in PROBLEMS
            for m, e in zip(record[w]["kl"], record[w]["two_standard_errors"], strict=True)
        ]
        rates = ", ".join(f"{record[w]['rate']:g}" for w in PROBLEMS)
        print(f"| {name} | {' | '.join(cells)} | {rates} | {record['seconds']:.0f} s |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
