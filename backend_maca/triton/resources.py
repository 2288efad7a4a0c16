"""What the Triton kernels take of a device, found by compiling them ahead of time, without one.

``python -m spikingbrain.backend_maca.triton.resources`` prints the table. The kernels are those that the launchers launch for
some problems: tensors without data go through the launchers, and the launches are recorded. No public Triton compiles for
MetaX; gfx942 is the nearest relative, with waves of 64 lanes and 64 KiB of shared memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spikingbrain.backend_maca.triton import (
    attention,
    attention_kernels,
    delta,
    recurrence,
    recurrence_kernels,
    scan_kernels,
    spike_kernels,
    spikes,
)
from spikingbrain.backend_maca.triton import scan as elements
from spikingbrain.backend_maca.triton.device import INTERPRETED

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int64: "*i64",
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """A kernel with the grid and the arguments of one launch, by name, and the options of its compilation."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int]

    @property
    def key(self) -> str:
        """Returns text that is equal where the compiled code is."""
        told = {k: (v.dtype if isinstance(v, Tensor) else v) for k, v in self.arguments.items()}
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        sizes = {
            k: (v if k in constants or isinstance(v, torch.dtype) else v % 16 == 0) for k, v in told.items()
        }
        return f"{self.kernel.__name__} {sizes} {self.options}"


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: bytes of shared memory of a block, registers of a thread, bytes of its stack (spills)."""

    kernel: str
    target: str
    shared: int
    registers: int
    stack: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Records launches instead of launching, for all kernels of this package."""
    found: list[Launch] = []
    kept: list[tuple[Any, str, Any]] = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
            def launch(*given: Any, **named: Any) -> None:
                options = {name: named.pop(name) for name in _OPTIONS}
                names = [p.name for p in self.kernel.params]
                arguments = dict(zip(names, given, strict=False)) | named
                found.append(Launch(self.kernel, tuple(grid), arguments, options))

            return launch

    for module in (attention_kernels, recurrence_kernels, scan_kernels, spike_kernels):
        for name, kernel in vars(module).items():
            if isinstance(kernel, triton.JITFunction):
                kept.append((module, name, kernel))
    try:
        for module, name, kernel in kept:
            setattr(module, name, Recorder(kernel))
        yield found
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)


def problems() -> dict[str, Callable[[], Any]]:
    """Returns calls of the launchers, on tensors without data, at sizes of real models."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def recur(dtype: torch.dtype, axis: str) -> None:
        q, k = empty(1, 2048, 8, 128, dtype=dtype), empty(1, 2048, 4, 128, dtype=dtype)
        decay = {"none": None, "head": k[..., 0], "key": k}[axis]
        state = empty(1, 4, 128, 128)
        one = None if decay is None else decay[:, :1]
        recurrence.forward(q[:, :1], k[:, :1], k[:, :1], one, state, axis, False)
        recurrence.forward(q, k, k, decay, state, axis, False)
        recurrence.backward(q, state, q, k, k, decay, state, axis, False)

    def attend(dtype: torch.dtype, size: int, given: bool = False) -> None:
        q, k = empty(1, 2048, 8, size, dtype=dtype), empty(1, 2048, 4, size, dtype=dtype)
        at = (empty(1, 2048, dtype=torch.int64),) * 2 if given else (None, None)
        o, sums = attention.forward(q, k, k, 512, 4, None, *at)
        attention.backward(q, q, k, k, o, sums, 512, 4, None, *at)

    def spike(rows: int) -> None:
        codes = empty(4096, 4096, dtype=torch.int8)
        spikes.spike_linear(empty(rows, 4096), empty(rows), codes, empty(4096, 1), empty(4096))

    def delta_rule(dtype: torch.dtype, axis: str) -> None:
        q, k = empty(1, 2048, 8, 128, dtype=dtype), empty(1, 2048, 4, 128, dtype=dtype)
        delta.forward(q, k, k, k[..., 0] if axis == "head" else k, k, k, empty(1, 4, 128, 128), axis, False)

    def scan() -> None:
        x = empty(4, 2048, 4096)
        elements.linear_scan(x, x, empty(4, 4096), True, False)

    made: dict[str, Callable[[], Any]] = {"scan": scan}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for axis in ("none", "head", "key"):
            made[f"recurrence {axis} {name}"] = lambda dtype=dtype, axis=axis: recur(dtype, axis)  # type: ignore[misc]
        for axis in ("head", "key"):
            made[f"delta rule {axis} {name}"] = lambda dtype=dtype, axis=axis: delta_rule(dtype, axis)  # type: ignore[misc]
        for size in (64, 128, 256)[: 2 if dtype == torch.float32 else 3]:
            made[f"attention {size} {name}"] = lambda dtype=dtype, size=size: attend(dtype, size)  # type: ignore[misc]
        made[f"attention at positions {name}"] = lambda dtype=dtype: attend(dtype, 128, True)  # type: ignore[misc]
    for rows in (1, 2048):
        made[f"spikes {rows} rows"] = lambda rows=rows: spike(rows)  # type: ignore[misc]
    return made


def missing(target: str) -> str:
    """Returns which part of Triton's installation compiling for a target lacks, or an empty text."""
    backend = TARGETS[target][0]
    if INTERPRETED:
        return "a process without TRITON_INTERPRET"
    if not any(b.compiler.supports_target(GPUTarget(*TARGETS[target])) for b in backends.values()):
        return f"a Triton with its {backend!r} backend"
    if backend == "cuda" and not _CUOBJDUMP.exists():
        return "cuobjdump, which Triton's wheels bring"
    return ""


def compile_launch(launch: Launch, target: str) -> Usage:
    """Compiles a kernel for one of `TARGETS`."""
    params = launch.kernel.params
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(params):
        value = launch.arguments[p.name]
        if p.is_constexpr:
            signature[p.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[p.name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[p.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled: Any = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(launch.options))
    registers, stack = _of_amd(compiled) if "amdgcn" in compiled.asm else _of_nvidia(compiled)
    return Usage(launch.kernel.__name__, target, compiled.metadata.shared, registers, stack)


def _of_amd(compiled: Any) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    return tuple(  # type: ignore[return-value]
        int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]
        for name in ("vgpr_count", "private_segment_fixed_size")
    )


def _of_nvidia(compiled: Any) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", text))
    return int(found["REG"]), int(found["STACK"])


def table(targets: Sequence[str] = tuple(TARGETS), only: str = "") -> Iterator[tuple[str, Usage]]:
    """Yields for each problem what its kernels take; equal code is compiled once.

    ``only``: a part of the problem's name and the kernel's, such as "float32 pair_scores".
    """
    seen: set[tuple[str, str]] = set()
    for name, problem in problems().items():
        with recorded() as launches:
            problem()
        for launch in launches:
            if only not in f"{name} {launch.kernel.__name__}":
                continue
            for target in targets:
                if (launch.key, target) not in seen:
                    seen.add((launch.key, target))
                    yield name, compile_launch(launch, target)


def main() -> None:
    targets = [t for t in TARGETS if not missing(t)]
    for target in TARGETS:
        if target not in targets:
            print(f"{target} is left out: it needs {missing(target)}")
    print(f"{'problem':<28}{'kernel':<24}{'target':<8}{'shared':>8}{'registers':>10}{'stack':>7}")
    for name, used in table(targets):
        print(
            f"{name:<28}{used.kernel:<24}{used.target:<8}{used.shared:>8}{used.registers:>10}{used.stack:>7}",
            flush=True,
        )


if __name__ == "__main__":
    main()
