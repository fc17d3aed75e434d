"""Each verdict on a finite space where the cause is put in and the truth is a sum, and its opposite; then the rules mutated.

Laws over twelve outcomes a prompt, 64 prompts, 64 draws a prompt of policy and reference each.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from klimb.exact.truth import gap, kl, mean, normalise, tilt
from klimb.numbers import diagnose as judging
from klimb.numbers import rules
from klimb.numbers.certificate import certificate
from klimb.numbers.diagnose import diagnose
from klimb.numbers.estimate import Estimate
from klimb.numbers.evidence import (
    Evidence,
    Quantity,
    Side,
    as_written,
    evidence_of_draws,
    evidence_of_plan,
    exact,
    joined,
    trend,
)
from klimb.numbers.frontier import default_betas, frontier
from klimb.numbers.labels import LABELS
from klimb.numbers.next_run import Setting
from klimb.numbers.rules import CLOSE, TABLE

BETA = 0.5
PROMPTS, OUTCOMES, DRAWS = 64, 12, 64


def space(seed=0):
    """log_ref and reward, [P, Y]."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(PROMPTS, OUTCOMES, generator=g, dtype=torch.float64) / 2
    return torch.log_softmax(logits, -1), 2 * torch.rand(
        PROMPTS, OUTCOMES, generator=g, dtype=torch.float64
    ) - 1


LOG_REF, REWARD = space()


def best(beta=BETA, reward=REWARD):
    return normalise(tilt(LOG_REF, reward, beta))


def evidence(
    log_pi,
    *,
    reward=REWARD,
    beta=BETA,
    size=(PROMPTS, DRAWS),
    sampler=None,
    admits=None,
    said=None,
    said_reference=LOG_REF,
    finished=None,
    audit=None,
    steps=None,
    seed=1,
):
    """Evidence of a policy that is known exactly.

    Args:
        log_pi: [P, Y] the policy.
        sampler: [P, Y] the law that really draws from it.
        admits: [P, Y] the law that the sampler says it draws from.
        said: [P, Y] what the scorer takes the policy for.
        said_reference: [P, Y] what it takes the reference for.
        finished: [P, Y] whether an outcome ended by itself.
        audit: [P, Y] another reward.
        steps: (value of the objective over the steps, noise) of a training.
    """
    g = torch.Generator().manual_seed(seed)
    p, n = size
    said = log_pi if said is None else said
    law = log_pi if sampler is None else sampler

    def side(drawn_from, log_q):
        chosen = torch.multinomial(drawn_from[:p].exp(), n, replacement=True, generator=g)

        def at(x):
            return None if x is None else x[:p].gather(1, chosen)

        return Side(at(reward), at(said), at(said_reference), at(finished), at(log_q), at(audit))

    mine, theirs = side(law, law if admits is None else admits), side(LOG_REF, LOG_REF)
    c = certificate(
        beta=beta,
        reward_policy=mine.reward,
        log_pi_policy=mine.log_pi,
        log_ref_policy=mine.log_ref,
        reward_reference=theirs.reward,
        log_pi_reference=theirs.log_pi,
        log_ref_reference=theirs.log_ref,
        generator=g,
    )
    found = evidence_of_draws(mine, theirs, beta=beta, generator=g)
    names = {"frontier_efficiency": "efficiency"}
    written = {names.get(n, n): x for n, x in vars(c).items() if isinstance(x, Estimate)}
    found = as_written(found, written)
    assert found.needs == c.needs
    pool = side(LOG_REF, LOG_REF).reward
    flat = bool((pool == pool[:, :1]).all())
    points = [] if flat else frontier(pool, default_betas(pool), generator=g)
    found = joined(found, evidence_of_plan(pool, beta=beta, frontier=points, generator=g))
    if steps is not None:
        pace = torch.arange(1.0, 41.0)
        value = steps(pace / 40) + 0.005 * torch.randn(40, generator=g)
        found = replace(found, rise=trend(pace, value, generator=g), done=exact(1.0, 40))
    return found


def moved(scale, seed=3):
    """The reference, moved in a direction that the reward knows nothing of."""
    g = torch.Generator().manual_seed(seed)
    return normalise(LOG_REF + scale * torch.randn(LOG_REF.shape, generator=g, dtype=torch.float64))


def without_the_best_mode():
    """p without the outcome that it likes most."""
    log_p = best()
    top = torch.nn.functional.one_hot(log_p.argmax(-1), OUTCOMES).bool()
    return normalise(torch.where(top, log_p - 12, log_p))


