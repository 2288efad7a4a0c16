"""What a call costs besides its work: a function of three tiny ops, compiled, on one thread.

    python benchmarks/call.py

The whole call is measured: Dynamo's guards, AOTAutograd's wrapper, and the backend's own part. "aot_eager" runs the ops one by
one behind the same wrappers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from timing import interleave, ratio
from torch import Tensor

CALLS = 2000


def function(x: Tensor) -> Tensor:
    return torch.sin(x) * 2 + x


def many(call: Callable[[Tensor], object], x: Tensor) -> None:
    for _ in range(CALLS):
        call(x)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", default="aot_eager,inductor,spikingbrain")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(16)
    with torch.no_grad():
        calls = {"eager": function}
        for backend in args.backends.split(","):
            torch._dynamo.reset()
            # each backend gets a function of its own, so that none waits behind another's guards
            twin = type(function)(function.__code__.replace(co_name=f"function_{backend}"), globals())
            calls[backend] = torch.compile(twin, backend=backend)
            torch.testing.assert_close(calls[backend](x), function(x))
        times = interleave({name: partial(many, call, x) for name, call in calls.items()}, args.rounds)
    for name, values in times.items():
        over = ratio(values, times.get("inductor", values))
        print(f"{name:14} {np.median(values) / CALLS * 1e6:7.2f} us a call, {over:.2f}x inductor's")


if __name__ == "__main__":
    main()
