"""vLLM itself: a server in the environment that `make test-vllm` makes, whose Python KLIMB_VLLM_PYTHON names."""

import contextlib
import os
import signal
import socket
import subprocess
import time

PYTHON = os.environ.get("KLIMB_VLLM_PYTHON")


@contextlib.contextmanager
def real_vllm(folder, log, *, port=None):
    """The address of a vLLM server of its own process, on a free port unless one is said; it is ended with all it started."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port or 0))
        port = free.getsockname()[1]
    own = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    words = ["--model", folder, "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    words += ["--enforce-eager", "--enable-lora", "--max-lora-rank", 16, "--max-loras", 2]
    # on a CPU a draw with a seed ends the engine where its prompt is read in two parts
    words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", 8192]
    words += ["--max-model-len", 64, "--logprobs-mode", "processed_logprobs"]
    with log.open("wb") as said:
        process = subprocess.Popen(
            [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)],
            env={**os.environ, **own},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 240
        while not listens(port):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, f"no vLLM within 240 s: {log.read_text()[-3000:]}"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def listens(port):
    with socket.socket() as there:
        return there.connect_ex(("127.0.0.1", port)) == 0
