"""One op of torch's own test database through the backend: what was compiled, and whether it agrees with eager.

All samples of an op and dtype go into one graph, since compiling is what takes the time. The graph takes the way of
``torch.compile``: AOTAutograd, this backend's decompositions and ``compile_graph``; only Dynamo is left out. Higher-order ops
(`hops`) go through Dynamo too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hops
import numpy as np
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch.utils import _pytree as pytree

from spikingbrain.frontend.dynamo import decompositions, report
from spikingbrain.frontend.dynamo.backend import compile_graph
from spikingbrain.frontend.dynamo.options import CompileOptions

sys.path.append(str(Path(__file__).parents[1]))
from tolerances import assert_close

DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
GRADIENT = "grad"  # of f32
MODES = (*DTYPES, GRADIENT)
LOOKED_AT = 80  # samples
MOST_ELEMENTS = 1 << 17
SECONDS = 120  # to compile one graph
SCALE = 10.0  # of the samples; gradients that cancel are measured against it, results against a thousandth
COUNTS = {"f32": 6}  # samples of an op; 4 in other modes
# Nothing is computed: tensors without elements, and values that are only made or copied.
_NOTHING = ("a tensor without elements", "too few ops in a row")

OPTIONS = CompileOptions(library=False, threads=1)


@dataclass
class Result:
    """What became of an op and dtype.

    "compiled", "partly", "eager", "wrong", "error", "unsupported" (torch itself refuses), or "skipped" (no sample).
    """

    status: str
    reason: str = ""


@dataclass
class Sample:
    """A call of an op, its tensors taken out as ``tensors``; traced by Dynamo, or by AOTAutograd alone."""

    run: Callable[[Sequence[Tensor]], list[Tensor]]
    tensors: list[Tensor]
    text: str = ""
    through_dynamo: bool = False


@dataclass
class Outcome:
    """One compiled graph: its reports and the results of each sample."""

    results: list[list[Tensor]]
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    reports: list[report.GraphReport] = field(default_factory=list)


def database() -> dict[str, Any]:
    """Returns OpInfo by name, ``name.variant`` where there are several; higher-order ops are among them."""
    from torch.testing._internal import common_methods_invocations as source

    # Random ops seed the generator themselves, which a compiled graph does not repeat: ``seed`` does it from outside.
    source.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    ops = {o.name + (f".{o.variant_test_name}" if o.variant_test_name else ""): o for o in source.op_db}
    return ops | hops.database()


def supports(info: Any, mode: str) -> bool:
    if mode == GRADIENT:
        return bool(info.supports_autograd) and torch.float32 in info.supported_backward_dtypes("cpu")
    return DTYPES[mode] in info.supported_dtypes("cpu")


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def samples(info: Any, mode: str, count: int) -> list[Sample]:
    """Returns up to ``count`` samples, spread over those that the database has."""
    seed()
    gradient = mode == GRADIENT
    dtype = torch.float32 if gradient else DTYPES[mode]
    found = []
    for sample, _ in zip(
        info.sample_inputs("cpu", dtype, requires_grad=gradient), range(LOOKED_AT), strict=False
    ):
        made = _sample(info.op, sample, isinstance(info, hops.HigherOrderOp) and info.through_dynamo)
        if sum(t.numel() for t in made.tensors) <= MOST_ELEMENTS:
            found.append(made)
    chosen = sorted({round(i * (len(found) - 1) / max(1, count - 1)) for i in range(count)}) if found else []
    return [found[i] for i in chosen]


def _sample(op: Callable[..., Any], sample: Any, through_dynamo: bool) -> Sample:
    leaves, tree = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        full = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            full[i] = tensor
        args, kwargs = pytree.tree_unflatten(full, tree)
        return [leaf for leaf in pytree.tree_leaves(op(*args, **kwargs)) if isinstance(leaf, Tensor)]

    return Sample(run, [leaves[i] for i in places], _text(sample), through_dynamo)


def _text(sample: Any) -> str:
    def leaf(value: Any) -> Any:
        return f"{str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, Tensor) else value

    return f"{pytree.tree_map(leaf, (sample.input, *sample.args))} {pytree.tree_map(leaf, sample.kwargs)}"[
        :300
    ]


def fresh(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns copies with the same strides that require gradients where the originals do."""
    made = []
    for t in tensors:
        copy = (
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
            if t.layout == torch.strided
            else t.detach().clone()
        )
        if t.layout == torch.strided and t.numel():
            overlapping = any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))
            if overlapping:
                copy = t.detach()
            else:
                copy.copy_(t.detach())
        made.append(copy.requires_grad_(t.requires_grad))
    return made


