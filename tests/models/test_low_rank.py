"""The adapter as one operation: peft's numbers and gradients, on every layer it takes over and none that it must not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd import gradcheck

from klimb.models.low_rank import fuse_adapters, low_rank_linear, merged


def numbers(bias):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)]
    x, w, b0, a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x.requires_grad_(), w, b0 if bias else None, a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(bias):
    x, w, b0, a, b = numbers(bias)
    assert gradcheck(lambda *inputs: low_rank_linear(inputs[0], w, b0, *inputs[1:], 0.7), (x, a, b))
    expected = nn.functional.linear(x, w + 0.7 * b @ a, b0)
    torch.testing.assert_close(low_rank_linear(x, w, b0, a, b, 0.7), expected, rtol=1e-13, atol=1e-13)
    assert (low_rank_linear(x, w, b0, a, b, 1.0) - expected).abs().max() > 1e-2  # the scale counts


def wrapped(**options):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False, **options)
    return get_peft_model(net, config, adapter_name="policy").eval()


def test_same_as_peft_layer_by_layer_and_with_the_adapter_off():
    own, theirs = wrapped(), wrapped()
    fuse_adapters(own)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    spoken = own(x)
    torch.testing.assert_close(spoken, theirs(x), rtol=1e-5, atol=1e-6)
    own(x).square().sum().backward()
    theirs(x).square().sum().backward()
    moved = [p for p in own.parameters() if p.grad is not None]
    assert len(moved) == 4
    for p, q in zip(moved, [p for p in theirs.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
    with own.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(own(x), theirs(x))
        assert (own(x) - spoken).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_other_kinds_keep_pefts_way(options):
    own, theirs = wrapped(**options), wrapped(**options)
    fuse_adapters(own)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(own(x), theirs(x), rtol=1e-5, atol=1e-6)
    own.train(), theirs.train()
    outputs = []
    for net in (own, theirs):
        torch.manual_seed(4)
        outputs.append(net(x))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_it_is_in_use():
    own = wrapped()
    fuse_adapters(own)
    layers = [m for m in own.modules() if isinstance(m, Linear)]
    x = torch.randn(7, 5, requires_grad=True)
    assert len(layers) == 2
    assert "LowRank" in type(layers[0](x).grad_fn).__name__


def test_merged_for_drawing_says_the_same_and_leaves_nothing_behind():
    own = wrapped()
    fuse_adapters(own)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    before, weights = own(x).detach(), {name: w.clone() for name, w in own.state_dict().items()}
    with merged(own):
        inside = own(x)
        assert own.state_dict().keys() == weights.keys()
        with torch.no_grad():
            own.base_model.model[0].lora_B["policy"].weight.add_(1.0)  # what is merged no longer follows
        assert torch.equal(own(x), inside)
    assert (own(x) - before).abs().max() > 1e-2
    own.load_state_dict(weights)
    torch.testing.assert_close(inside, before, rtol=1e-5, atol=1e-6)
    assert torch.equal(own(x), before)


def test_merged_does_nothing_where_it_would_round_or_the_adapter_is_off():
    own = wrapped()
    fuse_adapters(own)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    with own.disable_adapter():
        off = own(x)
        with merged(own):
            assert torch.equal(own(x), off)
    own = own.to(torch.bfloat16)
    spoken = own(x.bfloat16())
    with merged(own):
        assert torch.equal(own(x.bfloat16()), spoken)
        assert not any("whole" in m.__dict__ for m in own.modules())


def test_an_error_while_drawing_takes_the_merged_weights_away():
    own = wrapped()
    fuse_adapters(own)

    def draw():
        with merged(own):
            assert sum("whole" in m.__dict__ for m in own.modules()) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw()
    assert not any("whole" in m.__dict__ for m in own.modules())
