"""Proximal losses and their derivatives beside TRL's, on the same small tensors.

The committed numbers are those of TRL 1.16.0 with torch 2.13.0, float64: `trl_numbers()` below ran TRL's own
`_compute_loss` on these tensors (`python tests/reference/test_surrogate_vs_trl.py` prints the table again). TRL gives one
loss for the batch, klimb one value a prompt: their mean is compared. The second test runs TRL where it is installed.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from klimb.numbers.advantages import batch_standardized, group_standardized, leave_one_out_advantage
from klimb.objectives import coefficients
from klimb.objectives.aggregate import mean_over_batch, sum_tokens
from klimb.objectives.clip import capped, clipped
from klimb.objectives.importance import importance, masked, truncated
from klimb.objectives.ratio import sequence_ratio
from klimb.objectives.surrogate import cispo, dapo, dr_grpo, grpo, gspo, rloo

LENGTHS = torch.tensor([[3, 1, 4], [2, 4, 2]])
ROW = torch.arange(6).repeat_interleave(LENGTHS.flatten())
LONGEST = 5  # TRL's max_completion_length
BETA = 0.1
# written out, so that no generator's version matters; ratios from exp(-0.7) to exp(0.6)
OLD = -torch.tensor(
    [0.5, 1.2, 0.3, 2.0, 0.9, 0.1, 1.7, 0.6, 0.4, 1.1, 0.2, 0.8, 1.5, 0.7, 2.3, 0.05]
).double()
MOVE = torch.tensor(
    [0.1, -0.4, 0.6, -0.7, 0.25, -0.05, 0.15, -0.3, 0.02, 0.35, -0.15, -0.25, 0.3, -0.1, 0.2, -0.6]
).double()
OFFSET = torch.tensor(
    [0.3, -0.2, 0.1, 0.8, -0.5, 0.05, 0.4, -0.1, 0.2, -0.3, 0.15, 0.6, -0.4, 0.1, -0.9, 0.02]
).double()
PI, REF, Q = OLD + MOVE, OLD + MOVE - OFFSET, OLD - OFFSET.flip(0)
REWARD = torch.tensor([[1.0, 0.0, 0.25], [2.0, -1.0, 0.5]]).double()

# name -> klimb's objective; TRL's options
wide = partial(clipped, low=0.2, high=0.28)
CASES = {
    "grpo": (grpo, {"loss_type": "grpo"}),
    "grpo, k3": (partial(grpo, beta=BETA), {"loss_type": "grpo", "beta": BETA}),
    "grpo, k3 weighted": (
        partial(grpo, beta=BETA, weigh_penalty=True),
        {"loss_type": "grpo", "beta": BETA, "use_bias_correction_kl": True},
    ),
    "dr_grpo": (partial(dr_grpo, aggregate=partial(sum_tokens, divisor=LONGEST)), {"loss_type": "dr_grpo"}),
    "bnpo": (partial(dapo, clip=clipped, aggregate=mean_over_batch), {"loss_type": "bnpo"}),
    "dapo": (partial(dapo, clip=wide, aggregate=mean_over_batch), {"loss_type": "dapo", "high": 0.28}),
    "gspo": (
        gspo,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "low": 3e-4, "high": 4e-4},
    ),
    "gspo, wide": (
        partial(gspo, clip=clipped),
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "cispo": (
        partial(cispo, clip=partial(capped, cap=1.2), aggregate=mean_over_batch),
        {"loss_type": "cispo", "high": 1.2},
    ),
    "rloo": (partial(rloo, clip=clipped), {"rloo": True}),
    "token truncated": (
        partial(grpo, correct=partial(importance, limit=partial(truncated, cap=1.3))),
        {"loss_type": "grpo", "mode": "token_truncate", "cap": 1.3},
    ),
    "token masked": (
        partial(grpo, correct=partial(importance, limit=partial(masked, high=1.3))),
        {"loss_type": "grpo", "mode": "token_mask", "cap": 1.3},
    ),
    "sequence truncated": (
        partial(grpo, correct=partial(importance, ratio=sequence_ratio, limit=partial(truncated, cap=1.3))),
        {"loss_type": "grpo", "mode": "sequence_truncate", "cap": 1.3},
    ),
    "sequence masked": (
        partial(grpo, correct=partial(importance, ratio=sequence_ratio, limit=partial(masked, high=1.3))),
        {"loss_type": "grpo", "mode": "sequence_mask", "cap": 1.3},
    ),
}
TRL = {  # name -> the loss, and its derivative in the log-probability of each token
    "grpo": (
        -0.04440099,
        [
            -0.06880805,
            -0.04173419,
            0.0,
            0.0,
            0.01713076,
            0.01269078,
            0.01550055,
            0.0,
            -0.08501111,
            0.0,
            0.03586044,
            0.0,
            0.05624037,
            0.03769905,
            0.0,
            0.0,
        ],
    ),
    "grpo, k3": (
        -0.03262960,
        [
            -0.06736815,
            -0.04296421,
            0.00052868,
            0.00917785,
            0.01442775,
            0.01289399,
            0.01687422,
            -0.00043821,
            -0.08350053,
            -0.00291549,
            0.03644082,
            0.00187995,
            0.0541911,
            0.03809556,
            -0.01216336,
            0.00016501,
        ],
    ),
    "grpo, k3 weighted": (
        -0.03329963,
        [
            -0.0669661,
            -0.04247899,
            0.00101229,
            0.00662114,
            0.01445571,
            0.01288895,
            0.01743694,
            -0.00030867,
            -0.08331078,
            -0.00354767,
            0.03639838,
            0.001947,
            0.0539906,
            0.03807606,
            -0.00916052,
            9.147e-05,
        ],
    ),
    "dr_grpo": (
        0.01149290,
        [
            -0.04128483,
            -0.02504051,
            0.0,
            0.0,
            0.01370461,
            0.01015262,
            0.01240044,
            0.0,
            -0.03400444,
            0.0,
            0.02868835,
            0.0,
            0.04499229,
            0.03015924,
            0.0,
            0.0,
        ],
    ),
    "bnpo": (
        0.02154919,
        [
            -0.07740905,
            -0.04695096,
            0.0,
            0.0,
            0.02569614,
            0.01903617,
            0.02325083,
            0.0,
            -0.06375833,
            0.0,
            0.05379066,
            0.0,
            0.08436055,
            0.05654857,
            0.0,
            0.0,
        ],
    ),
    "dapo": (
        0.01094612,
        [
            -0.07740905,
            -0.04695096,
            0.0,
            0.0,
            0.02569614,
            0.01903617,
            0.02325083,
            0.0,
            -0.06375833,
            0.0,
            0.05379066,
            0.0,
            0.08436055,
            0.05654857,
            0.0,
            0.0,
        ],
    ),
    "gspo": (
        0.00043986,
        [
            0.0,
            0.0,
            0.0,
            0.0,
            0.01350926,
            0.01350926,
            0.01350926,
            0.01350926,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
        ],
    ),
    "gspo, wide": (
        -0.08711449,
        [
            -0.06880805,
            -0.06880805,
            -0.06880805,
            0.0,
            0.01350926,
            0.01350926,
            0.01350926,
            0.01350926,
            0.0,
            0.0,
            0.03963192,
            0.03963192,
            0.03963192,
            0.03963192,
            0.0,
            0.0,
        ],
    ),
    "cispo": (
        -0.17874711,
        [
            -0.07740905,
            -0.04695096,
            -0.08405113,
            0.02484438,
            0.02401461,
            0.01903617,
            0.02325083,
            0.01482538,
            -0.06375833,
            -0.074995,
            0.05379066,
            0.0486718,
            0.074995,
            0.05654857,
            0.0,
            0.0,
        ],
    ),
    "rloo": (
        -0.20172558,
        [
            0.0,
            0.0,
            0.0,
            0.0,
            0.0280339,
            0.0280339,
            0.0280339,
            0.0280339,
            0.0,
            0.0,
            0.32237524,
            0.32237524,
            0.32237524,
            0.32237524,
            -0.00636804,
            -0.00636804,
        ],
    ),
    "token truncated": (
        -0.07087818,
        [
            -0.07019806,
            -0.01696786,
            0.0,
            0.0,
            0.02226999,
            0.01474458,
            0.01148309,
            0.0,
            -0.07692123,
            0.0,
            0.03769905,
            0.0,
            0.07311248,
            0.04166389,
            0.0,
            0.0,
        ],
    ),
    "token masked": (
        -0.03626931,
        [
            -0.07019806,
            -0.01696786,
            0.0,
            0.0,
            0.0,
            0.01474458,
            0.01148309,
            0.0,
            -0.07692123,
            0.0,
            0.03769905,
            0.0,
            0.0,
            0.04166389,
            0.0,
            0.0,
        ],
    ),
    "sequence truncated": (
        0.03098092,
        [
            -0.03154202,
            -0.0191312,
            0.0,
            0.0,
            0.02226999,
            0.01649801,
            0.02015072,
            0.0,
            -0.11051444,
            0.0,
            0.04661857,
            0.0,
            0.07311248,
            0.04900876,
            0.0,
            0.0,
        ],
    ),
    "sequence masked": (
        -0.01337739,
        [-0.03154202, -0.0191312, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ),
}


def advantage_of(name):
    """As TRL makes it: rewards of a group, standardized; for RLOO minus the others' mean, the KL in the reward."""
    if name == "rloo":
        old_kl = torch.stack([x.sum() for x in (OLD - REF).split(LENGTHS.flatten().tolist())]).reshape(2, 3)
        return leave_one_out_advantage(REWARD - BETA * old_kl)
    return group_standardized(REWARD)


