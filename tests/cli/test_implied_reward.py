"""A trained policy as a reward: planned with, measured against, beside the reward that taught it; from a run and from elsewhere."""

import json
import shutil

import pytest
import torch
import yaml

from klimb.models.hub import load_model
from klimb.models.policy import CausalPolicy
from klimb.numbers.ordering import agreement
from klimb.store import read_draws, read_json


@pytest.fixture
def taught(klimb, tiny_run, options, tmp_path, no_report):
    """A run that has moved, its beta, and options of a plan with its reward."""
    batch = {
        "prompts_per_step": 8,
        "num_generations": 8,
        "num_replay": 8,
        "max_steps": 15,
        "learning_rate": 0.02,
    }
    status, _, err = klimb("train", "-q", *options({**tiny_run, **batch}))
    assert status == 0, err
    run = tmp_path / "run"
    beta = yaml.safe_load((run / "config.yaml").read_text())["beta"]
    settings = {
        **tiny_run,
        "reward_funcs": [f"implied:{run}"],
        "kl_budget": None,
        "beta": beta,
        "num_plan_draws": 96,
        "output_dir": tmp_path / "implied",
    }
    return run, beta, settings


def planned(klimb, options, settings):
    status, _, err = klimb("plan", "-q", *options(settings))
    assert (status, err) == (0, ""), err
    return read_json(settings["output_dir"] / "plan.json")


def test_the_plan_of_an_implied_reward_has_no_log_z_and_another_beta_has(taught, klimb, options, tmp_path):
    run, beta, settings = taught
    found = planned(klimb, options, settings)["optimum"]
    assert found["log_z"]["low"] < 0 < found["log_z"]["high"]
    assert found["log_z"]["high"] - found["log_z"]["low"] < 0.5
    wrong = {"func": "implied", "policy": str(run), "beta": 2 * beta}
    mutant = {**settings, "reward_funcs": [wrong], "output_dir": tmp_path / "wrong"}
    assert planned(klimb, options, mutant)["optimum"]["log_z"]["low"] > 0.05


def test_measured_against_its_own_reward_nothing_is_left_to_climb(taught, klimb, options):
    run, beta, settings = taught

    def measured(**changes):
        words = options({**settings, **changes})
        status, out, err = klimb("measure", "--policy", run / "policy", "--json", "-q", *words)
        assert status == 0, err
        return json.loads(out)

    found = measured()
    assert abs(found["gap"]["value"]) < 1e-5
    assert found["attained"]["value"] == pytest.approx(1, abs=1e-4)
    assert found["reward"]["value"] == pytest.approx(beta * found["kl"]["value"], abs=1e-5)
    wrong = {"func": "implied", "policy": str(run), "beta": 3 * beta}
    assert measured(reward_funcs=[wrong])["gap"]["low"] > 0.01


def test_a_reward_of_weight_zero_says_how_well_the_policy_orders_by_it(
    taught, klimb, options, tiny_run, tmp_path
):
    _, _, settings = taught
    both = {"reward_funcs": [*settings["reward_funcs"], tiny_run["reward_funcs"]], "reward_weights": [1, 0]}
    record = planned(klimb, options, {**settings, **both})
    own, good = record["rewards"]["implied"], record["rewards"]["good"]
    assert own["reference"]["value"] == pytest.approx(record["reference"]["reward"]["value"], abs=1e-6)
    assert own["agreement"]["value"] == 1
    assert 0.55 < good["agreement"]["low"] < good["agreement"]["value"] < 1
    pool = read_draws(tmp_path / "implied/draws/plan.parquet")
    assert torch.equal(pool.reward, pool.reward_parts["implied"])
    pairs, alike = 0, 0  # by hand, for the first prompt
    for i in range(pool.draws.num_draws):
        for j in range(i):
            ways = [
                (part[0, i] - part[0, j]).sign().item() for part in (pool.reward, pool.reward_parts["good"])
            ]
            pairs, alike = pairs + (0 not in ways), alike + (ways[0] * ways[1] > 0)
    assert agreement(pool.reward, pool.reward_parts["good"])[0] == pytest.approx(alike / pairs)
    assert "rewards" not in read_json(tmp_path / "run/plan.json")


