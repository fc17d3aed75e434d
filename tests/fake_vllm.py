"""A stand-in for a vLLM server: the same addresses and answers, backed by a tiny model, token by token without a cache.

Nothing of klimb is in it, so what it draws is also an independent reference.
"""

import contextlib
import json
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch


@contextlib.contextmanager
def fake_vllm(model_folder, *, ends):
    """The stand-in: `url`; `requests`, the payloads of completions; `fault(path, payload)` may give (status, text) or "die".

    `ends` are those of its own generation_config.json.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def loaded(adapter=None, folder=model_folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own, which the test suite would make an error of
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()

    fake = SimpleNamespace(
        requests=[],
        fault=lambda path, payload: None,
        models={"base": loaded()},
        loads=[],
        change=lambda answer: answer,
        ends=set(ends),
    )
    lock = threading.Lock()

    def answer(path, payload):
        if path == "/v1/load_lora_adapter":
            if payload["lora_name"] in fake.models:
                return 400, {"error": {"message": f"{payload['lora_name']} has already been loaded"}}
            fake.models[payload["lora_name"]] = loaded(payload["lora_path"])
            fake.loads.append(payload["lora_name"])
        elif path == "/v1/unload_lora_adapter":
            fake.models.pop(payload["lora_name"])
        elif path == "/collective_rpc":
            assert payload["method"] == "reload_weights"
            fake.models["base"] = loaded(folder=payload["kwargs"]["weights_path"])
        elif path == "/v1/completions":
            fake.requests.append(payload)
            if payload["model"] not in fake.models:
                return 404, {"error": {"message": f"The model {payload['model']} does not exist."}}
            return 200, fake.change({"choices": drawn(fake.models[payload["model"]], payload, fake.ends)})
        return 200, {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            cards = [{"id": name, "parent": None if name == "base" else "base"} for name in fake.models]
            self.reply(200, {"data": cards})

        def do_POST(self):
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:  # one after the other; and transformers loads models by changing torch for all threads
                fault = fake.fault(self.path, payload)
                said = None if fault == "die" else fault or answer(self.path, payload)
            if said is None:
                self.close_connection = True
                return
            self.reply(*said)

        def reply(self, status, body):
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the other side gave up
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@torch.no_grad()
def drawn(model, payload, ends):
    """The choices of one request; each draw has a generator of its own, seeded by the request's seed and its index."""
    n = payload["n"]
    generators = [torch.Generator().manual_seed(payload["seed"] + i) for i in range(n)]
    rows, laws = [list(payload["prompt"]) for _ in range(n)], [[] for _ in range(n)]
    ends = ends | set(payload["stop_token_ids"])
    running = list(range(n))
    for _ in range(payload["max_tokens"]):
        logits = model(input_ids=torch.tensor([rows[i] for i in running])).logits[:, -1]
        log_prob = (logits / payload["temperature"]).log_softmax(1)
        for i, law in zip(list(running), log_prob, strict=True):
            token = int(torch.multinomial(law.exp(), 1, generator=generators[i]))
            rows[i].append(token)
            laws[i].append(law[token].item())
            if token in ends:
                running.remove(i)
        if not running:
            break
    tokens = [row[len(payload["prompt"]) :] for row in rows]
    return [
        {
            "index": i,
            "text": "",
            "token_ids": tokens[i],
            "logprobs": {"token_logprobs": laws[i]},
            "finish_reason": "stop" if tokens[i][-1] in ends else "length",
        }
        for i in range(n)
    ]
