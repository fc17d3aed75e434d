"""Ways to flatten the residual log_target - log_pi: pure functions of numbers, one value a prompt.

P prompts, G draws a prompt. Everything is in nats. An objective's value is an estimate and its gradient is an estimate;
each docstring says of what, and whether it is biased. Only torch is imported here.
"""

from klimb.objectives.bind import bind
from klimb.objectives.candidates import exo, info_nca, nca
from klimb.objectives.coefficients import coefficients
from klimb.objectives.f_divergence import f_divergence
from klimb.objectives.forward_kl import forward_kl
from klimb.objectives.kl_penalty import kl_loss, kl_reward, rao_blackwell, token_kl_loss
from klimb.objectives.likelihood import dpg, filtered, raft, reward_weighted, sft
from klimb.objectives.log_variance import log_variance
from klimb.objectives.path_consistency import path_consistency
from klimb.objectives.preference import chi_po, dpo, ipo, preference, slic, wpo
from klimb.objectives.reference_free import cpo, orpo, simpo
from klimb.objectives.reverse_kl import reverse_kl
from klimb.objectives.reward_model import reward_model
from klimb.objectives.squared import length_normalised_balance, parted, pmd_mean, trajectory_balance
from klimb.objectives.surrogate import surrogate, token_surrogate
from klimb.objectives.unpaired import bco, kto
from klimb.objectives.value_loss import value_loss

__all__ = [
    "bco",
    "bind",
    "chi_po",
    "coefficients",
    "cpo",
    "dpg",
    "dpo",
    "exo",
    "f_divergence",
    "filtered",
    "forward_kl",
    "info_nca",
    "ipo",
    "kl_loss",
    "kl_reward",
    "kto",
    "length_normalised_balance",
    "log_variance",
    "nca",
    "orpo",
    "parted",
    "path_consistency",
    "pmd_mean",
    "preference",
    "raft",
    "rao_blackwell",
    "reverse_kl",
    "reward_model",
    "reward_weighted",
    "sft",
    "simpo",
    "slic",
    "surrogate",
    "token_kl_loss",
    "token_surrogate",
    "trajectory_balance",
    "value_loss",
    "wpo",
]
