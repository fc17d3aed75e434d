"""Learn a reward from judged completions, and audit a reward on judged completions that were held out.

P prompts a step, K completions a prompt. The model's one number is read at the end of prompt and completion together, exactly as
`klimb.rewards.model` reads it later.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from klimb.batch import next_prompts
from klimb.data import Prompt, Reward
from klimb.models.scorer import Scorer, rows_of
from klimb.numbers import calibration
from klimb.numbers.calibration import Bin, Pairs, Rescored, judged_pairs
from klimb.numbers.estimate import Estimate, interval
from klimb.numbers.weights import SMALLEST_TAIL, pareto_k, pareto_threshold
from klimb.objectives.reward_model import reward_model
from klimb.pool import Progress, silent
from klimb.rewards.model import logits_of, written
from klimb.steps import Step, TrainState

Loss = Callable[[Tensor, Tensor], Tensor]
"""scores and labels [P, K] -> [P]: `klimb.objectives.reward_model`, its options set"""
AT_ONCE = 32
"""texts between two reports of progress"""
NOISY = 0.05
"""nats that noise may add to log Z before it is told of"""
BINS = 20
"""of the histogram of scores"""


@dataclass(frozen=True)
class Comparison:
    """Some completions of one prompt, and what was said of them.

    Attributes:
        prompt: text or chat messages.
        completions: K texts.
        labels: K numbers, larger for what is better.
    """

    prompt: Prompt
    completions: Sequence[str]
    labels: Sequence[float]


def spelled(rows: Sequence[Comparison], tokenizer: object) -> list[list[list[int]]]:
    """[P][K] token ids of prompt and completion together."""
    return [[written(tokenizer, row.prompt, turn(row.prompt, c)) for c in row.completions] for row in rows]


def turn(prompt: Prompt, completion: str) -> object:
    """A completion as rewards are given it: text after text, a message after messages."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def learn_reward(
    rows: Sequence[Comparison],
    scorer: Scorer,
    optimizer: torch.optim.Optimizer,
    *,
    loss: Loss = reward_model,
    max_steps: int,
    prompts_per_step: int,
    max_grad_norm: float = 1.0,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    state: TrainState | None = None,
    generator: torch.Generator,
) -> Iterator[Step]:
    """Take steps until `max_steps` of them are done.

    Args:
        rows: comparisons to learn from, as many completions in each.
        scorer: the model that moves.
        optimizer: over `scorer.parameters()`.
        loss: scores and labels -> one value a prompt.
        max_steps: how many steps there are in all.
        prompts_per_step: P.
        max_grad_norm: the gradient is scaled down to at most this norm.
        scheduler: of the learning rate, stepped once a step.
        state: where to go on; by default at the start.
        generator: the only source of randomness.

    Yields:
        A Step after each of them: the loss, accuracy and margin of its pairs before they were learned from.

    Raises:
        ValueError: the gradient is not finite.

    Source: Christiano et al., "Deep reinforcement learning from human preferences", 2017; Stiennon et al., "Learning to summarize
    from human feedback", 2020.
    """
    state = state or TrainState()
    texts = spelled(rows, scorer.tokenizer)
    labels = torch.tensor([row.labels for row in rows], dtype=torch.float32)
    lengths = torch.tensor([[len(ids) for ids in group] for group in texts])
    while state.step < max_steps:
        chosen, order = next_prompts(state.order, len(rows), prompts_per_step, generator=generator)
        clock = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"]
        with record_function("klimb:update"):
            optimizer.zero_grad()
            score, value = _gradient([texts[i] for i in chosen], labels[list(chosen)], scorer, loss)
            norm = torch.nn.utils.clip_grad_norm_(list(scorer.parameters()), max_grad_norm)
            if not torch.isfinite(norm):
                raise ValueError(
                    f"step {state.step + 1}: the gradient is not finite; the weights were left as they were before it. Lower the "
                    "learning rate"
                )
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        pairs = judged_pairs(score, labels[list(chosen)], lengths[list(chosen)])
        found = {"accuracy": calibration.right(pairs.margin), "margin": pairs.margin}
        state = TrainState(state.step + 1, order)
        yield Step(
            step=state.step,
            estimates={},
            numbers={
                "objective_value": value.mean().item(),
                **{name: x[pairs.judged].mean().item() for name, x in found.items() if pairs.count},
                "mean_score": score.mean().item(),
                "grad_norm": norm.item(),
                "learning_rate": rate,
                "tokens": int(lengths[list(chosen)].sum()),
            },
            seconds={"update": time.perf_counter() - clock},
            fresh=None,
            state=state,
        )


