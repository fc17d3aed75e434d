"""Layers split over two ranks give the scores, gradients, norm and files of whole ones, for every architecture."""

import copy
from dataclasses import replace

import pytest
import torch

from klimb.backward import in_step, sum_gradients
from klimb.data import chunks, select
from klimb.models.families import full, lora, save_policy, whole_state
from klimb.models.sharded import clip_norm, gathered, parted, shard, whole
from klimb.ranks import ALONE, Ranks
from ranked import together

CHUNK = 12
"""tokens: so few that the two ranks have different numbers of pieces"""
DTYPES = {"gemma2": torch.float32}
"""its windows give NaN in float64 where a prompt is mostly padding"""
LIMIT = 0.01
"""a norm that clips"""


@pytest.fixture
def draws(examples, made_up, tokenizer):
    return made_up(examples, 3, len(tokenizer))


def test_rows_read_with_their_prompts_score_alike(build, tokenizer, architecture, draws):
    """The road of the backward pass of split layers, on layers that are whole."""
    policy, _ = full(build(architecture, dtype=DTYPES.get(architecture, torch.float64)), tokenizer)
    by_rows = replace(policy, sharded=Ranks(0, 2))
    for who in (policy, by_rows):
        who.model.zero_grad()
        tokens = who.log_prob(draws)
        (tokens * torch.arange(len(tokens))).sum().backward()
        if who is policy:
            expected = tokens.detach(), [p.grad.clone() for p in policy.parameters()]
    assert torch.allclose(tokens.detach(), expected[0], atol=1e-4)
    for p, gradient in zip(policy.parameters(), expected[1], strict=True):
        assert (p.grad - gradient).norm() < 1e-4 * max(1.0, gradient.norm().item())


def weighted(draws, policy):
    """Pieces of draws and a coefficient for each of their tokens."""
    return [
        (piece, {"token_log_pi": 1.0 + torch.arange(int(piece.lengths.sum())) / 10})
        for piece in chunks(draws, policy.chunk_tokens)
    ]


def passed_back(ranks, family, model, tokenizer, draws, folder, saving):
    """On each rank: gradients of whole layers, computed alone, against those of split ones."""
    plain, _ = family(copy.deepcopy(model), tokenizer, max_chunk_tokens=CHUNK)
    for i, p in enumerate(plain.parameters()):
        with torch.no_grad():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
    policy, reference = family(copy.deepcopy(model), tokenizer, max_chunk_tokens=CHUNK)
    policy = replace(policy, ranks=ranks, gradient_checkpointing=saving)
    policy, reference = shard(policy, replace(reference, ranks=ranks), ranks)
    with torch.no_grad():
        for p, q in zip(policy.parameters(), plain.parameters(), strict=True):
            p.copy_(parted(q.detach(), p))
    with torch.no_grad():
        apart = (policy.log_prob(draws) - plain.log_prob(draws)).abs().max()
        assert apart < 1e-4, (folder.name, apart)
    # all prompts but one are the second rank's
    own = select(draws, [0] if ranks.first else range(1, draws.num_prompts))
    shares = [select(draws, [0]), select(draws, range(1, draws.num_prompts))]
    in_step(plain, [piece for share in shares for piece in weighted(share, plain)], ALONE)
    in_step(replace(policy, ranks=ALONE), weighted(own, policy), ranks)
    sum_gradients(policy)
    for p, q in zip(policy.parameters(), plain.parameters(), strict=True):
        assert (gathered(p.grad) - q.grad).norm() < 1e-4 * max(1.0, q.grad.norm().item())
    expected = torch.nn.utils.clip_grad_norm_(list(plain.parameters()), LIMIT)
    norm = clip_norm([p.grad for p in policy.parameters()], LIMIT, ranks)
    assert abs(norm / expected - 1) < 1e-4
    for p, q in zip(policy.parameters(), plain.parameters(), strict=True):
        assert (gathered(p.grad) - q.grad).norm() < 1e-4 * LIMIT
    # a step, and drawing and scoring see it at once, and no older copy of any layer
    with torch.no_grad():
        for p, q in zip(policy.parameters(), plain.parameters(), strict=True):
            p -= 10 * p.grad
            q -= 10 * q.grad
        for _ in range(2):
            assert torch.allclose(policy.log_prob(draws), plain.log_prob(draws), atol=1e-4)
    state = whole_state(policy)
    if ranks.first:
        save_policy(policy, folder / "split", state=state)
        save_policy(plain, folder / "whole")


def each(ranks, several):
    for one in several:
        passed_back(ranks, *one)


@pytest.mark.parametrize("saving", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", [full, lora])
def test_split_layers_learn_what_whole_ones_do(build, tokenizer, draws, tmp_path, family, saving):
    from safetensors.torch import load_file

    names = ("llama_tied", "llama_untied", "qwen2", "gpt2", "gemma2")
    cases = []
    for name in names:
        (tmp_path / name).mkdir()
        model = build(name, dtype=DTYPES.get(name, torch.float64))
        cases.append((family, model, tokenizer, draws, tmp_path / name, saving))
    together(2, each, cases)
    for name in names:
        split, plain = (
            load_file(next((tmp_path / name / which).glob("*.safetensors"))) for which in ("split", "whole")
        )
        assert split.keys() == plain.keys()
        for weight, x in plain.items():
            assert (split[weight] - x).abs().max() < 1e-4, weight


def test_whole_layers_need_nobody(build, tokenizer):
    policy, _ = full(build("llama_tied"), tokenizer)
    with whole(policy):
        pass
    assert whole_state(policy) is None
