"""Which options go together: each check says what was got, what is expected, and what to leave out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klimb.config.kinds import TAUGHT, Full, Lora, Prefix, VllmSampler
from klimb.config.methods import DRAWN, OF_A_REWARD_MODEL, OF_REWARDED_DRAWS

if TYPE_CHECKING:
    from klimb.config.options import Config

DESTINATIONS = ("beta", "kl_budget", "reward_goal")
BOUND = 0.2
"""most by which a KL controller's relative error counts (a test compares it with klimb.numbers.kl_control)"""


def check_together(config: Config) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: what was got, what is expected, what to leave out.
    """
    given = [name for name in DESTINATIONS if getattr(config, name) is not None]
    if config.target.kind in TAUGHT and given != ["beta"]:
        other = next(name for name in given if name != "beta")
        raise ValueError(
            f"target.kind {config.target.kind} is a law already, whose beta is 1: got {other} {getattr(config, other):g}; leave it "
            f"out (--{other} null)"
        )
    if len(given) > 1:
        raise ValueError(
            f"got {' and '.join(f'{name} {getattr(config, name):g}' for name in given)}, expected one of "
            f"{', '.join(DESTINATIONS)}; switch the others off ({' or '.join(f'--{name} null' for name in given)})"
        )
    _samples_elsewhere(config)
    _is_frozen(config)
    if config.gradient_checkpointing and isinstance(config.family, Prefix):
        raise ValueError(
            "gradient_checkpointing: got family.kind prefix, whose keys and values lie in a memory that a layer run twice would "
            "write twice; leave it out, take a smaller max_chunk_tokens, or family.kind soft_prompt"
        )
    if config.target.kind == "entropy_bonus" and config.beta is None:
        raise ValueError(
            f"target.kind entropy_bonus: got {given[0]} {getattr(config, given[0]):g}, expected a beta: the bonus is "
            "itself so many nats from the reference; give --beta, and --kl_budget null --reward_goal null"
        )
    if config.target.kind != "tilt" and config.method == "filtered":
        raise ValueError(
            f"method filtered keeps what reaches a threshold of the plain reward, which target.kind "
            f"{config.target.kind} is not about; use raft or log_variance, or target.kind tilt"
        )
    if config.method == "reward_model":
        _learns_a_reward(config)
        return
    if config.center_rewards_coefficient or config.judge == "margins":
        asked = "judge margins" if config.judge == "margins" else "center_rewards_coefficient"
        raise ValueError(f"{asked} is of method reward_model, got {config.method}; leave it out")
    _controls_kl(config)
    if config.learn_from == "data":
        _learns_from_data(config)
    elif not _is_taught(config):
        _learns_from_draws(config)


def _learns_from_draws(config: Config) -> None:
    """Refuse groups of draws that nothing can be learned from."""
    if not config.reward_funcs and config.target.kind not in TAUGHT:
        raise ValueError(
            "no reward_funcs: expected a reward, or learn_from data with completions that are judged already"
        )
    for name in config.touched("judge", "label_smoothing"):
        raise ValueError(f"{name} is about completions of data; use learn_from data, or leave it out")
    if config.num_generations + config.num_replay < 2:
        raise ValueError(
            f"num_generations {config.num_generations} with num_replay {config.num_replay}: {config.method} compares the "
            "draws of one prompt with each other and needs at least 2; use num_generations 2 or more"
        )
    if config.num_generations == 0 and config.replay_steps < config.max_steps:
        raise ValueError(
            f"num_generations 0 leaves nothing to learn from after {config.replay_steps} replay_steps of "
            f"{config.max_steps} max_steps; use num_generations 2 or more, or as many "
            "replay_steps as max_steps"
        )
    replayed = config.num_replay + (config.num_generations if config.replay_steps else 0)
    if replayed > config.num_plan_draws:
        raise ValueError(
            f"a step would replay {replayed} kept draws a prompt, and num_plan_draws is {config.num_plan_draws}; "
            "replay fewer, or plan with more"
        )
    if config.num_minibatches > config.prompts_per_step:
        raise ValueError(
            f"num_minibatches {config.num_minibatches} is more than the {config.prompts_per_step} prompts_per_step; a "
            "minibatch holds whole prompts, one at least"
        )
    _weighs_rewards(config)


def _is_taught(config: Config) -> bool:
    """True if the target is a policy and nothing else has to be looked at."""
    taught = config.target.kind in TAUGHT
    if config.method == "distill" and not taught:
        raise ValueError(
            f"distill learns from a target that is a policy, got target.kind {config.target.kind}; give target.context, "
            "target.context_file or target.teacher"
        )
    asked = config.touched("divergence", "teacher_draws", "top_k", "sequence_gradient")
    if asked and config.method != "distill":
        raise ValueError(f"{asked[0]} is an option of method distill, got {config.method}; leave it out")
    if not taught:
        return False
    if config.reward_funcs or config.beta != 1.0:
        raise ValueError(
            f"target.kind {config.target.kind} is a law already: no reward_funcs, and beta is 1; leave both out"
        )
    if config.method == "distill":
        _distils(config)
    return config.method == "distill"


def _distils(config: Config) -> None:
    """Refuse what distill does not do, by name."""
    kept = [name for name in DRAWN[1:] if getattr(config, name)]
    if kept or config.num_generations < 1:
        raise ValueError(
            f"distill learns from num_generations fresh completions, one or more, and from nothing kept; leave {', '.join(DRAWN[1:])} out"
        )
    if unread := config.touched(*OF_REWARDED_DRAWS):
        raise ValueError(
            f"{', '.join(unread)}: distill does not read it; leave it out, or use another method"
        )
    if config.sequence_gradient and (config.teacher_draws == 1 or config.num_iterations > 1):
        raise ValueError(
            f"sequence_gradient is of completions that the policy draws as it is: got teacher_draws {config.teacher_draws:g} and "
            f"num_iterations {config.num_iterations}, expected less than 1 and 1"
        )


def _samples_elsewhere(config: Config) -> None:
    """Refuse what vLLM cannot draw."""
    if not isinstance(config.sampler, VllmSampler):
        return
    if not isinstance(config.family, Lora | Full):
        raise ValueError(
            f"sampler.kind vllm: got family.kind {config.family.kind}, expected lora or full: no server of vLLM has virtual tokens"
        )
    if config.reference is not None or config.target.kind == "teacher":
        other = "a target.teacher" if config.reference is None else f"reference {config.reference}"
        raise ValueError(
            f"sampler.kind vllm: got {other}, expected none: a server has one model, that of policy and reference"
        )
    if config.sampler.steps_ahead and config.sampler.url is None:
        raise ValueError(
            "sampler.steps_ahead: an engine of this process draws while nothing else happens; give sampler.url, or leave it out"
        )
    if config.sampler.steps_ahead and (
        config.learn_from == "data" or config.method == "distill" or config.dynamic_sampling
    ):
        raise ValueError(
            "sampler.steps_ahead: draws ahead go with neither learn_from data, distill nor dynamic_sampling; leave it out"
        )


def _is_frozen(config: Config) -> None:
    """Refuse what moves, splits or serves weights of 4 bits."""
    refused = {
        "family.kind full": isinstance(config.family, Full),
        "method reward_model": config.method == "reward_model",
        "shard": config.shard,
        "sampler.kind vllm": isinstance(config.sampler, VllmSampler),
    }
    got = [name for name, there in refused.items() if there]
    if config.dtype == "nf4" and got:
        raise ValueError(
            f"dtype nf4 is of frozen weights, whole on each GPU, that klimb itself draws from: got {' and '.join(got)}; leave it "
            "out, or take another dtype"
        )


def _weighs_rewards(config: Config) -> None:
    if config.reward_weights is not None and len(config.reward_weights) != len(config.reward_funcs):
        raise ValueError(
            f"got {len(config.reward_weights)} reward_weights for {len(config.reward_funcs)} reward_funcs, "
            "expected as many of each"
        )


def _learns_from_data(config: Config) -> None:
    """Refuse what only draws have."""
    drawn = [name for name in DRAWN if getattr(config, name)]
    if drawn:
        raise ValueError(
            f"learn_from data draws nothing to learn from: got {', '.join(f'{n} {getattr(config, n)}' for n in drawn)}; leave it out"
        )
    if config.beta is None:
        raise ValueError(
            "learn_from data: no plan finds a beta for a kl_budget or reward_goal without draws; give a beta"
        )
    if config.plan is not None or config.eval_steps is not None or config.kl_target is not None:
        raise ValueError(
            "learn_from data has no plan, no evaluation in between and no kl_target; leave plan, eval_steps and kl_target out"
        )
    if config.target.kind != "tilt":
        raise ValueError(f"learn_from data: got target.kind {config.target.kind}, expected tilt")
    _weighs_rewards(config)


def _learns_a_reward(config: Config) -> None:
    """Refuse what has no part in learning a reward from comparisons."""
    if config.learn_from != "data":
        raise ValueError(
            "reward_model learns from completions that somebody compared, got learn_from draws; use learn_from data with chosen "
            "and rejected, or with completions and scores"
        )
    idle = [
        name
        for name in type(config).model_fields
        if name not in OF_A_REWARD_MODEL
        and (getattr(config, name) if name in DRAWN else name in config.touched(name))
    ]
    if idle:
        raise ValueError(
            f"reward_model has no use for {', '.join(idle)}: it draws nothing and reads whole completions; leave "
            f"{'it' if len(idle) == 1 else 'them'} out"
        )
    start = config.family.start if isinstance(config.family, Lora) else None
    if not isinstance(config.family, Lora | Full) or start is not None:
        raise ValueError(
            "reward_model: expected family lora without start, or full; to go on from a reward model name its folder as "
            "model_name_or_path"
        )
    if config.judge == "scores" and config.label_smoothing:
        raise ValueError(
            "label_smoothing is of labels that may be wrong, got judge scores, which are chances already; leave it out"
        )


def _controls_kl(config: Config) -> None:
    """Refuse a KL controller that could not work."""
    if config.kl_target is None:
        if config.touched("kl_horizon"):
            raise ValueError(
                "kl_horizon is how slowly beta follows a kl_target, and there is none; give kl_target, or leave it out"
            )
        return
    if config.target.kind == "entropy_bonus":
        raise ValueError(
            "kl_target moves beta, and target.kind entropy_bonus is made of a beta and a bonus; leave one of them out"
        )
    if config.num_generations == 0:
        raise ValueError(
            "kl_target needs fresh draws to measure the KL on, and num_generations is 0; use 2 or more"
        )
    drawn = config.prompts_per_step * config.num_generations
    if drawn * BOUND >= config.kl_horizon:
        raise ValueError(
            f"kl_horizon {config.kl_horizon:g} is too short for {drawn} completions a step, which could bring beta to zero "
            f"at once; use more than {drawn * BOUND:g}, ten times that at best"
        )
