"""Searches the settings of the Triton kernels (`TritonTuning`) that are fastest at given sizes, and writes them to a JSON file.

``python -m spikingbrain.backend_maca.triton.tune -o settings.json``; sizes are those of SpikingBrain-7B unless told otherwise.
Where torch has a GPU, kernels are timed there. Elsewhere they are compiled ahead of time for gfx942, the nearest relative, and
a model judges, which is no measurement: what takes more shared memory than a block has, or spills, is refused. Each launch takes
the longer, the fewer waves a processor has in flight, up to those that hide latencies (``plan/cost.py``); waves among which a
block's result cannot be divided do not count, and the launches of a problem count alike. The model does not know what a block
reads, so it searches waves and stages, and no sizes of blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import OutOfResources

from spikingbrain.backend_maca.plan.cost import WAVE, Card
from spikingbrain.backend_maca.triton import (
    attention,
    delta,
    device,
    recurrence,
    resources,
    settings,
    spikes,
)
from spikingbrain.backend_maca.triton import scan as elements
from spikingbrain.errors import MissingDependency, OptionError, SpikingBrainError, TargetError
from spikingbrain.program import Program
from spikingbrain.search import Built, Compare, Estimating, Found, Timing, search

NEAREST = "gfx942"
# How far results may differ where floats are added in another order and then rounded, as a part of their length.
SAME = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Kernel -> the constants whose product are the numbers of a block's result, and how many of them a wave takes at least: a tile
# of matrix instructions, or one for each lane.
TILE = 256
RESULTS = {
    "attend": (("BM", "BE"), TILE),
    "attend_query_gradients": (("BM", "BD"), TILE),
    "attend_key_gradients": (("BN", "BD"), TILE),
    "carry_states": (("BK", "BV"), TILE),
    "carry_delta": (("BK", "BV"), TILE),
    "pair_scores": (("R", "C"), TILE),
    "read_states": (("C", "BV"), TILE),
    "one_step": (("BK", "BV"), WAVE),
    "value_gradients": (("C", "BV"), TILE),
    "query_gradients": (("R", "BK"), TILE),
    "key_gradients": (("R", "BK"), TILE),
    "scan_elements": (("BC",), WAVE),
    "scale_rows": (("BC",), WAVE),
    "spike_gemm": (("BM", "BN"), TILE),
}
Problems = Mapping[str, Callable[[], Sequence[Tensor]]]


@dataclass(frozen=True)
class Sizes:
    """What kernels are tuned for: one sequence of so many tokens, those of SpikingBrain-7B by default."""

    tokens: int = 2048
    width: int = 3584
    feed_forward: int = 18944
    heads: int = 28
    key_heads: int = 4
    head_size: int = 128
    window: int = 4096
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "dtype" and value < 1:
                raise OptionError(f"{name} is {value}", why="it must be 1 or more")
        if self.heads % self.key_heads:
            raise OptionError(f"{self.heads} heads on {self.key_heads} key heads", why="they must divide")


def problems(sizes: Sizes, where: str) -> dict[str, Problems]:
    """Returns calls of the launchers by op and name, on random tensors of a device of torch, "meta" for those without data."""
    tokens, size, dtype = sizes.tokens, sizes.head_size, DTYPES[sizes.dtype]

    def some(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.rand(shape, device=where).sub(0.5).to(dtype)

    q, k, v = (some(1, tokens, n, size) for n in (sizes.heads, sizes.key_heads, sizes.key_heads))
    if reason := attention.refusal(q, v):
        raise OptionError(f"head_size is {size}", why=reason)
    cached = some(1, sizes.window, sizes.key_heads, size)
    gates, state = -k.abs(), some(1, sizes.key_heads, size, size, dtype=torch.float32)
    unit = torch.nn.functional.normalize(k, dim=-1)
    x, h = some(1, tokens, sizes.width), some(1, sizes.width, dtype=torch.float32)
    counts = (some(tokens, sizes.width, dtype=torch.float32) * 6).round()
    codes = (some(sizes.feed_forward, sizes.width, dtype=torch.float32) * 255).to(torch.int8)
    threshold, scale = counts[:, 0].abs() + 1, some(sizes.feed_forward, 1, dtype=torch.float32)

    def attend() -> tuple[Tensor, Tensor]:
        return attention.forward(q, k, v, sizes.window, 0, None)

    def attend_and_back() -> Sequence[Tensor]:
        o, sums = attend()
        return attention.backward(q, q, k, v, o, sums, sizes.window, 0, None)

    def recur(steps: int) -> Sequence[Tensor]:
        q_, k_, v_, g = (x[:, :steps] for x in (q, k, v, gates))
        return recurrence.forward(q_, k_, v_, g, state, "key", False)

    def recur_back() -> Sequence[Tensor]:
        return [
            g for g in recurrence.backward(q, state, q, k, v, gates, state, "key", False) if g is not None
        ]

    def rule() -> Sequence[Tensor]:
        return delta.forward(k, k, v, gates[..., 0], unit * -0.5, unit, state, "head", False)

    def project(rows: int) -> Sequence[Tensor]:
        return [spikes.spike_linear(counts[:rows], threshold[:rows], codes, scale, None)]

    return {
        "attention": {
            "prefill": attend,
            "decode": lambda: attention.forward(q[:, :1], cached, cached, sizes.window, 0, None),
            "gradients": attend_and_back,
        },
        "recurrence": {
            "prefill": lambda: recur(tokens),
            "decode": lambda: recur(1),
            "gradients": recur_back,
        },
        "delta": {"prefill": rule},
        "scan": {"prefill": lambda: elements.linear_scan(-x.abs(), x, h, True, False)},
        "spikes": {"prefill": lambda: project(tokens), "decode": lambda: project(1)},
    }


class _Result:
    """A tensor that goes to the CPU when it is compared, not when it is timed."""

    def __init__(self, x: Tensor):
        self.x = x

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.x.detach().double().cpu().numpy(), dtype)


@dataclass(frozen=True)
class _Entry:
    uses_state: bool = False


class Calls:
    """Problems with some settings, called as programs are."""

    def __init__(self, timed: Problems, changes: Mapping[str, int], wait: Callable[[], None]):
        self.timed, self.changes, self.wait = timed, dict(changes), wait
        self.entries = dict.fromkeys(timed, _Entry())

    def call(self, entry: str, *_: Any, state: None = None) -> list[_Result]:
        """Returns the results, when the device has them."""
        with settings.using(self.changes):
            made = self.timed[entry]()
        self.wait()
        return [_Result(x) for x in made]


@dataclass
class Builder:
    """Tells what the kernels of one op are with some settings: timed where ``timed`` is given, else judged by the model.

    Attributes:
        shapes: the problems on tensors without data, whose launches are compared.
        timed: the same problems on the device.
        wait: returns when the device is done.
    """

    shapes: Problems
    timed: Problems | None = None
    wait: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.usages: dict[str, resources.Usage] = {}

    def __call__(self, changes: Mapping[str, int]) -> Built:
        launches: dict[str, list[resources.Launch]] = {}
        with settings.using(changes):
            for name, problem in self.shapes.items():
                with resources.recorded() as launches[name]:
                    problem()
        code = [(x.key, x.grid) for found in launches.values() for x in found]
        if self.timed is None:
            refused = next((r for found in launches.values() for x in found if (r := self.refusal(x))), "")
            seconds = {} if refused else {name: sum(map(self.relative, x)) for name, x in launches.items()}
            return Built(code, None, seconds, refused)
        calls = Calls(self.timed, changes, self.wait)
        try:
            for name in self.timed:
                calls.call(name)
        except OutOfResources as error:
            return Built(code, refused=str(error))
        return Built(code, cast(Program, calls))

    def usage(self, launch: resources.Launch) -> resources.Usage:
        if launch.key not in self.usages:
            self.usages[launch.key] = resources.compile_launch(launch, NEAREST)
        return self.usages[launch.key]

    def refusal(self, launch: resources.Launch) -> str:
        """Returns why a launch does not fit, or an empty text."""
        used = self.usage(launch)
        if used.shared > device.SHARED_BYTES:
            return (
                f"{used.kernel} takes {used.shared} bytes of shared memory, a block has {device.SHARED_BYTES}"
            )
        return f"{used.kernel} spills {used.stack} bytes of a thread" if used.stack else ""

    def relative(self, launch: resources.Launch) -> float:
        """Returns how much longer a launch takes than with all latencies hidden, by the model."""
        card, used, waves = Card(), self.usage(launch), launch.options["num_warps"]
        resident = card.resident(waves * WAVE, used.shared, used.registers)
        blocks = min(resident, -(-math.prod(launch.grid) // card.processors))
        constants, least = RESULTS[used.kernel]
        dividing: int = max(1, math.prod(launch.arguments[c] for c in constants) // least)
        return max(1.0, card.waves / (blocks * min(waves, dividing)))


def timing(
    calls: Mapping[str, Sequence[Any]],
    sizes: Sizes,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Returns what compares kernels by the time of whole calls, and their results by the dtype of the sizes."""
    return Timing(calls, rounds, clock, SAME[sizes.dtype])


