"""Ways to flatten the residual log_target - log_pi: pure functions of numbers, one value a prompt.

P prompts, G draws a prompt. Everything is in nats. An objective's value is an estimate and its gradient is an estimate;
each docstring says of what, and whether it is biased. Only torch is imported here.
"""

from klimb.objectives.bind import bind
from klimb.objectives.coefficients import coefficients
from klimb.objectives.forward_kl import forward_kl
from klimb.objectives.likelihood import dpg, filtered, raft, reward_weighted, sft
from klimb.objectives.log_variance import log_variance
from klimb.objectives.path_consistency import path_consistency
from klimb.objectives.reverse_kl import reverse_kl
from klimb.objectives.squared import length_normalised_balance, parted, pmd_mean, trajectory_balance

__all__ = [
    "bind",
    "coefficients",
    "dpg",
    "filtered",
    "forward_kl",
    "length_normalised_balance",
    "log_variance",
    "parted",
    "path_consistency",
    "pmd_mean",
    "raft",
    "reverse_kl",
    "reward_weighted",
    "sft",
    "trajectory_balance",
]
