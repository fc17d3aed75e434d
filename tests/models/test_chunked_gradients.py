"""Training is signed maximum likelihood: however the batch is cut, the gradient is that of the whole objective.

The measure of it is plain: one forward pass a completion without cache or padding, the objective on their sums,
`backward()` once through everything.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from klimb.backward import backward, known_numbers
from klimb.data import Pool
from klimb.models import policy as policy_module
from klimb.models.families import full, lora
from klimb.models.policy import CausalPolicy
from klimb.objectives import log_variance, reverse_kl
from klimb.objectives.surrogate import dapo, grpo, ppo
from klimb.target import tilt

SCALE = 0.3
CHUNKS = {"one chunk": 100_000, "a chunk of some prompts": 45, "a prompt a chunk": 19, "groups in pieces": 1}


@pytest.fixture
def pool(examples, made_up, tokenizer):
    draws = made_up(examples, 4, len(tokenizer))
    generator = torch.Generator().manual_seed(3)

    def table(center, spread):
        noise = torch.randn(draws.num_prompts, draws.num_draws, generator=generator, dtype=torch.float64)
        return center + spread * noise

    log_ref = -3.0 * draws.lengths + table(0, 1)
    return Pool(replace(draws, log_q=log_ref + table(0, 0.3)), table(0, 1), log_ref)


def plain_gradient(policy, pool, target, objective, plain):
    draws = pool.draws
    with policy.activate():
        log_pi = torch.stack(
            [
                torch.stack([plain(policy.model, policy.render(example), ids).sum() for ids in group])
                for example, group in zip(draws.examples, draws.completions, strict=True)
            ]
        )
        value = objective(log_pi=log_pi, log_target=pool.log_ref + pool.reward / target.beta)
        (SCALE * value.sum()).backward()
    return taken(policy), value.detach(), log_pi.detach()


def taken(policy):
    gradients = [p.grad.clone() for p in policy.trainable]
    for p in policy.trainable:
        p.grad = None
    return gradients


def relative(a, b):
    difference = sum((x - y).square().sum() for x, y in zip(a, b, strict=True)).sqrt()
    return (difference / sum(y.square().sum() for y in b).sqrt()).item()


def moved(policy):
    """Away from the start, where B = 0 and half of the adapter's gradient is zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in policy.trainable:
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return policy


@pytest.mark.parametrize("objective", [log_variance, partial(reverse_kl, log_q=None)])
@pytest.mark.parametrize(
    ("family", "name", "dtype", "tolerance"),
    [
        (lora, "gpt2", torch.float64, 1e-12),  # the one whose norms do not fall back to float32
        (full, "gpt2", torch.float64, 1e-12),
        (lora, "llama_tied", torch.float32, 4e-6),
        (full, "llama_tied", torch.float32, 2e-6),
        (full, "gemma2", torch.float32, 2e-6),
    ],
)
def test_chunks_change_no_gradient(build, tokenizer, plain, pool, objective, family, name, dtype, tolerance):
    policy, reference = family(build(name, dtype=dtype), tokenizer)
    policy = moved(policy)
    target = tilt(reference, None, 0.5)
    expected, value, log_pi = plain_gradient(policy, pool, target, objective, plain)
    for how, max_chunk_tokens in CHUNKS.items():
        cut = replace(policy, max_chunk_tokens=max_chunk_tokens)
        passed = backward(cut, pool.draws, known_numbers(pool, target), objective, scale=SCALE)
        assert relative(taken(cut), expected) < tolerance, how
        scale = 1e5 * tolerance  # values are sums of squares of some hundred nats
        assert torch.allclose(passed.value.double(), value.double(), rtol=10 * tolerance, atol=scale), how
        wanted = pool.log_ref + pool.reward / 0.5 - log_pi
        assert torch.allclose(passed.residual.double(), wanted.double(), atol=scale), how
        tokens = policy.log_prob(pool.draws).detach()
        assert torch.allclose(passed.token_log_pi, tokens, atol=scale), how
        assert torch.allclose(passed.log_pi, pool.draws.sequence_sums(tokens), atol=scale), how
        assert not torch.allclose(passed.token_log_pi, tokens.flip(0), atol=scale)


