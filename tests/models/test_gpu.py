"""The same code on a GPU: drawing, scoring, learning and measuring, on tiny models; skipped where there is none."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from klimb.learn import Recipe
from klimb.measure import measure
from klimb.models import fused_attention, shared_attention
from klimb.models import policy as policy_module
from klimb.models.families import lora
from klimb.models.policy import CausalPolicy
from klimb.objectives import log_variance
from klimb.plan import plan
from klimb.samplers.ancestral import ancestral
from klimb.samplers.replay import Replay
from klimb.steps import TrainState
from klimb.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def many_vowels(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / 4 for text in texts]


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied", "qwen2", "gpt2", "gemma2"])
def test_the_law_of_the_draws_is_the_policys(build, tokenizer, examples, name):
    policy, reference = lora(build(name).to("cuda"), tokenizer, r=4)
    draws = ancestral(policy, examples, 6, generator=seeded(1), max_completion_length=12)
    with torch.no_grad():
        scored = draws.sequence_sums(policy.log_prob(draws))
        assert torch.equal(scored, draws.sequence_sums(reference.log_prob(draws)))  # step 0: the same path
    assert draws.log_q is not None
    assert (draws.log_q - scored).abs().max() < 1e-3
    for tensor in policy.trainable:
        torch.nn.init.normal_(tensor.data, std=0.3)
    with torch.no_grad():
        moved = draws.sequence_sums(policy.log_prob(draws))
    assert (draws.log_q - moved).abs().max() > 0.1  # the mutant: another policy's law


def test_chunks_change_no_gradient(build, tokenizer, examples):
    gradients = []
    for size in (10_000, 13):
        policy, _ = lora(build("llama_tied").to("cuda"), tokenizer, r=4, max_chunk_tokens=size)
        draws = ancestral(policy, examples, 4, generator=seeded(2), max_completion_length=12)
        draws.sequence_sums(policy.log_prob(draws)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


def random_attention(prompts, rows):
    """Query, key, value and an upstream gradient of packed tokens in bfloat16; and what float64 makes of them."""
    total = sum(prompts) + sum(map(sum, rows))
    generator = torch.Generator(device="cuda").manual_seed(0)
    made = [
        torch.randn(total, heads, 16, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (6, 2, 2, 6)
    ]
    layout = shared_attention.laid_out(prompts, rows, device="cuda")
    exact = [x.double() for x in made]
    out, seen = shared_attention.attend(*exact[:3], layout, 0.4)
    return made, (out, *shared_attention.attend_backward(exact[3], out, seen, layout, 0.4))


@pytest.mark.parametrize(
    ("prompts", "rows"),
    [([40, 7, 90], [[3, 0, 130], [2, 2, 2], [0, 0, 40]]), ([5, 5], [[70] * 4] * 2), ([4], [[0, 0]])],
    ids=["ragged", "nothing padded", "prompts alone"],
)
def test_fused_kernels_are_attention(prompts, rows):
    made, exact = random_attention(prompts, rows)
    runs = fused_attention.laid_out(prompts, rows, device="cuda")

    def found(runs):
        out, seen = fused_attention.attend(*made[:3], runs, 0.4)
        return out, *fused_attention.attend_backward(made[3], out, seen, runs, 0.4)

    for ours, wanted in zip(found(runs), exact, strict=True):
        assert (ours - wanted).norm() < 0.01 * wanted.norm()
    assert all(torch.equal(a, b) for a, b in zip(found(runs), found(runs), strict=True))  # a fixed order
    if runs.own is not None:
        blind = replace(runs, own=replace(runs.own, causal=False))
        assert (found(blind)[0] - exact[0]).norm() > 0.1 * exact[0].norm()


@pytest.mark.parametrize("name", ["llama_untied", "qwen2"])
def test_half_precision_rounds_no_more_than_the_models_own_layers(
    name, build, tokenizer, examples, monkeypatch
):
    """Scores and gradients in bfloat16 against float64, by the fused kernels and by transformers' layers; eight policies,
    since of one the error is half as large again or not by how a single sum was rounded."""
    draws = ancestral(
        CausalPolicy(build(name), tokenizer), examples, 6, generator=seeded(1), max_completion_length=12
    )

    def found(dtype, seed):
        policy, _ = lora(build(name, dtype=dtype, width=0.3).to("cuda"), tokenizer, r=4)
        for i, tensor in enumerate(policy.trainable):
            rounded = torch.empty(tensor.shape, dtype=torch.bfloat16)
            tensor.data.copy_(rounded.normal_(std=0.1, generator=seeded(100 * seed + i)))
        scores = policy.log_prob(draws)
        scores.sum().backward()
        return scores.detach().double(), torch.cat([p.grad.flatten() for p in policy.trainable]).double()

    apart = []
    for seed in range(8):
        exact, ours = found(torch.float64, seed), found(torch.bfloat16, seed)
        with monkeypatch.context() as patch:
            patch.setattr(policy_module, "is_llama_like", lambda model: False)
            theirs = found(torch.bfloat16, seed)
        apart.append(
            [
                [((x - e).norm() / e.norm()).item() for x, e in zip(road, exact, strict=True)]
                for road in (ours, theirs)
            ]
        )
    for mine, other in zip(
        *torch.tensor(apart).square().mean(0).sqrt(), strict=True
    ):  # of scores, of gradients
        assert 0 < mine < 1.3 * other


@pytest.mark.parametrize("name", ["llama_untied", "qwen2"])
def test_draws_in_half_precision_are_the_policys(name, build, tokenizer, examples):
    policy, reference = lora(build(name, dtype=torch.bfloat16, width=0.3).to("cuda"), tokenizer, r=4)
    for tensor in policy.trainable:
        torch.nn.init.normal_(tensor.data, std=0.1)
    draws = ancestral(policy, examples, 64, generator=seeded(1), max_completion_length=12)
    assert draws.lengths.min() < draws.lengths.max()  # rows have left
    with torch.no_grad():
        ours, other = (draws.sequence_sums(who.log_prob(draws)) for who in (policy, reference))
    assert (draws.log_q - ours).abs().mean() < 0.2 * (draws.log_q - other).abs().mean()


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_layers_that_run_twice_change_no_gradient(build, tokenizer, examples, name):
    policy, _ = lora(build(name).to("cuda"), tokenizer, r=4)
    draws = ancestral(policy, examples, 4, generator=seeded(2), max_completion_length=12)
    gradients = []
    for saving in (False, True):
        for tensor in policy.trainable:
            tensor.grad = None
        who = replace(policy, gradient_checkpointing=saving)
        who.log_prob(draws).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_a_climb(build, tokenizer, examples):
    policy, reference = lora(build("llama_untied", width=0.3).to("cuda"), tokenizer, r=8)
    sampler = partial(ancestral, max_completion_length=8)
    found = plan(examples, reference, many_vowels, sampler, num_draws=64, generator=seeded(3))
    target = found.target(kl=0.5)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    steps = train(
        examples,
        policy,
        target,
        sampler,
        Recipe(log_variance),
        optimizer,
        max_steps=15,
        prompts_per_step=len(examples),
        num_draws=16,
        num_replay=16,
        state=TrainState(replay=Replay().extended(found.pool)),
        generator=seeded(4),
    )
    assert len(list(steps)) == 15
    certificate = measure(examples, policy, target, sampler, num_draws=64, generator=seeded(5)).certificate
    assert certificate.reward.low > certificate.reference_reward.high
