"""One training step against TRL's RLOOTrainer on the same work: 8 prompts x 8 generations x 32 new tokens.

    python benchmarks/step_vs_trl.py                  # needs: pip install trl==1.16.0
    python benchmarks/step_vs_trl.py --rounds 3 --steps 3
    python benchmarks/step_vs_trl.py --long           # 4 prompts x 8 x 256, completions end where they end

Both run SmolLM2-135M with LoRA r=16 on all linear layers, in the dtype that this processor multiplies fastest, with
the sequence KL in the reward, gradient checkpointing off and no completion ended early, each in a process of its own,
in turn, several rounds. Where the dtype is bfloat16, TRL runs as it comes (adapters in float32), with peft's
autocast_adapter_dtype=False, which is the fairer peer, and on a CPU also with its head mended (`contiguous_head`). The
first step of each process is not counted. Times differ between machines and hours; the ratio within one run is the result.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from processor import processor

PROMPTS, GENERATIONS, TOKENS = 8, 8, 32
LONG = {"PROMPTS": 4, "TOKENS": 256}
TRL = {
    "trl": {"autocast": True, "mended": False},
    "trl-adapters-as-model": {"autocast": False, "mended": False},
    "trl-adapters-as-model-head-mended": {"autocast": False, "mended": True},
}
SUBJECTS = [
    "a bakery",
    "a night train",
    "a jazz concert",
    "a hotel",
    "a cookbook",
    "a park",
    "a horror film",
    "a shoe",
]


def prompts():
    """The first `PROMPTS` subjects; of long completions a story, most of which the limit cuts."""
    long = TOKENS > 100
    system, task = (
        ("You write stories.", "Write a story about")
        if long
        else ("You write short reviews.", "Write a one-sentence review of")
    )
    return [
        [{"role": "system", "content": system}, {"role": "user", "content": f"{task} {subject}."}]
        for subject in SUBJECTS[:PROMPTS]
    ]


def reward(prompts, completions, **columns):
    """Costs nothing and differs from draw to draw."""
    return [float(sum(map(ord, c[0]["content"])) % 17) for c in completions]


def klimb_worker(steps, model_name, device):
    import torch

    from klimb.data import Example
    from klimb.learn import Recipe
    from klimb.models.families import lora
    from klimb.models.hub import load_model
    from klimb.models.policy import CausalPolicy
    from klimb.objectives import reverse_kl
    from klimb.samplers.ancestral import ancestral
    from klimb.target import tilt
    from klimb.train import train

    model, tokenizer = load_model(model_name, device=device)
    policy, reference = lora(model, tokenizer, r=16, alpha=32)
    if not ends_early():
        never = (model.config.vocab_size,)
        policy = CausalPolicy(model, tokenizer, policy.activate, policy.trainable, end=never)

    def sampler(policy, examples, num_draws, *, generator):
        return ancestral(policy, examples, num_draws, generator=generator, max_completion_length=TOKENS)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    records = []
    for step in train(
        [Example(p) for p in prompts()],
        policy,
        tilt(reference, reward, 0.05),
        sampler,
        Recipe(reverse_kl),
        optimizer,
        max_steps=steps + 1,
        prompts_per_step=PROMPTS,
        num_draws=GENERATIONS,
        generator=torch.Generator().manual_seed(0),
        keep_fresh=False,
    ):
        tokens = step.numbers["tokens"]
        assert ends_early() or tokens == PROMPTS * GENERATIONS * TOKENS
        s = step.seconds
        records.append(
            {
                "sampling": s["draw"],
                "scoring": s["score"],
                "training": s["update"],
                "step": sum(s.values()),
                "tokens": tokens,
            }
        )
    return {"dtype": str(model.dtype), "records": records[1:]}


def contiguous_head(model):
    """The model, its head given states that lie side by side.

    torch 2.13 multiplies a slice of bfloat16 states [rows, tokens, width], which is what `logits_to_keep` leaves, by copying
    the head for every row: 5 s instead of 0.01 for 64 rows of SmolLM2-135M on a CPU.
    """
    model.get_output_embeddings().register_forward_pre_hook(lambda _, states: (states[0].contiguous(),))
    return model


def trl_worker(steps, model_name, device, *, autocast, mended):
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import RLOOConfig, RLOOTrainer

    from klimb.models.hub import load_model

    model, tokenizer = load_model(model_name, device=device)
    model = contiguous_head(model) if mended else model
    dtype = model.dtype
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=autocast)

    def now():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    clock = {"sampling": 0.0, "scoring": 0.0}

    class Timed(RLOOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            start = now()
            made = super()._generate_single_turn(*args, **kwargs)
            clock["sampling"] += now() - start
            tokens.append(sum(map(len, made)))
            return made

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            start = now()
            try:
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            finally:
                if not torch.is_grad_enabled():
                    clock["scoring"] += now() - start

        def training_step(self, *args, **kwargs):
            start, before = now(), dict(clock)
            result = super().training_step(*args, **kwargs)
            spent = {name: clock[name] - before[name] for name in clock}
            total = now() - start
            records.append(
                spent | {"training": total - sum(spent.values()), "step": total, "tokens": tokens[-1]}
            )
            return result

    records, tokens = [], []
    with tempfile.TemporaryDirectory() as folder:
        config = RLOOConfig(
            folder,
            per_device_train_batch_size=PROMPTS * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=TOKENS,
            generation_kwargs={} if ends_early() else {"min_new_tokens": TOKENS},
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            beta=0.05,
            learning_rate=1e-5,
            max_steps=steps + 1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=device == "cpu",
            report_to="none",
            logging_steps=1000,
            save_strategy="no",
            disable_tqdm=True,
        )
        Timed(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": p} for p in prompts()]),
            processing_class=tokenizer,
        ).train()
    return {"dtype": str(dtype), "records": records[1:]}


def ends_early():
    """Whether completions end where they end; both sides' lengths then differ, and seconds a token are compared."""
    return TOKENS > 100


