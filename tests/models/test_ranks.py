"""One rank, two, and two that split the layers draw the same completions and learn the same: every metric and weight to 1e-6.

In float64, and yet not to its last bits: norms of the layers and stored numbers are float32 in it too, and Adam makes as much
of a small gradient as of a large one.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from klimb.config import load
from klimb.loaded import prepare
from klimb.ranks import ALONE, Ranks
from klimb.store import load_latest_checkpoint
from ranked import differences, ended, run, runs, started, together

CONTEXT = "the film was very good and kind"
RUNS = {
    "plan, replay, average": {"max_steps": 20, "ema_decay": 0.5, "eval_steps": 7, "eval_draws": 16},
    "split layers, adapters": {"shard": True, "max_steps": 20, "ema_decay": 0.5},
    "split layers, all weights": {
        "shard": True, "family.kind": "full", "prompts_per_step": 3, "max_steps": 4, "max_chunk_tokens": 12,
    },
    "split layers, one prompt, a soft prompt": {
        "shard": True, "family.kind": "soft_prompt", "family.init": "random", "prompts_per_step": 1, "max_steps": 3,
    },
    "fewer prompts than ranks": {"prompts_per_step": 1, "max_steps": 3},
    "old policy, minibatches, critic": {
        "method": "ppo", "prompts_per_step": 3, "num_minibatches": 2, "num_iterations": 2, "num_replay": 0, "max_steps": 4,
    },
    "all weights, moving beta": {
        "family.kind": "full", "method": "rloo", "num_replay": 0, "kl_budget": None, "beta": 0.3, "kl_target": 0.2, "max_steps": 4,
    },
    "other prompts in the place of those without contrast": {
        "method": "rloo", "dynamic_sampling": 1, "num_replay": 0, "num_generations": 2, "max_steps": 4,
    },
    "learned log Z": {"method": "trajectory_balance", "log_z": "learned", "max_steps": 4},
    "distilled": {
        "method": "distill", "target.kind": "context", "target.context": CONTEXT, "reward_funcs": "[]", "kl_budget": None,
        "num_replay": 0, "prompts_per_step": 3, "max_steps": 4,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(make_run, tmp_path_factory):
    """Each of RUNS by one rank and by two: folders of the two runs."""
    folder = tmp_path_factory.mktemp("ranks")
    options = {**make_run(folder), "dtype": "float64", "save_steps": 100, "learning_rate": 1e-3}
    at = {
        name: [{**options, **changes, "output_dir": str(folder / f"{i}-{n}")} for n in (1, 2)]
        for i, (name, changes) in enumerate(RUNS.items())
    }
    two = started(2, runs, [(both[1],) for both in at.values()])
    try:
        runs(ALONE, [(both[0],) for both in at.values()])
    finally:
        statuses = ended(two)
    assert statuses == [0, 0]
    return {name: [Path(one["output_dir"]) for one in both] for name, both in at.items()}


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(pairs, name):
    found = differences(*pairs[name])
    efficiency = [x for n, x in found.items() if n.startswith("frontier_efficiency")]
    assert max(efficiency, default=0.0) < 1e-4  # a resample divides by what little there was to gain
    assert max(x for n, x in found.items() if not n.startswith("frontier_efficiency")) < 1e-6


def test_half_precision_keeps_float32_masters_of_split_layers(make_run, tmp_path):
    """In bfloat16 two ranks round in another order than one; what they learned points the same way."""
    settings = {**make_run(tmp_path), "dtype": "bfloat16", "shard": True, "max_steps": 4, "save_steps": 100}
    runs(ALONE, [({**settings, "output_dir": str(tmp_path / "one")}, "run_train")])
    together(2, run, settings, "run_train")
    one, two = (load_latest_checkpoint(tmp_path / name / "checkpoints").tensors for name in ("one", "run"))
    learned = []
    for name, x in one.items():
        if name.startswith("weights"):
            assert two[name].dtype == torch.float32
            learned.append((x.flatten(), two[name].flatten()))
    a, b = (torch.cat(side) for side in zip(*learned, strict=True))
    start = _adapters_at_first(settings)
    apart = torch.nn.functional.cosine_similarity(a - start, b - start, dim=0)
    assert apart > 0.9
    assert torch.nn.functional.cosine_similarity(a - start, (b - start).roll(1), dim=0) < 0.5


def _adapters_at_first(settings):
    """What the weights were before any step."""
    options = [part for name, x in settings.items() for part in (f"--{name}", str(x))]
    policy = prepare(load(None, options)).policy
    return torch.cat([p.detach().float().flatten() for p in policy.parameters()])


STOPS = [(2, 3), (1, 2), (2, None)]
"""ranks, and how many steps they took before they were asked to stop"""


def test_a_run_goes_on_with_another_number_of_ranks(pairs, make_run, tmp_path):
    """Weights, optimizer, average, replay, generator and order of the prompts, split over two ranks or whole on one."""
    changes = {
        "shard": True,
        "max_steps": 8,
        "ema_decay": 0.5,
        "dtype": "float64",
        "save_steps": 100,
        "learning_rate": 1e-3,
    }
    settings = {**make_run(tmp_path), **changes}
    never = {**settings, "output_dir": str(tmp_path / "never")}
    run(ALONE, never, "run_train")
    for i, (world, stop) in enumerate(STOPS):
        go = partial(run, ALONE) if world == 1 else partial(together, world, run)
        go(settings, "run_train", i > 0, stop)
    found = differences(tmp_path / "never", tmp_path / "run")
    assert max(found.values()) < 1e-6, found


def test_the_comparison_sees_another_seed(pairs, tmp_path):
    """Two runs of the table differ by much more than the tolerance."""
    one, other = pairs["plan, replay, average"][0], pairs["fewer prompts than ranks"][0]
    a, b = (load_latest_checkpoint(run / "checkpoints").tensors["weights.0"] for run in (one, other))
    assert (a - b).abs().max() > 1e-3


def test_shares_are_all_of_it():
    for world in (1, 2, 3, 7):
        for num in (0, 1, 5, 12):
            shares = [Ranks(rank, world).share(num) for rank in range(world)]
            assert [i for share in shares for i in share] == list(range(num))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
