"""The loss of a reward model beside TRL's, on the same scores: plain, with margins, with centring.

The committed numbers are those of TRL 1.16.0's `RewardTrainer.compute_loss` (`python tests/reference/test_reward_model_vs_trl.py`
prints them again), in float64; the second test runs TRL where it is installed.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from klimb.objectives import reward_model

SCORE = torch.tensor([[0.8, -0.3], [-1.1, 0.4], [2.0, 1.9]]).double()  # chosen, rejected
MARGIN = torch.tensor([0.5, 0.0, 1.2]).double()
LABEL = torch.tensor([[1.0, 0.0]]).double().expand(3, 2)
OF_MARGIN = torch.stack([MARGIN, torch.zeros(3).double()], 1)
CASES = {
    "plain": (lambda s: reward_model(s, LABEL), {}),
    "centred": (lambda s: reward_model(s, LABEL, centring=0.05), {"centre": 0.05}),
    "margins": (lambda s: reward_model(s[[0, 2]], OF_MARGIN[[0, 2]], margins=True), {"margin": True}),
    "margins, centred": (
        lambda s: reward_model(s[[0, 2]], OF_MARGIN[[0, 2]], margins=True, centring=0.05),
        {"margin": True, "centre": 0.05},
    ),
}
TRL = {  # name -> the loss, and its derivative in each score
    "plain": (0.87771509, [-0.08324663, 0.08324663, -0.27252483, 0.27252483, -0.15834027, 0.15834027]),
    "centred": (1.14354842, [-0.06657996, 0.0999133, -0.29585816, 0.24919149, -0.02834027, 0.28834027]),
    "margins": (0.91241164, [-0.17717184, 0.17717184, 0.0, 0.0, -0.37513006, 0.37513006]),
    "margins, centred": (1.29891164, [-0.15217184, 0.20217184, 0.0, 0.0, -0.18013006, 0.57013005]),
}


def ours(name):
    score = SCORE.clone().requires_grad_()
    value = CASES[name][0](score).mean()
    (slope,) = torch.autograd.grad(value, score)
    return value.item(), slope.flatten().tolist()


@pytest.mark.parametrize("name", CASES)
def test_value_and_slope_are_trls(name):
    value, slope = ours(name)
    assert value == pytest.approx(TRL[name][0], abs=1e-7)
    assert slope == pytest.approx(TRL[name][1], abs=1e-7)


def test_the_numbers_tell_the_losses_apart():
    assert len({round(value, 6) for value, _ in TRL.values()}) == len(CASES)


def test_trl_still_says_so():
    pytest.importorskip("trl")
    for name, (_, options) in CASES.items():
        value, slope = trl_loss(**options)
        assert value == pytest.approx(TRL[name][0], abs=1e-7), name
        assert slope == pytest.approx(TRL[name][1], abs=1e-7), name


def trl_loss(margin=False, centre=None):
    """TRL's own loss and its derivative; the pair whose margin is zero is left out where there are margins."""
    from trl import RewardTrainer

    score = SCORE.clone().requires_grad_()
    pairs = score[[0, 2]] if margin else score
    logits = pairs.t().reshape(-1, 1)  # all chosen, then all rejected
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=centre),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {"attention_mask": torch.ones(1)}
    if margin:
        inputs["margin"] = MARGIN[[0, 2]]
    trainer.model = type(
        "Model", (), {"training": True, "__call__": lambda self, **_: SimpleNamespace(logits=logits)}
    )()
    loss = RewardTrainer.compute_loss(trainer, trainer.model, inputs)
    (slope,) = torch.autograd.grad(loss, score)
    return loss.item(), slope.flatten().tolist()


if __name__ == "__main__":
    for name, (_, options) in CASES.items():
        value, slope = trl_loss(**options)
        print(f"    {name!r}: ({value:.8f}, {[round(x, 8) for x in slope]}),")
