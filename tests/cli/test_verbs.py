"""Every verb, end to end, on the tiny model: what it writes, what it prints, and that the numbers agree."""

import json
import subprocess
import sys

import pytest
import yaml

from klimb.store import load_latest_checkpoint, read_draws, read_json, read_jsonl


def test_climb_writes_a_whole_run_and_the_policy_is_better(klimb, tiny_run, options, tmp_path):
    batch = {"prompts_per_step": 8, "num_generations": 8, "num_replay": 8, "measure_draws": 64}
    settings = {**tiny_run, **batch, "max_steps": 30, "save_steps": 10, "eval_steps": 15, "eval_prompts": 8}
    status, out, err = klimb("climb", *options(settings))
    assert (status, err) == (0, ""), err
    for words in ("reference reward", "predicted optimum", "share attained", "try next", "policy", "report"):
        assert words in out
    run = tmp_path / "run"
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert {"config.yaml", "env.json", "plan.json", "metrics.jsonl", "measure.json"} <= names
    assert {"draws/plan.parquet", "draws/measure.parquet", "draws/train-000030.parquet"} <= names
    assert "policy/adapter_model.safetensors" in names
    found = read_json(run / "measure.json")
    # most of what is left is that a random model knows nothing of held-out prompts
    assert found["reward"]["low"] > found["reference"]["reward"]["high"]
    assert found["attained"]["value"] > 0.2
    assert found["kl"]["value"] < 0.8
    assert read_jsonl(run / "metrics.jsonl")[14]["evaluation"]["kl"]["value"] > 0
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["beta"] == read_json(run / "plan.json")["beta"]["value"] == found["beta"]
    assert resolved["kl_budget"] is None
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000020", "step-000030"]

    # the saved policy, loaded again, has the log-probabilities that the run measured
    status, out, err = klimb("measure", run, "--json")
    assert (status, err) == (0, ""), err
    assert json.loads(out)["kl"]["value"] == pytest.approx(found["kl"]["value"], abs=1e-5)
    status, out, _ = klimb("report", run)
    assert (status, out.strip()) == (0, str(run / "report.html"))


def test_step_zero_of_a_new_adapter_is_the_reference(klimb, tiny_run, options, tmp_path):
    status, _, err = klimb("train", "-q", *options({**tiny_run, "max_steps": 1}))
    assert status == 0, err
    first = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["kl"]["value"] == pytest.approx(0, abs=1e-6)


def test_json_is_all_there_is_on_stdout(klimb, tiny_run, options):
    status, out, _ = klimb("plan", "--json", *options(tiny_run))
    record = json.loads(out)
    assert status == 0
    assert record["plan"]["optimum"]["kl"]["value"] == pytest.approx(0.5, abs=0.1)
    assert record["plan"]["num_draws"] == 32


def test_a_plans_pool_is_used_again_and_no_verb_disturbs_another(klimb, tiny_run, options, tmp_path):
    assert klimb("plan", "-q", *options(tiny_run))[0] == 0
    again = {**tiny_run, "output_dir": str(tmp_path / "again"), "plan": str(tmp_path / "run")}
    fresh = {**tiny_run, "output_dir": str(tmp_path / "fresh")}
    assert klimb("train", "-q", *options(again))[0] == 0
    assert klimb("train", "-q", *options(fresh))[0] == 0
    a, b = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("again", "fresh"))
    timings = {"seconds": 0, "tokens_per_second": 0}
    assert [r | timings for r in a] == [r | timings for r in b]
    pools = [read_draws(tmp_path / name / "draws/plan.parquet") for name in ("run", "again")]
    assert pools[0].reward.equal(pools[1].reward)


@pytest.mark.parametrize("method", ["reverse_kl", "forward_kl"])
def test_other_objectives_and_full_weights_train(klimb, tiny_run, options, tmp_path, method):
    settings = {**tiny_run, "method": method, "num_replay": None, "family.kind": "full", "max_steps": 2}
    status, _, err = klimb("train", "-q", *options(settings))
    assert (status, err) == (0, "")
    assert (tmp_path / "run/policy/model.safetensors").is_file()