def _gradient(
    texts: Sequence[Sequence[list[int]]], labels: Tensor, scorer: Scorer, loss: Loss
) -> tuple[Tensor, Tensor]:
    """Scores [P, K] and losses [P]; the gradient of the mean loss is added to the parameters'."""
    score, value = torch.zeros(labels.shape), torch.zeros(len(labels))
    longest = [max(map(len, group)) for group in texts]
    for piece in rows_of(longest, labels.shape[1], scorer.chunk_tokens):
        flat = [ids for i in piece for ids in texts[i]]
        here = logits_of(scorer.model, scorer.tokenizer, flat).reshape(len(piece), -1)
        cost = loss(here, labels[piece].to(here))
        (cost.sum() / len(texts)).backward()
        score[piece], value[piece] = here.detach().float().cpu(), cost.detach().float().cpu()
    return score, value


@dataclass(frozen=True)
class Audit:
    """What held-out comparisons say of a reward.

    Attributes:
        accuracy: how often the better one has the larger score.
        surprise: of the judgements by the scores, nats a pair; log 2 knows nothing.
        margin: how much more the better one scores.
        calibration_error: of the chances that the scores give; a calibrated model of so few pairs has `calibrated` (its mean, and what 95
            of 100 stay below).
        overconfidence: mean chance given to the favoured one, less how often it was the better one.
        bins: the table of reliability.
        length: correlation of differences in score with differences in length.
        length_of_labels: the same of who won; what the scores may have of it.
        longer_better: accuracy where the longer one was the better.
        shorter_better: accuracy where the shorter one was.
        tail: Pareto k of exp(score / beta) within prompts; above `tail_threshold` a few completions decide what that tilt does.
        tail_threshold: for so many completions.
        trusted_beta: the least beta of a grid from which on the tail is below its threshold; None: none is.
        beta: units of score per nat.
        rescored: how -> the same completions scored in another way.
        scores: histogram of better and worse completions: edges, and a count each.
        num_rows: P.
    """

    accuracy: Estimate
    surprise: Estimate
    margin: Estimate
    calibration_error: Estimate
    calibrated: tuple[float, float]
    overconfidence: Estimate
    bins: Sequence[Bin]
    length: Estimate
    length_of_labels: Estimate
    longer_better: Estimate
    shorter_better: Estimate
    tail: Estimate
    tail_threshold: float
    trusted_beta: float | None
    beta: float
    rescored: Mapping[str, Rescored]
    scores: Mapping[str, Sequence[float]]
    num_rows: int


def audit(
    rows: Sequence[Comparison],
    reward: Reward,
    *,
    beta: float,
    generator: torch.Generator,
    lengths: Callable[[str], int] = len,
    others: Mapping[str, Reward] | None = None,
    rescore_rows: int = 16,
    progress: Progress = silent,
) -> Audit:
    """Put a reward to comparisons that it did not learn from.

    Args:
        rows: held-out comparisons, as many completions in each.
        reward: any reward; its differences are read as log odds.
        beta: at which its tail and noise are looked at, units of reward per nat.
        generator: of the bootstrap.
        lengths: of a completion; characters unless said.
        others: how -> the same reward, computed in another way.
        rescore_rows: rows that are scored again by each of them.
        progress: told how far it is.

    Raises:
        ValueError: no two labels differ, or a score is None or not finite.
    """
    score = _scored(rows, reward, progress=progress, what="score held-out completions")
    label = torch.tensor([row.labels for row in rows], dtype=torch.float64)
    length = torch.tensor([[lengths(text) for text in row.completions] for row in rows])
    pairs = judged_pairs(score, label, length)
    if not pairs.count:
        raise ValueError(
            f"measure: in none of {len(rows)} held-out rows do two labels differ; expected comparisons with a better one"
        )
    edges = calibration.bin_edges(pairs)
    again = {}
    for how, other in (others or {}).items():
        some = rows[:rescore_rows]
        second = _scored(some, other, progress=progress, what=f"score again, {how}")
        again[how] = calibration.rescored(score[: len(some)], second, beta, generator=generator)
    tail, threshold, trusted = _tail(rows, score, beta, generator)
    won = torch.ones_like(pairs.margin)
    return Audit(
        accuracy=calibration.accuracy(pairs),
        surprise=calibration.pair_mean(pairs, calibration.surprise(pairs), generator=generator),
        margin=calibration.pair_mean(pairs, pairs.margin, generator=generator),
        calibration_error=calibration.calibration_error(pairs, edges, generator=generator),
        calibrated=calibration.calibrated_error(pairs, edges, generator=generator),
        overconfidence=calibration.pair_mean(pairs, calibration.overconfidence(pairs), generator=generator),
        bins=calibration.reliability(pairs, edges),
        length=calibration.goes_with_length(pairs, pairs.margin, generator=generator),
        length_of_labels=calibration.goes_with_length(pairs, won, generator=generator),
        longer_better=calibration.accuracy(pairs, pairs.longer > 0),
        shorter_better=calibration.accuracy(pairs, pairs.longer < 0),
        tail=tail,
        tail_threshold=threshold,
        trusted_beta=trusted,
        beta=beta,
        rescored=again,
        scores=_histogram(score, pairs),
        num_rows=len(rows),
    )


