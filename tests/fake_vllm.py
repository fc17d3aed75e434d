"""A stand-in for a vLLM server: the same addresses and answers, backed by a tiny model, token by token without a cache.

Nothing of klimb is in it, so what it draws is also an independent reference.
"""

import contextlib
import copy
import json
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

LOCK = threading.Lock()
"""requests to all stand-ins come one after the other: peft loads an adapter by changing torch for all threads"""


@contextlib.contextmanager
def fake_vllm(model_folder, *, ends):
    """The stand-in: `url`; `requests`, the payloads of completions; `fault(path, payload)` may give (status, text) or "die".

    `begin_anew()` leaves it as a process is that was started again.

    `ends` are those of its own generation_config.json.
    """
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    # Here and not in the server's thread: while it loads, transformers takes from all models their tied weights.
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()

    def loaded(adapter=None, folder=None):
        model = copy.deepcopy(base)
        if folder is not None:
            found = model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
            assert not found.unexpected_keys
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own, which the test suite would make an error of
            return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()

    fake = SimpleNamespace(
        requests=[],
        fault=lambda path, payload: None,
        models={"base": loaded()},
        version="default",
        loads=[],
        change=lambda answer: answer,
        ends=set(ends),
    )

    def answer(path, payload):
        if path == "/v1/load_lora_adapter":
            if payload["lora_name"] in fake.models:
                return 400, {"error": {"message": f"{payload['lora_name']} has already been loaded"}}
            fake.models[payload["lora_name"]] = loaded(payload["lora_path"])
            fake.loads.append(payload["lora_name"])
        elif path == "/v1/unload_lora_adapter":
            fake.models.pop(payload["lora_name"], None)
        elif path == "/collective_rpc":
            assert payload["method"] == "reload_weights"
            fake.loads.append(payload["kwargs"]["weights_path"])
            fake.models["base"] = loaded(folder=payload["kwargs"]["weights_path"])
        elif path == "/update_weight_version":
            fake.version = payload["new_version"]
        elif path == "/v1/completions":
            fake.requests.append(payload)
            if payload["model"] not in fake.models:
                return 404, {"error": {"message": f"The model {payload['model']} does not exist."}}
            return 200, fake.change({"choices": drawn(fake.models[payload["model"]], payload, fake.ends)})
        return 200, {}

    def begin_anew():
        fake.models, fake.version = {"base": loaded()}, "default"

    fake.begin_anew = begin_anew

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/weight_info":
                self.reply(200, {"weight_version": fake.version})
                return
            cards = [{"id": name, "parent": None if name == "base" else "base"} for name in fake.models]
            self.reply(200, {"data": cards})

        def do_POST(self):
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/collective_rpc":
                time.sleep(0.05)  # who does not wait for the new weights draws from the old ones
            with LOCK:
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


@contextlib.contextmanager
def fake_engine(*, ends, sleeps=True):
    """The package vllm, as far as klimb knows it: what its engine was told lies in `said`; it draws only when it is awake."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    said = []

    class LLM:
        def __init__(self, model, *, enable_sleep_mode, **options):
            assert enable_sleep_mode == sleeps
            assert (options["logprobs_mode"], options["dtype"]) == ("processed_logprobs", "float32")
            self.awake, self.adapters, self.llm_engine = True, {}, self
            self.take(model)
            said.append("start")

        def take(self, folder):
            self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

        def generate(self, prompts, params, *, lora_request, use_tqdm):
            assert self.awake
            said.append("draw")
            assert not use_tqdm
            model = self.base
            if lora_request is not None:
                name, number, folder = vars(lora_request).values()
                assert self.adapters.setdefault(number, name) == name
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()
            return [
                SimpleNamespace(outputs=[one_of(x) for x in drawn(model, {**vars(p), **prompt}, set(ends))])
                for prompt, p in zip(prompts, params, strict=True)
            ]

        def remove_lora(self, number):
            self.adapters.pop(number)

        def collective_rpc(self, method, kwargs):
            assert self.awake
            assert method == "reload_weights"
            said.append("weights")
            self.take(kwargs["weights_path"])

        def reset_prefix_cache(self):
            return True

        def sleep(self, level):
            assert self.awake
            said.append("sleep")
            self.awake = False

        def wake_up(self):
            assert not self.awake
            said.append("wake")
            self.awake = True

    def one_of(choice):
        laws = [
            {token: SimpleNamespace(logprob=x)}
            for token, x in zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
        ]
        return SimpleNamespace(**{**choice, "logprobs": laws})

    def request(name, number, folder):
        return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=folder)

    platform = SimpleNamespace(is_cpu=lambda: not sleeps, is_sleep_mode_available=lambda: sleeps)
    modules = {
        "vllm": SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace),
        "vllm.platforms": SimpleNamespace(current_platform=platform),
        "vllm.lora.request": SimpleNamespace(LoRARequest=request),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield said


@torch.no_grad()
def drawn(model, payload, ends):
    """The choices of one request; each draw has a generator of its own, seeded by the request's seed and its index."""
    n = payload["n"]
    generators = [torch.Generator().manual_seed(payload["seed"] + i) for i in range(n)]
    prompt = payload["prompt"] if "prompt" in payload else payload["prompt_token_ids"]
    rows, laws = [list(prompt) for _ in range(n)], [[] for _ in range(n)]
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
    tokens = [row[len(prompt) :] for row in rows]
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
