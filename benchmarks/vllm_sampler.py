"""How fast a vLLM server on the same processor draws, beside klimb's own sampler, and how far its law is from the scorer's.

    make test-vllm                          # makes .venv-vllm
    python benchmarks/vllm_sampler.py       # SmolLM2-135M, bfloat16, 8 prompts x 8 completions of up to 32 tokens

Both draw the same prompts in turn, of the reference and of a policy whose adapter has moved since the last turn; the server is
warm, and its adapter handed over within the time.
"""

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from klimb.dataset import load_examples
from klimb.models.families import lora
from klimb.models.hub import DTYPES, load_model
from klimb.samplers.ancestral import ancestral
from klimb.samplers.vllm import Vllm
from klimb.samplers.vllm_server import Server

OWN = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",
}


@contextlib.contextmanager
def served(python, folder, dtype, log):
    """The address of a vLLM server of the model in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", folder, "--host", "127.0.0.1", "--port", port, "--dtype", dtype, "--enforce-eager"]
    words += ["--enable-lora", "--max-lora-rank", 16, "--max-loras", 2, "--max-model-len", 512]
    # on a CPU a draw with a seed ends the engine where its prompt is read in two parts
    words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", 8192]
    words += ["--logprobs-mode", "processed_logprobs"]
    with log.open("wb") as said:
        process = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)],
            env={**os.environ, **OWN},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 240
        while True:
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=".venv-vllm/bin/python")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    examples = load_examples("examples/data/reviews.jsonl", split="train", limit=asked.prompts)
    model, tokenizer = load_model("smollm2-135m", dtype=DTYPES[asked.dtype])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        policy, reference = lora(model, tokenizer, r=16)
        with served(asked.python, folder, asked.dtype, Path(place) / "log") as url:
            server = Vllm(engines=[Server(url)], max_completion_length=asked.tokens)
            server.check(reference, examples[0])
            own = partial(ancestral, max_completion_length=asked.tokens)
            for name, who in {"reference": reference, "adapter": policy}.items():
                compare(name, who, reference, {"klimb": own, "vllm": server}, examples, asked)


def compare(name, who, reference, samplers, examples, asked):
    """Draw in turn, some rounds after one that does not count; print what came out."""
    generator = torch.Generator().manual_seed(0)
    rates, apart = ({sampler: [] for sampler in samplers} for _ in range(2))
    for turn in range(asked.rounds + 1):
        with torch.no_grad():
            for weight in who.parameters():
                weight += 0.002 * torch.randn(weight.shape, generator=generator)
        for kind, sampler in samplers.items():
            began = time.perf_counter()
            draws = sampler(who, examples, asked.draws, generator=generator)
            seconds = time.perf_counter() - began
            if turn == 0:
                continue
            rates[kind].append(int(draws.lengths.sum()) / seconds)
            with torch.no_grad():
                scored = draws.sequence_sums(who.log_prob(draws))
                moved = (scored - draws.sequence_sums(reference.log_prob(draws))).abs().mean().item()
            apart[kind].append((draws.log_q - scored).abs().flatten())
    for kind in samplers:
        errors = torch.cat(apart[kind])
        print(
            f"{name}, {kind}: {statistics.median(rates[kind]):.0f} tokens/s ({asked.rounds} rounds: {min(rates[kind]):.0f} to "
            f"{max(rates[kind]):.0f}), |log_q - log_prob| a completion: mean {errors.mean():.2g}, 99 % "
            f"{errors.quantile(0.99):.2g}, largest {errors.max():.2g} nats",
            flush=True,
        )
    ratios = [b / a for a, b in zip(rates["klimb"], rates["vllm"], strict=True)]
    print(
        f"{name}: vllm / klimb {statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"{moved:.2g} nats a completion from the reference",
        flush=True,
    )


if __name__ == "__main__":
    main()
