"""Two Ray workers on this machine train what one process trains, and draw the plan that one process draws."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fake_vllm import fake_vllm
from klimb.ranks import ALONE
from klimb.store import load_latest_checkpoint, read_json, read_jsonl
from ranked import run

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]


def by_ray(folder, settings):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    recipe = [sys.executable, str(ROOT / "recipes/ray_climb.py"), str(file), "--verb", "train"]
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    quiet = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONPATH": source}
    return subprocess.run(recipe, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=280)


@pytest.fixture(params=["own sampler", "server"])
def sampler(request, tiny_model, monkeypatch):
    """Options of who draws."""
    if request.param == "own sampler":
        yield {}
        return
    pytest.importorskip("httpx2")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with fake_vllm(tiny_model, ends=[1]) as fake:
        yield {"sampler": {"kind": "vllm", "url": fake.url}}


def flat(settings):
    """The same, as options of the command line."""
    inner = {name: x for name, x in settings.items() if isinstance(x, dict)}
    outer = {name: x for name, x in settings.items() if name not in inner}
    return outer | {f"{name}.{part}": x for name, of in inner.items() for part, x in of.items()}


@pytest.mark.slow
def test_two_ray_workers_are_one_process(tiny_run, tmp_path, sampler):
    settings = {**tiny_run, "dtype": "float64", "max_steps": 4, "save_steps": 4, "learning_rate": 1e-3}
    settings |= sampler
    found = by_ray(tmp_path, settings)
    assert found.returncode == 0, found.stderr[-4000:]
    run(ALONE, flat({**settings, "output_dir": str(tmp_path / "one")}), "run_train")
    two, one = Path(settings["output_dir"]), tmp_path / "one"
    assert [r["step"] for r in read_jsonl(two / "metrics.jsonl")] == [1, 2, 3, 4]
    weights = [load_latest_checkpoint(path / "checkpoints").tensors for path in (one, two)]
    for name, x in weights[0].items():
        if name.startswith("weights"):
            assert (x - weights[1][name]).abs().max() < 1e-6, name


PLANNER = """
import sys
from klimb import run
from klimb.config import load
from klimb.integrations import ray as over
over.report = lambda path, watch=None: None
prepare = run.prepare
loads = []
def counted(*arguments, **options):
    loads.append(1)
    return prepare(*arguments, **options)
run.prepare = counted
if __name__ == "__main__":
    import ray
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        over.plan_over_ray(load(sys.argv[1], []), num_workers=2, resume=len(sys.argv) > 2)
    except ValueError as error:
        print(error)
        sys.exit(2)
    print("models loaded by the driver:", len(loads))