def test_a_run_of_pairs_and_one_that_draws_stand_on_one_frontier(taught, klimb, options, tiny_run, tmp_path):
    """Either is certified against the other's reward by the same command."""
    _, beta, settings = taught
    rows = [
        {
            "prompt": [{"role": "user", "content": f"write a review {i}"}],
            "chosen": [{"role": "assistant", "content": "good warm"}],
            "rejected": [{"role": "assistant", "content": "bad cold"}],
        }
        for i in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = ("num_generations", "num_replay", "num_plan_draws", "kl_budget", "reward_funcs")
    dpo = {n: x for n, x in tiny_run.items() if n not in drawn} | {
        "dataset_name": tmp_path / "pairs.jsonl",
        "dataset_test_split": None,
        "learn_from": "data",
        "method": "dpo",
        "beta": beta,
        "max_steps": 12,
        "output_dir": tmp_path / "dpo",
    }
    status, _, err = klimb("train", "-q", *options(dpo))
    assert status == 0, err
    settings["reward_funcs"] = [f"implied:{tmp_path}/dpo/policy"]
    shares = {}
    for name in ("dpo", "run"):
        words = options({**settings, "measure_prompts": 8})
        status, out, err = klimb("measure", "--policy", tmp_path / name / "policy", "--json", "-q", *words)
        assert status == 0, err
        shares[name] = json.loads(out)["attained"]["value"]
    assert shares["dpo"] == pytest.approx(1, abs=1e-4)
    assert shares["run"] < 0.9


def test_an_adapter_and_a_whole_model_of_no_run(taught, klimb, options, tmp_path, tiny_model, other_model):
    run, beta, settings = taught
    shutil.copytree(run / "policy", tmp_path / "elsewhere")
    adapter = {"func": "implied", "policy": str(tmp_path / "elsewhere"), "beta": beta, "dtype": "float32"}
    same = planned(klimb, options, settings)["optimum"]
    again = planned(
        klimb, options, {**settings, "reward_funcs": [adapter], "output_dir": tmp_path / "adapter"}
    )
    assert again["optimum"] == same
    whole = {
        "func": "implied",
        "policy": str(other_model),
        "reference": str(tiny_model),
        "beta": beta,
        "dtype": "float32",
    }
    planned(klimb, options, {**settings, "reward_funcs": [whole], "output_dir": tmp_path / "whole"})
    pool = read_draws(tmp_path / "whole/draws/plan.parquet")
    log_pi, log_ref = (
        pool.draws.sequence_sums(
            CausalPolicy(*load_model(str(who), dtype=torch.float32)).log_prob(pool.draws)
        )
        for who in (other_model, tiny_model)
    )
    torch.testing.assert_close(pool.reward, beta * (log_pi - log_ref).detach(), rtol=0, atol=1e-4)
    assert pool.reward.std() > 0.1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("implied:nowhere", "implied: nowhere: no such folder; expected a run or a trained policy"),
        ({"func": "implied"}, "needs the option policy"),
        ({"func": "implied", "policy": "elsewhere"}, "got beta None, expected a positive number"),
        ({"func": "implied", "policy": "elsewhere", "beta": -1}, "got beta -1"),
        ({"func": "implied", "policy": "elsewhere", "betta": 1}, "did you mean 'beta'?"),
        ({"func": "implied", "policy": "whole", "beta": 1}, "give the option reference"),
        ({"func": "implied", "policy": "run", "reference": "other"}, "its tokenizer has other words"),
        ({"func": "implied", "policy": "empty"}, "empty/policy: no such folder"),
    ],
)
def test_what_is_no_policy_is_refused_before_anything_is_drawn(
    taught, klimb, options, tmp_path, tiny_model, monkeypatch, spec, said
):
    run, _, settings = taught
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "policy", "elsewhere")
    shutil.copytree(tiny_model, "whole")
    shutil.copytree(tiny_model, "other")
    words = tmp_path / "other/tokenizer.json"
    words.write_text(words.read_text().replace('"film"', '"movie"'))
    (tmp_path / "empty").mkdir()
    shutil.copy(run / "config.yaml", "empty")
    status, _, err = klimb("plan", "-q", *options({**settings, "reward_funcs": [spec]}))
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "implied").exists()
