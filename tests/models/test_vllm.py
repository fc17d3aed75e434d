"""The contract of a sampler, held by the local one, by the stand-in of a vLLM server, and by vLLM itself, a server's and inside.

vLLM needs an environment of its own: `make test-vllm` makes it, says where its Python is in KLIMB_VLLM_PYTHON, for a server,
and runs these tests with that Python too, for an engine of the same process.
"""

import contextlib
import importlib.util
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from klimb.data import Example
from klimb.models.families import full, lora
from klimb.models.hub import load_model
from klimb.models.soft_prompt import soft_prompt
from klimb.samplers import vllm, vllm_inside
from klimb.samplers.ancestral import ancestral
from klimb.samplers.vllm import Vllm, Weights
from klimb.samplers.vllm_server import Server

pytest.importorskip("httpx2")
pytest.importorskip("stamina")
from fake_vllm import fake_engine, fake_vllm
from real_vllm import PYTHON, real_vllm

LONGEST = 6
TOLERANCE = 1e-3  # nats a completion, float32 on both sides
ENDS = [0, 7]
EXAMPLES = [
    Example("the cat sat on the mat"),
    Example("abc"),
    Example([{"role": "user", "content": "name a bird"}]),
]


@pytest.fixture(scope="module", autouse=True)
def no_proxy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A Llama with heads as wide as vLLM takes them, and two ends."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("vllm-model")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                eos_token_id=0,
                bos_token_id=None,
                pad_token_id=1,
                initializer_range=0.2,
            )
        )
    model.generation_config.eos_token_id = ENDS
    # a server that is told nothing takes these for its own
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=3, repetition_penalty=1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        "local",
        "stand-in",
        "stand-in inside",
        pytest.param(
            "inside",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("vllm") is None, reason="make test-vllm runs this"
            ),
        ),
        pytest.param("vllm", marks=pytest.mark.skipif(PYTHON is None, reason="make test-vllm runs this")),
    ],
)
def served(request, folder, tmp_path_factory):
    """Makes samplers of one kind."""
    if request.param == "local":
        yield SimpleNamespace(kind="local", make=lambda: partial(ancestral, max_completion_length=LONGEST))
    elif request.param == "stand-in":
        with fake_vllm(folder, ends=ENDS) as fake:
            yield SimpleNamespace(
                kind="stand-in", make=lambda: Vllm(engines=[Server(fake.url)], max_completion_length=LONGEST)
            )
    elif "inside" in request.param:
        with fake_engine(ends=ENDS) if "stand-in" in request.param else contextlib.nullcontext():
            engine = vllm_inside.start(adapters(folder)[1], longest=64, memory=0.1)
            yield SimpleNamespace(
                kind=request.param, make=lambda: Vllm(engines=[engine], max_completion_length=LONGEST)
            )
    else:
        with real_vllm(folder, tmp_path_factory.mktemp("vllm-log") / "log") as url:
            yield SimpleNamespace(
                kind="vllm", make=lambda: Vllm(engines=[Server(url)], max_completion_length=LONGEST)
            )


@pytest.fixture
def adapted(folder):
    """(policy, reference), the policy's adapter moved away from zero."""
    policy, reference = adapters(folder)
    moved(policy, 1)
    return policy, reference


def adapters(folder):
    return lora(*load_model(str(folder), dtype=torch.float32), r=4)


