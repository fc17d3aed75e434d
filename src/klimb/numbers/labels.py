"""What the numbers of the evidence are called, for a reader."""

from __future__ import annotations

from klimb.numbers.estimate import Estimate

LABELS = {
    "reward": ("reward", ""),
    "reference_reward": ("the reference's reward", ""),
    "optimum_reward": ("the best policy's reward", ""),
    "kl": ("KL to the reference", " nats"),
    "optimum_kl": ("the best policy's KL", " nats"),
    "gap": ("gap", ""),
    "self_gap": ("gap that the policy's own draws show", ""),
    "attained": ("share attained", ""),
    "efficiency": ("share of the reward that this KL can buy", ""),
    "overlap": ("mean of policy / reference over the reference's draws (1 if all is well)", ""),
    "bought": ("the most that this KL can buy", ""),
    "ceiling": ("the most that any policy can earn at this KL, by the reference's draws", ""),
    "wasted": ("KL beyond what this reward costs", " nats"),
    "spread": ("standard deviation of the reference's reward within a prompt", ""),
    "dropped": ("share of the best policy on completions that the policy makes 20 times rarer", ""),
    "cut": ("share of completions cut", ""),
    "cut_loss": ("reward of finished completions above that of cut ones", ""),
    "mismatch": ("KL from sampler to scorer", " nats"),
    "reward_gain": ("gain in reward", ""),
    "audit_gain": ("gain in the audit reward", ""),
    "tail": ("tail index of the reward (0.5 and more: extremes rule it)", ""),
    "flat": ("share of prompts where all rewards are the same", ""),
    "never": ("share of prompts where the reference finds no reward", ""),
    "lift_share": ("the best policy's lift, as a share of the most in the plan's reach", ""),
    "plan_lift": ("the best policy's lift over the reference, by the plan", ""),
    "done": ("share of the steps taken", ""),
    "rise": ("what as much training again would add, by the trend", ""),
}
"""number of the evidence -> what it is called, and its unit"""


def line(name: str, estimate: Estimate) -> str:
    """A number of the evidence as a line.

    Example:
        >>> line("kl", Estimate(0.51, 0.45, 0.55, 768))
        'KL to the reference 0.51 [0.45, 0.55] nats'
    """
    label, unit = LABELS[name]
    return f"{label} {estimate}{unit}"