def searched(op: str, modelled: bool, chosen: Sequence[str] | None = None) -> list[str]:
    """Returns the settings of an op that are searched, of those chosen.

    Raises OptionError for one that is not known, or of which the model tells nothing.
    """
    for name in chosen or ():
        if name not in settings.SETTINGS:
            raise OptionError(f"no setting {name!r}", hint=f"one of {', '.join(settings.SETTINGS)}")
        if modelled and not name.endswith(("_warps", "_stages")):
            raise OptionError(
                f"no model of {name}",
                why="it does not know what blocks read; it ranks waves and stages",
                hint="a machine with a GPU, where kernels are timed",
            )
    return [
        name
        for name, s in settings.SETTINGS.items()
        if s.ops == op
        and (chosen is None or name in chosen)
        and (not modelled or name.endswith(("_warps", "_stages")))
    ]


def search_op(
    op: str,
    builder: Builder,
    compare: Compare,
    chosen: Sequence[str] | None,
    budget: float | None,
    progress: Callable[[str], None],
) -> Found:
    """Returns what is found for the kernels of one op. Raises OptionError where the usual settings do not fit."""
    names = searched(op, builder.timed is None, chosen)
    if names and (refused := builder({}).refused):
        raise OptionError(
            f"the usual kernels of {op} do not run at these sizes", why=refused, hint="smaller heads"
        )
    return (
        search(builder, compare, names, budget, progress, settings.SETTINGS) if names else Found({}, (), ())
    )


