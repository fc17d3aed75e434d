"""A run from elsewhere than the model itself: another model as the reference, or an adapter to go on from."""

import json

import pytest
import torch

from klimb.config import load
from klimb.loaded import prepare
from klimb.run import climb, run_train
from klimb.store import read_draws, read_json, read_jsonl
from klimb.watch import Watch

pytestmark = pytest.mark.usefixtures("no_report")


def scored(policy, draws):
    with torch.no_grad():
        return draws.sequence_sums(policy.log_prob(draws))


def measured_again(klimb, run, kl):
    """What `klimb measure RUN` finds, from the saved policy and the configuration alone."""
    status, out, err = klimb("measure", run, "--json")
    assert status == 0, err
    assert json.loads(out)["kl"]["value"] == pytest.approx(kl, abs=1e-5)


def test_another_model_is_the_reference(klimb, tiny_run, other_model, options):
    config = load(None, options({**tiny_run, "reference": str(other_model), "max_steps": 12}))
    run = climb(config).path
    loaded = prepare(config)
    plan = read_draws(run / "draws/plan.parquet")
    assert torch.allclose(plan.log_ref, scored(loaded.reference, plan.draws), atol=1e-4)
    assert (
        plan.log_ref - scored(loaded.policy, plan.draws)
    ).abs().mean() > 0.5  # the model that moves is another
    first = read_draws(run / "draws/train-000001.parquet")
    assert torch.allclose(first.log_ref, scored(loaded.reference, first.draws), atol=1e-4)
    assert torch.allclose(first.log_pi, scored(loaded.policy, first.draws), atol=1e-4)
    steps = read_jsonl(run / "metrics.jsonl")
    assert steps[0]["kl"]["value"] > 0.5
    kl = [step["kl"]["value"] for step in steps]
    assert sum(kl[-4:]) < 0.9 * sum(kl[:4])  # it climbs towards the reference's tilt
    measured_again(klimb, run, read_json(run / "measure.json")["kl"]["value"])


def test_reference_samples_of_another_model(klimb, tiny_run, other_model, options):
    settings = options({**tiny_run, "reference": str(other_model)})
    status, _, err = klimb("sample", "-q", *settings, "--method", "best_of", "--num-draws", "4")
    assert status == 0, err


@pytest.fixture
def first_run(tiny_run, options, tmp_path):
    """A run of six steps, whose adapter the next one goes on from."""
    return run_train(
        load(None, options({**tiny_run, "output_dir": str(tmp_path / "first"), "learning_rate": 0.03}))
    ).path


@pytest.mark.parametrize("stop_after", [None, 3])
def test_training_goes_on_from_an_adapter(klimb, tiny_run, options, first_run, stop_after):
    start = str(first_run / "policy")
    config = load(None, options({**tiny_run, "family.start": start}))
    seen = []
    watch = Watch(
        event=lambda kind, record: seen.append(kind) if kind == "step" else None,
        stop=lambda: len(seen) == stop_after,
    )
    outcome = climb(config, watch=watch)
    assert outcome.interrupted == (stop_after is not None)
    if outcome.interrupted:
        outcome = climb(config, resume=True)
    run = outcome.path
    loaded = prepare(config)
    plan = read_draws(run / "draws/plan.parquet")
    assert torch.allclose(plan.log_ref, scored(loaded.reference, plan.draws), atol=1e-4)
    assert torch.allclose(plan.log_ref, scored(loaded.policy, plan.draws), atol=1e-4)
    base = prepare(load(None, options(tiny_run))).reference
    assert (
        plan.log_ref - scored(base, plan.draws)
    ).abs().mean() > 0.1  # the adapter is the reference, not the base
    steps = read_jsonl(run / "metrics.jsonl")
    assert steps[0]["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["kl"]["value"] > 0.01
    measured_again(klimb, run, read_json(run / "measure.json")["kl"]["value"])
    frozen = prepare(config, policy_folder=run / "policy").reference
    assert torch.allclose(scored(frozen, plan.draws), plan.log_ref, atol=1e-4)


def test_going_on_twice_ends_in_the_same_numbers(tiny_run, options, first_run, tmp_path):
    """Stopped and resumed, or not."""
    start = {"family.start": str(first_run / "policy")}
    whole = climb(load(None, options({**tiny_run, **start})))
    halved = load(None, options({**tiny_run, **start, "output_dir": str(tmp_path / "halved")}))
    seen = []
    watch = Watch(
        event=lambda kind, record: seen.append(kind) if kind == "step" else None, stop=lambda: len(seen) == 2
    )
    assert climb(halved, watch=watch).interrupted
    again = climb(halved, resume=True)

    def measured(outcome):  # its diagnosis names commands, and they the run
        return json.dumps(outcome.measurement).replace(str(outcome.path), "RUN")

    assert measured(again) == measured(whole)


def test_an_adapters_pool_is_not_the_bases(klimb, tiny_run, options, first_run):
    asked = {**tiny_run, "family.start": str(first_run / "policy"), "plan": str(first_run)}
    status, _, err = klimb("plan", "-q", *options(asked))
    assert (status, "of another model" in err) == (2, True)
