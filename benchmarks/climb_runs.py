"""What happens inside one process of climb_vs_trl.py: draw a plan, train with klimb or with TRL, certify saved policies.

Every worker takes a job (a dict of plain values), writes into `job["folder"]` and prints nothing. Trainers save adapters at
the same steps, outside the clock, in peft's format; the certificate does not know who trained them.
"""

import json
import time
from functools import partial
from pathlib import Path

import torch

from klimb import store
from klimb.config import Config
from klimb.data import Pool
from klimb.dataset import load_examples
from klimb.loaded import prepare
from klimb.measure import certify
from klimb.models.families import last_layers, lora, save_policy
from klimb.models.hub import load_model
from klimb.models.master import write_out
from klimb.planning import planned
from klimb.pool import draw_pool
from klimb.rewards.load import load_reward
from klimb.samplers.ancestral import ancestral
from klimb.target import tilt
from klimb.training import trained
from klimb.watch import Watch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PROMPTS, REWARD = str(EXAMPLES / "data" / "reviews.jsonl"), f"{EXAMPLES / 'sentiment.py'}:reward"
CERTIFICATE_SEED = 20261126
CERTIFIED = ("reward", "kl", "gap", "attained")


class Clock:
    """Seconds of training so far; it stands still while something else is done."""

    def __init__(self, device, seconds=0.0):
        self.finish = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.seconds, self.since = seconds, None

    def go(self):
        self.since = time.perf_counter()

    def stop(self):
        self.finish()
        self.seconds += time.perf_counter() - self.since
        self.since = None


def saved_at(step, job):
    return step % job["every"] == 0 or step == job["steps"]


def step_folder(job, step):
    return Path(job["folder"]) / f"step-{step:06d}"


def write_trained(job, marks, ended=None):
    (Path(job["folder"]) / "trained.json").write_text(json.dumps({"marks": marks, "ended": ended}))


# klimb: what `klimb train` does, through the same functions, from options of its configuration.


def config_of(job, output_dir, **more):
    settings = job["settings"]
    return Config.model_validate(
        {
            "model_name_or_path": job["model"],
            "device": job["machine"]["device"],
            "dtype": settings["dtype"],
            "dataset_name": PROMPTS,
            "reward_funcs": REWARD,
            "beta": settings["beta"],
            "max_completion_length": settings["tokens"],
            "prompts_per_step": settings["prompts"],
            "num_generations": settings["generations"],
            "lr_scheduler_type": "constant",
            "seed": job["seed"],
            "output_dir": str(output_dir),
            **job["options"],
            **more,
        }
    )


def plan_worker(job):
    """A pool of reference draws for one seed, and the seconds and tokens that it took: several runs start from it."""
    folder = Path(job["folder"])
    loaded = prepare(config_of(job, folder))
    _make_run(folder)
    clock = Clock(job["machine"]["device"])
    clock.go()
    pool, _, _ = planned(loaded, folder, Watch(), to_train=False)
    clock.stop()
    store.write_json(
        folder / "cost.json", {"seconds": clock.seconds, "tokens": int(pool.draws.lengths.sum())}
    )


def klimb_worker(job):
    from safetensors.torch import load_file

    run = Path(job["folder"]) / "klimb"
    plan = job["plan"]
    config = config_of(
        job,
        run,
        learning_rate=job["rate"],
        max_steps=job["steps"],
        save_steps=job["every"],
        save_total_limit=job["steps"],
        plan=plan,
    )
    cost = (
        {"seconds": 0.0, "tokens": 0} if plan is None else json.loads((Path(plan) / "cost.json").read_text())
    )
    loaded = prepare(config)
    _make_run(run)
    clock, tokens = Clock(job["machine"]["device"], cost["seconds"]), cost["tokens"]
    marks = [{"step": 0, "seconds": clock.seconds, "tokens": tokens}]

    def event(kind, record):
        nonlocal tokens
        if kind == "step":
            if "draw" in record["seconds"]:
                each = config.prompts_per_step * config.num_generations
                tokens += round(record["completion_length"] * each)
            if saved_at(record["step"], job):
                clock.stop()
                marks.append({"step": record["step"], "seconds": clock.seconds, "tokens": tokens})
        if kind == "checkpoint":
            clock.go()

    watch = Watch(event=event)
    pool = planned(loaded, run, Watch(), to_train=True)[0] if plan else None
    clock.go()
    ended = None
    try:
        trained(loaded, run, pool=pool, beta=config.beta, resume=False, watch=watch)
    except ValueError as error:  # a learning rate at which it comes apart is a result
        ended = str(error)
    kind = "average" if config.ema_decay else "weights"
    for mark in marks[1:]:
        held = load_file(run / "checkpoints" / f"step-{mark['step']:06d}" / "tensors.safetensors")
        moved = loaded.policy.trainable
        write_out([held[f"{kind}.{i}"] for i in range(len(moved))], moved)
        save_policy(loaded.policy, step_folder(job, mark["step"]))
    write_trained(job, marks, ended)