def findings(found: Audit) -> list[str]:
    """What an audit found, a sentence each, the worst first; only what its intervals can tell.

    A reward that is too sure of itself asks for a larger beta; the other faults are of the reward itself.
    """
    said = []
    if found.accuracy.low <= 0.5:
        said.append("On held-out pairs it is not told apart from a coin: train longer, or with more pairs.")
    if found.calibration_error.value > found.calibrated[1]:
        bent = found.overconfidence
        how = "too sure" if bent.low > 0 else "not sure enough" if bent.high < 0 else "sometimes too sure"
        said.append(f"Its chances are off by more than so few pairs explain: it is {how} of what it favours.")
    else:
        said.append("Its chances are not told apart from calibrated ones.")
    if found.length.low > found.length_of_labels.high:
        said.append("It favours long completions more than the judgements do.")
    if found.length.high < found.length_of_labels.low:
        said.append("It favours short completions more than the judgements do.")
    for how, again in found.rescored.items():
        if again.log_z > NOISY:
            said.append(
                f"Scored {how} its numbers move by {again.spread.value:.2g}: at beta {found.beta:g} that alone lifts log Z by "
                f"{again.log_z:.2g} nats."
            )
    if not found.tail.value <= found.tail_threshold:
        from_on = "" if found.trusted_beta is None else f"; from beta {found.trusted_beta:.2g} on they do not"
        said.append(
            f"At beta {found.beta:g} a few completions decide what exp(reward / beta) prefers{from_on}."
        )
    return said


def _scored(rows: Sequence[Comparison], reward: Reward, *, progress: Progress, what: str) -> Tensor:
    """[P, K] float64."""
    each = len(rows[0].completions)
    step = max(1, AT_ONCE // each)
    values: list[float] = []
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        given = reward(
            [row.prompt for row in some for _ in row.completions],
            [turn(row.prompt, text) for row in some for text in row.completions],
        )
        values += [math.nan if value is None else value for value in given]
        progress(what, len(values), each * len(rows))
    score = torch.tensor(values, dtype=torch.float64).reshape(len(rows), each)
    if not bool(score.isfinite().all()):
        raise ValueError(f"{what}: got a score that is not finite; expected a number a completion")
    return score


def _tail(
    rows: Sequence[Comparison], score: Tensor, beta: float, generator: torch.Generator
) -> tuple[Estimate, float, float | None]:
    """Pareto k of exp(score / beta), its threshold, and the least beta of a grid from which on it is below."""
    number = {text: i for i, text in enumerate(dict.fromkeys(str(row.prompt) for row in rows))}
    group = torch.tensor([number[str(row.prompt)] for row in rows]).repeat_interleave(score.shape[1])
    off = calibration.within_prompts(score.flatten(), group)
    n = len(off)
    if n < SMALLEST_TAIL or not bool(off.any()):
        why = f"unreliable: {n} completions, expected {SMALLEST_TAIL} or more that differ"
        return Estimate(math.nan, math.nan, math.nan, n, (why,)), math.nan, None
    threshold = pareto_threshold(n)
    resamples = off[torch.randint(n, (200, n), generator=generator)]
    low, high = interval(pareto_k(resamples / beta), n)
    value = pareto_k((off / beta)[None]).item()
    why = (
        f"unreliable: at beta {beta:g} a few completions decide what exp(r / beta) does: Pareto k {value:.2f}, expected at most "
        f"{threshold:.2f}"
    )
    e = Estimate(
        value, min(low.item(), value), max(high.item(), value), n, (why,) if value > threshold else ()
    )
    grid = off.std() * torch.logspace(-2, 1, 40, dtype=torch.float64)
    k = torch.cat([pareto_k((off / b)[None]) for b in grid])
    heavy = (k > threshold).nonzero()
    first = 0 if not len(heavy) else int(heavy.max()) + 1
    return e, threshold, None if first == len(grid) else grid[first].item()


def _histogram(score: Tensor, pairs: Pairs) -> dict[str, list[float]]:
    """Scores of better and worse members of pairs, counted in bins of one width."""
    first, second = torch.triu_indices(score.shape[1], score.shape[1], 1)
    a, b = score[:, first], score[:, second]
    # the better one is the one whose difference to the other is the margin
    turned = (a - b - pairs.margin).abs() <= (b - a - pairs.margin).abs()
    better, worse = torch.where(turned, a, b)[pairs.judged], torch.where(turned, b, a)[pairs.judged]
    low, high = score.min().item(), score.max().item()
    high = high if high > low else low + 1.0
    counts = {
        name: torch.histc(x, BINS, low, high).tolist() for name, x in (("better", better), ("worse", worse))
    }
    return {"edges": torch.linspace(low, high, BINS + 1).tolist(), **counts}
