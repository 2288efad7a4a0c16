"""A compiled model against eager: outputs, inputs changed in place, and gradients.

Where they differ by more than rounding explains, eager itself is asked: it is run again and again with every rounding operation
a few units in the last place off. An element that differs is accepted as unstable if eager's own value moves about as far
(a ``floor`` of 2.9999998, say); anything else is wrong.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Function = Callable[..., Sequence[torch.Tensor]]
Compiler = Callable[[Function], Function]

# Relative and absolute. Elements beyond these are not wrong yet, only looked at more closely.
TOLERANCES = {
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (5e-2, 1e-2),
    torch.float32: (1e-4, 1e-5),
    torch.float64: (1e-9, 1e-10),
}
NOISE_RUNS = 16
NOISE_ULPS = 4.0
APPROXIMATION_ULPS = (
    32.0  # of functions that compilers replace by polynomials; in half precision the rounding hides it
)
SPREAD = 4.0  # the observed movement of a value times this is accepted: sixteen runs do not find the extremes

APPROXIMATED = """
sin cos tan asin acos atan exp log log2 pow sigmoid tanh erf gelu gelu_backward _softmax
""".split()  # noqa: SIM905

# Without rounding in any implementation, so that nothing may excuse a difference.
EXACT = """
neg abs relu threshold_backward maximum minimum max min amax amin where clamp clamp_min clamp_max sign floor ceil round
trunc cat stack pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
replication_pad3d clone copy_ fill_ zero_ full full_like zeros zeros_like ones ones_like new_zeros new_full scalar_tensor
empty_like tril triu index gather slice_backward select_backward max_pool2d_with_indices upsample_nearest1d upsample_nearest2d
upsample_nearest3d repeat flip detach lift_fresh lift_fresh_copy value_selecting_reduction_backward masked_fill
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Outcome:
    """``kind`` is passed, unstable, wrong, error, abort or invalid; ``detail`` begins with the type of an exception."""

    kind: str
    detail: str = ""


def compiler(backend: str, options: dict[str, Any]) -> Compiler:
    """``backend`` is the name of a registered one, or ``module:function`` of a module on the path."""
    if ":" in backend:
        module, name = backend.split(":")
        found = getattr(importlib.import_module(module), name)
    else:
        torch._dynamo.lookup_backend(backend)  # says so if there is none
        found = backend
    return partial(torch.compile, backend=found, options=options or None, fullgraph=True, dynamic=False)


def check(function: Function, inputs: Sequence[torch.Tensor], compile: Compiler, training: bool) -> Outcome:
    """Compiles and compares ``function``, with gradients if ``training`` and it has any."""
    try:
        mutated = _mutated(function, inputs)
        expected, names = evaluate(function, inputs, mutated, training)
    except Exception as error:
        return Outcome("invalid", f"eager: {_line(error)}")
    if training and not any(name.startswith("gradient") for name in names):
        return Outcome("passed", "not differentiable")
    try:
        actual, compiled_names = evaluate(compile(function), inputs, mutated, training)
    except Exception as error:
        return Outcome("error", _line(error))
    if names != compiled_names:
        return Outcome("wrong", f"results {compiled_names}, expected {names}")
    return _judge(actual, expected, names, lambda: _perturbed(function, inputs, mutated, training))


def evaluate(
    function: Function, inputs: Sequence[torch.Tensor], mutated: set[int], training: bool
) -> tuple[list[torch.Tensor], list[str]]:
    """Returns every result of a call and what it is."""
    args = [each.detach().clone() for each in inputs]
    leaves = [i for i, each in enumerate(args) if training and each.is_floating_point() and i not in mutated]
    for i in leaves:
        args[i].requires_grad_()
    with torch.set_grad_enabled(training):
        outputs = list(function(*args))
    results = {f"output {i}": out.detach().clone() for i, out in enumerate(outputs)}
    results |= {f"input {i} afterwards": args[i] for i in sorted(mutated)}
    differentiable = [i for i, out in enumerate(outputs) if out.requires_grad]
    if differentiable and leaves:
        draw = torch.Generator().manual_seed(0)
        tangents = [
            torch.rand(outputs[i].shape, generator=draw).to(outputs[i].dtype) + 0.5 for i in differentiable
        ]
        gradients = torch.autograd.grad(
            [outputs[i] for i in differentiable], [args[i] for i in leaves], tangents, allow_unused=True
        )
        for i, gradient in zip(leaves, gradients, strict=True):
            results[f"gradient of input {i}"] = torch.zeros_like(args[i]) if gradient is None else gradient
        results |= {f"output {i} is differentiable": torch.tensor(True) for i in differentiable}
    return list(results.values()), list(results)


