"""Ways to flatten the residual log_target - log_pi: pure functions of numbers, one value a prompt.

P prompts, G draws a prompt. Everything is in nats. An objective's value is an estimate and its gradient is an estimate;
each docstring says of what, and whether it is biased. Only torch is imported here.
"""

from klimb.objectives.bind import bind
from klimb.objectives.coefficients import coefficients
from klimb.objectives.f_divergence import f_divergence
from klimb.objectives.forward_kl import forward_kl
from klimb.objectives.log_variance import log_variance
from klimb.objectives.reverse_kl import reverse_kl

__all__ = ["bind", "coefficients", "f_divergence", "forward_kl", "log_variance", "reverse_kl"]