@pytest.mark.parametrize("objective", [grpo, dapo, ppo])
def test_chunks_change_no_gradient_of_token_level_objectives(build, tokenizer, pool, objective):
    """The whole batch in one chunk is the measure; that one chunk is right, the test above shows."""
    policy, reference = lora(build("gpt2", dtype=torch.float64), tokenizer)
    policy = moved(policy)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        old = policy.log_prob(pool.draws)
    old = old + 0.1 * torch.randn(old.shape, generator=generator, dtype=torch.float64)
    known = known_numbers(pool, tilt(reference, None, 0.5)) | {
        "token_log_old": old,
        "token_log_ref": old + 0.3 * torch.randn(old.shape, generator=generator, dtype=torch.float64),
        "advantage": torch.randn(pool.reward.shape, generator=generator, dtype=torch.float64),
        "token_advantage": torch.randn(old.shape, generator=generator, dtype=torch.float64),
    }
    backward(replace(policy, max_chunk_tokens=100_000), pool.draws, known, objective, scale=SCALE)
    expected = taken(policy)
    for how, max_chunk_tokens in CHUNKS.items():
        cut = replace(policy, max_chunk_tokens=max_chunk_tokens)
        backward(cut, pool.draws, known, objective, scale=SCALE)
        assert relative(taken(cut), expected) < 1e-12, how
    mixed_up = known | {name: x.flip(0) for name, x in known.items() if name.startswith("token_adv")}
    mixed_up |= {"advantage": known["advantage"].flip(0)}
    backward(policy, pool.draws, mixed_up, objective, scale=SCALE)
    assert relative(taken(policy), expected) > 0.1


def test_the_mutant_that_lets_each_piece_have_its_own_mean_is_noticed(build, tokenizer, plain, pool):
    # cut a group of four into two of two, as micro-batches do that do not know of the group
    policy, reference = lora(build("gpt2", dtype=torch.float64), tokenizer)
    policy = moved(policy)
    target = tilt(reference, None, 0.5)
    expected, _, _ = plain_gradient(policy, pool, target, log_variance, plain)

    def halves(log_pi, log_target):
        return sum(log_variance(log_pi[:, k : k + 2], log_target[:, k : k + 2]) for k in (0, 2)) / 2

    backward(policy, pool.draws, known_numbers(pool, target), halves, scale=SCALE)
    assert relative(taken(policy), expected) > 0.1


def test_gradients_are_added_to_what_is_there(build, tokenizer, pool):
    policy, reference = lora(build("gpt2", dtype=torch.float64), tokenizer)
    target = tilt(reference, None, 0.5)
    backward(policy, pool.draws, known_numbers(pool, target), log_variance, scale=SCALE)
    once = [p.grad.clone() for p in policy.trainable]
    backward(policy, pool.draws, known_numbers(pool, target), log_variance, scale=SCALE)
    assert relative([p.grad for p in policy.trainable], [2 * g for g in once]) < 1e-12


@pytest.mark.parametrize(("width", "tokens"), [(64, 2048), (576, 1024), (896, 658), (4096, 512)])
def test_a_chunk_is_as_large_as_the_model_is_narrow(build, tokenizer, width, tokens):
    policy = CausalPolicy(build("gpt2"), tokenizer)
    policy.model.config.hidden_size = width
    assert policy.chunk_tokens == tokens
    assert replace(policy, max_chunk_tokens=7).chunk_tokens == 7


@pytest.mark.parametrize(("group_tokens", "passes"), [(2048, 1), (40, 4)])
def test_a_group_that_fits_is_read_once(pool, build, tokenizer, examples, monkeypatch, group_tokens, passes):
    """Left to itself a chunk is small; the draws of one prompt still go together as long as the memory allows."""
    monkeypatch.setattr(policy_module, "CHUNK_TOKENS", {"cpu": 5})
    monkeypatch.setattr(policy_module, "GROUP_TOKENS", group_tokens)
    policy, reference = lora(build("llama_tied"), tokenizer)
    group = [torch.arange(8, 8 + n) for n in (13, 17, 19)]
    one = replace(
        pool.draws,
        examples=examples[:1],
        completions=[group],
        finished=pool.draws.finished[:1, :3],
        log_q=None,
    )
    rows = []
    scored = CausalPolicy.log_prob
    monkeypatch.setattr(
        CausalPolicy, "log_prob", lambda self, draws: rows.append(draws.num_draws) or scored(self, draws)
    )
    known = known_numbers(Pool(one, torch.rand(1, 3), torch.rand(1, 3)), tilt(reference, None, 0.5))
    backward(policy, one, known, log_variance, scale=SCALE)
    assert len(rows) == passes