def eager(batch: Sequence[Sample], gradient: bool) -> Outcome:
    outcome = Outcome([])
    seed()
    for sample in batch:
        inputs = fresh(sample.tensors)
        results = sample.run(inputs)
        outcome.results.append([r.detach() for r in results])
        if gradient:
            outcome.gradients.append(_gradients(results, inputs))
    return outcome


def compiled(
    batch: Sequence[Sample], gradient: bool, dynamic: bool = False, options: CompileOptions | None = OPTIONS
) -> Outcome:
    """Runs the samples as one graph; without options, torch alone does it."""
    counts: list[int] = []

    def whole(*tensors: Tensor) -> list[Tensor]:
        results, at = [], 0
        counts.clear()
        for sample in batch:
            part = sample.run(tensors[at : at + len(sample.tensors)])
            at += len(sample.tensors)
            counts.append(len(part))
            results += part
        return results

    inputs = [t for sample in batch for t in fresh(sample.tensors)]
    with report.collect() as reports:
        take = _by_dynamo if batch[0].through_dynamo else _by_aot_autograd
        function = take(whole, dynamic, options)
        function(
            *(t for sample in batch for t in fresh(sample.tensors))
        )  # compiles; tracing may draw random numbers
        seed()
        flat = function(*inputs)
        taken = iter(flat)
        parts = [[next(taken) for _ in range(n)] for n in counts]
        outcome = Outcome([[r.detach() for r in part] for part in parts], reports=reports)
        if gradient:
            at = 0
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(_flat_gradients(parts, wanted))
            for sample in batch:
                mine = inputs[at : at + len(sample.tensors)]
                at += len(sample.tensors)
                outcome.gradients.append([next(found) if t.requires_grad else None for t in mine])
    return outcome


def _by_aot_autograd(
    function: Callable[..., Any], dynamic: bool, options: CompileOptions | None
) -> Callable[..., Any]:
    chosen = options or CompileOptions(level=0)

    def compiler(kind: str) -> Callable[..., Any]:
        return lambda module, _: compile_graph(module, kind, chosen)[0].load()

    settings = decompositions.aot_settings(compiler, library=chosen.library)
    made: Callable[..., Any] = aot_function(function, **settings, dynamic=dynamic)
    return made


def _by_dynamo(
    function: Callable[..., Any], dynamic: bool, options: CompileOptions | None
) -> Callable[..., Any]:
    torch._dynamo.reset()
    if options is None:
        return torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=dynamic)
    chosen = dataclasses.asdict(options) | {"cache": False}
    return torch.compile(function, backend="spikingbrain", fullgraph=True, dynamic=dynamic, options=chosen)


def _weight(result: Tensor) -> Tensor:
    """Returns a fixed gradient to start from, of small varied numbers."""
    return (torch.arange(result.numel(), dtype=result.dtype).reshape(result.shape) % 7 - 2.5) / 4


def _differentiable(results: Sequence[Tensor]) -> list[Tensor]:
    return [r for r in results if r.requires_grad]


