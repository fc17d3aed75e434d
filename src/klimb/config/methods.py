"""The methods that train, what each needs, and which options it looks at."""

from __future__ import annotations

# written out, since the table itself needs torch; a test compares the two
TRAINED = (
    "log_variance",
    "reverse_kl",
    "forward_kl",
    "jensen_shannon",
    "total_variation",
    "chi2_reverse",
    "chi2_forward",
    "squared_hellinger",
    "alpha(0.5)",
    "skew_kl(0.1)",
    "skew_reverse_kl(0.1)",
    "generalized_js(0.1)",
    "trajectory_balance",
    "a_star_po",
    "pmd_mean",
    "flow_rl",
    "dpo",
    "ipo",
    "wpo",
    "slic",
    "chi_po",
    "f_dpo(jensen_shannon)",
    "simpo",
    "cpo",
    "orpo",
    "kto",
    "bco",
    "exo",
    "info_nca",
    "nca",
    "sft",
    "reward_weighted",
    "raft",
    "filtered",
    "dpg",
    "rloo",
    "ppo",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "reinforce_pp",
)
FAMILIES = ("alpha", "skew_kl", "skew_reverse_kl", "generalized_js")
"""divergences with a number of one's own: alpha(0.3)"""
NEED_LOG_Z = frozenset(
    {
        "jensen_shannon",
        "total_variation",
        "chi2_reverse",
        "chi2_forward",
        "squared_hellinger",
        "trajectory_balance",
        "a_star_po",
        "flow_rl",
        "dpg",
        *(name for name in TRAINED if name.partition("(")[0] in FAMILIES),
    }
)
UNTRAINED = {
    "best_of": "it draws and trains nothing: klimb sample --method best_of",
    "rejection": "it draws and trains nothing: klimb sample --method rejection",
    "path_consistency": "its soft values need a critic, which training has not got; log_variance needs none",
}

DRAWN = ("num_generations", "num_replay", "replay_steps", "dynamic_sampling")
"""options of draws, zero where there are none"""
OF_REWARDED_DRAWS = (
    *(
        "reward_weights",
        "reward_cache",
        "plan",
        "keep_fresh",
        "log_z",
        "log_z_learning_rate",
        "clip",
        "num_minibatches",
    ),
    *("epsilon", "epsilon_high", "importance_cap", "kl_stop", "kl_penalty", "kl_target", "kl_horizon"),
    *("gae_lambda", "value_learning_rate", "value_clip", "eval_steps", "eval_prompts", "eval_draws"),
)
"""options that distill has no use for"""
OF_A_REWARD_MODEL = frozenset(
    [
        "model_name_or_path",
        "model_revision",
        "dtype",
        "device",
        "trust_remote_code",
        "family",
        "dataset_name",
        "dataset_train_split",
        "dataset_test_split",
        "prompt_column",
        "max_prompts",
        "learn_from",
        "judge",
        "label_smoothing",
        "center_rewards_coefficient",
        "beta",
        "method",
        "prompts_per_step",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "max_grad_norm",
        "ema_decay",
        "output_dir",
        "save_steps",
        "save_total_limit",
        "report_to",
        "seed",
        "max_chunk_tokens",
    ]
)
"""options that method reward_model looks at; its beta is where the tail of the learned reward is looked at"""