"""


def drawn_by_ray(folder, settings, *more):
    """plan_over_ray with two workers, in a process of its own."""
    file, program = folder / "run.yaml", folder / "planner.py"
    file.write_text(yaml.safe_dump(settings))
    program.write_text(PLANNER)
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    quiet = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONPATH": source}
    command = [sys.executable, str(program), str(file), *more]
    return subprocess.Popen(
        command, env={**os.environ, **quiet}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_two_workers_of_ray_data_draw_the_plan_of_one_process(tiny_run, tmp_path):
    """Killed in the middle too, and gone on with."""
    settings = {**tiny_run, "num_plan_draws": 96}  # two prompts a part, eight parts
    reward = Path(settings["reward_funcs"].partition(":")[0])
    reward.write_text(reward.read_text().replace('"""Share', '__import__("time").sleep(0.5)\n    """Share'))
    run(ALONE, {**settings, "output_dir": str(tmp_path / "one")}, "run_plan")
    one, two = tmp_path / "one", Path(settings["output_dir"])

    process = drawn_by_ray(tmp_path, settings)
    parts = two / "draws/plan.parts"
    while process.poll() is None and len(list(parts.glob("[0-9]*.parquet"))) < 3:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    there = {path.name: path.stat().st_ino for path in parts.glob("[0-9]*.parquet")}
    assert 3 <= len(there) < 8
    process = drawn_by_ray(tmp_path, settings, "--resume")
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said[-4000:]
    assert (two / "draws/plan.parquet").read_bytes() == (one / "draws/plan.parquet").read_bytes()
    assert read_json(two / "plan.json") == read_json(one / "plan.json")
    assert not parts.exists()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["own sampler", "server"])
def test_a_plan_of_a_run_that_trains_all_weights(tiny_run, tiny_model, tmp_path, monkeypatch, who):
    """Every worker has a policy beside its reference; a server is given the weights once, by the driver."""
    settings = {**tiny_run, "num_plan_draws": 96, "family": {"kind": "full"}}
    with fake_vllm(tiny_model, ends=[1]) as fake:
        if who == "server":
            pytest.importorskip("httpx2")
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            settings["sampler"] = {"kind": "vllm", "url": fake.url}
        run(ALONE, flat({**settings, "output_dir": str(tmp_path / "one")}), "run_plan")
        one, two = tmp_path / "one", Path(settings["output_dir"])
        fake.begin_anew()
        before = len(fake.loads)
        process = drawn_by_ray(tmp_path, settings)
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 0, said[-4000:]
        assert len(fake.loads) - before == (who == "server")
        assert "models loaded by the driver: 1" in said
        assert (two / "draws/plan.parquet").read_bytes() == (one / "draws/plan.parquet").read_bytes()
        assert read_json(two / "plan.json") == read_json(one / "plan.json")
        drawn = (two / "draws/plan.parquet").stat().st_ino
        again = drawn_by_ray(tmp_path, settings, "--resume")
        said, _ = again.communicate(timeout=280)
        assert again.returncode == 0, said[-4000:]
        assert (two / "draws/plan.parquet").stat().st_ino == drawn
        assert not (two / "draws/plan.parts").exists()


@pytest.mark.slow
def test_a_server_that_begins_anew_under_workers_is_one_message(tiny_run, tiny_model, tmp_path, monkeypatch):
    """And what they drew before is gone on with."""
    pytest.importorskip("httpx2")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with fake_vllm(tiny_model, ends=[1]) as fake:
        settings = {**tiny_run, "num_plan_draws": 96, "family": {"kind": "full"}}
        settings["sampler"] = {"kind": "vllm", "url": fake.url}
        asked = []

        def fault(path, payload):
            asked.extend([path] if path == "/v1/completions" and payload["n"] == 96 else [])
            if len(asked) == 9:
                fake.begin_anew()

        fake.fault = fault
        process = drawn_by_ray(tmp_path, settings)
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 2, said[-4000:]
        assert "plan_over_ray: " in said
        assert "it began anew while it drew" in said
        assert said.count("what was drawn before is kept, and --resume goes on") == 1
        there = len(list((Path(settings["output_dir"]) / "draws/plan.parts").glob("[0-9]*.parquet")))
        assert 1 <= there < 8
        process = drawn_by_ray(tmp_path, settings, "--resume")
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 0, said[-4000:]
    assert (Path(settings["output_dir"]) / "plan.json").is_file()


@pytest.mark.slow
def test_a_worker_says_what_is_wrong(tiny_run, tmp_path):
    reward = Path(tiny_run["reward_funcs"].partition(":")[0])
    reward.write_text("def good(completions, **columns):\n    raise KeyError('only there')\n")
    process = drawn_by_ray(tmp_path, tiny_run)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 2, said[-4000:]
    assert "plan_over_ray: " in said
    assert "only there" in said


REFUSED = {
    "a plan that is given, which draw no pool": {"plan": "runs/other"},
    "kl_budget 3 nats needs about 245 draws a prompt, num_plan_draws is 32": {"kl_budget": 3},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_no_plan_can_come_of_is_refused_before_anything_is_drawn(tiny_run, message):
    from klimb.config import load
    from klimb.integrations.ray import plan_over_ray

    settings = {**tiny_run, **REFUSED[message]}
    options = [part for name, x in settings.items() for part in (f"--{name}", str(x))]
    with pytest.raises(ValueError, match=message):
        plan_over_ray(load(None, options), num_workers=2)
    assert not Path(tiny_run["output_dir"]).exists()