def peak_memory(device):
    """GB of this process so far, or on a GPU of what torch has allocated there."""
    if device == "cpu":
        from klimb.profile import peak_of_process

        return peak_of_process() / 1e9
    import torch

    return torch.cuda.max_memory_allocated() / 1e9


def run(name, steps, model_name, device):
    """One worker in a process of its own; its records, and its peak memory in GB."""
    command = [sys.executable, __file__, "--worker", name, "--steps", str(steps)]
    command += ["--model", model_name, "--device", device, *(["--long"] if ends_early() else [])]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2, help="counted steps in a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each")
    parser.add_argument("--worker", choices=["klimb", *TRL], help=argparse.SUPPRESS)
    parser.add_argument("--model", default="smollm2-135m", help="folder or id; its shape is what is timed")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--long", action="store_true", help="4 prompts x 8 x 256 tokens, ended where they end"
    )
    options = parser.parse_args()
    if options.long:
        globals().update(LONG)
    if options.worker:
        work = (options.steps, options.model, options.device)
        found = klimb_worker(*work) if options.worker == "klimb" else trl_worker(*work, **TRL[options.worker])
        peak = peak_memory(options.device)
        print("\n" + json.dumps(found | {"peak_gb": peak}))
        return
    names, results = ["klimb", "trl"], {}
    others = [
        name for name in TRL if name not in names and (options.device == "cpu" or not TRL[name]["mended"])
    ]
    for _ in range(options.rounds):
        for name in names:
            results.setdefault(name, []).append(run(name, options.steps, options.model, options.device))
            if name == "trl" and "bfloat16" in results["trl"][0]["dtype"] and len(names) == 2:
                names += others  # in float32 they are the same
    import torch
    import transformers
    import trl

    cores = os.cpu_count()
    print(
        f"\n{processor()}, {cores} cores, {options.device}, {results['klimb'][0]['dtype']}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    )
    print(
        f"{PROMPTS} prompts x {GENERATIONS} generations x {TOKENS} tokens, median [min, max] of "
        f"{options.rounds} x {options.steps} steps, seconds\n"
    )
    print("| | step | sampling | scoring | training | tokens | peak memory |\n|---|---|---|---|---|---|---|")
    for name, rounds in results.items():
        records = [record for found in rounds for record in found["records"]]
        cells = []
        for part in ("step", "sampling", "scoring", "training"):
            values = [record[part] for record in records]
            cells.append(f"{statistics.median(values):.1f} [{min(values):.1f}, {max(values):.1f}]")
        cells.append(f"{statistics.median(record['tokens'] for record in records):.0f}")
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(f['peak_gb'] for f in rounds):.1f} GB |")
    ours = statistics.median(r["step"] / r["tokens"] for f in results["klimb"] for r in f["records"])
    memory = statistics.median(f["peak_gb"] for f in results["klimb"])
    for name in names[1:]:
        theirs = statistics.median(r["step"] / r["tokens"] for f in results[name] for r in f["records"])
        more = statistics.median(f["peak_gb"] for f in results[name])
        print(
            f"\n{name} takes {theirs / ours:.2f} times as long a token and {more / memory:.2f} times the memory"
        )


if __name__ == "__main__":
    main()