def found_by_few(share):
    """A reward of 0 and 1 that most prompts never see, and one that most prompts get always."""
    seen = torch.arange(PROMPTS)[:, None] < share * PROMPTS
    passed = torch.where(seen, (REWARD > 0).double(), 0.0)
    constant = torch.where(seen, (REWARD > 0).double(), 0.5)
    return passed, constant


PASSED, CONSTANT = found_by_few(0.25)
LONG = REWARD.median() > REWARD
"""outcomes that are cut: those that earn little"""
PART = best(3 * BETA)
HALF = (best(BETA / 2) + LOG_REF) / 2
FINISHED = torch.where(LONG, 0.0, 1.0)

# name, evidence, the verdicts that must be given (all of them, and no other)
CASES = {
    "the best policy itself": (lambda: evidence(best()), {"close to the best"}),
    "nearly the best": (lambda: evidence(best(1.2 * BETA)), {"close to the best"}),
    "part of the way, on the frontier": (lambda: evidence(PART), {"undertrained"}),
    "part of the way, and still rising": (
        lambda: evidence(PART, steps=lambda t: 0.3 * t),
        {"undertrained"},
    ),
    "part of the way, and at rest": (lambda: evidence(PART, steps=lambda t: 0.3 + 0 * t), {"capacity"}),
    "at rest where it should be": (
        lambda: evidence(best(), steps=lambda t: 0.3 + 0 * t),
        {"close to the best"},
    ),
    "at rest where it began": (
        lambda: evidence(best(30 * BETA), steps=lambda t: 0 * t),
        {"hardly moved"},
    ),
    "stopped half-way": (
        lambda: replace(evidence(PART), done=exact(0.5, 20)),
        {"stopped early"},
    ),
    "all steps taken": (lambda: replace(evidence(PART), done=exact(1.0, 40)), {"undertrained"}),
    "the reference": (lambda: evidence(LOG_REF), {"hardly moved"}),
    "learning rate far too small": (lambda: evidence(best(30 * BETA)), {"hardly moved"}),
    "beta far too high, and its best policy": (
        lambda: evidence(best(50 * BETA), beta=50 * BETA),
        {"beta too high"},  # of so little a share cannot be told
    ),
    "beta far too high, and the reference": (
        lambda: evidence(LOG_REF, beta=50 * BETA, seed=2),
        {"beta too high"},
    ),
    "moved along no direction of the reward": (lambda: evidence(moved(1.2)), {"KL wasted"}),
    "moved along no direction, less far than p": (
        lambda: evidence(moved(0.6)),
        {"KL wasted", "undertrained"},
    ),
    "half of the KL in a direction of no use": (
        lambda: evidence(normalise(best() + moved(1.0) - LOG_REF)),
        {"KL wasted"},
    ),
    "beta far too high, and a little drift": (
        lambda: evidence(moved(0.1), beta=50 * BETA),
        {"beta too high"},
    ),
    "p without a mode": (lambda: evidence(without_the_best_mode()), {"mode dropped", "KL wasted"}),
    "never finds a reward": (
        lambda: evidence(best(reward=PASSED), reward=PASSED),
        {"exploration-limited", "close to the best"},
    ),
    "constant on most prompts": (
        lambda: evidence(best(reward=CONSTANT), reward=CONSTANT),
        {"reward flat", "close to the best"},
    ),
    "finds a reward on most prompts": (
        lambda: evidence(best(reward=found_by_few(0.8)[0]), reward=found_by_few(0.8)[0]),
        {"close to the best"},
    ),
    "cut before it earns": (
        lambda: evidence(best(), finished=FINISHED),
        {"close to the best"},  # little of p is cut
    ),
    "cut, and part of the way": (
        lambda: evidence(PART, finished=FINISHED),
        {"completions truncated", "undertrained"},
    ),
    "cut, and it does not matter": (
        lambda: evidence(PART, finished=torch.arange(OUTCOMES).expand(PROMPTS, -1) % 2),
        {"undertrained"},
    ),
    "all cut, and it does not matter": (
        lambda: evidence(PART, finished=torch.zeros(PROMPTS, OUTCOMES)),
        {"undertrained"},
    ),
    "all cut, and no reward": (
        lambda: evidence(best(reward=PASSED), reward=PASSED, finished=torch.zeros(PROMPTS, OUTCOMES)),
        {"completions truncated", "close to the best"},
    ),
    "a few cut, and no reward": (
        lambda: evidence(
            best(reward=PASSED),
            reward=PASSED,
            finished=(torch.arange(OUTCOMES) > 3).double().expand(PROMPTS, -1),
        ),
        {"exploration-limited", "close to the best"},
    ),
    "the audit falls": (
        lambda: evidence(best(), audit=-REWARD),
        {"reward hacked", "close to the best"},
    ),
    "the audit rises": (lambda: evidence(best(), audit=REWARD**3), {"close to the best"}),
    "the audit falls and so does the reward": (
        lambda: evidence(normalise(LOG_REF - REWARD), audit=REWARD),
        {"KL wasted", "undertrained"},
    ),
    "drawn colder than scored": (
        lambda: evidence(PART, sampler=normalise(PART / 0.5)),
        {"sampler and scorer disagree"},
    ),
    "the reference scored too low": (
        lambda: evidence(PART, said_reference=LOG_REF - 0.5),
        {"sampler and scorer disagree"},
    ),
    "part of the way, with some KL of no use": (
        lambda: evidence(normalise(best(0.6) + moved(0.95) - LOG_REF), beta=0.3),
        {"undertrained"},
    ),
    "beta far too high, at rest with a little drift": (
        lambda: evidence(moved(0.05), beta=50 * BETA, steps=lambda t: 0 * t),
        {"beta too high"},
    ),
    "a low beta, nearly the best, at rest": (
        lambda: evidence(best(0.36), beta=0.2, steps=lambda t: 0.3 + 0 * t),
        {"close to the best"},
    ),
    "half of the KL not counted": (
        lambda: evidence(best(BETA / 2), said=HALF, admits=HALF),
        {"impossible"},
    ),
}


