"""A slice of what was computed for all times at once, as the same computation on slices.

``exp(dt * a)[:, t]`` is ``exp(dt[:, t] * a)``: so the step shows what it is made of, and nothing of the size of the whole needs
to be there.
"""

from __future__ import annotations

from dataclasses import replace

from spikingbrain.passes.recurrence.algebra import equation_of
from spikingbrain.passes.recurrence.form import Loop, Token
from spikingbrain.passes.recurrence.graph import Slot, Value

POINTWISE = {
    *(
        "mul",
        "add",
        "sub",
        "div",
        "neg",
        "exp",
        "exp2",
        "sigmoid",
        "relu",
        "softplus",
        "log_sigmoid",
        "cast",
        "rsub",
    ),
    *("silu", "tanh", "log", "square", "sqrt", "where", "masked_fill", "logical_not", "reciprocal", "pow"),
}


def sunk(loop: Loop, token: Value) -> Value | None:
    """Returns a body value equal to the token, computed from other tokens; None where its sequence is no such computation.

    New tokens are entered into the loop.
    """
    place = loop.tokens.get(token)
    if place is None or place.width or token.shape is None or place.source.shape is None:
        return None
    source = place.source
    rank = len(source.shape or ())
    if source.op in POINTWISE:
        inputs = [_part(loop, place, x, place.dim - (rank - len(x.shape or ()))) for x in source.inputs]
        return _made(loop, source, inputs, source.literals, token)
    if source.op == "unsqueeze":
        d = source.literals[1]
        x = _part(loop, place, source.inputs[0], place.dim - (d < place.dim))
        return _made(loop, source, [x], (Slot(0), d - (place.dim < d)), token)
    if source.op == "permute":
        order = source.literals[1]
        dim = order[place.dim]
        rest = tuple(d - (d > dim) for d in order if d != dim)
        return _made(loop, source, [_part(loop, place, source.inputs[0], dim)], (Slot(0), rest), token)
    if source.op == "expand":
        x = source.inputs[0]
        inner = _part(loop, place, x, place.dim - (rank - len(x.shape or ())))
        return _made(loop, source, [inner], (Slot(0), token.shape), token)
    if source.op == "einsum":
        found = equation_of(source)
        if found is None:
            return None
        names, result = found
        time = result[place.dim]
        inputs = [
            _part(loop, place, x, n.index(time)) if time in n else x
            for n, x in zip(names, source.inputs, strict=True)
        ]
        shorter = ",".join(n.replace(time, "") for n in names) + f"->{result.replace(time, '')}"
        return _made(loop, source, inputs, (shorter, *source.literals[1:]), token)
    return None


def _part(loop: Loop, place: Token, x: Value, dim: int) -> Value:
    """Returns the slice of an operand that the slice of the result needs; ``dim`` below 0: the operand has no time."""
    if dim < 0 or x.shape is None:
        return x
    shape = x.shape[:dim] + x.shape[dim + 1 :]
    if x.shape[dim] == 1 and place.source.shape is not None and place.source.shape[place.dim] != 1:
        v = Value("select", [x], (Slot(0), dim, 0), shape, x.dtype, (), len(loop.body))
        loop.body.append(v)
        return v
    wanted = replace(place, source=x, dim=dim)
    for token, known in loop.tokens.items():
        if known == wanted:
            return token
    v = Value("token", [], (), shape, x.dtype, (), len(loop.body))
    loop.tokens[v] = wanted
    loop.body.append(v)
    return v


def _made(
    loop: Loop, source: Value, inputs: list[Value], literals: tuple[object, ...], token: Value
) -> Value:
    v = Value(source.op, inputs, literals, token.shape, token.dtype, source.origin, len(loop.body))
    loop.body.append(v)
    return v
