"""Tiny random language models of five kinds, one tokenizer, and the plainest way to score a completion with them.

Everything is built offline from a seed. The weights are drawn wide (a law near the uniform one would hide every
mistake in positions, masks and caches), and the plain score is transformers' own forward pass: one sequence, no
cache, no padding, log_softmax of its logits in float32.
"""

import ctypes

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from klimb.data import Draws, Example
from klimb.models import compiled, cpu_kernels, fused_attention
from klimb.models.policy import CausalPolicy

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?0123456789"
ARCHITECTURES = ("llama_tied", "llama_untied", "qwen2", "gpt2", "gemma2")
SEED = 7
ENDS = [0, 7, 12, 20, 30]  # several, as in chat models, and so that completions of all lengths are drawn


def spell(letters):
    """A tokenizer of single letters; token 0 ends, token 1 pads."""
    special = ["<end>", "<pad>", "<u>", "<s>", "<a>"]
    words = {token: i for i, token in enumerate([*special, *letters])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<end>",
        pad_token="<pad>",
        additional_special_tokens=special[2:],
        chat_template=TEMPLATE,
    )


def build_model(name, *, vocabulary, dtype=torch.float32, ends=ENDS, width=1.0):
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "initializer_range": 0.3 * width,
        "bos_token_id": None,
        "eos_token_id": ends,
        "pad_token_id": 1,
    }
    torch.manual_seed(SEED)
    if name.startswith("llama"):
        model = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=name == "llama_tied"))
    elif name == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=False))
    elif name == "gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(
                **common,
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=6,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=4.0,
                layer_types=["sliding_attention", "full_attention"],
            )
        )
    else:
        assert name == "gpt2"
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=96,
                n_embd=32,
                n_layer=2,
                n_head=4,
                initializer_range=0.3 * width,
                resid_pdrop=0.5,
                embd_pdrop=0.5,
                attn_pdrop=0.5,
                bos_token_id=None,
                eos_token_id=ends,
                pad_token_id=1,
            )
        )
    return model.to(dtype).eval().requires_grad_(False)


def plain_scores(model, prompt, completion):
    """[T] log pi(token | everything before it), from one forward pass of the model as its makers wrote it."""
    ids = torch.cat([torch.tensor(prompt), completion])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(1)[len(prompt) - 1 : -1].gather(1, completion[:, None])[:, 0]


@pytest.fixture(scope="session")
def tokenizer():
    return spell(LETTERS)


@pytest.fixture
def seven_tokens():
    """A fresh Llama and its tokenizer whose vocabulary is so small that every completion can be listed."""
    tokenizer = spell("ab")
    return build_model("llama_tied", vocabulary=len(tokenizer), ends=[0]), tokenizer


@pytest.fixture(scope="session")
def build(tokenizer):
    """build(name, dtype=...) -> a fresh model of that architecture."""

    def make(name="llama_tied", **options):
        return build_model(name, vocabulary=len(tokenizer), **options)

    return make


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def policy(build, tokenizer, architecture):
    return CausalPolicy(build(architecture), tokenizer)


@pytest.fixture(scope="session")
def examples():
    """Prompts of 1 to 61 tokens, as text and as chat, so that a batch of them is mostly padding."""
    return [
        Example("k"),
        Example("the cat sat on the mat, and the dog sat on the cat. why? 42!"),
        Example([{"role": "user", "content": "hi"}]),
        Example([{"role": "system", "content": "be brief."}, {"role": "user", "content": "name a bird"}]),
        Example("abc"),
    ]


@pytest.fixture(scope="session")
def plain():
    """plain(model, prompt ids, completion ids) -> [T]."""
    return plain_scores


@pytest.fixture(scope="session")
def plain_sums():
    """plain_sums(policy, draws) -> [P, G], one plain forward pass a completion."""

    def sums(policy, draws):
        with policy.activate(), torch.no_grad():
            table = [
                [plain_scores(policy.model, policy.render(example), ids).sum() for ids in group]
                for example, group in zip(draws.examples, draws.completions, strict=True)
            ]
        return torch.tensor(table)

    return sums


@pytest.fixture(scope="session")
def letters_policy():
    """A policy over 8 tokens, one of them the end, whose completions of length two can all be written down."""
    spelling = spell("xyz")
    return CausalPolicy(build_model("llama_untied", vocabulary=len(spelling), ends=[0], width=0.7), spelling)


@pytest.fixture(scope="session")
def enumerated():
    """enumerated(policy, example, longest, law) -> all completions and their probabilities, float64.

    `law` maps logits [V] to probabilities [V]; by default softmax. Everything comes from plain forward passes.
    """

    def enumerate_(policy, example, longest, law=lambda logits: logits.softmax(0)):
        prompt, found = policy.render(example), {}

        def grow(prefix, probability):
            ids = torch.tensor([*prompt, *prefix])[None]
            with torch.no_grad():
                step = law(policy.model(input_ids=ids, use_cache=False).logits[0, -1].double())
            for token, p in enumerate(step.tolist()):
                longer = (*prefix, token)
                if token in policy.end or len(longer) == longest:
                    found[longer] = probability * p
                else:
                    grow(longer, probability * p)

        grow((), 1.0)
        return list(found), torch.tensor(list(found.values()), dtype=torch.float64)

    return enumerate_


