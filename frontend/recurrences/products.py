"""Products of labelled tensors, brought into the layout of the recurrence ops.

The analysis names the axes of each factor; here factors are permuted, multiplied and merged into groups of axes, such as
``[("b0",), ("t",), ("b1",), ("k",)]`` for ``[B, T, S, K]``.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from spikingbrain.frontend.recurrences.emit import Emitter
from spikingbrain.passes.recurrence.form import Factor, Product

aten = torch.ops.aten

Groups = Sequence[Sequence[str]]
Labelled = tuple[fx.Node, tuple[str | None, ...]]


def product(
    emit: Emitter,
    factors: Sequence[tuple[Labelled, int]],
    scalar: float,
    groups: Groups,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
) -> fx.Node:
    """Returns the product in the merged layout ``groups``; axes that no factor has are broadcast to their sizes.

    ``factors`` pairs each labelled tensor with its power, 1 or -1.
    """
    order = [label for group in groups for label in group]
    made: fx.Node | None = None
    for labelled, power in factors:
        tensor = cast(emit, aligned(emit, labelled, order), dtype)
        if made is None:
            made = tensor if power > 0 else emit.op(aten.reciprocal.default, tensor)
        else:
            made = emit.op(aten.mul.Tensor if power > 0 else aten.div.Tensor, made, tensor)
    if made is None:
        made = emit.op(aten.full.default, [1] * len(order), scalar, dtype=dtype)
    elif scalar != 1.0:
        made = emit.op(aten.mul.Scalar, made, scalar)
    return merged(emit, made, groups, sizes)


def aligned(emit: Emitter, labelled: Labelled, order: Sequence[str]) -> fx.Node:
    """Returns the tensor with one axis per label of ``order``, of size 1 where it has none."""
    node, axes = labelled
    held = [a for a in axes if a is not None]
    for dim in reversed([i for i, a in enumerate(axes) if a is None]):
        node = emit.op(aten.squeeze.dim, node, dim)
    wanted = [a for a in order if a in held]
    if wanted != held:
        node = emit.op(aten.permute.default, node, [held.index(a) for a in wanted])
    for dim, label in enumerate(order):
        if label not in held:
            node = emit.op(aten.unsqueeze.default, node, dim)
    return node


def merged(emit: Emitter, node: fx.Node, groups: Groups, sizes: Mapping[str, int]) -> fx.Node:
    """Broadcasts the axes of ``groups`` to their sizes and joins each group into one axis."""
    full = [sizes[label] for group in groups for label in group]
    if list(node.meta["val"].shape) != full:
        node = emit.op(aten.expand.default, node, full)
    shape = [1] * len(groups)
    for i, group in enumerate(groups):
        for label in group:
            shape[i] *= sizes[label]
    return node if shape == full else emit.op(aten.reshape.default, node, shape)


def unmerged(
    emit: Emitter, node: fx.Node, groups: Groups, sizes: Mapping[str, int], axes: Sequence[str | None]
) -> fx.Node:
    """Splits the axes of a tensor laid out by ``groups`` again and orders them as ``axes``; None is an axis of size 1."""
    order = [label for group in groups for label in group]
    shape = [sizes[label] for label in order]
    if list(node.meta["val"].shape) != shape:
        node = emit.op(aten.reshape.default, node, shape)
    wanted = [order.index(a) for a in axes if a is not None]
    rest = [
        i for i in range(len(order)) if i not in wanted
    ]  # of size 1: a role that this tensor does not have
    if wanted + rest != list(range(len(order))):
        node = emit.op(aten.permute.default, node, wanted + rest)
    for _ in rest:
        node = emit.op(aten.squeeze.dim, node, len(wanted))
    for dim, label in enumerate(axes):
        if label is None:
            node = emit.op(aten.unsqueeze.default, node, dim)
    return node


def cast(emit: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Returns the tensor in ``dtype``."""
    return node if node.meta["val"].dtype == dtype else emit.op(aten.to.dtype, node, dtype)


def contraction(
    emit: Emitter,
    factors: Sequence[Labelled],
    scalar: float,
    axes: Sequence[str | None],
    sizes: Mapping[str, int],
) -> fx.Node:
    """Returns the product of the factors summed over every label that ``axes`` lacks, laid out as ``axes``."""
    if not factors:
        return emit.op(aten.full.default, [1 if a is None else sizes[a] for a in axes], scalar)
    labels = sorted(
        {a for _, ax in factors for a in ax if a is not None} | {a for a in axes if a is not None}
    )
    letter = dict(zip(labels, string.ascii_letters, strict=False))
    nodes, terms = [], []
    for node, held in factors:
        for dim in reversed([i for i, a in enumerate(held) if a is None]):
            node = emit.op(aten.squeeze.dim, node, dim)
        nodes.append(node)
        terms.append("".join(letter[a] for a in held if a is not None))
    there = [a for a in axes if a is not None and any(letter[a] in t for t in terms)]
    made = emit.op(aten.einsum.default, f"{','.join(terms)}->{''.join(letter[a] for a in there)}", nodes)
    if scalar != 1.0:
        made = emit.op(aten.mul.Scalar, made, scalar)
    for dim, label in enumerate(axes):
        if label not in there:
            made = emit.op(aten.unsqueeze.default, made, dim)
    full = [1 if a is None else sizes[a] for a in axes]
    return made if list(made.meta["val"].shape) == full else emit.op(aten.expand.default, made, full)


def axes_of(item: Product | None) -> set[str]:
    """Returns the labels of a product."""
    return {a for f in item.factors for a in f.axes if a is not None} if item else set()


def factors_of(*products: Product | None) -> list[Factor]:
    """Returns the factors of all the products."""
    return [f for p in products if p for f in p.factors]
