"""Preference losses beside TRL's, on the same small tensors.

The committed numbers are those of TRL 1.16.0 with torch 2.13.0, float64: `trl_numbers()` below ran TRL's own DPO loss on them
(`python tests/reference/test_preference_vs_trl.py` prints the table again). TRL gives one loss for the batch, klimb one value a
prompt: their mean is compared. The second test runs TRL where it is installed.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from klimb.objectives import cpo, exo, nca, orpo, preference, simpo
from klimb.objectives.generators import divergence
from klimb.objectives.preference import given, hinge, logistic, squared

BETA, SMOOTHING = 0.4, 0.1
LENGTHS = torch.tensor([[3, 1], [2, 4], [1, 1]])  # of the chosen and the rejected completion of three prompts
# written out, so that no generator's version matters; log ratios from -1.1 to 1.3
PI = -torch.tensor([[2.4, 1.1], [3.0, 5.2], [0.7, 1.9]]).double()
REF = -torch.tensor([[3.7, 0.9], [2.6, 4.1], [1.4, 2.3]]).double()
WINS = torch.tensor([[1.0, 0.0]]).double().expand(3, 2)

pairs = partial(preference, reward=WINS, judge=given)
of_f = {
    "forward_kl": lambda x: -torch.expm1(-x),
    "js": lambda x: 2 * divergence("jensen_shannon").slope(x),  # TRL's is the sum of two KLs, ours their mean
}
# name -> klimb's value a prompt at these log ratios; TRL's options
CASES = {
    "dpo": (lambda x: pairs(x, REF, beta=BETA), {"loss": "sigmoid"}),
    "robust": (
        lambda x: pairs(x, REF, beta=BETA, link=partial(logistic, smoothing=SMOOTHING, unbias=True)),
        {"loss": "robust", "smoothing": SMOOTHING},
    ),
    "hinge": (lambda x: pairs(x, REF, beta=BETA, link=hinge), {"loss": "hinge"}),
    "ipo, a token": (
        lambda x: pairs((x - REF) / LENGTHS, torch.zeros_like(REF), beta=BETA, link=squared) / BETA**2,
        {"loss": "ipo"},
    ),
    "exo": (
        lambda x: exo(
            BETA * (x - REF),
            torch.tensor([[1 - SMOOTHING, SMOOTHING]]).double().log().expand(3, 2),
            torch.zeros_like(REF),
        ),
        {"loss": "exo_pair", "smoothing": SMOOTHING},
    ),
    "nca": (
        lambda x: nca(
            BETA * (x - REF), torch.tensor([[0.0, -50.0]]).double().expand(3, 2), torch.zeros_like(REF)
        ),
        {"loss": "nca_pair"},
    ),
    "simpo": (
        lambda x: simpo(x, WINS, BETA, LENGTHS, margin=0.5, judge=given),
        {"loss": "simpo", "by": "cpo"},
    ),
    "cpo, without likelihood": (
        lambda x: cpo(x, WINS, BETA, LENGTHS, likelihood=0.0, judge=given),
        {"loss": "sigmoid", "by": "cpo"},
    ),
    "orpo, the odds alone": (
        lambda x: orpo(x, WINS, LENGTHS, weight=BETA, judge=given) + (x[:, 0] / LENGTHS[:, 0]),
        {"loss": "odds", "by": "orpo"},
    ),
    "f-DPO, forward KL": (
        lambda x: pairs(x, REF, beta=BETA, score=of_f["forward_kl"]),
        {"loss": "sigmoid", "f": "forward_kl"},
    ),
    "f-DPO, Jensen-Shannon": (
        lambda x: pairs(x, REF, beta=BETA, score=of_f["js"]),
        {"loss": "sigmoid", "f": "js_divergence"},
    ),
}
TRL = {  # name -> the loss, and its derivative in the log-probability of each completion
    "dpo": (0.54511647, [-0.04724583, 0.04724583, -0.05739384, 0.05739384, -0.06267146, 0.06267146]),
    "robust": (0.50344981, [-0.06391249, 0.06391249, -0.07406051, 0.07406051, -0.07933813, 0.07933813]),
    "hinge": (0.66666669, [-0.13333333, 0.13333333, -0.13333333, 0.13333333, -0.13333333, 0.13333333]),
    "ipo, a token": (0.88780096, [-0.13703703, 0.41111109, -0.39166669, 0.19583335, -0.63333333, 0.63333333]),
    "exo": (0.34944849, [-0.04872264, 0.04872264, -0.06267109, 0.06267109, -0.06899215, 0.06899215]),
    "nca": (1.33082364, [-0.00790378, 0.03200071, -0.04131631, 0.02611607, -0.01942409, 0.03599433]),
    "simpo": (0.87630249, [-0.02639436, 0.07918308, -0.04273783, 0.02136891, -0.06733331, 0.06733331]),
    "cpo, without likelihood": (
        0.60507470,
        [-0.0836197, 0.0836197, -0.03909037, 0.03909037, -0.05096695, 0.05096695],
    ),
    "orpo, the odds alone": (  # in float32
        0.19680363,
        [-0.03062598, 0.07583919, -0.04857422, 0.02593642, -0.0400768, 0.02372355],
    ),
    "f-DPO, forward KL": (
        0.53867280,
        [-0.01476162, 0.06615701, -0.07025802, 0.14148225, -0.03195583, 0.04313586],
    ),
    "f-DPO, Jensen-Shannon": (
        0.62070493,
        [-0.01269332, 0.03258803, -0.03613757, 0.04528668, -0.02163499, 0.02616657],
    ),
}


def ours(name):
    log_pi = PI.clone().requires_grad_()
    value = CASES[name][0](log_pi).mean()
    (slope,) = torch.autograd.grad(value, log_pi)
    return value.item(), slope.flatten().tolist()


@pytest.mark.parametrize("name", CASES)
def test_value_and_slope_are_trls(name):
    value, slope = ours(name)
    assert abs(value - TRL[name][0]) < 1e-7
    assert slope == pytest.approx(TRL[name][1], abs=1e-7)


def test_the_numbers_tell_the_losses_apart():
    assert len({round(value, 6) for value, _ in TRL.values()}) == len(CASES)


def test_trl_still_says_so():
    pytest.importorskip("trl")
    for name, (value, slope) in trl_numbers().items():
        assert value == pytest.approx(TRL[name][0], abs=1e-7), name
        assert slope == pytest.approx(TRL[name][1], abs=1e-7), name


def trl_numbers():
    """Name -> TRL's loss, and its derivative in the log-probability of each completion."""
    return {
        name: trl_reference_free(**options) if "by" in options else trl_loss(**options)
        for name, (_, options) in CASES.items()
    }


