"""Ways to flatten the residual log_target - log_pi: pure functions of numbers, one value a prompt.

P prompts, G draws a prompt. Everything is in nats. An objective's value is an estimate and its gradient is an estimate;
each docstring says of what, and whether it is biased. Only torch is imported here.
"""

from klimb.objectives.bind import bind
from klimb.objectives.coefficients import coefficients
from klimb.objectives.f_divergence import f_divergence
from klimb.objectives.forward_kl import forward_kl
from klimb.objectives.kl_penalty import kl_loss, kl_reward, rao_blackwell, token_kl_loss
from klimb.objectives.log_variance import log_variance
from klimb.objectives.reverse_kl import reverse_kl
from klimb.objectives.surrogate import surrogate, token_surrogate
from klimb.objectives.value_loss import value_loss

__all__ = [
    "bind",
    "coefficients",
    "f_divergence",
    "forward_kl",
    "kl_loss",
    "kl_reward",
    "log_variance",
    "rao_blackwell",
    "reverse_kl",
    "surrogate",
    "token_kl_loss",
    "token_surrogate",
    "value_loss",
]
