"""What a training says once: sampler and scorer apart, draws of which nobody knows what they leave out."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from klimb import run as edge
from klimb import store
from klimb.checkpoint import Moving, restore, saved
from klimb.config import load
from klimb.data import Draws, Example, Pool
from klimb.run import run_plan, run_train
from klimb.samplers.ancestral import ancestral
from klimb.samplers.replay import Kept, Replay
from klimb.steps import TrainState, disagreement
from klimb.watch import Watch


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(edge, "report", lambda path, watch: None)


def trained(config, *, resume=False, stop_after=None):
    """The warnings of a training."""
    warnings, steps = [], []
    told = {"warning": warnings.append, "step": steps.append}
    watch = Watch(
        event=lambda kind, record: told.get(kind, lambda record: None)(record),
        stop=lambda: len(steps) == stop_after,
    )
    run_train(config, resume=resume, watch=watch)
    return warnings


# Sampler and scorer.


def off_by(nats, *arguments, **named):
    draws = ancestral(*arguments, **named)
    return replace(draws, log_q=draws.log_q + nats)


@pytest.mark.parametrize(("nats", "warned"), [(0.0, 0), (2.0, 1)])
def test_a_sampler_apart_from_the_scorer_is_told_of_once(tiny_run, options, monkeypatch, nats, warned):
    monkeypatch.setattr("klimb.loaded.ancestral", partial(off_by, nats))
    config = load(None, options({**tiny_run, "kl_budget": None, "beta": 0.05, "max_steps": 3}))
    warnings = trained(config)
    assert len(warnings) == warned
    assert all("sampler and scorer differ by 2 nats" in text for text in warnings)
    means = [r["sampler_error_mean"] for r in store.read_jsonl(Path(config.output_dir) / "metrics.jsonl")]
    assert means == pytest.approx([nats] * 3, abs=1e-5)


def test_the_line_is_a_tenth_of_the_spread_of_the_reward_in_nats():
    draws = Draws(
        [Example("a")], [[torch.zeros(1, dtype=torch.int64)] * 5], torch.ones(1, 5, dtype=torch.bool)
    )
    pool = Pool(draws, torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), torch.zeros(1, 5))
    line = 0.1 * 2.5**0.5 / 0.5  # of 1, 2, 3, 4, 5 with beta 1/2
    assert disagreement(pool, 0.999 * line, 0.5) is None
    assert f"{2.5**0.5 / 0.5:.2g} nats" in disagreement(pool, 1.001 * line, 0.5)
    flat = replace(pool, reward=torch.ones(1, 5))
    forbidden = replace(pool, reward=torch.tensor([[1.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf]]))
    assert disagreement(flat, 9.0, 0.5) is disagreement(forbidden, 9.0, 0.5) is None


# A KL penalty that is none.


@pytest.mark.parametrize(("penalty", "warned"), [("k2_as_loss", 0), ("k3_as_loss", 1)])
def test_a_penalty_of_another_gradient_is_told_of(tiny_run, options, penalty, warned):
    changes = {"method": "dr_grpo", "num_replay": 0, "kl_penalty": penalty, "max_steps": 1}
    warnings = trained(load(None, options({**tiny_run, **changes})))
    assert len(warnings) == warned
    assert all("wrong direction" in text and "k1_in_reward and k2_as_loss" in text for text in warnings)


# Draws of unknown support.


@pytest.fixture(scope="module")
def planned(make_run, options, tmp_path_factory):
    """A run that was planned."""
    folder = tmp_path_factory.mktemp("planned")
    settings = make_run(folder)
    return settings, run_plan(load(None, options(settings))).path


@pytest.fixture
def unknown(planned, options, tmp_path):
    """A function: the run's configuration with a pool of this support instead."""
    settings, run = planned

    def make(support, **changes):
        found = store.read_draws(run / "draws/plan.parquet")
        pool = Pool(
            replace(found.draws, full_support=support), found.reward, found.log_ref, found.reward_parts
        )
        store.write_pool(tmp_path / "pool.parquet", pool, verb="plan", hashes=found.hashes)
        new = {"plan": str(tmp_path / "pool.parquet"), "output_dir": str(tmp_path / "run"), "max_steps": 4}
        return load(None, options({**settings, **new, **changes}))

    return make


@pytest.mark.parametrize(
    ("support", "method", "warned"),
    [(None, "log_variance", 1), (None, "reverse_kl", 0), (None, "forward_kl", 0), (True, "log_variance", 0)],
)
def test_an_objective_that_asks_for_no_law_warns_once_of_draws_of_unknown_support(
    unknown, support, method, warned
):
    warnings = trained(unknown(support, method=method))
    assert len(warnings) == warned
    assert all(text.startswith("log_variance does not ask which law") for text in warnings)


def test_draws_that_cannot_be_everything_are_still_refused(unknown):
    with pytest.raises(ValueError, match="cannot draw every completion"):
        trained(unknown(False))


def forgetful(checkpoint):
    kept = checkpoint.state["replay"]
    return replace(
        checkpoint,
        state={**checkpoint.state, "replay": {**kept, "full_support": [True] * len(kept["full_support"])}},
    )


def test_a_resumed_run_still_knows_what_its_kept_draws_are(unknown, monkeypatch):
    config = unknown(None, save_steps=1)
    assert len(trained(config, stop_after=2)) == 1
    again = config.model_copy(update={"output_dir": f"{config.output_dir}-again"})
    shutil.copytree(config.output_dir, again.output_dir)
    assert len(trained(config, resume=True)) == 1
    # the mutant: a checkpoint that forgets it
    real = store.load_latest_checkpoint
    monkeypatch.setattr(store, "load_latest_checkpoint", lambda folder: forgetful(real(folder)))
    assert trained(again, resume=True) == []


def test_every_field_of_a_kept_draw_comes_back_from_a_checkpoint(tmp_path):
    weight = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    moving = Moving([weight], optimizer, scheduler, torch.Generator(), [])
    rows = [
        Kept(torch.arange(3 + i), f"text {i}", i == 1, -1.5 * i, -2.5 * i, 0.25 * i, support)
        for i, support in enumerate((True, False, None))
    ]
    state = TrainState(3, (1, 2), Replay({"one": rows[:2], "two": rows[2:]}, limit=7))
    store.save_checkpoint(tmp_path, 3, *saved(state, moving))
    back = restore(store.load_latest_checkpoint(tmp_path), moving, replay=Replay())
    assert (back.step, back.order, back.replay.limit, list(back.replay.rows)) == (
        3,
        (1, 2),
        7,
        ["one", "two"],
    )
    for old, new in zip(rows, [*back.replay.rows["one"], *back.replay.rows["two"]], strict=True):
        assert new.completion.equal(old.completion)
        assert replace(new, completion=None) == replace(old, completion=None)
