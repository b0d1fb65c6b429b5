"""Floating point operations of single operators: products by the FAQ's formula, everything else apart.

A dot product of n terms takes n multiplications and n - 1 additions. That is all there is to the formula of
row 3.5 of the FAQ, ``Cout * Mout^2 * (2 * Cin * K^2 - 1)``: a convolution is ``Cout * Mout^2`` dot products
of ``Cin * K^2`` terms. From it follows, for one image:

- a map that is not square: ``Hout * Wout`` for ``Mout^2``, a kernel of ``Kh * Kw`` for ``K^2``;
- g groups: each output sees the inputs of its group only, so a dot product has ``Cin / g * K^2`` terms;
- stride, padding, dilation: they change ``Mout`` and nothing else (products with padded zeros are counted);
- a bias: one addition more for each output, ``Cout * Mout^2 * 2 * Cin * K^2``;
- a fully connected layer: a convolution of one pixel, ``Cout * (2 * Cin - 1)``; so is a product of matrices,
  row by column;
- attention of L queries over S keys, width d, a head: ``L * S`` dot products of d terms for Q K^T and
  ``L * d`` of S terms for A V; the softmax between them is counted with the rest.

A multiply-accumulate is one term of a dot product. Many tools print their number as "FLOPs"; it is about half
of what the formula gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Count:
    """What an operator takes.

    ``macs``: terms of its dot products; ``dots``: dot products; ``biases``: additions of a bias;
    ``other``: operations that belong to no dot product.
    """

    macs: int = 0
    dots: int = 0
    biases: int = 0
    other: int = 0

    @property
    def flops(self) -> int:
        """By the formula: two for each term, less the first addition of each sum."""
        return 2 * self.macs - self.dots + self.biases


Rule = Callable[[Sequence[Any], Sequence[Tensor]], Count]


def _convolution(args: Sequence[Any], out: Sequence[Tensor]) -> Count:
    images, weight, bias, transposed = args[0], args[1], args[2], args[6]
    outputs = out[0].numel()
    # weight [Cout, Cin / g, Kh, Kw]; transposed, [Cin, Cout / g, Kh, Kw]: it is the inputs that are spread
    macs = (images.numel() if transposed else outputs) * weight[0].numel()
    return Count(macs, outputs, 0 if bias is None else outputs)


def _linear(args: Sequence[Any], out: Sequence[Tensor]) -> Count:
    outputs = out[0].numel()
    bias = len(args) > 2 and args[2] is not None
    return Count(outputs * args[1].shape[-1], outputs, outputs if bias else 0)


def _product(args: Sequence[Any], out: Sequence[Tensor]) -> Count:
    outputs = out[0].numel()
    return Count(outputs * args[0].shape[-1], outputs)


def _product_added(args: Sequence[Any], out: Sequence[Tensor]) -> Count:
    outputs = out[0].numel()
    return Count(outputs * args[1].shape[-1], outputs, outputs)


def _attention(args: Sequence[Any], out: Sequence[Tensor]) -> Count:
    query, key = args[0], args[1]
    mask = len(args) > 3 and args[3] is not None
    width, keys = query.shape[-1], key.shape[-2]
    scores = query.numel() // width * keys
    outputs = out[0].numel()
    softmax = _softmax_of(scores, keys)
    return Count(
        macs=scores * width + outputs * keys,
        dots=scores + outputs,
        other=scores * (2 if mask else 1) + softmax,  # scaled by 1 / sqrt(d); the mask is added
    )


def _softmax_of(elements: int, row: int) -> int:
    """Highest of a row, difference, exponential, sum, quotient."""
    return 5 * elements - 2 * (elements // row)


def _softmax(args: Sequence[Any], out: Sequence[Tensor]) -> Count:
    return Count(other=_softmax_of(out[0].numel(), out[0].shape[args[1]]))


def _per_output(operations: int) -> Rule:
    return lambda args, out: Count(other=operations * out[0].numel())


def _per_input(args: Sequence[Any], out: Sequence[Tensor]) -> Count:
    return Count(other=args[0].numel())


def _window(args: Sequence[Any], out: Sequence[Tensor]) -> Count:
    kernel = args[1]
    size = kernel[0] * kernel[-1]
    return Count(other=out[0].numel() * size)


RULES: dict[Any, Rule] = {
    aten.convolution: _convolution,
    aten.linear: _linear,
    aten.mm: _product,
    aten.bmm: _product,
    aten.mv: _product,
    aten.dot: _product,
    aten.addmm: _product_added,
    aten.baddbmm: _product_added,
    aten.scaled_dot_product_attention: _attention,
    aten._softmax: _softmax,
    aten._log_softmax: _softmax,
    # with running statistics a batch norm is a factor and an addition
    aten._native_batch_norm_legit_no_training: _per_output(2),
    # mean, difference, square, sum, factor, weight, bias
    aten.native_layer_norm: _per_output(7),
    aten.native_group_norm: _per_output(7),
    aten.mean: _per_input,
    aten.sum: _per_input,
    aten.amax: _per_input,
    aten.max: _per_input,
    aten.var: _per_input,
    aten.var_mean: _per_input,
    aten.linalg_vector_norm: _per_input,
    aten._adaptive_avg_pool2d: _per_input,
    aten.adaptive_max_pool2d: _per_input,
    aten.avg_pool2d: _window,
    aten.max_pool2d_with_indices: _window,
}
WHOLE = {aten.linear, aten.scaled_dot_product_attention}  # counted as they stand, not in their parts
MOVES = {aten.clone, aten.copy_, aten._to_copy, aten.fill_, aten.zero_}  # "pointwise" to torch, but no work


def count(operator: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> Count:
    """What one call of an aten operator takes; a function of each element counts as one operation an element.

    Args:
        operator: an ``OpOverload``.
        args: its positional arguments.
        outputs: the tensors that it gave.
    """
    packet = operator.overloadpacket
    rule = RULES.get(packet)
    if rule is not None:
        return rule(args, outputs)
    if packet in MOVES or torch.Tag.pointwise not in operator.tags or not outputs:
        return Count()
    return Count(other=outputs[0].numel())
