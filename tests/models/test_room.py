"""A cache with reserved memory remembers what the growing one does, bit by bit."""

import torch
from transformers import DynamicCache

from klimb.models.room import make_room


def filled(tokens, *, room):
    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache()
    states = [torch.randn(4, 2, n, 3, generator=generator) for n in (5, *[1] * tokens)]
    for i, x in enumerate(states):
        cache.update(x, -x, 0)
        if i == 0 and room:
            make_room(cache, tokens)
        if i == 2:
            cache.batch_select_indices(torch.tensor([0, 2, 3]))
            states[i + 1 :] = [y[[0, 2, 3]] for y in states[i + 1 :]]
    return cache


def test_the_same_as_a_cache_that_grows():
    roomy, growing = filled(6, room=True).layers[0], filled(6, room=False).layers[0]
    assert roomy.keys.shape == (3, 2, 11, 3)
    assert torch.equal(roomy.keys, growing.keys)
    assert torch.equal(roomy.values, growing.values)
    assert roomy.get_seq_length() == growing.get_seq_length() == 11


def test_nothing_is_copied_for_a_new_token():
    cache = filled(3, room=True)
    before = cache.layers[0].keys.data_ptr()
    make_room(cache, 2)
    moved = cache.layers[0].keys.data_ptr()
    keys = torch.ones(3, 2, 1, 3)
    cache.update(keys, keys, 0)
    first = cache.layers[0].keys.data_ptr()
    cache.update(keys, keys, 0)
    assert moved == before  # room is reserved when it is first written to
    assert cache.layers[0].keys.data_ptr() == first != before