def _mutated(function: Function, inputs: Sequence[torch.Tensor]) -> set[int]:
    args = [each.detach().clone() for each in inputs]
    with torch.no_grad():
        function(*args)
    return {i for i, each in enumerate(args) if each._version}


def _perturbed(
    function: Function, inputs: Sequence[torch.Tensor], mutated: set[int], training: bool
) -> list[list[torch.Tensor]]:
    runs = []
    for seed in range(NOISE_RUNS):
        with _Noise(seed):
            runs.append(evaluate(function, inputs, mutated, training)[0])
    return runs


def _judge(
    actual: list[torch.Tensor],
    expected: list[torch.Tensor],
    names: list[str],
    perturbed: Callable[[], list[list[torch.Tensor]]],
) -> Outcome:
    bad: dict[int, torch.Tensor] = {}
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if (a.dtype, a.shape) != (e.dtype, e.shape):
            return Outcome(
                "wrong", f"{names[i]} is {a.dtype} {list(a.shape)}, expected {e.dtype} {list(e.shape)}"
            )
        off = _distance(a, e) > _allowed(e)
        if off.any():
            bad[i] = off
    if not bad:
        return Outcome("passed")
    runs = perturbed()
    for i, off in bad.items():
        spread = torch.stack([_distance(run[i], expected[i]) for run in runs]).amax(0)
        wrong = off & ~(_distance(actual[i], expected[i]) <= _allowed(expected[i]) + SPREAD * spread)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            return Outcome(
                "wrong",
                f"{names[i]} ({actual[i].dtype} {list(actual[i].shape)}): {int(wrong.sum())} of {wrong.numel()} elements, "
                f"the first at {list(at)}: {actual[i][at].item()}, expected {expected[i][at].item()}",
            )
    return Outcome("unstable", ", ".join(names[i] for i in bad))


def _distance(a: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Elementwise; none between two NaN or equal infinities, infinite between either and a number."""
    same = (a == e) | (a.isnan() & e.isnan())
    # Large integers are told apart by `same`; their distance may well be rounded.
    distance = (a.double() - e.double()).abs().nan_to_num(nan=torch.inf)
    return torch.where(same, 0.0, distance.clamp_min(torch.finfo(torch.float64).tiny))


def _allowed(e: torch.Tensor) -> torch.Tensor:
    relative, absolute = TOLERANCES.get(e.dtype, (0.0, 0.0))
    return absolute + relative * e.double().abs().nan_to_num(nan=0.0, posinf=0.0)


class _Noise(TorchDispatchMode):
    """Moves the result of each rounding op, and what it sums over, by a few units in the last place; in the backward pass too."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = any(arg.alias_info and arg.alias_info.is_write for arg in func._schema.arguments)
        view = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        name = func._schema.name.removeprefix("aten::")
        if view or name in EXACT or (name == "_to_copy" and not _narrows(args[0], kwargs)):
            return func(*args, **kwargs)
        if torch.Tag.pointwise not in func.tags and not written:
            args, kwargs = tree_map(self._moved, (args, kwargs))
        out = func(*args, **kwargs)
        ulps = APPROXIMATION_ULPS if name in APPROXIMATED else NOISE_ULPS
        return out if written else tree_map(lambda value: self._moved(value, ulps), out)

    def _moved(self, value: Any, ulps: float = NOISE_ULPS) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        step = (ulps if value.dtype.itemsize > 2 else NOISE_ULPS) * torch.finfo(value.dtype).eps
        noise = (2 * torch.rand(value.shape, generator=self.draw, dtype=torch.float64) - 1) * step
        return (value.double() * (1 + noise)).to(value.dtype)


def _narrows(value: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    to = kwargs.get("dtype") or value.dtype
    floats = value.is_floating_point() and to.is_floating_point
    return floats and torch.finfo(to).eps > torch.finfo(value.dtype).eps


def _line(error: BaseException) -> str:
    error = getattr(error, "inner_exception", error)  # of a backend, which dynamo wraps
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
