"""Spiking projections to test: what they are given, what numpy makes of it, and how they are compiled and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch_mlir import ir

from spikingbrain.backend_iree.dispatch import wrap_kernels
from spikingbrain.passes import dialect, pipeline, recipes
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.parameters import StoredTensor
from spikingbrain.passes.spike_to_int import SpikeToInt
from spikingbrain.passes.weights_to_arguments import WeightsToArguments
from spikingbrain.target import Target

Array = np.ndarray[Any, Any]
LARGEST = {4: 7, 8: 127, 16: 32767}


@dataclass(frozen=True)
class Case:
    """One projection: K channels in G groups to N columns; ``rows`` None means any number of them, ``silent`` a share told."""

    k: int
    n: int
    groups: int = 1
    bits: int = 8
    rows: int | None = None
    bias: bool = False
    silent: float | None = None

    def function(self, name: str) -> str:
        m = "?" if self.rows is None else self.rows
        element = "i16" if self.bits == 16 else "i8"
        x, v, y = f"tensor<{m}x{self.k}xf32>", f"tensor<{m}xf32>", f"tensor<{m}x{self.n}xf32>"
        w, s, b = (
            f"tensor<{self.n}x{self.k}x{element}>",
            f"tensor<{self.n}x{self.groups}xf32>",
            f"tensor<{self.n}xf32>",
        )
        parameter = '%{0} = "spikingbrain.parameter"() {{sources = ["{0}"], recipe = []}} : () -> {1}'
        stored = [("w", w), ("s", s), *[("b", b)] * self.bias]
        share = "" if self.silent is None else f", silent = {self.silent} : f64"
        operands = ["%counts", "%v", *(f"%{p}" for p, _ in stored)]
        return f"""
func.func @{name}(%x: {x}) -> {y} attributes {{spikingbrain.weight_arguments}} {{
  {"".join(parameter.format(p, t) + chr(10) + "  " for p, t in stored)}
  %counts, %v = "spikingbrain.spike_encode"(%x) {{k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}}
    : ({x}) -> ({x}, {v})
  %y = "spikingbrain.spike_linear"({", ".join(operands)}) {{bits = {self.bits} : i64{share}}}
    : ({", ".join([x, v, *(t for _, t in stored)])}) -> {y}
  return %y : {y}
}}"""

    def weights(self, rng: np.random.Generator) -> dict[str, Array]:
        """Returns random weights, the extreme codes among them, with scales that are powers of two."""
        high = LARGEST[self.bits]
        codes = rng.integers(-high - 1, high + 1, (self.n, self.k))
        if self.bits == 16:  # as in the published checkpoint: a hundredth lies outside int8
            wide = rng.random(codes.shape) < 0.01
            codes = np.where(
                wide, rng.choice([300, -129, 128, 32767, -32768], codes.shape), codes % 256 - 128
            )
        codes[0, : self.k // 2], codes[-1, self.k // 2 :] = high, -high - 1
        scales = 2.0 ** rng.integers(-12, -6, (self.n, self.groups))
        return {
            "w": codes.astype(np.int16 if self.bits == 16 else np.int8),
            "s": scales.astype(np.float32),
            "b": rng.standard_normal(self.n).astype(np.float32),
        }


def encode(x: Array, k: float = 3.0, lower: float = 1e-5, upper: float = 1e4) -> tuple[Array, Array]:
    """Returns the counts and thresholds of rows."""
    with np.errstate(all="ignore"):
        mean = (np.abs(x).astype(np.float64).sum(-1) / x.shape[-1]).astype(np.float32)
        threshold = np.clip(mean / np.float32(k), np.float32(lower), np.float32(upper))
        return np.round(x / threshold[..., None]), threshold


def linear(x: Array, weights: dict[str, Array], bias: bool) -> tuple[Array, Array]:
    """Returns the projection with every integer sum exact, and it again with the bias added in the same rounding."""
    counts, threshold = encode(x)
    codes, scales = weights["w"], weights["s"]
    groups, width = scales.shape[1], codes.shape[1] // scales.shape[1]
    total = np.zeros((len(x), len(codes)), np.float32)
    # Sums stay below 2**53 wherever the threshold is not clamped above: f64 is as exact as int64 and knows NaN.
    fits = np.abs(counts).max(-1, initial=0) < 2**31
    with np.errstate(all="ignore"):
        for g in range(groups):
            part = slice(g * width, (g + 1) * width)
            sums = counts[:, part].astype(np.float64) @ codes[:, part].T.astype(np.float64)
            whole = counts[fits, part].astype(np.int64) @ codes[:, part].T.astype(np.int64)
            sums[fits] = whole
            total += sums.astype(np.float32) * scales[:, g]
        y = total * threshold[:, None]
        if not bias:
            return y, y
        product = total.astype(np.float64) * threshold[:, None]  # exact
        return y + weights["b"], (product + weights["b"]).astype(np.float32)


def programs(cases: dict[str, Case], target: Target) -> dict[str, Callable[[Array, dict[str, Array]], Array]]:
    """Compiles a program for each case; it takes x and the model's weights."""
    from iree import runtime

    code, stored = compile_cases(cases, target)
    config = runtime.Config("local-sync")
    system = runtime.SystemContext(config=config)
    system.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code))
    compiled = system.modules.module

    def program(name: str) -> Callable[[Array, dict[str, Array]], Array]:
        def run(x: Array, weights: dict[str, Array]) -> Array:
            result: Array = compiled[name](x, *packed(stored[name], weights)).to_host()
            return result

        return run

    return {name: program(name) for name in cases}


def packed(stored: Sequence[StoredTensor], weights: dict[str, Array]) -> list[Array]:
    """Returns a model's weights as a program takes them."""
    return [recipes.apply(s.recipe, [weights[n] for n in s.sources]) for s in stored]


def compile_cases(
    cases: dict[str, Case], target: Target, flags: Sequence[str] = ()
) -> tuple[bytes, dict[str, list[StoredTensor]]]:
    """Returns IREE's module of the cases and, for each, the stored tensors that it takes behind x."""
    from iree.compiler import tools

    text = "".join(case.function(name) for name, case in cases.items())
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        context = PassContext(target)
        pipeline.run([SpikeToInt(), WeightsToArguments()], module, context)
        pipeline.check_lowered(module)
        pipeline.clean(module)
        wrap_kernels(module)
        features = ",".join(f"+{feature}" for feature in sorted(target.features))
        flags = [
            f"--iree-llvmcpu-target-cpu={target.cpu}",
            f"--iree-llvmcpu-target-cpu-features={features}",
            "--iree-input-demote-f64-to-f32=false",
            *flags,
        ]
        code = tools.compile_str(str(module), target_backends=["llvm-cpu"], extra_args=flags)
    return code, context.weight_arguments