@pytest.fixture(scope="module")
def worlds():
    """Evidence of every case."""
    return {name: make() for name, (make, _) in CASES.items()}


def given(found):
    return {verdict.name for verdict in diagnose(found).verdicts}


@pytest.mark.parametrize("name", CASES)
def test_a_known_cause_gets_its_verdict_and_no_other(worlds, name):
    assert given(worlds[name]) == CASES[name][1]


def test_every_verdict_has_a_case_where_it_is_given_and_one_where_it_is_not():
    for rule in TABLE:
        expected = [rule.name in verdicts for _, verdicts in CASES.values()]
        assert any(expected), rule.name
        assert not all(expected), rule.name


def mutants():
    """Every rule turned over, silenced, shouting; and every one without one of its clauses."""
    for rule in TABLE:
        yield f"{rule.name}: not", replace(rule, margin=lambda e, m=rule.margin: -m(e))
        yield f"{rule.name}: never", replace(rule, margin=lambda e, m=rule.margin: -m(e).abs() - 1)
        yield f"{rule.name}: always", replace(rule, margin=lambda e, m=rule.margin: m(e).abs() + 1)
        if rule.unless:
            yield f"{rule.name}: whatever else", replace(rule, unless=())
        if rule.voids:
            yield f"{rule.name}: voids nothing", replace(rule, voids=())


def caught(worlds, mutant=None):
    changed = TABLE if mutant is None else [mutant if r.name == mutant.name else r for r in TABLE]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judging, "TABLE", tuple(changed))
        return [name for name, (_, verdicts) in CASES.items() if given(worlds[name]) != verdicts]


@pytest.mark.parametrize(("name", "mutant"), list(mutants()), ids=[name for name, _ in mutants()])
def test_mutants_of_the_rules_are_caught(worlds, name, mutant):
    assert caught(worlds, mutant), name


def without_a_clause(rule, function, k, size):
    """The rule without the k-th clause of its "and" or "or"; the sizes of those are noted."""
    real = getattr(rules, function)

    def fewer(*clauses):
        size.append(len(clauses))
        return real(*(c for j, c in enumerate(clauses) if j != k or len(clauses) == 1))

    def margin(e):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(rules, function, fewer)
            return rule.margin(e)

    return replace(rule, margin=margin)


def clauses():
    """Rule, "and" or "or", and which clause, for all there are."""
    for rule in TABLE:
        for function in ("every", "some"):
            size = []
            numbers = dict.fromkeys((*rule.needs, *rule.may), torch.ones(1))
            without_a_clause(rule, function, -1, size).margin(SimpleNamespace(**numbers))
            yield from ((rule, function, k) for k in range(max(size, default=0)))


@pytest.mark.parametrize(
    ("rule", "function", "k"), list(clauses()), ids=[f"{r.name}, {f} {k}" for r, f, k in clauses()]
)
def test_every_clause_is_needed(worlds, rule, function, k):
    """Without its k-th clause a rule gives a verdict where it should not, or none where it should."""
    assert caught(worlds, without_a_clause(rule, function, k, []))


