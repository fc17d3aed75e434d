"""Policy gradients that take several updates on one batch: PPO, GRPO and their kin."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from klimb.methods.row import Method
from klimb.numbers.advantages import (
    gae_advantage,
    group_centred,
    group_standardized,
    leave_one_out_advantage,
    returns,
    reward_less_kl,
    token_reward,
    whitened_reward_to_go,
)
from klimb.objectives.surrogate import cispo, dapo, dr_grpo, grpo, gspo, ppo, reinforce_pp, rloo

SURROGATES: Mapping[str, Method] = MappingProxyType(
    {
        "rloo": Method(
            knows="density",
            divergence="KL(pi||p) in the reward, leave-one-out, sequence ratio",
            draws="the policy, some updates old",
            claim="gradient",
            fixed_point="the target",
            caveat="stale draws need the whole ratio: no clip here, so few updates a batch",
            source="Ahmadian et al., 2024",
            objective=rloo,
            derived={"reward": reward_less_kl, "advantage": leave_one_out_advantage},
            unit="reward",
        ),
        "ppo": Method(
            knows="density",
            divergence="KL(pi||p) in the reward a token, critic, clipped ratio",
            draws="the policy, some updates old",
            claim="gradient",
            fixed_point="the target, up to clip and critic",
            caveat="after the first inner step it is proximal: a clipped draw says nothing more; lambda below 1 believes the critic; whitening few draws biases",
            source="Schulman et al., 2017; Ziegler et al., 2019",
            objective=ppo,
            derived={"token_reward": token_reward, "token_advantage": gae_advantage, "returns": returns},
            unit="reward",
        ),
        "grpo": Method(
            knows="density, beta divided by the group's deviation",
            divergence="reward by clipped ratio, k3 of each token as a loss, mean over tokens",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="another: a forward KL to the reference in place of the reverse, a beta a prompt",
            caveat="three: the deviation rescales beta, k3 as a loss is the forward KL, the mean over tokens favours long failures",
            source="Shao et al., 2024",
            objective=grpo,
            derived={"advantage": group_standardized},
            unit="reward",
        ),
        "dr_grpo": Method(
            knows="rewards",
            divergence="reward by clipped ratio, sum over tokens",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="none inside: certainty of the best completion",
            caveat="no price on KL, so no target; unbiased for the gradient of the reward up to (G - 1) / G",
            source="Liu et al., 2025",
            objective=dr_grpo,
            derived={"advantage": group_centred},
            unit="reward",
        ),
        "dapo": Method(
            knows="rewards",
            divergence="reward by clipped ratio, clip higher, mean over the group's tokens",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="none inside: certainty of the best completion",
            caveat="no price on KL, so no target; dropping groups without spread changes which prompts count",
            source="Yu et al., 2025",
            objective=dapo,
            derived={"advantage": group_standardized},
            unit="reward",
        ),
        "gspo": Method(
            knows="rewards",
            divergence="reward by clipped geometric-mean ratio",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="none inside: certainty of the best completion",
            caveat="no price on KL, so no target; the ratio is a token's on average, not the sequence's",
            source="Zheng et al., 2025",
            objective=gspo,
            derived={"advantage": group_standardized},
            unit="reward",
        ),
        "cispo": Method(
            knows="rewards",
            divergence="likelihood weighted by a capped, fixed ratio",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="none inside: certainty of the best completion",
            caveat="no price on KL, so no target; the cap biases, and no token falls silent",
            source="MiniMax, 2025",
            objective=cispo,
            derived={"advantage": group_standardized},
            unit="reward",
        ),
        "reinforce_pp": Method(
            knows="density",
            divergence="KL(pi||p) in the reward a token, whitened over the batch",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="near the target",
            caveat="whitening over few draws and the mean over tokens bias it; after the first inner step it is proximal: a clipped draw says nothing more",
            source="Hu, 2025",
            objective=reinforce_pp,
            derived={"token_reward": token_reward, "token_advantage": whitened_reward_to_go},
            unit="reward",
        ),
    }
)