@pytest.fixture(scope="session")
def made_up():
    """made_up(examples, G, vocabulary) -> random completions of 1 to 9 tokens that nobody drew from a model."""

    def make(examples, num_draws, vocabulary, seed=0):
        generator = torch.Generator().manual_seed(seed)
        completions = [
            [
                torch.randint(0, vocabulary, (1 + (3 * p + 2 * g) % 9,), generator=generator)
                for g in range(num_draws)
            ]
            for p in range(len(examples))
        ]
        return Draws(examples, completions, finished=torch.ones(len(examples), num_draws, dtype=torch.bool))

    return make


@pytest.fixture
def plain_kernels(monkeypatch):
    """In the place of a GPU's fused kernels what they compute, sequence by sequence."""

    def sequences(run):
        used = (run.keys[1:] - run.keys[:-1]) if run.used is None else run.used
        for s, (start, end) in enumerate(
            zip(run.queries[:-1].tolist(), run.queries[1:].tolist(), strict=True)
        ):
            begin = int(run.keys[s])
            yield slice(start, end), slice(begin, begin + int(used[s]))

    def weighed(run, query, key, scale):
        score = (
            torch.einsum("qhw,shw->hqs", query, key.repeat_interleave(query.shape[1] // key.shape[1], 1))
            * scale
        )
        later = torch.arange(score.shape[2]) > torch.arange(score.shape[1])[:, None]
        return score.masked_fill(later, -torch.inf) if run.causal else score

    def forward(run, query, key, value, scale):
        out, log_sum = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
        for asked, said in sequences(run):
            score = weighed(run, query[asked], key[said], scale)
            log_sum[:, asked] = score.logsumexp(-1)
            wide = value[said].repeat_interleave(query.shape[1] // value.shape[1], 1)
            out[asked] = torch.einsum("hqs,shw->qhw", score.softmax(-1), wide)
        return out, log_sum

    def backward(run, upstream, query, key, value, out, log_sum, scale):
        found = [torch.zeros_like(x) for x in (query, key, value)]
        groups = query.shape[1] // key.shape[1]
        for asked, said in sequences(run):
            q, g = query[asked], upstream[asked]
            k, v = (x[said].repeat_interleave(groups, 1) for x in (key, value))
            weights = (weighed(run, q, key[said], scale) - log_sum[:, asked, None]).exp()
            level = (g * out[asked]).sum(-1).t()[..., None]
            inner = weights * (torch.einsum("qhw,shw->hqs", g, v) - level) * scale
            found[0][asked] += torch.einsum("hqs,shw->qhw", inner, k)
            for place, x in (
                (1, torch.einsum("hqs,qhw->shw", inner, q)),
                (2, torch.einsum("hqs,qhw->shw", weights, g)),
            ):
                found[place][said] += x.unflatten(1, (-1, groups)).sum(2)
        return tuple(found)

    monkeypatch.setattr(fused_attention, "run_forward", forward)
    monkeypatch.setattr(fused_attention, "run_backward", backward)


@pytest.fixture(scope="session")
def wide_model(tiny_model, tmp_path_factory):
    """The tiny model with heads as wide as vLLM takes them."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("wide-model")
    config = AutoConfig.from_pretrained(tiny_model)
    config.hidden_size, config.head_dim = 64, 32
    with torch.random.fork_rng():
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


PRODUCTS = {
    "as they are": [],
    "dot products": ["-U__AMX_BF16__"],
    "plain": ["-U__AMX_BF16__", "-U__AVX512BF16__"],
}


@pytest.fixture(scope="session", params=PRODUCTS)
def loops(request, tmp_path_factory):
    """The compiled loops, for a processor whose products of bfloat16 are no better than these."""
    if not PRODUCTS[request.param]:
        found = compiled.library()
    else:
        flags = [*compiled._flags(), *PRODUCTS[request.param]]
        target = tmp_path_factory.mktemp("loops") / "loops.so"
        sources = {
            name: compiled.files("klimb.models").joinpath(name).read_bytes() for name in compiled.SOURCES
        }
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(compiled, "_flags", lambda: flags)
            compiled._compile(compiled._compiler(), sources, compiled._openmp(), target)
        found = ctypes.CDLL(str(target))
    if not found.attention_ready():
        pytest.skip("the system does not lend the processor's tiles")
    return found


@pytest.fixture
def products(loops, monkeypatch):
    """Attention, and products of few rows, by these."""
    monkeypatch.setattr(cpu_kernels, "library", lambda: loops)
    monkeypatch.setattr(cpu_kernels, "multiplies", lambda: True)
    cpu_kernels._loop.cache_clear()
    yield
    cpu_kernels._loop.cache_clear()
