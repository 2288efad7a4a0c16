"""Brings a neutral graph into the one form that the rest of the analysis reads.

Equal pure values become one value; dead values go. Aliases, copies and casts to the same type vanish (``detach`` and casts
that change the type stay). What PyTorch can say in several ways is said in one:

    select(x, dim, index)          index >= 0; also for unbind, and for slices of one entry, which get an unsqueeze
    slice(x, dim, start, end)      step 1 (another step is a fifth literal); also for split and chunk
    stack((...), dim)              also for cat of single entries and for chains of writes that fill a tensor
    cat((...), dim)                also for chains of slice writes; nested cats are one
    view(x, shape)                 reshape, flatten, unflatten
    permute(x, dims)               transpose, t, mT
    squeeze(x, dims), unsqueeze(x, dim), expand(x, shape), cast(x), full(shape, value)

Dims are counted from the front. A value's ``origin`` becomes the tuple of the values of the given graph that it stands for,
in order; it is empty for what is made here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spikingbrain.passes.recurrence.graph import Graph, Slot, Value, argument
from spikingbrain.passes.recurrence.writes import Pending, Source, Writes

ALIASES = {"clone", "contiguous", "alias", "lift_fresh", "lift_fresh_copy", "alias_copy", "positive"}
CASTS = {"_to_copy", "to", "type_as", "float", "double", "half", "bfloat16"}
VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "view_copy", "_reshape_alias"}
FILLS: dict[str, float | None] = {
    **{name: 0.0 for name in ("zeros", "zeros_like", "new_zeros", "zero")},
    **{name: 1.0 for name in ("ones", "ones_like", "new_ones")},
    **{name: None for name in ("full", "full_like", "new_full", "fill", "scalar_tensor")},
}
NO_EFFECT = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"}
RANDOM = ("rand", "dropout", "bernoulli", "normal", "multinomial", "poisson", "exponential", "empty")


def normalise(graph: Graph) -> Graph:
    """Returns the same computation in the form described above, live values only."""
    return _Normaliser(graph).run()


def structure(op: str, inputs: Sequence[Value], literals: Any, shape: Any, dtype: str) -> tuple[Any, ...]:
    """Returns what makes two pure values equal, as a key."""
    return (op, tuple(map(id, inputs)), literal_key(literals), shape, dtype)


def literal_key(literal: Any) -> Any:
    """Returns a key in which 1, 1.0 and True differ, and 0.0 and -0.0; arrays count by identity."""
    if isinstance(literal, tuple):
        return tuple(map(literal_key, literal))
    if literal is None or isinstance(literal, (str, Slot)):
        return literal
    if isinstance(literal, (bool, int, float, complex)):
        return (type(literal).__name__, repr(literal))
    return (type(literal).__name__, id(literal))


def is_random(op: str) -> bool:
    """Whether two values of this op may differ although they look the same."""
    return op in ("input", "opaque") or any(word in op for word in RANDOM)


@dataclass(eq=False)
class _Cat:
    """A cat whose only reader is a cat along the same dim: its parts so far."""

    parts: deque[Value]
    dim: int


class _Normaliser:
    def __init__(self, graph: Graph) -> None:
        self.given = graph
        self.users = graph.users()
        self.outputs = set(graph.outputs)
        self.made = Graph()
        self.known: dict[tuple[Any, ...], Value] = {}
        self.of: dict[Value, Source | _Cat] = {}

    def run(self) -> Graph:
        for raw in _live(self.given):
            result = self.rewrite(raw)
            if result is not None:
                self.of[raw] = result
        outputs = [self.value(v) for v in self.given.outputs]
        for raw, source in self.of.items():
            made = source.found if isinstance(source, Pending) else source
            if isinstance(made, Value):
                made.origin += (raw,)
        kept = Graph(outputs=outputs)
        for v in _live(Graph(self.made.values, outputs)):
            kept.add(v)
        return kept

    # Making values

    def make(
        self,
        op: str,
        inputs: Sequence[Value],
        literals: tuple[Any, ...],
        shape: tuple[int, ...] | None,
        dtype: str,
    ) -> Value:
        key = structure(op, inputs, literals, shape, dtype)
        if is_random(op) or key not in self.known:
            self.known[key] = self.made.add(Value(op, list(inputs), literals, shape, dtype, origin=()))
        return self.known[key]

    def value(self, raw: Value) -> Value:
        """Returns the normalised value of a given one; where it is a chain of writes, what it has come to."""
        source = self.of[raw]
        return self.finish(source.parts, source.dim) if isinstance(source, _Cat) else self.settled(source)

    def settled(self, source: Source) -> Value:
        if isinstance(source, Value):
            return source
        if source.found is None:
            source.found = source.writes.settle(source.version, source.last, self)
        return source.found

    # The methods below make one normal form each; dims are not negative.

    def select(self, x: Value, dim: int, index: int) -> Value:
        assert x.shape is not None
        if x.op == "unsqueeze" and x.literals[1] == dim:
            return x.inputs[0]
        if x.op == "slice" and x.literals[1] == dim:
            start, step = x.literals[2], (x.literals[4] if len(x.literals) > 4 else 1)
            return self.select(x.inputs[0], dim, start + index * step)
        shape = x.shape[:dim] + x.shape[dim + 1 :]
        return self.make("select", [x], (Slot(0), dim, index), shape, x.dtype)

    def slice(self, x: Value, dim: int, start: int, end: int, step: int = 1) -> Value:
        assert x.shape is not None
        size = max(0, -(-(end - start) // step))
        if size == x.shape[dim] and step == 1:
            return x
        if size == 1:
            return self.unsqueeze(self.select(x, dim, start), dim)
        shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
        if step == 1 and x.op == "slice" and x.literals[1] == dim and len(x.literals) == 4:
            offset = x.literals[2]
            return self.slice(x.inputs[0], dim, offset + start, offset + end)
        literals = (Slot(0), dim, start, end) + ((step,) if step != 1 else ())
        return self.make("slice", [x], literals, shape, x.dtype)

    def unsqueeze(self, x: Value, dim: int) -> Value:
        assert x.shape is not None
        return self.make("unsqueeze", [x], (Slot(0), dim), (*x.shape[:dim], 1, *x.shape[dim:]), x.dtype)

    def squeeze(self, x: Value, dims: tuple[int, ...]) -> Value:
        assert x.shape is not None
        dims = tuple(sorted(d for d in set(dims) if x.shape[d] == 1))
        if not dims:
            return x
        if len(dims) == 1 and x.op == "unsqueeze" and x.literals[1] == dims[0]:
            return x.inputs[0]
        shape = tuple(s for d, s in enumerate(x.shape) if d not in dims)
        return self.make("squeeze", [x], (Slot(0), dims), shape, x.dtype)

    def expand(self, x: Value, shape: tuple[int, ...]) -> Value:
        return x if x.shape == shape else self.make("expand", [x], (Slot(0), shape), shape, x.dtype)

    def cast(self, x: Value, dtype: str) -> Value:
        return x if x.dtype == dtype else self.make("cast", [x], (Slot(0),), x.shape, dtype)

    def join(self, op: str, parts: Sequence[Value], dim: int, shape: tuple[int, ...], dtype: str) -> Value:
        slots = tuple(Slot(i) for i in range(len(parts)))
        return self.make(op, parts, (slots, dim), shape, dtype)

    def stack(self, parts: Sequence[Value], dim: int) -> Value:
        shape = parts[0].shape
        assert shape is not None
        if len(parts) == 1:
            return self.unsqueeze(parts[0], dim)
        return self.join("stack", parts, dim, (*shape[:dim], len(parts), *shape[dim:]), parts[0].dtype)

    def finish(self, parts: Sequence[Value], dim: int) -> Value:
        """Returns the cat of parts that are not empty."""
        first = parts[0]
        assert first.shape is not None
        if len(parts) == 1:
            return first
        sizes = [p.shape[dim] for p in parts if p.shape is not None]
        if all(size == 1 for size in sizes):
            return self.stack([self.select(p, dim, 0) for p in parts], dim)
        shape = (*first.shape[:dim], sum(sizes), *first.shape[dim + 1 :])
        return self.join("cat", parts, dim, shape, first.dtype)

    # Reading the given graph

    def rewrite(self, raw: Value) -> Source | _Cat | None:
        """Returns what a given value becomes, its inputs having been rewritten; None for what has no value."""
        op, shape, rank = raw.op, raw.shape, len(raw.shape or ())
        if op in NO_EFFECT:
            return None
        if op in ALIASES:
            return (
                self.of[raw.inputs[0]]
                if not isinstance(self.of[raw.inputs[0]], _Cat)
                else self.value(raw.inputs[0])
            )
        if op in ("select", "slice", "select_scatter", "slice_scatter", "index_put"):
            return self.access(raw)
        if op in ("unbind", "split", "split_with_sizes", "chunk", "tensor_split") or op == "getitem":
            return self.piece(raw)
        if op in ("cat", "stack"):
            return self.joined(raw)
        if op in FILLS and shape is not None and not (op == "fill" and len(raw.inputs) > 1):
            fill = FILLS[op]
            if fill is None:
                fill = argument(raw, 0 if op == "scalar_tensor" else 1, "fill_value", None)
                fill = fill if isinstance(fill, (int, float)) else argument(raw, 2, "value", None)
            if isinstance(fill, (int, float)):
                return self.make("full", [], (shape, float(fill)), shape, raw.dtype)
        inputs = [self.value(x) for x in raw.inputs]
        if op == "input":
            return self.make(op, inputs, raw.literals, shape, raw.dtype)
        if op == "constant":
            return self.made.add(Value(op, [], raw.literals, shape, raw.dtype, origin=()))
        if shape is not None and inputs and inputs[0].shape is not None:
            plain = self.plain(raw, inputs, rank)
            if plain is not None:
                return plain
        return self.make(op, inputs, raw.literals, shape, raw.dtype)

    def plain(self, raw: Value, inputs: list[Value], rank: int) -> Value | None:
        """Ops that only rearrange or convert."""
        op, x, shape = raw.op, inputs[0], raw.shape
        assert shape is not None and x.shape is not None
        if op in CASTS or op == "cast":
            return self.expand(self.cast(x, raw.dtype), shape)
        if op == "copy" and len(inputs) == 2:
            return self.expand(self.cast(inputs[1], raw.dtype), shape)
        if op in ("expand", "expand_as", "broadcast_to"):
            return self.expand(x, shape)
        if op == "squeeze":
            dims = argument(raw, 1, "dim", tuple(range(len(x.shape))))
            dims = dims if isinstance(dims, tuple) else (dims,)
            return self.squeeze(x, tuple(d % len(x.shape) for d in dims))
        if op == "unsqueeze":
            return self.unsqueeze(x, argument(raw, 1, "dim", 0) % rank)
        if op in VIEWS:
            return x if x.shape == shape else self.make("view", [x], (Slot(0), shape), shape, raw.dtype)
        order = _permutation(raw, rank)
        if order is None:
            return None
        if order == tuple(range(rank)):
            return x
        if x.op == "permute":
            inner = x.literals[1]
            return self.permuted(x.inputs[0], tuple(inner[d] for d in order))
        return self.permuted(x, order)

    def permuted(self, x: Value, order: tuple[int, ...]) -> Value:
        assert x.shape is not None
        if order == tuple(range(len(order))):
            return x
        return self.make("permute", [x], (Slot(0), order), tuple(x.shape[d] for d in order), x.dtype)

    def piece(self, raw: Value) -> Source | None:
        """unbind and split: nothing themselves; their pieces are selects and slices."""
        if raw.op != "getitem":
            return self.value(raw.inputs[0])
        parent, index = raw.inputs[0], raw.literals[1]
        x = self.value(parent)
        if parent.op == "unbind":
            assert x.shape is not None
            return self.select(x, argument(parent, 1, "dim", 0) % len(x.shape), index % _pieces(parent))
        if parent.op not in ("split", "split_with_sizes", "chunk"):
            return self.make("getitem", [x], raw.literals, raw.shape, raw.dtype)
        assert x.shape is not None
        dim = argument(parent, 2, "dim", 0) % len(x.shape)
        starts = _starts(parent, x.shape[dim])
        index %= len(starts) - 1
        return self.slice(x, dim, starts[index], starts[index + 1])

    def access(self, raw: Value) -> Source | None:
        """Reads and writes of one entry or of a window; chains of writes are kept as such while they grow."""
        source, shape = self.of[raw.inputs[0]], raw.inputs[0].shape
        source = self.value(raw.inputs[0]) if isinstance(source, _Cat) else source
        assert shape is not None
        if raw.op == "index_put":
            place = _one_index(raw, shape)
            if place is None or raw.inputs[-1].shape != shape[: place[0]] + shape[place[0] + 1 :]:
                return self.make(
                    raw.op, [self.value(x) for x in raw.inputs], raw.literals, raw.shape, raw.dtype
                )
            return self.write(raw, source, place[0], place[1], 0, self.of_source(raw.inputs[2]))
        writes = raw.op.endswith("_scatter")
        rewrites = all(u.op.endswith("_scatter") and u.inputs[0] is raw for u in self.users[raw])
        dim = argument(raw, 1 + writes, "dim", 0) % max(1, len(shape))
        if raw.op.startswith("select"):
            index = argument(raw, 2 + writes, "index", 0) % shape[dim]
            if writes:
                return self.write(raw, source, dim, index, 0, self.of_source(raw.inputs[1]))
            found = source.read(dim, index, 0, rewrites, self) if isinstance(source, Pending) else None
            return found if found is not None else self.select(self.settled(source), dim, index)
        start, end, step = (
            argument(raw, 2 + writes + i, n, None) for i, n in enumerate(("start", "end", "step"))
        )
        start, end, step = slice(start, end, step).indices(shape[dim])
        if not writes:
            if end - start == 1 and isinstance(source, Pending):
                found = source.read(dim, start, 0, rewrites, self)
                if found is not None:
                    return self.unsqueeze(self.settled(found), dim)
            found = (
                source.read(dim, start, end - start, rewrites, self)
                if isinstance(source, Pending) and step == 1
                else None
            )
            return found if found is not None else self.slice(self.settled(source), dim, start, end, step)
        piece = self.of_source(raw.inputs[1])
        if end - start == shape[dim] and step == 1:
            return piece
        goes_on = isinstance(source, Pending) and source.writes.width and source.accepts(dim, start, 1)
        if end - start == 1 and not goes_on:
            return self.write(raw, source, dim, start, 0, self.select(self.settled(piece), dim, 0))
        if step != 1:
            x = [self.settled(source), self.settled(piece)]
            return self.make(raw.op, x, (Slot(0), Slot(1), dim, start, end, step), raw.shape, raw.dtype)
        return self.write(raw, source, dim, start, end - start, piece)

    def of_source(self, raw: Value) -> Source:
        source = self.of[raw]
        return self.value(raw) if isinstance(source, _Cat) else source

    def write(self, raw: Value, source: Source, dim: int, start: int, width: int, piece: Source) -> Source:
        goes_on = (
            any(u.op == raw.op and u.inputs[0] is raw for u in self.users[raw]) and raw not in self.outputs
        )
        if isinstance(source, Pending) and source.accepts(dim, start, width):
            return source.extend(start, piece, not goes_on)
        assert raw.shape is not None
        writes = Writes(self.settled(source), dim, width, raw.shape[dim])
        return Pending(writes, 0, False).extend(start, piece, not goes_on)

    def joined(self, raw: Value) -> Source | _Cat:
        assert raw.shape is not None
        dim = argument(raw, 1, "dim", 0) % len(raw.shape)
        if raw.op == "stack":
            inputs = [raw.inputs[slot.index] for slot in raw.literals[0]]
            return self.stack([self.cast(self.value(x), raw.dtype) for x in inputs], dim)
        parts: deque[Value] = deque()
        order = [raw.inputs[slot.index] for slot in raw.literals[0]]
        for x in order:
            source = self.of[x]
            if isinstance(source, _Cat) and source.dim == dim:
                if len(source.parts) > len(parts):
                    parts, shorter = source.parts, parts
                    parts.extendleft(reversed(shorter))
                else:
                    parts.extend(source.parts)
                continue
            v = self.value(x)
            if v.shape is not None and len(v.shape) == len(raw.shape) and v.shape[dim] > 0:
                parts.append(self.cast(v, raw.dtype))
        if not parts:
            return self.make("full", [], (raw.shape, 0.0), raw.shape, raw.dtype)
        users = self.users[raw]
        if (
            len(users) == 1
            and users[0].op == "cat"
            and raw not in self.outputs
            and users[0].inputs.count(raw) == 1
        ):
            outer = users[0]
            if argument(outer, 1, "dim", 0) % len(raw.shape) == dim:
                return _Cat(parts, dim)
        return self.finish(parts, dim)


def _live(graph: Graph) -> list[Value]:
    """Returns the values that an output is computed from, in order."""
    seen, todo = set(graph.outputs), list(graph.outputs)
    while todo:
        for x in todo.pop().inputs:
            if x not in seen:
                seen.add(x)
                todo.append(x)
    return [v for v in graph.values if v in seen]


def _permutation(raw: Value, rank: int) -> tuple[int, ...] | None:
    order = list(range(rank))
    if raw.op == "permute":
        return tuple(d % rank for d in argument(raw, 1, "dims", ()))
    if raw.op in ("transpose", "swapaxes", "swapdims"):
        i, j = (argument(raw, 1 + k, f"dim{k}", 0) % rank for k in (0, 1))
        order[i], order[j] = j, i
    elif raw.op in ("t", "numpy_T"):
        order.reverse()
    elif raw.op in ("mT", "adjoint", "matrix_H", "mH"):
        order[-2:] = reversed(order[-2:])
    else:
        return None
    return tuple(order)


def _pieces(parent: Value) -> int:
    shape = parent.inputs[0].shape
    assert shape is not None
    return int(shape[argument(parent, 1, "dim", 0) % len(shape)])


def _starts(parent: Value, size: int) -> list[int]:
    """Returns where each piece of a split begins, and the end."""
    sizes = argument(parent, 1, "split_size", None)
    if sizes is None:
        sizes = argument(parent, 1, "chunks", 1)
    if parent.op == "chunk":
        sizes = -(-size // sizes)
    if isinstance(sizes, int):
        return [*range(0, size, max(1, sizes)), size]
    starts = [0]
    for s in sizes:
        starts.append(starts[-1] + s)
    return starts


def _one_index(raw: Value, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns (dim, index) of an index_put that writes at one constant place of one dim."""
    indices = raw.literals[1]
    used = [(d, raw.inputs[s.index]) for d, s in enumerate(indices) if isinstance(s, Slot)]
    adds = argument(raw, 3, "accumulate", False)
    if len(used) != 1 or adds or used[0][1].op != "constant" or used[0][1].shape != ():
        return None
    dim, index = used[0]
    numbers: Any = index.literals[0] if index.literals else None
    if len(raw.inputs) != 3 or not hasattr(numbers, "dtype"):
        return None
    return dim, int(numbers) % shape[dim]
