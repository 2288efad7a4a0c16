"""Random models, each a function of its seed alone.

nnsmith grows a graph of operators op by op and lets z3 find shapes for which it is valid. What comes out of here is a graph of
ATen calls whose inputs and weights are all arguments, together with values for them.

``python tests/fuzz/generate.py SEED...`` prints them.
"""

from __future__ import annotations

import random
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import z3
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nnsmith asks for pygraphviz, which only draws
    from nnsmith.abstract.dtype import DTYPE_GEN_COMPLEX, DType
    from nnsmith.error import ConstraintError, InternalError
    from nnsmith.graph_gen import SymbolicGen
    from nnsmith.materialize.torch import ALL_TORCH_OPS
    from nnsmith.materialize.torch.symbolnet import SymbolNet
    from nnsmith.util import register_seed_setter

register_seed_setter("torch", torch.manual_seed, overwrite=True)

MAX_ELEMENTS = 2**12
ATTEMPTS_PER_OP = 40
Z3_WORK = (
    2_000_000  # z3 counts its own steps: a limit in seconds would make the graph depend on the machine's load
)
RANKS = [0, 1, 2, 2, 3, 3, 3, 4, 4, 4]
SIZES = [2, 3, 4, 5, 7, 8, 9, 16, 17, 33]
ENLARGED = 12  # dimensions
MODELS = 8  # tries, until one is valid
DRAWS = 6  # tries, until no value in the model is NaN or infinite

# Integer inputs are small, so that sums and powers of them stay representable.
RANGES = [(-2.0, 2.0), (0.5, 3.0), (0.1, 0.9), (-1.0, 1.0), (1.0, 2.0), (3.0, 7.0)]


class Invalid(Exception):
    """No model came of this seed."""


@dataclass
class Model:
    """A graph, values for its placeholders, and the nnsmith ops it was made from."""

    graph: fx.GraphModule
    inputs: list[torch.Tensor]
    ops: list[str]


class Generator(SymbolicGen):
    """nnsmith's, stopped by work done and not by the clock."""

    def __init__(self, seed: int, nodes: int) -> None:
        super().__init__(
            _opset(),
            seed=seed,
            max_elem_per_tensor=MAX_ELEMENTS,
            rank_choices=RANKS,
            dtype_choices=["f16", "f32", "f64", "i32", "i64"],
        )
        self.solver.set("rlimit", Z3_WORK)
        self.attempts = nodes * ATTEMPTS_PER_OP
        self.abstract_gen(nodes, max_gen_millisec=10**9)
        self._enlarge()

    def extra_exit_check(self, max_node_size: int) -> bool:
        self.attempts -= 1
        return self.attempts < 0

    def _enlarge(self) -> None:
        """z3 likes sizes of one: asks for more, dimension by dimension, where the constraints allow it."""
        sizes = [size for name in self.placeholders for size in self.ir.vars[name].shape]
        random.shuffle(sizes)
        for size in sizes[:ENLARGED]:
            wish = size >= random.choice(SIZES)
            if self.check_sat(wish) == z3.sat:
                self.assume(wish)
        if self.check_sat() != z3.sat:
            raise Invalid("z3 found no sizes")


def _opset() -> list[Any]:
    def real(dtypes: list[tuple[DType, ...]]) -> list[tuple[DType, ...]]:
        return [each for each in dtypes if not set(each) & set(DTYPE_GEN_COMPLEX)]

    for op in ALL_TORCH_OPS:
        op.in_dtypes, op.out_dtypes = real(op.in_dtypes), real(op.out_dtypes)
    return list(ALL_TORCH_OPS)