def test_the_numbers_are_those_of_the_space(worlds):
    """Every number that the rules use, against its sum over all outcomes."""
    log_pi = normalise(best(0.6) + moved(0.95) - LOG_REF)
    found = worlds["part of the way, with some KL of no use"]
    log_p, few = best(0.3), (log_pi - LOG_REF) < math.log(0.05)
    truths = {
        "reward": mean(log_pi, REWARD),
        "reference_reward": mean(LOG_REF, REWARD),
        "reward_gain": mean(log_pi, REWARD) - mean(LOG_REF, REWARD),
        "optimum_reward": mean(log_p, REWARD),
        "kl": kl(log_pi, LOG_REF),
        "optimum_kl": kl(log_p, LOG_REF),
        "gap": gap(log_pi, LOG_REF, REWARD, 0.3),
        "spread": (mean(LOG_REF, REWARD**2) - mean(LOG_REF, REWARD) ** 2).sqrt(),
        "dropped": (log_p.exp() * few).sum(-1),
    }
    for name, truth in truths.items():
        estimate = getattr(found, name).estimate
        # prompts are all there are, so only the draws are random: the interval over prompts is wide enough
        assert estimate.low <= truth.mean() <= estimate.high, name
    curve = [
        (b, mean(best(b), REWARD).mean().item(), kl(best(b), LOG_REF).mean().item())
        for b in torch.logspace(1.2, -1.2, 400).tolist()
    ]
    at = min(curve, key=lambda point: abs(point[2] - truths["kl"].mean().item()))
    assert found.bought.estimate.low <= at[1] <= found.bought.estimate.high
    assert found.ceiling.estimate.low <= at[1] <= found.ceiling.estimate.high
    cheapest = min(curve, key=lambda point: abs(point[1] - truths["reward"].mean().item()))[2]
    wasted = truths["kl"].mean().item() - cheapest
    assert wasted > 0.1
    assert found.wasted.estimate.low <= wasted <= found.wasted.estimate.high


def test_which_beta_would_give_how_much(worlds):
    verdict = diagnose(worlds["beta far too high, and its best policy"], Setting("RUN")).verdicts[0]
    told = verdict.command.rpartition(" ")[2]
    assert verdict.name == "beta too high"
    assert "--beta" in verdict.command
    assert f"beta {float(told):.3g} would earn" in verdict.advice
    reward = float(verdict.advice.split(f"beta {float(told):.3g} would earn ")[1].split()[0])
    assert reward == pytest.approx(mean(best(float(told)), REWARD).mean().item(), abs=0.05)


def test_beta_too_high_leaves_out_points_that_the_plan_cannot_support(worlds):
    found = worlds["beta far too high, and its best policy"]
    bad = [replace(p, reliable=False) for p in found.frontier]
    verdict = diagnose(replace(found, frontier=bad), Setting("RUN")).verdicts[0]
    assert (verdict.advice, verdict.command) == ("Lower beta.", "")


def made(name, value, sd, n=1000):
    """A number of that value with that standard error."""
    g = torch.Generator().manual_seed(len(name))
    values = value + sd * torch.randn(1000, generator=g, dtype=torch.float64)
    return Quantity(Estimate(value, value - 1.96 * sd, value + 1.96 * sd, n), values)


def test_the_draws_it_asks_for_settle_it():
    """attained 0.82 with a standard error of 0.04 cannot tell; with as many draws more as it says, it can."""
    few = Evidence(
        attained=made("attained", 0.82, 0.04), gap=made("gap", 0.1, 0.01), kl=made("kl", 0.5, 0.01),
        optimum_kl=made("optimum_kl", 0.5, 0.01), num_prompts=10, num_draws=20,
    )  # fmt: skip
    verdict = diagnose(few, Setting("RUN")).verdicts[0]
    assert verdict.name == "cannot tell"
    total = 2 * few.num_prompts * few.num_draws
    assert verdict.more == pytest.approx(total * ((2 * 0.04 / 0.02) ** 2 - 1), rel=0.1)
    assert str(verdict.more) in verdict.advice
    assert verdict.command == "klimb measure RUN --measure_prompts 160 --measure_draws 20" or (
        150 <= int(verdict.command.split()[4]) <= 170
    )
    shrunk = 0.04 / math.sqrt(1 + verdict.more / total)
    settled = diagnose(replace(few, attained=made("attained", 0.82, shrunk))).verdicts[0]
    assert (settled.name, settled.confidence) == ("close to the best", "sure")
    half = diagnose(replace(few, attained=made("attained", 0.82, 0.04 / math.sqrt(4)))).verdicts[0]
    assert (half.name, half.confidence) == ("close to the best", "likely")  # a quarter of that is not enough
    assert 0 < half.more < verdict.more


