"""Gemma 2 in float64 gives NaN where a prompt is padded: transformers does that, before anything of klimb's.

Its attention adds float64's most negative number where a token may not look, and takes the softmax in float32, where that
is -inf. A token of the padding may look at none: a row of -inf has no softmax. The NaN of its value then reaches every
token, because 0 x NaN is NaN. Models whose attention is torch's fused operation are not touched.
"""

import pytest
import torch

from klimb.data import Draws, Example


def states(model, *, pads, mask=None):
    """[L, D] of one row of eight tokens whose first ones are padding."""
    ids = torch.arange(5, 13)[None]
    seen = torch.ones_like(ids)
    seen[0, :pads] = 0
    return model.get_decoder()(
        input_ids=ids, attention_mask=seen if mask is None else mask(seen), use_cache=False
    ).last_hidden_state[0]


@pytest.mark.parametrize("pads", [1, 6])
def test_transformers_itself_gives_nan(build, pads):
    assert states(build("gemma2", dtype=torch.float64), pads=0).isfinite().all()
    assert states(build("gemma2", dtype=torch.float64), pads=pads).isnan().all()
    assert states(build("gemma2", dtype=torch.float32), pads=pads).isfinite().all()
    assert states(build("llama_tied", dtype=torch.float64), pads=pads).isfinite().all()


def test_a_mask_that_float32_can_hold_gives_numbers(build):
    """The cause: with another number for "may not look" the same layers in float64 agree with float32."""

    def bounded(seen):
        causal = torch.ones(8, 8, dtype=torch.bool).tril() & (seen[0] == 1)
        near = causal & torch.ones(8, 8, dtype=torch.bool).triu(-5)  # a window of six
        return {
            name: torch.where(allowed, 0.0, -1e30)[None, None].double()
            for name, allowed in (("full_attention", causal), ("sliding_attention", near))
        }

    wide = states(build("gemma2", dtype=torch.float64), pads=3, mask=bounded)[3:]
    narrow = states(build("gemma2", dtype=torch.float32), pads=3)[3:]
    assert (wide - narrow).abs().max() < 1e-4


def test_prompts_of_one_length_are_scored_in_float64(build, tokenizer):
    from klimb.models.policy import CausalPolicy

    policy = CausalPolicy(build("gemma2", dtype=torch.float64), tokenizer)

    def scored(*prompts):
        draws = Draws(
            [Example(prompt) for prompt in prompts],
            [[torch.tensor([8, 9, 7])] for _ in prompts],
            finished=torch.ones(len(prompts), 1, dtype=torch.bool),
            texts=[["de"] for _ in prompts],
        )
        with torch.no_grad():
            return policy.log_prob(draws)

    assert scored("abcd", "dcba").isfinite().all()
    assert scored("abcd", "a").isnan().any()
