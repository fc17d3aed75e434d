"""A real model climbs with klimb and with TRL: gap, KL and share at equal tokens and seconds, and seconds to half the gap.

    python benchmarks/climb_vs_trl.py                       # needs: pip install trl==1.16.0
    python benchmarks/climb_vs_trl.py --only klimb_reverse_kl trl_rloo --rates 1e-3 --steps 20 --seeds 0
    python benchmarks/climb_vs_trl.py --table               # from the records alone

SmolLM2-135M-Instruct, LoRA, the prompts and the reward of examples/, beta 0.197 (about one nat): 4 prompts x 8 generations x
16 tokens a step. Every method is tried at the same learning rates, constant, on the first seed; its best ones go on with
the other seeds. Policies are saved outside the clock. Afterwards klimb's certificate measures each of them on held-out
prompts, by the same code and beside the same reference draws. The seconds and tokens of a plan are klimb's.

A finished run is a record in benchmarks/records/ and is not run again, so that a table can be made on several days.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

from climb_records import best_rates, file_name, missing, read, tables
from processor import processor

HERE = Path(__file__).resolve().parent
LAST_LAYERS = {"kind": "lora", "r": 2, "alpha": 4, "layers": 12}
RANK_8 = LAST_LAYERS | {"r": 8, "alpha": 16}
REPLAY = {"num_plan_draws": 16, "num_replay": 8}
# name -> what it is called; whose trainer; options of klimb's configuration (for TRL the family alone)
METHODS = {
    "klimb_log_variance": (
        "klimb log_variance, replay, the plan's pool first",
        "klimb",
        {"family": LAST_LAYERS, "method": "log_variance", **REPLAY},
    ),
    "klimb_weighted": (
        "klimb reverse_kl, weighted replay, the plan's pool first",
        "klimb",
        {"family": LAST_LAYERS, "method": "reverse_kl", **REPLAY},
    ),
    "klimb_reverse_kl": (
        "klimb reverse_kl (the objective of RLOO)",
        "klimb",
        {"family": LAST_LAYERS, "method": "reverse_kl", "num_replay": 0},
    ),
    "klimb_log_variance_8": (
        "klimb log_variance, replay, the plan's pool first, rank 8, average of the last weights",
        "klimb",
        {"family": RANK_8, "method": "log_variance", "ema_decay": 0.9, **REPLAY},
    ),
    "trl_rloo": ("trl RLOOTrainer", "RLOOTrainer", {"family": LAST_LAYERS}),
    "trl_rloo_8": ("trl RLOOTrainer, rank 8", "RLOOTrainer", {"family": RANK_8}),
    "trl_grpo": ("trl GRPOTrainer", "GRPOTrainer", {"family": LAST_LAYERS}),
}


def main():
    options = parsed()
    if options.worker:
        from climb_runs import WORKERS

        kind, job = json.loads(options.worker)
        WORKERS[kind](job)
        return
    if not options.table:
        climb(options)
    print(
        tables(current(options), {name: title for name, (title, _, _) in METHODS.items()}, options.seeds[0])
    )


def current(options):
    """The records of methods as they are now."""
    return [
        r for r in read(options.records) if r["method"] in METHODS and r["options"] == METHODS[r["method"]][2]
    ]


def parsed():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=METHODS, default=list(METHODS), help="these methods")
    add("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3], help="learning rates to try")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the first one is tuned on")
    add("--steps", type=int, default=64, help="of every run")
    add("--every", type=int, default=8, help="steps between policies that are certified")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, help="of each run; left out: the cores divided among the jobs")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--model", default="smollm2-135m", help="name, or a folder of weights")
    add("--held-out", type=int, default=24, help="prompts of a certificate")
    add("--held-out-draws", type=int, default=32, help="draws a prompt of a certificate")
    add("--records", type=Path, default=HERE / "records", help="where finished runs are kept")
    add("--work", type=Path, default=HERE.parent / "runs" / "climb_vs_trl", help="where unfinished ones are")
    add("--table", action="store_true", help="run nothing, print the tables of what is recorded")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def climb(options):
    """Every run that is not recorded: all learning rates on the first seed, then the best ones on the others."""
    import torch

    from klimb.models.hub import default_dtype

    cuda = options.device == "cuda"
    dtype = str(default_dtype(options.device)).removeprefix("torch.")
    common = {
        "machine": {
            "device": options.device,
            "name": torch.cuda.get_device_name() if cuda else processor(),
            "threads": options.threads or max(1, os.cpu_count() // options.jobs),
            "jobs": options.jobs,
        },
        "settings": {
            "beta": 0.197,
            "prompts": 4,
            "generations": 8,
            "tokens": 16,
            "held_out": options.held_out,
            "held_out_draws": options.held_out_draws,
            "dtype": dtype,
            "certified_in": "float32"
            if cuda
            else dtype,  # float32 has no rounding in its KL, and takes a CPU thrice as long
        },
        "steps": options.steps,
        "every": options.every,
    }

    def run(method, rate, seed):
        return common | {"method": method, "options": METHODS[method][2], "rate": rate, "seed": seed}

    first, *others = options.seeds
    finish([run(method, rate, first) for method in options.only for rate in options.rates], options)
    alike = [r for r in current(options) if all(r[name] == common[name] for name in ("machine", "settings"))]
    best = {method: best_rates(alike, method, first) for method in options.only}
    finish([run(m, rate, seed) for seed in others for m in options.only for rate in best[m]], options)


def finish(runs, options):
    """Carry out and record the runs that are not recorded, `options.jobs` at a time."""
    todo = missing(runs, read(options.records))
    if not todo:
        return
    worker(options, "reference", reference_of(todo[0], options), "untrained.json")
    plans = {job["folder"]: job for run in todo if (job := plan_of(run, options))}
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: worker(options, "plan", job, "cost.json"), plans.values()))
        list(pool.map(partial(finished, options), todo))


def finished(options, run):
    """Train, certify, record; each in a process of its own, and what an earlier day has done is not done again."""
    folder, trainer = work_of(run, options), METHODS[run["method"]][1]
    reference, plan = reference_of(run, options)["folder"], plan_of(run, options)
    job = run | {
        "folder": folder,
        "trainer": trainer,
        "reference": reference,
        "plan": plan and plan["folder"],
    }
    worker(options, "klimb" if trainer == "klimb" else "trl", job, "trained.json")
    worker(options, "certify", job, "certified.json")
    trained, certified, untrained = (
        json.loads(Path(path).read_text())
        for path in (f"{folder}/trained.json", f"{folder}/certified.json", f"{reference}/untrained.json")
    )
    record = run | {
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
        "ended": trained["ended"],
        "checkpoints": [mark | certified.get(str(mark["step"]), untrained) for mark in trained["marks"]],
    }
    path = options.records / file_name(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    last = record["checkpoints"][-1]
    print(
        f"{path.stem}: step {last['step']}, {last['seconds']:.0f} s, reward {last['reward']['value']:.3f}, KL "
        f"{last['kl']['value']:.2f}, gap {last['gap']['value']:.3f}, share {last['attained']['value']:.2f}",
        file=sys.stderr,
        flush=True,
    )


def worker(options, kind, job, result):
    """Run a worker in a process of its own, unless an earlier one of the same job left its result."""
    folder, text = Path(job["folder"]), json.dumps([kind, job | {"model": options.model}])
    if (folder / result).exists() and (folder / f"{kind}.job").read_text() == text:
        return
    if kind != "certify" and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / result).unlink(missing_ok=True)
    (folder / f"{kind}.job").write_text(text)
    threads = str(job["machine"]["threads"])
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (folder / f"{kind}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, __file__, "--worker", text],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if done.returncode:
        last = (folder / f"{kind}.log").read_text().strip().splitlines()[-1:]
        raise SystemExit(f"{kind} of {folder} ended with {done.returncode}: {last}; see {folder / kind}.log")


def work_of(run, options):
    """The folder of a run that is not finished."""
    return str(options.work / file_name(run).removesuffix(".json"))


def plan_of(run, options):
    """The job of drawing the pool that this run starts from, or None; runs of one seed and size share it."""
    draws, seed = run["options"].get("num_plan_draws"), run["seed"]
    if draws is None:
        return None
    return {
        **{name: run[name] for name in ("machine", "settings", "seed")},
        "options": {name: run["options"][name] for name in ("family", "num_plan_draws")},
        "folder": str(Path(work_of(run, options)).parent / f"plan-{draws}-seed{seed}"),
    }


def reference_of(run, options):
    """The job of drawing the reference that all certificates share; of its family nothing but zeros is seen."""
    return {
        **{name: run[name] for name in ("machine", "settings")},
        "options": {"family": LAST_LAYERS},
        "folder": str(Path(work_of(run, options)).parent / "reference"),
    }


if __name__ == "__main__":
    main()
