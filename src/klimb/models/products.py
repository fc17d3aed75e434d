"""Linear layers that read the same states as one product, with their low-rank adapters, and its gradients.

N rows, D_in wide -> D_out, the sum of the layers' own. On a CPU the weights are laid out once for the processor; the adapters of
all layers are one narrow product and one wide one. The backward pass is written beside the forward pass: it gives the
gradient of the rows, and collects those of whatever in the layers is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from klimb.models import cpu_kernels
from klimb.models.low_rank import adapter_of, base_of

PACKABLE = (torch.bfloat16, torch.float32)
ROWS = 64
"""how many rows a packed product is laid out for; others run too"""

Gradients = dict[int, Tensor]
"""of trained tensors, by their id"""


@dataclass(frozen=True)
class Part:
    """One of the layers: its weight [d, D_in], bias [d] or None, adapter A [r, D_in] and B [d, r] with its scale, or None."""

    weight: Tensor
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor, float] | None

    def trained(self) -> list[Tensor]:
        """What of it is trained."""
        mine = [self.weight, self.bias, *(self.adapter or ())[:2]]
        return [x for x in mine if x is not None and x.requires_grad]


@dataclass(frozen=True)
class Product:
    """x -> x W' + bias + (x A') B' of layers side by side, W and B above one another, A times its scale.

    Attributes:
        parts: the layers, in order.
        weights: [D_out, D_in] of each layer, or one for all of them.
        packed: whether that one is laid out for the processor.
        bias: [D_out] or None.
        adapter: A [r, D_in], B' [r, D_out], or None.
    """

    parts: tuple[Part, ...]
    weights: tuple[Tensor, ...]
    packed: bool
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor] | None

    def __call__(self, x: Tensor) -> Tensor:
        """[N, D_in] -> [N, D_out]."""
        return self.forward(x)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[N, D_in] -> [N, D_out], and x A' [N, r], which the backward pass wants."""
        if self.packed:
            y = _packed_linear(x, self.weights[0], self.bias)
        elif len(self.weights) == 1:
            y = nn.functional.linear(x, self.weights[0], self.bias)
        else:
            y = self._side_by_side(x)
            y = y if self.bias is None else y.add_(self.bias)
        if self.adapter is None:
            return y, None
        a, b = self.adapter
        narrow = x @ a.t()
        return y.addmm_(narrow, b), narrow

    def backward(self, upstream: Tensor, x: Tensor, narrow: Tensor | None, found: Gradients) -> Tensor:
        """The gradient of the rows [N, D_in]; those of what is trained are added to `found`.

        Args:
            upstream: [N, D_out].
            x: [N, D_in] what went in.
            narrow: [N, r] what `forward` said.
            found: gradients by the tensors' id.
        """
        g_narrow = self.collect(upstream, x, narrow, found)
        pieces = self._pieces(upstream)
        g_x = pieces[0] @ self.parts[0].weight
        for piece, part in zip(pieces[1:], self.parts[1:], strict=True):
            g_x.addmm_(piece, part.weight)
        return g_x if g_narrow is None or self.adapter is None else g_x.addmm_(g_narrow, self.adapter[0])

    def collect(self, upstream: Tensor, x: Tensor, narrow: Tensor | None, found: Gradients) -> Tensor | None:
        """Add the gradients of what is trained to `found`; that of x A' comes back, None without adapters."""
        pieces = self._pieces(upstream)
        for piece, part in zip(pieces, self.parts, strict=True):
            if part.weight.requires_grad:
                found[id(part.weight)] = piece.t() @ x
            if part.bias is not None and part.bias.requires_grad:
                found[id(part.bias)] = piece.sum(0)
        if self.adapter is None or narrow is None:
            return None
        g_narrow = upstream @ self.adapter[1].t()
        adapters = [part.adapter for part in self.parts if part.adapter is not None]
        to_narrow = g_narrow.t() @ x if any(a.requires_grad for a, *_ in adapters) else None
        start = 0
        for piece, part in zip(pieces, self.parts, strict=True):
            if part.adapter is None:
                continue
            a, wide, scale = part.adapter
            mine = slice(start, start := start + len(a))
            if to_narrow is not None and a.requires_grad:
                found[id(a)] = to_narrow[mine].mul_(scale)
            if wide.requires_grad:
                found[id(wide)] = piece.t() @ narrow[:, mine]
        return g_narrow

    def _side_by_side(self, x: Tensor) -> Tensor:
        """[N, D_in] -> [N, D_out] of several weights, each written where it belongs."""
        heights = [len(weight) for weight in self.weights]
        y = x.new_empty(len(x), sum(heights))
        for weight, place in zip(self.weights, y.split(heights, 1), strict=True):
            torch.mm(x, weight.t(), out=place)
        return y

    def _pieces(self, upstream: Tensor) -> tuple[Tensor, ...]:
        """[N, D_out] -> [N, d] of each layer."""
        return upstream.split([len(part.weight) for part in self.parts], 1)


