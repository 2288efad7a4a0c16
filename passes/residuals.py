"""Sums of a projection's result with another tensor, which the projection can start from or end with."""

from __future__ import annotations

from torch_mlir import ir


def sum_with(op: ir.Operation) -> tuple[ir.Operation, ir.Value | None]:
    """Returns the linalg.generic that only adds another tensor to the projection's result, and that tensor.

    Returns the projection itself and None where its result is used in another way.
    """
    users = [use.owner.operation for use in op.results[0].uses]
    if len(users) != 1 or users[0].name != "linalg.generic" or users[0].block != op.block:
        return op, None
    (user,) = users
    inputs = list(user.operands)
    maps = [m.value for m in user.attributes["indexing_maps"]]
    body = [o.operation for o in user.regions[0].blocks[0].operations]
    arguments = list(user.regions[0].blocks[0].arguments)
    identity = ir.AffineMap.get_identity(maps[0].n_dims)
    if (
        len(inputs) != 3
        or any(m != identity for m in maps)
        or [o.name for o in body] != ["arith.addf", "linalg.yield"]
    ):
        return op, None
    if {hash(v) for v in body[0].operands} != {hash(a) for a in arguments[:2]}:
        return op, None
    addend = inputs[1] if inputs[0] == op.results[0] else inputs[0]
    if addend == op.results[0] or addend.type != op.results[0].type:
        return op, None
    return user, addend


def sums_with(op: ir.Operation, most: int) -> tuple[list[ir.Operation], list[ir.Value]]:
    """Returns up to ``most`` sums of a projection's result with other tensors, one after the other, and those tensors."""
    sums: list[ir.Operation] = []
    addends: list[ir.Value] = []
    while len(sums) < most:
        total, addend = sum_with(sums[-1] if sums else op)
        if addend is None:
            break
        sums.append(total)
        addends.append(addend)
    return sums, addends
