"""Where to go. The usual target is the tilt; a modified objective is a modified target, with a name of its own.

One idea a file: tilt (ref exp(r / beta) / Z), implied (what plan and measure need to know of any target), entropy (an
entropy bonus), moving (a reference that follows the policy), standardized (the reward in its own standard
deviations), per_length (the reward per token), mixture (part reference, part another policy), chi_squared (another
penalty than KL), constraints (forbidden completions, and shares that must hold on average).

Whatever only changes what a completion is worth is a reward, and its target is a `Tilt`: a mixture, a constraint, a
moment. The others are dataclasses of their own, with the same `reference`, `reward`, `beta` and `log_target(scored)`.
"""

from klimb.target.chi_squared import ChiSquaredTarget, chi_squared
from klimb.target.constraints import Forbid, forbid, moment_tilt
from klimb.target.entropy import EntropyTarget, entropy_bonus
from klimb.target.implied import implied_reward, own_reward
from klimb.target.mixture import LogRatio, MixtureRatio, geometric_mixture, mixture
from klimb.target.moving import MovingTarget, composed_beta, moving_reference
from klimb.target.per_length import LengthNormalizedTarget, length_normalized
from klimb.target.standardized import StandardizedTarget, settled_betas, standardized
from klimb.target.tilt import Tilt, tilt

__all__ = [
    "ChiSquaredTarget",
    "EntropyTarget",
    "Forbid",
    "LengthNormalizedTarget",
    "LogRatio",
    "MixtureRatio",
    "MovingTarget",
    "StandardizedTarget",
    "Tilt",
    "chi_squared",
    "composed_beta",
    "entropy_bonus",
    "forbid",
    "geometric_mixture",
    "implied_reward",
    "length_normalized",
    "mixture",
    "moment_tilt",
    "moving_reference",
    "own_reward",
    "settled_betas",
    "standardized",
    "tilt",
]