def side_by_side(linears: Sequence[Any]) -> Product:
    """The product of linear layers, each plain or with one low-rank adapter, that read the same states."""
    bases = [base for linear in linears if (base := base_of(linear)) is not None]
    assert len(bases) == len(linears)
    weights, packed = _laid_out([base.weight for base in bases], bases[0])
    biases = [base.bias for base in bases]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat(
            [
                base.weight.new_zeros(len(base.weight)) if b is None else b
                for base, b in zip(bases, biases, strict=True)
            ]
        )
    parts = tuple(
        Part(base.weight, base.bias, adapter_of(linear)) for base, linear in zip(bases, linears, strict=True)
    )
    return Product(parts, weights, packed, bias, _adapters_side_by_side(parts))


def _adapters_side_by_side(parts: Sequence[Part]) -> tuple[Tensor, Tensor] | None:
    """A above one another, each times its scale, and B' as blocks; few operations, since they are made anew for every pass."""
    heights = [len(part.weight) for part in parts]
    starts = [sum(heights[:i]) for i in range(len(heights))]
    on = [
        (part.adapter, start) for part, start in zip(parts, starts, strict=True) if part.adapter is not None
    ]
    if not on:
        return None
    narrow = [a.detach() if scale == 1.0 else a.detach() * scale for (a, _, scale), _ in on]
    if len(parts) == 1:
        return narrow[0], on[0][0][1].detach().t()
    a = torch.cat(narrow)
    b, row = a.new_zeros(len(a), sum(heights)), 0
    for (_, wide, _), start in on:
        b[row : row + wide.shape[1], start : start + wide.shape[0]] = wide.detach().t()
        row += wide.shape[1]
    return a, b


@dataclass(frozen=True)
class OfFew:
    """A product for few rows, again and again: its adapters are one compiled loop of a CPU.

    Attributes:
        weight: [D_out, D_in] laid out for the processor.
        bias: [D_out] or None.
        adapters: the layers' own, or None where none has one.
    """

    weight: Tensor
    bias: Tensor | None
    adapters: cpu_kernels.Adapters | None

    def __call__(self, x: Tensor) -> Tensor:
        """[N, D_in], contiguous -> [N, D_out]."""
        y = _packed_linear(x, self.weight, self.bias)
        if self.adapters is not None:
            cpu_kernels.adapt(y, x, self.adapters)
        return y


def of_few(product: Product) -> OfFew:
    """The same product for few rows, where there are the loops of `klimb.models.cpu_kernels` and weights are laid out."""
    assert product.packed
    if product.adapter is None:
        return OfFew(product.weights[0], product.bias, None)
    wide = [None if part.adapter is None else part.adapter[1].detach() for part in product.parts]
    ranks = torch.tensor([0 if b is None else b.shape[1] for b in wide])
    columns = torch.tensor([len(part.weight) for part in product.parts])
    b = torch.cat([b.t().flatten() for b in wide if b is not None])
    adapters = cpu_kernels.Adapters(product.adapter[0].t().contiguous(), b, ranks, columns)
    return OfFew(product.weights[0], product.bias, adapters)