@torch.no_grad()
def moved(policy, seed, by=0.2):
    generator = torch.Generator().manual_seed(seed)
    for weight in policy.parameters():
        weight += by * torch.randn(weight.shape, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def scored(policy, draws):
    return draws.sequence_sums(policy.log_prob(draws))


def apart(draws, policy):
    """The largest difference between the law that was stated and the policy's own, nats a completion."""
    return (draws.log_q - scored(policy, draws)).abs().max().item()


def test_the_law_is_that_of_the_policy_through_every_swap_and_back(served, adapted):
    policy, reference = adapted
    sampler = served.make()
    for seed in (2, 3, 4):
        draws = sampler(policy, EXAMPLES, 16, generator=seeded(seed))
        assert draws.own_law
        assert draws.full_support
        assert apart(draws, policy) < TOLERANCE
        assert apart(draws, reference) > 1  # a swap that took no effect would be seen
        back = sampler(reference, EXAMPLES, 16, generator=seeded(seed))
        assert apart(back, reference) < TOLERANCE
        moved(policy, seed)
        assert apart(draws, policy) > 0.1  # so the next round's draws are of the weights of that round


def test_every_weight_may_move(served, folder):
    policy, reference = full(*load_model(str(folder), dtype=torch.float32))
    sampler = served.make()
    if isinstance(sampler, Vllm):
        sampler.check(reference, EXAMPLES[0])
    moved(policy, 5, by=0.05)
    draws = sampler(policy, EXAMPLES, 16, generator=seeded())
    assert apart(draws, policy) < TOLERANCE
    assert apart(draws, reference) > 1
    assert apart(sampler(reference, EXAMPLES, 16, generator=seeded()), reference) < TOLERANCE


def test_an_engine_keeps_the_name_of_its_weights_and_is_given_them_again_where_it_has_others(served, folder):
    sampler = served.make()
    if not isinstance(sampler, Vllm):
        pytest.skip("the local sampler is given no weights")
    policy, reference = full(*load_model(str(folder), dtype=torch.float32))
    moved(policy, 7, by=0.05)
    sampler(policy, EXAMPLES, 2, generator=seeded())
    (engine,) = sampler.engines
    name = engine.holds()
    engine.take_weights(Weights("another run's", folder))
    assert engine.holds() == "another run's"
    draws = sampler(policy, EXAMPLES, 16, generator=seeded())
    assert engine.holds() == name
    assert apart(draws, policy) < TOLERANCE
    sampler(reference, EXAMPLES, 2, generator=seeded())  # what the tests of adapters stand on


def test_ends_count_once_and_length_is_kept(served, adapted):
    policy, _ = adapted
    draws = served.make()(policy, EXAMPLES, 64, generator=seeded())
    rows = [ids.tolist() for group in draws.completions for ids in group]
    ended = [row[-1] in ENDS for row in rows]
    assert {row[-1] for row in rows} >= set(ENDS)  # both of them end something
    assert all(not set(ENDS) & set(row[:-1]) for row in rows)
    assert all(len(row) == LONGEST for row, end in zip(rows, ended, strict=True) if not end)
    assert {len(row) for row in rows} == set(range(1, LONGEST + 1))
    assert draws.finished.flatten().tolist() == ended
    assert draws.texts == [[policy.decode(ids) for ids in group] for group in draws.completions]
    assert draws.sequence_sums(draws.packed_log_q).allclose(draws.log_q, atol=1e-5)


def test_one_seed_one_set_of_draws(served, adapted):
    policy, _ = adapted
    sampler = served.make()
    first, again, other = (
        [
            ids.tolist()
            for group in sampler(policy, EXAMPLES, 8, generator=seeded(s)).completions
            for ids in group
        ]
        for s in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert len(set(map(tuple, first))) > 8  # draws of one prompt are not one draw


def chance(served, policy, sampler):
    """p of a chi-squared test of many first two tokens against their exact probabilities."""
    draws = sampler(policy, [EXAMPLES[1]] * 16, 500, generator=seeded(6))
    prompt = policy.render(EXAMPLES[1])
    with policy.activate(), torch.no_grad():
        first = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(0)
        seconds = policy.model(
            input_ids=torch.tensor([[*prompt, token] for token in range(len(first))])
        ).logits[:, -1]
        seconds = seconds.double().softmax(1)
    expected = {}
    for token, p in enumerate(first.tolist()):
        if token in ENDS:
            expected[token,] = p
        else:
            expected |= {(token, t): p * s for t, s in enumerate(seconds[token].tolist())}
    seen = dict.fromkeys(expected, 0)
    for group in draws.completions:
        for ids in group:
            seen[tuple(ids[:2].tolist())] += 1
    number = sum(seen.values())
    common = [pair for pair, p in expected.items() if p * number >= 10]
    counts = [*(seen[pair] for pair in common), number - sum(seen[pair] for pair in common)]
    masses = [*(expected[pair] for pair in common), 1 - sum(expected[pair] for pair in common)]
    assert len(common) > 30
    return stats.chisquare(counts, [number * p for p in masses]).pvalue


def test_draws_follow_the_law_and_a_cooler_one_is_noticed(served, adapted, monkeypatch):
    policy, _ = adapted
    assert chance(served, policy, served.make()) > 1e-3
    if served.kind == "local":
        cooler = partial(served.make(), temperature=0.9)
    else:
        cooler = served.make()
        monkeypatch.setitem(vllm.PLAIN, "temperature", 0.9)
    assert chance(served, policy, cooler) < 1e-6


def test_another_model_is_found_out_and_all_weights_are_given_anew(served, folder):
    """Adapters stand on a model that vLLM has to have; all weights it is given, should it hold those of a run that ended."""
    if served.kind == "local":
        pytest.skip("the local sampler has no other model")
    served.make().check(adapters(folder)[1], EXAMPLES[0])
    elsewhere = adapters(folder)[1]
    with torch.no_grad():
        embeddings = elsewhere.model.get_input_embeddings().weight
        embeddings += 0.1 * torch.randn(embeddings.shape, generator=seeded())
    with pytest.raises(ValueError, match=r"differ by .* nats a token from those of the model of this run"):
        served.make().check(elsewhere, EXAMPLES[0])
    policy, reference = full(*load_model(str(folder), dtype=torch.float32))
    moved(policy, 6, by=0.05)
    for who in (policy, reference):
        sampler = served.make()
        sampler.check(who, EXAMPLES[0])
        assert apart(sampler(who, EXAMPLES, 8, generator=seeded()), who) < TOLERANCE


@pytest.mark.skipif(PYTHON is None, reason="make test-vllm runs this")
def test_vllm_itself_is_given_all_weights_again_where_it_began_anew(folder, tmp_path):
    """The same sampler, another process behind the same address."""
    policy, _ = full(*load_model(str(folder), dtype=torch.float32))
    moved(policy, 8, by=0.05)
    with real_vllm(folder, tmp_path / "first") as url:
        server = Server(url)
        sampler = Vllm(engines=[server], max_completion_length=LONGEST)
        assert apart(sampler(policy, EXAMPLES, 16, generator=seeded()), policy) < TOLERANCE
        draw, name = sampler.handed_over(policy), server.holds()
    assert server.holds() is None
    with real_vllm(folder, tmp_path / "second", port=int(url.rpartition(":")[2])):
        assert server.holds() not in (None, name)
        with pytest.raises(ValueError, match="it began anew while it drew"):
            draw(policy, EXAMPLES, 16, generator=seeded())
        assert apart(sampler(policy, EXAMPLES, 16, generator=seeded()), policy) < TOLERANCE
        assert server.holds() == name


def test_virtual_tokens_are_refused(folder):
    policy, _ = soft_prompt(*load_model(str(folder), dtype=torch.float32), num_virtual_tokens=2, init=None)
    with pytest.raises(ValueError, match=r"virtual tokens, .*family lora or full"):
        Vllm(engines=[Server("http://127.0.0.1:1")], max_completion_length=4)(
            policy, EXAMPLES, 2, generator=seeded()
        )