def tune(
    sizes: Sizes,
    ops: Sequence[str] = settings.OPS,
    chosen: Sequence[str] | None = None,
    rounds: int = 9,
    budget: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Returns what the JSON file holds: ``tuning``, by what it was judged, the device, versions, sizes and what was tried.

    Raises OptionError, or MissingDependency where Triton can neither run kernels here nor compile them for gfx942.
    """
    if strange := [op for op in ops if op not in settings.OPS]:
        raise OptionError(f"no op {strange[0]!r}", hint=f"one of {', '.join(settings.OPS)}")
    try:
        here = device.find()
    except TargetError:
        here = None
    if (modelled := here is None or here.kind == "interpreter") and (needs := resources.missing(NEAREST)):
        raise MissingDependency(f"without a GPU kernels are compiled for {NEAREST}, which needs {needs}")
    judge = f"a model for {NEAREST}, not a measurement" if modelled else "time"
    progress(f"searched by {judge}")
    shapes, timed = problems(sizes, "meta"), None if modelled else problems(sizes, "cuda")
    end = None if budget is None else time.monotonic() + budget
    found: list[Found] = []
    for op in ops:
        calls: dict[str, Sequence[Any]] = dict.fromkeys(shapes[op], ())
        compare: Compare = Estimating(calls) if modelled else timing(calls, sizes, rounds)
        builder = Builder(shapes[op], timed[op] if timed else None, torch.cuda.synchronize)
        left = None if end is None else end - time.monotonic()
        found.append(search_op(op, builder, compare, chosen, left, progress))
    return {
        "tuning": {name: value for f in found for name, value in f.settings.items()},
        "judged_by": judge,
        **({} if here is None or modelled else {"device": here.name}),
        "versions": {
            "spikingbrain": version("spikingbrain"),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "sizes": asdict(sizes),
        "trials": [{**t.record(), "refused": t.refused} for f in found for t in f.trials],
        "left_out": [name for f in found for name in f.left_out],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 fine, 1 refused with a message, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m spikingbrain.backend_maca.triton.tune",
        description="Search the settings of the Triton kernels: by time on a GPU, without one by a model of gfx942.",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    for name, value in asdict(Sizes()).items():
        choices = list(DTYPES) if name == "dtype" else None
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=value,
            choices=choices,
            help=f"usual: {value}",
        )
    parser.add_argument(
        "--ops", default=",".join(settings.OPS), help="those to search for, with commas between"
    )
    parser.add_argument("--settings", help="those to search, with commas between; else all")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each")
    parser.add_argument("--budget", type=float, help="seconds after which no further setting is searched")
    args = parser.parse_args(argv)

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        sizes = Sizes(**{name: getattr(args, name) for name in asdict(Sizes())})
        chosen = [s.strip() for s in args.settings.split(",")] if args.settings else None
        ops = [op.strip() for op in args.ops.split(",")]
        made = tune(sizes, ops, chosen, args.rounds, args.budget, progress)
    except SpikingBrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    args.output.write_text(json.dumps(made, indent=1) + "\n")
    told = ", ".join(f"{name} {value}" for name, value in made["tuning"].items()) or "the usual settings"
    print(f"{args.output}: {told}, by {made['judged_by']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
