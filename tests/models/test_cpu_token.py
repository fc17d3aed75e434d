"""A token through all layers as one call, and the products it is made of: against float64, by each kind of product a processor may have."""

import subprocess

import pytest
import torch

from klimb.models import compiled, cpu_kernels
from klimb.models.cpu_kernels import Laid, lay_out, multiply_few
from klimb.models.decoding import started
from klimb.models.families import lora
from klimb.models.llama_on_cpu import LoopDecoder

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler here")
ROUNDING = 3e-3
"""of bfloat16: a sum in float, rounded once"""


def laid(width, columns, rank, *, seed=0):
    """A product of few rows, and the same as a map in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias, a, b = (
        torch.randn(*shape, generator=generator).to(torch.bfloat16)
        for shape in ((columns, width), (columns,), (max(rank, 1), width), (columns, max(rank, 1)))
    )

    def plain(x):
        y = x.double() @ weight.double().t() + bias.double()
        narrow = (x.double() @ a.double().t()).to(torch.bfloat16).double()
        return y + narrow @ b.double().t() if rank else y

    adapter = (rank, lay_out(a), lay_out(b)) if rank else ()
    return Laid(width, columns, lay_out(weight), bias, *adapter), plain


def apart(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("rows", "width", "columns", "rank"),
    [(1, 3, 1, 0), (32, 64, 96, 16), (33, 576, 50, 48), (7, 50, 70, 5), (64, 96, 33, 32), (100, 48, 64, 40)],
)
def test_products_of_few_rows(rows, width, columns, rank, products):
    linear, plain = laid(width, columns, rank)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    found = multiply_few(x, linear)
    assert found.shape == (rows, columns)
    assert apart(found, plain(x)) < ROUNDING
    # the mutants: another row's states, and another weight
    assert apart(multiply_few(x.roll(1, 1), linear), plain(x)) > 0.1
    assert apart(multiply_few(x, laid(width, columns, rank, seed=2)[0]), plain(x)) > 0.1
    x[0, 0] = torch.nan
    assert torch.equal(multiply_few(x, linear).isnan().all(1), torch.arange(rows) == 0)


def test_products_of_few_rows_are_on_where_the_processor_multiplies_bfloat16(loops, request):
    kind = request.node.callspec.params["loops"]
    ask = [*compiled._compiler(), *compiled._flags(), "-dM", "-E", "-x", "c++", "/dev/null"]
    knows = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    dots, tiles = "__AVX512BF16__" in knows, "__AMX_BF16__" in knows
    wanted = {"as they are": dots or tiles, "dot products": dots, "plain": False}[kind]
    assert bool(loops.products_ready()) == wanted


def test_products_without_bias_and_of_rows_that_do_not_lie_together(products):
    linear, plain = laid(40, 70, 0)
    x = torch.randn(40, 9).to(torch.bfloat16).t()
    assert apart(multiply_few(x, linear), plain(x)) < ROUNDING
    without = Laid(linear.width, linear.columns, linear.weight)
    assert apart(multiply_few(x, without), plain(x) - linear.bias.double()) < ROUNDING


def test_products_do_not_depend_on_their_company(products):
    """Neither rows beside one nor the number of threads change a row's bits: a draw does not depend on who else is drawn."""
    linear, _ = laid(576, 100, 16)
    x, threads = torch.randn(70, 576).to(torch.bfloat16), torch.get_num_threads()
    found = multiply_few(x, linear)
    for start, stop in ((0, 1), (3, 40), (31, 33), (64, 70)):
        assert torch.equal(multiply_few(x[start:stop], linear), found[start:stop])
    try:
        torch.set_num_threads(1)
        assert torch.equal(multiply_few(x, linear), found)
    finally:
        torch.set_num_threads(threads)


LONGEST, KEPT = 40, [0, 3, 4, 7, 9]


def states(policy, examples, tokens):
    """[T][R, D] the states that predict the tokens after each of these [R, T], R = 2 a prompt; after ten only some rows go on."""
    found = []
    with policy.activate(), started(policy, examples, 2, LONGEST) as (_, decoder):
        for step in range(tokens.shape[1]):
            if step == 10:
                decoder.keep(torch.tensor(KEPT))
                tokens = tokens[KEPT]
            found.append(decoder.next_hidden(tokens[:, step]).clone())
    return found, decoder


def plain_states(policy, examples, tokens):
    """The same by transformers' own layers, from the whole text of each row."""
    found = []
    with policy.activate(), torch.no_grad():
        for row, ids in enumerate(tokens):
            prompt = policy.render(examples[row // 2])
            text = torch.cat([torch.tensor(prompt), ids])[None]
            found.append(policy.body(input_ids=text, use_cache=False).last_hidden_state[0, len(prompt) :])
    whole = torch.stack(found, 1)
    return [whole[step] if step < 10 else whole[step, KEPT] for step in range(len(whole))]


@pytest.mark.parametrize("name", ["llama_tied", "qwen2"], ids=["Llama", "with biases"])
@pytest.mark.parametrize("options", [None, {}, {"layers": 1}, {"target_modules": ["q_proj", "up_proj"]}])
def test_a_token_through_all_layers(name, options, build, tokenizer, examples, products, monkeypatch):
    tokens = torch.randint(
        5, len(tokenizer), (2 * len(examples), 20), generator=torch.Generator().manual_seed(3)
    )

    def policy_of(dtype):
        policy, reference = lora(
            build(name, dtype=torch.bfloat16).to(dtype), tokenizer, r=3, **(options or {})
        )
        generator = torch.Generator().manual_seed(1)
        for tensor in policy.trainable:
            tensor.data.copy_((torch.randn(tensor.shape, generator=generator) * 0.1).to(torch.bfloat16))
        return reference if options is None else policy

    exact = plain_states(policy_of(torch.float64), examples, tokens)
    ours, decoder = states(policy_of(torch.bfloat16), examples, tokens)
    assert isinstance(decoder, LoopDecoder)
    assert decoder.whole is not None
    monkeypatch.setattr(cpu_kernels, "multiplies", lambda: False)
    theirs, decoder = states(policy_of(torch.bfloat16), examples, tokens)
    assert decoder.whole is None
    for step, (wanted, found) in enumerate(zip(exact, ours, strict=True)):
        assert apart(found, wanted) < 0.1, step
        assert apart(found.roll(1, 0), wanted) > 0.3  # the mutant: another row's state
    exact, ours, theirs = (torch.cat(x) for x in (exact, ours, theirs))
    assert apart(ours, exact) < 1.25 * apart(theirs, exact)


def test_weights_that_moved_are_laid_out_anew(build, tokenizer, examples, products):
    policy, _ = lora(build("llama_tied", dtype=torch.bfloat16), tokenizer, r=3)
    tokens = torch.randint(
        5, len(tokenizer), (2 * len(examples), 12), generator=torch.Generator().manual_seed(3)
    )
    before, _ = states(policy, examples, tokens)
    kept = policy.body.__dict__["laid_for_few"][1]
    assert all(torch.equal(a, b) for a, b in zip(states(policy, examples, tokens)[0], before, strict=True))
    assert policy.body.__dict__["laid_for_few"][1] is kept
    with torch.no_grad():
        policy.model.get_decoder().layers[0].mlp.down_proj.base_layer.weight.mul_(2.0)
    after, _ = states(policy, examples, tokens)
    assert policy.body.__dict__["laid_for_few"][1] is not kept
    assert not torch.equal(before[0], after[0])