def trl_reference_free(loss, by):
    """The same of TRL's trainers without a reference; lengths divide before it, as its `average_log_prob` does."""
    import os

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        beta=BETA,
        loss_type=loss,
        simpo_gamma=0.5,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    log_pi = PI.clone().requires_grad_()
    chosen, rejected = ((log_pi / LENGTHS) if loss != "sigmoid" else log_pi).t()
    if by == "orpo":
        value = -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].mean()
    else:
        value = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean()
    (slope,) = torch.autograd.grad(value, log_pi)
    return value.item(), slope.flatten().tolist()


def trl_loss(loss, smoothing=0.0, f="reverse_kl"):
    """TRL's own function on one row a completion, chosen ones first; only the first token of each carries anything."""
    from trl import DPOTrainer

    lengths, log_pi = LENGTHS.t().reshape(-1), PI.clone().requires_grad_()
    longest = int(lengths.max())
    mask = (torch.arange(longest + 1) >= 1) & (torch.arange(longest + 1) <= lengths[:, None])
    first = torch.zeros(6, longest, dtype=torch.float64)
    first[:, 0] = 1.0
    log_probs = first * log_pi.t().reshape(-1)[:, None]
    nothing = torch.zeros(6, longest)
    outputs = SimpleNamespace(
        log_probs=log_probs,
        entropy=nothing,
        mean_logits=nothing,
        is_top1=torch.zeros(6, longest, dtype=torch.bool),
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=f,
        loss_types=[loss],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(6, longest + 1, dtype=torch.int64),
        "attention_mask": torch.ones(6, longest + 1, dtype=torch.int64),
        "completion_mask": mask.long(),
        "ref_chosen_logps": REF[:, 0],
        "ref_rejected_logps": REF[:, 1],
    }
    value = DPOTrainer._compute_loss(trainer, lambda **arguments: outputs, inputs, False)
    (slope,) = torch.autograd.grad(value, log_pi)
    return value.item(), slope.flatten().tolist()


if __name__ == "__main__":
    for name, (value, slope) in trl_numbers().items():
        print(f'    "{name}": ({value:.8f}, {[round(x, 8) for x in slope]}),')