class _Program(torch.nn.Module):
    """The calls of a SymbolNet, without its own checks, which read values and so cannot be traced."""

    def __init__(self, net: SymbolNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = dict(zip(self.net.input_map, inputs, strict=True))
        for function, args, results, _ in self.net.instructions:
            out = function(*[values[name] for name in args])
            values.update(zip(results, out if isinstance(out, list) else [out], strict=True))
        return tuple(values[name] for name in self.net.output_map)


def make(seed: int, nodes: tuple[int, int] = (5, 15)) -> Model:
    """Returns the model of ``seed``; `Invalid` says that there is none."""
    reasons: list[str] = []
    for attempt in range(MODELS):
        try:
            return _make(seed * MODELS + attempt, nodes)
        except (Invalid, ConstraintError, InternalError) as error:
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise Invalid("; ".join(reasons))


def _make(seed: int, nodes: tuple[int, int]) -> Model:
    generator = Generator(seed, random.Random(seed).randint(*nodes))
    net = SymbolNet(generator.make_concrete())
    training = random.Random(seed).random() < 0.5  # batch norm updates its statistics in place, or reads them
    state = {k: v.detach() for k, v in [*net.named_parameters(), *net.named_buffers()]}
    program = _Program(net).train(training)

    def function(state: dict[str, torch.Tensor], inputs: list[torch.Tensor]) -> Any:
        return torch.func.functional_call(program, {f"net.{k}": v for k, v in state.items()}, tuple(inputs))

    shapes = [(list(like.shape), like.dtype.torch()) for like in net.input_map.values()]
    draw = torch.Generator().manual_seed(seed)
    for low, high in RANGES[:DRAWS]:
        inputs = [_draw(shape, dtype, low, high, draw) for shape, dtype in shapes]
        weights = {
            k: _draw(v.shape, v.dtype, low, high, draw) if _constant(k) else v for k, v in state.items()
        }
        try:
            graph = make_fx(function, pre_dispatch=True)(_copies(weights), inputs)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            reason = f"eager: {type(error).__name__}: {error}".splitlines()[0]
            continue  # a division by zero depends on the values, a dtype torch has no kernel for does not: both come here
        graph = _flat(graph)
        values = [*weights.values(), *inputs]
        finite = _Finite(graph)
        finite.run(*_copies(dict(enumerate(values))).values())
        if finite.ok:
            ops = [type(inst.iexpr.op).__name__ for inst in net.ir.insts]
            return Model(graph, values, [op for op in ops if op not in ("Input", "Constant")])
        reason = "NaN or infinity for all values tried"
    raise Invalid(reason)


def _constant(name: str) -> bool:
    return name.endswith(".data")  # nnsmith's constants; weights of layers keep torch's initialisation


def _copies(values: dict[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    return {k: v.clone() for k, v in values.items()}


def _draw(
    shape: Any, dtype: torch.dtype, low: float, high: float, generator: torch.Generator
) -> torch.Tensor:
    value = low + (high - low) * torch.rand(list(shape), generator=generator, dtype=torch.float64)
    if dtype == torch.bool:
        return value > (low + high) / 2
    return value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)


def _flat(traced: fx.GraphModule) -> fx.GraphModule:
    """Placeholders x0, x1, ... in place of trees; unused ones stay, to keep the order of the values."""
    graph = fx.Graph()
    names = iter(range(len(traced.graph.nodes)))
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copies[node] = graph.placeholder(f"x{next(names)}")
        elif node.op == "output":
            graph.output(fx.map_arg(tuple(node.args[0]), copies.__getitem__))
        elif node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)
        else:
            raise Invalid(f"{node.op} in the traced graph")
    return fx.GraphModule(torch.nn.Module(), graph)


class _Finite(fx.Interpreter):
    """Notes whether every value is finite, and small enough for a cast to an integer type (otherwise undefined in C)."""

    ok = True

    def run_node(self, node: fx.Node) -> Any:
        out = super().run_node(node)
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.ok &= bool(out.isfinite().all()) and bool((out.abs() < 2**30).all())
        return out


def main() -> None:
    for seed in sys.argv[1:]:
        model = make(int(seed))
        print(model.graph.code)
        for value in model.inputs:
            print(value.dtype, list(value.shape), value.double().sum().item())


if __name__ == "__main__":
    main()