def _gradients(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(_flat_gradients([results], wanted))
    return [next(found) if t.requires_grad else None for t in inputs]


def _flat_gradients(parts: Sequence[Sequence[Tensor]], wanted: Sequence[Tensor]) -> list[Tensor | None]:
    starts = [r for part in parts for r in _differentiable(part)]
    if not starts or not wanted:
        return [None] * len(wanted)
    return list(torch.autograd.grad(starts, wanted, [_weight(r) for r in starts], allow_unused=True))


def conform(
    info: Any, mode: str, count: int = 6, dynamic: bool = False, options: CompileOptions = OPTIONS
) -> Result:
    """Returns what becomes of an op in a mode: a dtype, or ``grad``."""
    gradient = mode == GRADIENT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            batch = samples(info, mode, count)
        except Exception as error:
            return Result("skipped", f"torch has no samples: {_short(error)}")
        if gradient:
            batch = [s for s in batch if any(t.requires_grad for t in s.tensors)]
        if not batch:
            return Result("skipped", "torch has no samples")
        try:
            expected = eager(batch, gradient)
        except Exception as error:
            refused = isinstance(info, hops.HigherOrderOp)
            return Result("unsupported" if refused else "skipped", f"eager: {_short(error)}")
        try:
            with deadline(SECONDS):
                found = compiled(batch, gradient, dynamic, options)
        except Exception as error:
            if untraceable(batch, gradient, dynamic):
                if batch[0].through_dynamo:  # nothing leaves the op to eager then
                    return Result(
                        "unsupported", f"torch's aot_eager_decomp_partition fails too: {_short(error)}"
                    )
                by_value = re.match("DataDependent|DynamicOutput", type(error).__name__)
                why = "its course or shape depends on values" if by_value else _short(error)[:80]
                return Result("eager", f"torch does not trace it: {why}")
            return Result("error", f"{_short(error)} [{_first_failing(batch, gradient, dynamic)}]")
    for sample, a, e in zip(batch, found.results, expected.results, strict=True):
        if (wrong := difference(a, e, SCALE / 1000)) and not _is_as_good(sample, a, e):
            return Result("wrong", f"{wrong} [{sample.text}]")
    for sample, a, e in zip(batch if gradient else [], found.gradients, expected.gradients, strict=True):
        if wrong := difference(a, e, SCALE):
            return Result("wrong", f"gradient: {wrong} [{sample.text}]")
    reports = [r for r in found.reports if not gradient or r.kind == "backward"]
    return status(reports)


def _first_failing(batch: Sequence[Sample], gradient: bool, dynamic: bool) -> str:
    for sample in batch:
        try:
            with deadline(SECONDS):
                compiled([sample], gradient, dynamic)
        except Exception:
            return sample.text
    return "only together"


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside after some time, which also ends a compile process that hangs."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def untraceable(batch: Sequence[Sample], gradient: bool, dynamic: bool) -> bool:
    """Returns whether torch fails without this backend too."""
    try:
        compiled(batch, gradient, dynamic, None)
    except Exception:
        return True
    return False


def difference(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], scale: float = 0.0) -> str:
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:
            if a is not e and not _is_zero(a) and not _is_zero(e):
                return "there is no gradient where there should be one, or the other way round"
            continue
        if a.layout != torch.strided:
            a, e = a.to_dense(), e.to_dense()
        if a.is_complex() and e.is_complex():
            a, e = torch.view_as_real(a.resolve_conj()), torch.view_as_real(e.resolve_conj())
        try:
            assert_close(a, e, "result", scale)
        except AssertionError as error:
            return str(error)
        except Exception as error:
            return _short(error)
    return ""


def _is_as_good(sample: Sample, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Returns whether results in halfs are about as near as eager's to what f64 gives."""
    if not any(t.dtype in (torch.float16, torch.bfloat16) for t in expected):
        return False
    seed()
    exact = sample.run([t.double() if t.is_floating_point() else t for t in fresh(sample.tensors)])
    errors = [
        max(
            (float((t.double() - x).abs().max()) for t, x in zip(found, exact, strict=True) if t.numel()),
            default=0.0,
        )
        for found in (actual, expected)
    ]
    return errors[0] <= 3 * errors[1]


def _is_zero(tensor: Tensor | None) -> bool:
    return tensor is not None and not tensor.any()


def status(reports: Sequence[report.GraphReport]) -> Result:
    """Returns "compiled", "partly" or "eager" with the reasons of what is not compiled."""
    reasons: dict[str, list[str]] = {}
    regions = [r for graph in reports for r in graph.regions]
    for region in regions:
        if region.status != "compiled" and not region.reason.startswith(_NOTHING):
            ops = reasons.setdefault(region.reason, [])
            ops += [op for op in dict.fromkeys(region.ops) if op not in ops]
    if not reasons:
        return Result("compiled")
    some = any(r.status == "compiled" for r in regions)
    text = "; ".join(f"{', '.join(ops[:4])}: {why}" for why, ops in reasons.items())
    return Result("partly" if some else "eager", text[:400])


def _short(error: BaseException) -> str:
    error = getattr(error, "inner_exception", error)  # Dynamo wraps those of a backend
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"