def klimb_numbers(name):
    """The mean value, and its derivative in each token's log-probability."""
    method, _ = CASES[name]
    value, table = coefficients(
        method,
        network=["token_log_pi"],
        token_log_pi=PI,
        token_log_old=OLD,
        row=ROW,
        lengths=LENGTHS,
        advantage=advantage_of(name),
        token_log_q=Q,
        token_log_ref=REF,
    )
    return value.mean().item(), (table["token_log_pi"] / 2).tolist()


def trl_numbers(name):
    """The same from TRL's `_compute_loss`, handed our log-probabilities where it would ask a model for them."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    options = CASES[name][1]
    mask = torch.arange(4) < LENGTHS.reshape(-1, 1)
    padded = [torch.zeros(6, 4).double().masked_scatter(mask, x) for x in (PI, OLD, REF, Q)]
    log_pi, old, ref, q = padded
    log_pi.requires_grad_()
    # the advantages as TRL computes them, from its lines on scale_rewards and on the leave-one-out baseline
    grouped = REWARD
    if "rloo" in options:
        grouped = REWARD - BETA * ((old - ref) * mask).sum(1).reshape(2, 3)
        advantages = grouped - (grouped.sum(1, keepdim=True) - grouped) / 2
    else:
        deviation = (((grouped - grouped.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True) / 2).sqrt()
        advantages = (grouped - grouped.mean(1, keepdim=True)) / (deviation + 1e-4)
    inputs = {
        "prompt_ids": torch.zeros(6, 1).long(),
        "prompt_mask": torch.ones(6, 1).long(),
        "completion_ids": torch.zeros(6, 4).long(),
        "completion_mask": mask.long(),
        "advantages": advantages.flatten(),
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    if mode := options.get("mode"):
        ratio = (old - q) * mask
        ratio = torch.exp(ratio.sum(1, keepdim=True) if mode.startswith("sequence") else ratio)
        cap = options["cap"]
        inputs["importance_sampling_ratio"] = (
            ratio.clamp(max=cap) if mode.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)
        )
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_pi, torch.zeros(6, 4), None),
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=None,
            use_bias_correction_kl=options.get("use_bias_correction_kl", False),
            steps_per_generation=1,
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=options.get("importance_sampling_level", "token"),
        beta=options.get("beta", 0.0),
        loss_type=options.get("loss_type"),
        epsilon_low=options.get("low", 0.2),
        epsilon_high=options.get("high", 0.2),
        use_vllm="mode" in options,
        vllm_importance_sampling_correction="mode" in options,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    loss = (RLOOTrainer if "rloo" in options else GRPOTrainer)._compute_loss(trainer, None, inputs)
    (slope,) = torch.autograd.grad(loss, log_pi)
    return loss.item(), slope[mask].tolist()


@pytest.mark.parametrize("name", CASES)
def test_value_and_derivative_are_those_committed(name):
    value, table = klimb_numbers(name)
    loss, slope = TRL[name]
    assert value == pytest.approx(loss, abs=1e-6)
    assert table == pytest.approx(slope, abs=1e-6)


def test_the_cases_tell_each_other_apart():
    """A wrong part does not pass: every case's numbers differ from every other's."""
    values = [klimb_numbers(name)[0] for name in CASES]
    gaps = [abs(a - b) for i, a in enumerate(values) for b in values[:i]]
    assert min(gaps) > 1e-4


def test_batch_standardized_is_trls_scale_by_batch():
    centred = REWARD - REWARD.mean(1, keepdim=True)
    deviation = ((REWARD - REWARD.mean()) ** 2).sum().div(5).sqrt()
    assert torch.allclose(batch_standardized(REWARD), centred / (deviation + 1e-4), atol=1e-14)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_still_says_so():
    pytest.importorskip("trl.trainer.rloo_trainer")
    for name, (loss, slope) in TRL.items():
        value, table = trl_numbers(name)
        assert value == pytest.approx(loss, abs=1e-6), name
        assert table == pytest.approx(slope, abs=1e-6), name


if __name__ == "__main__":
    for case in CASES:
        value, table = trl_numbers(case)
        print(f'    "{case}": ({value:.8f}, {[round(x, 8) for x in table]}),')