def test_unreliable_numbers_give_no_verdict_and_say_how_many_draws_they_need():
    found = evidence(best(0.2), beta=0.1, size=(10, 8))
    diagnosis = diagnose(found, Setting("RUN"))
    assert diagnosis.verdict == "cannot tell"
    assert "log(draws) - KL" in diagnosis.because
    assert f"--measure_draws {max(math.ceil(found.needs / 2), 16)}" in diagnosis.verdicts[0].command
    assert "close to the best" not in diagnosis.shares


def test_what_was_not_measured_is_said_and_not_guessed(worlds):
    nothing = diagnose(Evidence(), Setting("RUN", trained=False))
    assert nothing.verdict == "not measured"
    assert set(nothing.unmeasured) == {rule.name for rule in TABLE}
    assert nothing.verdicts[0].command == "klimb climb --resume RUN"
    assert diagnose(Evidence(), Setting("RUN")).verdicts[0].command == "klimb measure RUN"
    for rule in TABLE:
        for name in rule.needs:
            found = diagnose(replace(worlds["cut, and part of the way"], **{name: None}))
            assert name in found.unmeasured[rule.name]


def test_a_rule_uses_the_numbers_that_it_shows_and_no_others(worlds):
    full = worlds["cut, and part of the way"]
    for rule in TABLE:
        known = {name: getattr(full, name) or made(name, 0.5, 0.1) for name in (*rule.needs, *rule.may)}
        judging._margin(rule, Evidence(**known))
        assert set(known) <= set(LABELS)


def test_no_fault_found():
    """Past the optimum's KL and with most of what that buys: no reason, and not the goal either."""
    found = Evidence(
        **{
            name: made(name, value, 0.01)
            for name, value in {
                "attained": 0.6, "gap": 0.1, "kl": 0.7, "optimum_kl": 0.5, "efficiency": 0.9, "reward": 0.5,
                "bought": 0.52, "spread": 0.5, "wasted": 0.1,
            }.items()
        }
    )  # fmt: skip
    diagnosis = diagnose(found, Setting("RUN", {"max_steps": 24}))
    assert diagnosis.verdict == "no fault found"
    assert diagnosis.verdicts[0].command.endswith("--max_steps 48")


def test_forbidden_outcomes_are_not_close_to_the_best():
    """Both draw a forbidden outcome: the gap is infinite, and no share of it can be told."""
    reward = REWARD.clone()
    reward[:, 0] = -math.inf
    found = evidence(LOG_REF, reward=reward)
    verdict = diagnose(found, Setting("RUN", {})).verdicts[0]
    assert (verdict.name, found.gap) == ("cannot tell", None)
    assert "forbidden" in verdict.says
    assert "forward_kl" in verdict.command


def policy_at(beta, goal):
    """[P, Y] the tilt whose share attained is exactly `goal`."""
    room = gap(LOG_REF, LOG_REF, REWARD, beta).mean()
    low, high = beta, 50 * beta
    for _ in range(60):
        middle = (low * high) ** 0.5
        left = gap(best(middle), LOG_REF, REWARD, beta).mean()
        low, high = (middle, high) if 1 - left / room > goal else (low, middle)
    return best(low)


def test_sure_is_seldom_wrong_at_the_border_and_a_mutant_that_trusts_the_estimate_is(monkeypatch):
    """At the border one in twenty would be called sure; binomial(30, 0.05) passes 5 three times in 1000."""
    policy = policy_at(BETA, CLOSE)
    found = [evidence(policy, seed=seed) for seed in range(30)]

    def alarms():
        verdicts = [v for e in found for v in diagnose(e).verdicts]
        return sum(v.name == "close to the best" and v.confidence == "sure" for v in verdicts)

    assert alarms() <= 5
    monkeypatch.setattr(judging, "SURE", 0.0)
    monkeypatch.setattr(judging, "LIKELY", 0.0)
    assert alarms() > 8


def test_a_trend_knows_a_schedule_that_ends_from_a_training_that_is_at_rest():
    g = torch.Generator().manual_seed(0)
    rate = 1 - torch.arange(64) / 64  # linear to zero
    pace = rate.cumsum(0) - rate
    noise = 0.01 * torch.randn(64, generator=g)
    rising = trend(pace, 0.01 * pace + noise, whole=rate.sum().item(), generator=g).estimate
    resting = trend(pace, 0.3 + noise, whole=rate.sum().item(), generator=g).estimate
    assert rising.low <= 0.01 * rate.sum() <= rising.high
    assert rising.low > 0.2
    assert resting.low <= 0 <= resting.high
    assert trend(pace[:14], noise[:14], generator=g) is None  # too few to tell
