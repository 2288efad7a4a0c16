"""What a call costs besides its work: a function of three tiny ops, compiled, on one thread.

    python benchmarks/call.py

The whole call is measured: Dynamo's guards, AOTAutograd's wrapper, and the backend's own part. "aot_eager" runs the ops one by
one behind the same wrappers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def function(x: Tensor) -> Tensor:
    return torch.sin(x) * 2 + x


def microseconds(call: Callable[[Tensor], object], x: Tensor, calls: int = 2000) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call(x)
    return (time.perf_counter() - start) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", default="aot_eager,inductor,spikingbrain")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(16)
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        calls = {"eager": function}
        for backend in args.backends.split(","):
            torch._dynamo.reset()
            # each backend gets a function of its own, so that none waits behind another's guards
            twin = type(function)(function.__code__.replace(co_name=f"function_{backend}"), globals())
            calls[backend] = torch.compile(twin, backend=backend)
            torch.testing.assert_close(calls[backend](x), function(x))
        for _ in range(args.rounds):
            for name, call in calls.items():
                times.setdefault(name, []).append(microseconds(call, x))
    for name, values in times.items():
        over = np.median(np.divide(values, times.get("inductor", values)))
        print(f"{name:14} {np.median(values):7.2f} us a call, {over:.2f}x inductor's")


if __name__ == "__main__":
    main()
