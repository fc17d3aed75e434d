"""The explorer's JavaScript says what klimb says: random cases, to 1e-9."""

import json
import math
import shutil
import subprocess
from importlib import resources

import pytest
import torch

from klimb.exact.derivation import derive
from klimb.exact.divergences import generalized_jensen_shannon, skew_kl
from klimb.exact.problem import Problem, best
from klimb.exact.remarks import directions_part
from klimb.exact.truth import kl, mean
from klimb.numbers.tilt import tilted_kl, tilted_mean

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")
CASES = 25


def javascript(program, numbers=None):
    """What a program that ends in `say(value)` says, with the page's formulas in front of it."""
    source = numbers or (resources.files("klimb.explorer") / "numbers.js").read_text(encoding="utf-8")
    say = "const say = (x) => process.stdout.write(JSON.stringify(x));\n"
    done = subprocess.run(
        [NODE, "-"], input=source + say + program, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def cases():
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(CASES):
        size = int(torch.randint(2, 8, (1,), generator=g))
        log_ref, log_pi = (
            torch.randn(1, size, generator=g, dtype=torch.float64).mul(2).log_softmax(-1) for _ in range(2)
        )
        reward = 3 * torch.randn(1, size, generator=g, dtype=torch.float64)
        beta = 10 ** (2 * torch.rand(1, generator=g).item() - 1)
        found.append((Problem(log_ref, reward, beta), log_pi))
    return found


def written(given, log_pi):
    return {
        "logRef": given.log_ref[0].tolist(),
        "reward": given.reward[0].tolist(),
        "logPi": log_pi[0].tolist(),
        "beta": given.beta,
    }


def test_the_numbers_of_the_first_chapter():
    made = cases()
    said = javascript(f"say({json.dumps([written(*case) for case in made])}.map(numbersOf));")
    for (given, log_pi), numbers in zip(made, said, strict=True):
        log_p, r = given.log_p, given.reward
        gap = given.beta * kl(log_pi, log_p).item()
        expected = {
            "logZ": given.log_z.item(),
            "bestReward": mean(log_p, r).item(),
            "bestKl": kl(log_p, given.log_ref).item(),
            "refReward": mean(given.log_ref, r).item(),
            "reward": mean(log_pi, r).item(),
            "kl": kl(log_pi, given.log_ref).item(),
            "objective": (mean(log_pi, r) - given.beta * kl(log_pi, given.log_ref)).item(),
            "toBest": kl(log_pi, log_p).item(),
            "fromBest": kl(log_p, log_pi).item(),
            "gap": gap,
            "share": 1 - gap / (given.beta * given.log_z.item() - mean(given.log_ref, r).item()),
        }
        assert numbers["logP"] == pytest.approx(log_p[0].tolist(), abs=1e-9)
        del numbers["logP"]
        assert numbers == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert best(given).reward == pytest.approx(numbers["bestReward"], abs=1e-9)


def test_a_changed_formula_is_seen():
    source = (resources.files("klimb.explorer") / "numbers.js").read_text(encoding="utf-8")
    mutant = source.replace("l + r / beta);\n  const logZ", "l + r * beta);\n  const logZ")
    assert mutant != source
    given, log_pi = cases()[0]
    said = javascript(f"say(numbersOf({json.dumps(written(given, log_pi))}));", mutant)
    assert abs(said["logZ"] - given.log_z.item()) > 1e-3


def test_a_weight_that_does_not_move_with_the_law_is_seen():
    source = (resources.files("klimb.explorer") / "numbers.js").read_text(encoding="utf-8")
    mutant = source.replace("zip(byLaw, byWeights, (a, b) => a + b)", "byLaw")
    assert mutant != source
    given, log_pi = cases()[0]
    [seen, zero] = javascript(f"say(derivationOf({json.dumps(written(given, log_pi))})[5][1]);", mutant)
    assert zero == 0
    assert seen > 1e-3


def test_rewards_that_are_all_alike_have_no_share():
    given, log_pi = cases()[0]
    flat = written(given, log_pi) | {"reward": [0.7] * given.reward.shape[1]}
    # compared there: JSON writes infinity as null too
    assert javascript(f"say(numbersOf({json.dumps(flat)}).share === null);") is True


def test_both_sides_of_every_line_of_the_derivation():
    made = cases()
    said = javascript(f"say({json.dumps([written(*case) for case in made])}.map(derivationOf));")
    for (given, log_pi), lines in zip(made, said, strict=True):
        steps = derive(given, log_pi, num_random=1, generator=torch.Generator().manual_seed(0)).steps
        expected = [[[s.left_value, s.right_value] for s in step.sides] for step in steps]
        assert [len(line) for line in lines] == [len(line) for line in expected]
        flat = [x for line in lines for pair in line for x in pair]
        assert flat == pytest.approx(
            [x for line in expected for pair in line for x in pair], rel=1e-9, abs=1e-9
        )


def test_the_frontier_is_that_of_a_pool_that_holds_every_outcome_once():
    g = torch.Generator().manual_seed(4)
    rewards = torch.randn(1, 64, generator=g, dtype=torch.float64)
    betas = [0.3, 1.0, 4.0]
    said = javascript(
        f"const r = {json.dumps(rewards[0].tolist())}; say(frontier(r.map(() => -Math.log(64)), r, {betas}));"
    )
    for point, beta in zip(said, betas, strict=True):
        assert point["reward"] == pytest.approx(tilted_mean(rewards, beta, correct=False).item(), abs=1e-9)
        assert point["kl"] == pytest.approx(tilted_kl(rewards, beta, correct=False).item(), abs=1e-9)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_losses_of_distillation(share):
    g = torch.Generator().manual_seed(5)
    a, b = (torch.randn(7, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    said = javascript(
        f"const [a, b] = {json.dumps([a.tolist(), b.tolist()])}; say(Object.keys(LOSSES).map((n) => LOSSES[n](a, b, {share})));"
    )
    expected = [
        kl(a, b),
        kl(b, a),
        generalized_jensen_shannon(a, b, share=share),
        skew_kl(a, b, share=share),
        skew_kl(b, a, share=share),
    ]
    assert said == pytest.approx([x.item() for x in expected], abs=1e-9)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_losses_of_a_student_that_lacks_something_are_finite_but_for_one_and_within_their_bounds(share):
    """A law without an outcome: the mixture has it. The mutant, a mixture of the student alone, is infinite."""
    a, b = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.6, 0.4], [1.0, 0.0]))
    program = "const [a, b] = [lawOf([0.6, 0.4]), lawOf([1, 0])]; say(Object.keys(LOSSES).map((n) => String(LOSSES[n](a, b, SHARE))));"
    said = javascript(program.replace("SHARE", str(share)))
    expected = [
        generalized_jensen_shannon(a, b, share=share),
        skew_kl(a, b, share=share),
        skew_kl(b, a, share=share),
    ]
    assert said[0] == "Infinity"
    assert [float(x) for x in said[2:]] == pytest.approx([x.item() for x in expected], abs=1e-9)
    assert max(float(x) for x in said[3:]) < -math.log(share)
    assert float(said[2]) < -share * math.log(share) - (1 - share) * math.log1p(-share)
    source = (resources.files("klimb.explorer") / "numbers.js").read_text(encoding="utf-8")
    mutant = source.replace("logSumExp([x + Math.log(share), y + Math.log1p(-share)])", "y")
    assert mutant != source
    assert javascript(program.replace("SHARE", str(share)), mutant)[3] == "Infinity"


def test_a_student_too_small_ends_where_newtons_method_ends():
    rows = {row[0]: row[1:3] for row in directions_part().rows}
    said = javascript(
        "const t = twoBumps(0.6, 9, 24); say(['reverse', 'forward'].map((n) => { const f = fitted(n, t);"
        "return [f.value, kl(f.law, t), kl(t, f.law)]; }));"
    )
    assert said[0][0] == pytest.approx(rows["min KL(π‖p)"][0], abs=1e-9)
    assert said[1][0] == pytest.approx(rows["min KL(p‖π)"][1], abs=1e-9)
    assert said[0][2] == pytest.approx(
        rows["min KL(π‖p)"][1], rel=1e-5
    )  # not what was minimised: first order in the place
    assert said[1][1] == pytest.approx(rows["min KL(p‖π)"][0], rel=1e-5)