def _make_run(folder):
    for inner in ("draws", "checkpoints"):
        (folder / inner).mkdir(parents=True)


# TRL: its trainer as it comes, on the same adapters, prompts, reward and batch.


def trl_worker(job):
    import trl
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback

    settings, device = job["settings"], job["machine"]["device"]
    model, tokenizer = load_model(job["model"], dtype=getattr(torch, settings["dtype"]), device=device)
    family = job["options"]["family"]
    layers = family.get("layers")
    torch.manual_seed(job["seed"])
    config = LoraConfig(
        r=family["r"],
        lora_alpha=family["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear" if layers is None else last_layers(model, "all-linear", layers),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    said = load_reward(REWARD)
    clock, tokens = Clock(device), 0
    marks = [{"step": 0, "seconds": 0.0, "tokens": 0}]

    def reward(prompts, completions, completion_ids, **columns):
        nonlocal tokens
        tokens += sum(map(len, completion_ids))
        return said(prompts=prompts, completions=completions)

    class Save(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            clock.go()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if saved_at(state.global_step, job):
                clock.stop()
                marks.append({"step": state.global_step, "seconds": clock.seconds, "tokens": tokens})
                model.save_pretrained(step_folder(job, state.global_step))
                clock.go()

    arguments = getattr(trl, job["trainer"].replace("Trainer", "Config"))(
        str(Path(job["folder"]) / "trl"),
        per_device_train_batch_size=settings["prompts"] * settings["generations"],
        num_generations=settings["generations"],
        max_completion_length=settings["tokens"],
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=settings["beta"],
        learning_rate=job["rate"],
        lr_scheduler_type="constant",
        max_steps=job["steps"],
        gradient_checkpointing=False,
        bf16=False,  # the weights are of that dtype already
        use_cpu=device == "cpu",
        seed=job["seed"],
        report_to="none",
        logging_steps=1000,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"prompt": e.prompt, **e.columns} for e in load_examples(PROMPTS, split="train")]
    trainer = getattr(trl, job["trainer"])(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Save()],
    )
    # a frozen copy of the new adapter, still zero, as the reference: the model without adapter is the same and quicker
    trainer.model.delete_adapter("ref")
    trainer.train()
    write_trained(job, marks)


# The certificate, the same for every policy.


def certify_worker(job):
    """Certify every saved policy of a run, and write `certified.json`: step -> the certificate's numbers."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    policy, target, examples, sampler = _to_certify(job)
    wrapped = policy.activate.args[0]
    pool = _reference_pool(job)
    found = {}
    for mark in json.loads((Path(job["folder"]) / "trained.json").read_text())["marks"][1:]:
        weights = load_file(step_folder(job, mark["step"]) / "adapter_model.safetensors")
        unused = set_peft_model_state_dict(wrapped, weights, adapter_name="policy").unexpected_keys
        assert not unused, unused
        found[mark["step"]] = _certificate(job, policy, target, examples, sampler, pool)
    store.write_json(Path(job["folder"]) / "certified.json", found)


def reference_worker(job):
    """The reference draws that all certificates share, and the certificate of the untrained policy."""
    policy, target, examples, sampler = _to_certify(job)
    pool = draw_pool(
        examples,
        target.reference,
        target.reward,
        sampler,
        num_draws=job["settings"]["held_out_draws"],
        generator=torch.Generator().manual_seed(CERTIFICATE_SEED + 1),
    )
    folder = Path(job["folder"])
    store.write_pool(folder / "reference.parquet", pool, verb="measure-reference", hashes={})
    store.write_json(folder / "untrained.json", _certificate(job, policy, target, examples, sampler, pool))


def _to_certify(job):
    settings = job["settings"]
    dtype, device = getattr(torch, settings["certified_in"]), job["machine"]["device"]
    model, tokenizer = load_model(job["model"], dtype=dtype, device=device)
    family = {name: x for name, x in job["options"]["family"].items() if name != "kind"}
    policy, reference = lora(model, tokenizer, **family)
    examples = load_examples(PROMPTS, split="test", limit=settings["held_out"])
    sampler = partial(ancestral, max_completion_length=settings["tokens"])
    return policy, tilt(reference, load_reward(REWARD), settings["beta"]), examples, sampler


def _reference_pool(job):
    found = store.read_draws(Path(job["reference"]) / "reference.parquet")
    return Pool(found.draws, found.reward, found.log_ref)


def _certificate(job, policy, target, examples, sampler, pool):
    """The same uniform numbers draw for every policy, so that policies differ by less than their intervals say."""
    found, _, _ = certify(
        examples,
        policy,
        target,
        sampler,
        num_draws=job["settings"]["held_out_draws"],
        generator=torch.Generator().manual_seed(CERTIFICATE_SEED),
        reference_pool=pool,
    )
    return {name: getattr(found, name).as_dict() for name in CERTIFIED}


WORKERS = {
    "plan": plan_worker,
    "klimb": klimb_worker,
    "trl": trl_worker,
    "certify": certify_worker,
    "reference": reference_worker,
}