def test_bfloat16_moves_by_its_float32_masters_and_their_average(klimb, tiny_run, options, tmp_path):
    settings = {**tiny_run, "dtype": "bfloat16", "ema_decay": 0.9, "eval_steps": 3}
    status, _, err = klimb("train", "-q", *options(settings))
    assert (status, err) == (0, "")
    tensors = load_latest_checkpoint(tmp_path / "run/checkpoints").tensors
    weights, average = tensors["weights.0"], tensors["average.0"]
    assert str(weights.dtype) == "torch.float32"
    assert 0 < (weights - average).abs().max() < 0.1
    from safetensors.torch import load_file

    (policy,) = [
        t
        for name, t in load_file(tmp_path / "run/policy/adapter_model.safetensors").items()
        if t.shape == average.shape and (t == average.to(t.dtype)).all() and (t != 0).any()
    ][:1]
    assert str(policy.dtype) == "torch.bfloat16"  # the average, rounded


@pytest.mark.parametrize("method", ["ancestral", "best_of", "rejection"])
def test_sample_without_training(klimb, tiny_run, options, tmp_path, method):
    settings = {k: v for k, v in tiny_run.items() if k != "kl_budget"}
    arguments = [
        *options({**settings, "beta": 0.5}),
        "--method",
        method,
        "--num-draws",
        "64",
        "--bound",
        "1.5",
    ]
    yaml_file = tmp_path / "run.yaml"
    yaml_file.write_text("seed: 3\n")
    status, out, err = klimb("sample", "--json", "-c", yaml_file, *arguments)
    assert status == 0, err
    record = json.loads(out)
    assert record["draws"] == 8 * 64
    drawn = read_draws(record["path"])
    base = 0.26  # the reference's mean reward, within 0.1
    if method == "ancestral":
        assert record["reward"]["value"] == pytest.approx(base, abs=0.1)
        assert drawn.draws.full_support is True
    else:
        assert record["reward"]["low"] > base
        assert drawn.draws.log_q is None


def test_dry_run_prints_the_resolved_configuration_and_writes_nothing(klimb, tiny_run, options, tmp_path):
    status, out, _ = klimb("climb", "--dry-run", *options(tiny_run))
    assert status == 0
    assert yaml.safe_load(out)["family"] == {
        "kind": "lora",
        "r": 16,
        "alpha": 32.0,
        "target_modules": "all-linear",
        "layers": None,
        "start": None,
    }
    assert not (tmp_path / "run").exists()


SLOW = {"torch", "transformers", "peft", "datasets", "pydantic", "numpy", "scipy", "pandas", "altair"}
"""what takes from a tenth of a second to several to import"""


def slow_ones(statements):
    """Which of SLOW a fresh interpreter holds after some statements."""
    code = f"import sys\n{statements}\nprint('\\nloaded', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return SLOW & set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["climb", "--help"], ["train", "--help"], ["derive", "--help"]]
)
def test_help_loads_nothing_slow(arguments):
    call = f"from klimb.cli import main\ntry: main({arguments})\nexcept SystemExit as ended: assert not ended.code"
    # typer itself asks pydantic, if it is there, how to read the options of a command
    assert slow_ones(call) - {"pydantic"} == set()
    assert arguments != ["--help"] or slow_ones(call) == set()


def test_what_is_loaded_before_it_is_needed():
    assert slow_ones("import klimb") == set()
    assert not slow_ones("import klimb.config") & {"torch", "transformers", "datasets"}
    assert not slow_ones("import klimb.train, klimb.plan, klimb.measure") & {
        "peft",
        "datasets",
        "pandas",
        "altair",
    }
    assert slow_ones("import klimb.train") >= {
        "torch"
    }  # the list above is one of names that are there to be found


def test_small_commands(klimb):
    status, out, _ = klimb("schema")
    kinds = json.loads(out)["properties"]["target"]["discriminator"]["mapping"]
    assert set(kinds) == {"tilt", "entropy_bonus", "length_normalized", "context", "teacher"}
    fields = json.loads(out)["properties"]
    assert status == 0
    assert 40 <= len(fields) <= 76
    assert all("description" in field or "$ref" in str(field) for field in fields.values())
    status, out, _ = klimb("env")
    assert "torch" in json.loads(out)["versions"]