def laid_for_few(products: Sequence[Product], keeper: nn.Module) -> list[cpu_kernels.Laid]:
    """The same products for few rows by the compiled loop: weights in one piece of memory, kept beside `keeper` until one changes."""
    parts = [[part.weight.detach() for part in product.parts] for product in products]
    name = tuple(_version(weight) for weights in parts for weight in weights)
    kept = keeper.__dict__.get("laid_for_few")
    if kept is None or kept[0] != name:
        kept = keeper.__dict__["laid_for_few"] = (name, _laid_together(parts))
    return [_laid(product, weight) for product, weight in zip(products, kept[1], strict=True)]


def _laid_together(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    sizes = [cpu_kernels.laid_size(sum(map(len, weights)), weights[0].shape[1]) for weights in parts]
    laid = list(cpu_kernels.large_pages(parts[0][0], sum(sizes)).split(sizes))
    for weights, to in zip(parts, laid, strict=True):
        cpu_kernels.lay_out(torch.cat(list(weights)) if len(weights) > 1 else weights[0], to)
    return laid


def _laid(product: Product, weight: Tensor) -> cpu_kernels.Laid:
    columns, width = sum(len(part.weight) for part in product.parts), product.parts[0].weight.shape[1]
    if product.adapter is None:
        return cpu_kernels.Laid(width, columns, weight, product.bias)
    a, b = product.adapter
    return cpu_kernels.Laid(
        width, columns, weight, product.bias, len(a), cpu_kernels.lay_out(a), cpu_kernels.lay_out(b.t())
    )


def forget_laid_out(model: nn.Module) -> None:
    """Forget the copies that were laid out for the processor: of layers that are split over ranks, which come and go unversioned."""
    for module in model.modules():
        for name in ("laid_out", "laid_for_few"):
            module.__dict__.pop(name, None)


def _laid_out(weights: Sequence[Tensor], keeper: nn.Module) -> tuple[tuple[Tensor, ...], bool]:
    """The weights; on a CPU above one another, packed where it gains by it, kept beside the first until one changes."""
    if weights[0].device.type != "cpu":  # a copy would cost memory that a large model has not
        return tuple(w.detach() for w in weights), False
    name = tuple(_version(w) for w in weights)
    kept = keeper.__dict__.get("laid_out")
    if kept is not None and kept[0] == name:
        return kept[1], kept[2]
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0].detach()
    packs = _packs(weight)
    if packs:
        weight = _packed(weight)
    keeper.__dict__["laid_out"] = (name, (weight,), packs)
    return (weight,), packs


def by_loop(weight: Tensor) -> bool:
    """True where products of few rows go by the compiled loop."""
    return weight.is_cpu and weight.dtype == torch.bfloat16 and cpu_kernels.multiplies()


def _version(weight: Tensor) -> tuple[Any, ...]:
    """What is another after the weight has changed."""
    return weight.data_ptr(), weight._version, weight.dtype, len(weight)


def laid_out_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The map x [N, D_in] -> x weight' + bias [N, D_out], not differentiable; on a CPU of a weight laid out for the processor."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if not _packs(weight):
        return partial(nn.functional.linear, weight=weight, bias=bias)
    if by_loop(weight):
        columns, width = weight.shape
        to = cpu_kernels.large_pages(weight, cpu_kernels.laid_size(columns, width))
        return partial(
            cpu_kernels.multiply_few,
            linear=cpu_kernels.Laid(width, columns, cpu_kernels.lay_out(weight, to), bias),
        )
    packed = _packed(weight)
    return lambda x: _packed_linear(x, packed, bias)


def _packs(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in PACKABLE and torch.backends.mkldnn.is_available()


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
