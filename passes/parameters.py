"""Reading and rewriting ``spikingbrain.parameter`` ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_mlir import ir

from spikingbrain.passes import recipes, torch_ir


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the artifact's weights: what it is made from and what it looks like."""

    sources: tuple[str, ...]
    recipe: tuple[str, ...]
    shape: tuple[int, ...]
    element: str  # MLIR's name: f32, bf16, i8, ...

    @property
    def key(self) -> str:
        return recipes.key(self.sources, self.recipe)


def stored(op: ir.Operation) -> StoredTensor:
    """Returns what a ``parameter`` op stands for."""
    texts = {name: tuple(a.value for a in op.attributes[name]) for name in ("sources", "recipe")}
    type_ = ir.RankedTensorType(op.results[0].type)
    return StoredTensor(texts["sources"], texts["recipe"], tuple(type_.shape), str(type_.element_type))


def all_stored(module: ir.Module) -> list[StoredTensor]:
    """Returns every stored tensor of a module once, in order of first use."""
    found = {s.key: s for s in map(stored, torch_ir.operations(module, "spikingbrain.parameter"))}
    return list(found.values())


def parameter(value: ir.Value) -> ir.Operation | None:
    """Returns the ``parameter`` op that defines ``value``, if one does."""
    owner = value.owner
    if isinstance(owner, ir.Block) or owner.operation.name != "spikingbrain.parameter":
        return None
    return owner.operation


def create(sources: Sequence[str], recipe: Sequence[str], type_: ir.Type) -> ir.Value:
    """Emits a ``parameter`` op at the current insertion point."""
    strings = {
        name: ir.ArrayAttr.get([ir.StringAttr.get(s) for s in texts])
        for name, texts in (("sources", sources), ("recipe", recipe))
    }
    return ir.Operation.create("spikingbrain.parameter", [type_], attributes=strings).result
