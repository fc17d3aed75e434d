"""Central differences: the gradient that no formula and no autograd had a hand in; and descent, to the end."""

import pytest
import torch

from klimb.exact import categorical


def central_differences(function, x, step=1e-4):
    """Fourth-order differences of a scalar function at x, entry by entry; error about step^4 + 1e-16 / step."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        bump = torch.zeros_like(x)
        bump.view(-1)[i] = step
        with torch.no_grad():
            near = function(x + bump) - function(x - bump)
            far = function(x + 2 * bump) - function(x - 2 * bump)
        gradient.view(-1)[i] = (8 * near - far) / (12 * step)
    return gradient


@pytest.fixture(scope="session")
def numeric_gradient():
    return central_differences


def lbfgs(loss, *starts):
    """The tensors at which loss(*tensors) is least, from `starts`."""
    found = [start.clone().requires_grad_() for start in starts]
    optimizer = torch.optim.LBFGS(
        found,
        max_iter=2000,
        history_size=50,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(*found)
        value.backward()
        return value

    optimizer.step(closure)
    return [x.detach() for x in found]


@pytest.fixture(scope="session")
def to_the_end():
    return lbfgs


@pytest.fixture
def minimise(to_the_end, request):
    """The law over the module's ATOMS at which loss(log_pi) is least, from the uniform one."""

    def found(loss):
        start = torch.zeros(request.module.ATOMS, dtype=torch.float64)
        (theta,) = to_the_end(lambda theta: loss(categorical(theta)), start)
        return categorical(theta)

    return found
