"""Times the CPU kernels of linear recurrences against blockwise forms in torch, one thread, interleaved.

Gated linear attention (decay of keys, as logarithms) and the delta rule, states of 128x128. torch gets its own layout
``[B, H, T, D]``, keys, values and gates repeated per query head, prepared outside the timing, and the faster of its
eager and its inductor forms counts. The peak is a loop of multiply-adds between registers, run in the same rounds.
Allocators keep memory, for all, so that no candidate pays for page faults. Time is that of the thread, which other
processes disturb less; a ratio is the median over rounds.

    python benchmarks/recurrence_kernel.py [--target cpu|x86-64-v3] [--only WORD] [--without-inductor]
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import iree.runtime as rt
import numpy as np
import torch
from timing import fastest, interleave, keep_memory, ratio
from torch import Tensor
from torch_mlir import ir
from torch_mlir.dialects import func

from spikingbrain.backend_iree.dispatch import wrap_kernels
from spikingbrain.backend_iree.targets import known
from spikingbrain.passes import dialect
from spikingbrain.passes.kernels import builders
from spikingbrain.passes.kernels.recurrence import emit_recurrence_launch
from spikingbrain.target import Target

SIZE = 128
PEAK_TURNS, PEAK_SUMS = 200_000, 12
CHUNK = 64


@dataclass(frozen=True)
class Case:
    batch: int
    time: int
    heads: int
    states: int
    delta: bool = False

    @property
    def fields(self) -> dict[str, list[int]]:
        """Returns the kernel's operands with their sizes."""
        b, t, h, s = self.batch, self.time, self.heads, self.states
        of_state = [b, t, s, SIZE]
        fields = {"q": [b, t, h, SIZE], "k": of_state, "v": of_state}
        fields |= {"erase": of_state, "predict": of_state} if self.delta else {"decay": of_state}
        return fields | {"state": [b, s, SIZE, SIZE]}

    @property
    def operations(self) -> int:
        """Returns the additions and multiplications that the op's definition asks for, decays aside."""
        return (
            2 * SIZE * SIZE * self.batch * self.time * (self.heads + self.states * (3 if self.delta else 1))
        )


CASES = {
    "GLA 1k": Case(1, 1024, 8, 8),
    "GLA 4k": Case(1, 4096, 8, 8),
    "GLA 16k": Case(1, 16384, 8, 8),
    "GLA 28/4 heads 1k": Case(1, 1024, 28, 4),
    "GLA 28/4 heads 4k": Case(1, 4096, 28, 4),
    "GLA 16 short": Case(16, 64, 8, 8),
    "GLA decode": Case(1, 1, 16, 16),
    "delta rule 1k": Case(1, 1024, 8, 8, delta=True),
    "delta rule 4k": Case(1, 4096, 8, 8, delta=True),
    "delta rule decode": Case(1, 1, 16, 16, delta=True),
}


# Ours


def compiled(module: ir.Module, target: Target) -> Callable[..., Any]:
    """Returns ``@main`` of a module of launches; takes over the module."""
    wrap_kernels(module)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "m.mlir"), Path(folder, "m.vmfb")
        source.write_text(module.operation.get_asm())
        flags = known()[target.name].flags
        subprocess.run(["iree-compile", str(source), "-o", str(binary), *flags], check=True)
        config = rt.Config(device=rt.get_device("local-sync"))
        vm_module = rt.VmModule.copy_buffer(config.vm_instance, binary.read_bytes())
        return rt.load_vm_module(vm_module, config).main


def recurrence(case: Case, target: Target) -> Callable[..., Any]:
    types = {n: "tensor<" + "x".join(map(str, sizes)) + "xf32>" for n, sizes in case.fields.items()}
    operands = ("q", "k", "v", "decay", "erase", "predict", "bonus", "state")
    present = ", ".join(str(int(n in types)) for n in operands)
    results = f"{types['q']}, {types['state']}"
    text = (
        f"func.func @main({', '.join(f'%{n}: {t}' for n, t in types.items())}) -> ({results}) {{\n"
        f'%o, %s = "spikingbrain.linear_recurrence"({", ".join(f"%{n}" for n in types)})'
        f' {{decay_axis = "{"none" if case.delta else "key"}", log_decay = true, exclusive = false,'
        f" reverse = false, operandSegmentSizes = array<i32: {present}>}}"
        f" : ({', '.join(types.values())}) -> ({results})\nreturn %o, %s : {results}\n}}"
    )
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        emit_recurrence_launch(module.body.operations[0].body.blocks[0].operations[0], target)
        return compiled(module, target)


def multiply_adds(target: Target) -> tuple[Callable[[], Any], int]:
    """Returns a loop over registers and the operations of one call."""
    lanes = target.vector_lanes_f32
    row = f"tensor<{lanes}xf32>"
    text = (
        f"func.func @main(%x: {row}) -> {row} {{\n%one = arith.constant 1 : index\n"
        f'%y = "spikingbrain_control.launch"(%one, %one, %one, %x) {{callee = @peak, tied = [-1]}}'
        f" : (index, index, index, {row}) -> {row}\nreturn %y : {row}\n}}"
    )
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        kind = ir.MemRefType.get([lanes], ir.F32Type.get())
        with ir.InsertionPoint(module.body):
            kernel = func.FuncOp("peak", ([ir.IndexType.get()] * 3 + [kind] * 2, []), visibility="private")
        with ir.InsertionPoint(kernel.add_entry_block()):
            x, y = list(kernel.arguments)[3:]
            factor, fused = builders.load(x, [0], lanes), builders.has_fma(target)

            def turn(_: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                return [builders.multiply_add(s, factor, factor, fused) for s in sums]

            sums = builders.loop(0, PEAK_TURNS, 1, turn, [factor] * PEAK_SUMS)
            builders.store(builders.folded(functools.partial(builders.larger), sums), y, [0])
            func.ReturnOp([])
        main = compiled(module, target)
    ones = np.full(lanes, 0.5, np.float32)
    return functools.partial(main, ones), 2 * lanes * PEAK_TURNS * PEAK_SUMS


# torch


def gla_outer(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Returns what chunks ``[B, H, N, C, D]`` need before the states are known."""
    total = g.cumsum(-2)
    last = total[..., -1:, :]
    query, key = q * total.exp(), k * (-total).exp()
    scores = (query @ key.transpose(-1, -2)).tril()
    return query, scores, k * (last - total).exp(), last.exp().transpose(-1, -2)


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, outer: Any, join: Any) -> Tensor:
    """Gated linear attention in chunks; everything but the states is computed for all chunks at once."""
    q, k, v, g = (x.unflatten(2, (-1, min(CHUNK, x.shape[2]))) for x in (q, k, v, g))
    query, scores, key, decay = outer(q, k, g)
    update = key.transpose(-1, -2) @ v
    states = torch.empty_like(update)
    for n in range(update.shape[2]):
        states[:, :, n] = state
        state = torch.addcmul(update[:, :, n], state, decay[:, :, n])
    return join(query, states, scores, v)


def gla_join(query: Tensor, states: Tensor, scores: Tensor, v: Tensor) -> Tensor:
    return (query @ states + scores @ v).flatten(2, 3)


def delta_outer(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """Returns the WY form of each chunk: ``u = value - weight S`` are the rows added to a state S."""
    scaled = k * beta
    lower = (scaled @ k.transpose(-1, -2)).tril(-1)
    both = torch.cat([v * beta, scaled], -1)
    value, weight = torch.linalg.solve_triangular(lower, both, upper=False, unitriangular=True).chunk(2, -1)
    return value, weight, (q @ k.transpose(-1, -2)).tril()


def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, outer: Any, join: Any) -> Tensor:
    """The delta rule in chunks."""
    q, k, v, beta = (x.unflatten(2, (-1, min(CHUNK, x.shape[2]))) for x in (q, k, v, beta))
    value, weight, scores = outer(q, k, v, beta)
    states, added = value.new_empty(*value.shape[:3], SIZE, SIZE), torch.empty_like(value)
    for n in range(value.shape[2]):
        states[:, :, n] = state
        added[:, :, n] = value[:, :, n] - weight[:, :, n] @ state
        state = state + k[:, :, n].transpose(-1, -2) @ added[:, :, n]
    return join(q, states, scores, added)


def gla_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
    state.mul_(g.exp().transpose(-1, -2)).add_(k.transpose(-1, -2) * v)
    return q @ state


def delta_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    state.add_(k.transpose(-1, -2) * (beta * (v - k @ state)))
    return q @ state


def torch_forms(case: Case, inductor: bool) -> dict[str, Callable[..., Tensor]]:
    if case.time == 1:
        step = delta_step if case.delta else gla_step
        forms: dict[str, Callable[..., Tensor]] = {"torch eager": step}
        return forms | {"torch inductor": torch.compile(step)} if inductor else forms
    whole, outer = (delta, delta_outer) if case.delta else (gla, gla_outer)
    forms = {"torch eager": functools.partial(whole, outer=outer, join=gla_join)}
    if inductor:
        parts = {"outer": torch.compile(outer), "join": torch.compile(gla_join)}
        forms["torch inductor"] = functools.partial(whole, **parts)
    return forms


# Measuring


def inputs(case: Case) -> tuple[dict[str, np.ndarray], list[Tensor]]:
    """Returns the kernel's operands, and torch's: q, k, v, gates or learning rates, state."""
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(sizes, dtype=np.float32) for n, sizes in case.fields.items()}
    arrays["q"] *= SIZE**-0.5
    beta = 1 / (1 + np.exp(-arrays["v"][..., :1]))
    if case.delta:
        arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
        arrays |= {"predict": arrays["k"], "erase": -beta * arrays["k"], "state": 0 * arrays["state"]}
        tensors = {"q": arrays["q"], "k": arrays["k"], "v": arrays["v"], "gate": beta}
        arrays["k"] = beta * arrays["k"]
    else:
        arrays["decay"] = np.log(1 / (1 + np.exp(-arrays["decay"]))) / 16  # as GLA's layers have it
        tensors = {"q": arrays["q"], "k": arrays["k"], "v": arrays["v"], "gate": arrays["decay"]}
    group = case.heads // case.states
    theirs = [torch.from_numpy(x).transpose(1, 2).contiguous() for x in tensors.values()]
    theirs.append(torch.from_numpy(arrays["state"].copy()))
    return arrays, theirs[:1] + [x.repeat_interleave(group, 1) for x in theirs[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", default="cpu", choices=[n for n, t in known().items() if t.target.vector_bits]
    )
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--without-inductor", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    target = known()[options.target].target
    peak, peak_operations = multiply_adds(target)
    least: dict[str, float] = {}
    for name, case in CASES.items():
        if options.only not in name:
            continue
        arrays, tensors = inputs(case)
        run, device = recurrence(case, target), rt.get_device("local-sync")
        out = run(*arrays.values())[0].to_host()
        ours = functools.partial(run, *(rt.asdevicearray(device, x) for x in arrays.values()))
        candidates: dict[str, Callable[[], Any]] = {"peak": peak, "kernel": ours}
        with torch.no_grad():
            for label, form in torch_forms(case, not options.without_inductor).items():
                theirs = form(*tensors[:-1], tensors[-1].clone()).transpose(1, 2).numpy()
                error = np.abs(out - theirs).max() / np.abs(theirs).max()
                assert error < 1e-4, (label, error)
                candidates[label] = functools.partial(form, *tensors)
            times = interleave(candidates, options.rounds, fastest(0.05))
        least[name] = times["kernel"].min()
        best = peak_operations / times.pop("peak").min()
        print(f"{name}: {case.operations / least[name] / best:.0%} of {best / 1e9:.0f} Gflop/s")
        for label, values in times.items():
            print(
                f"    {label:14} {values.min() * 1e3:9.3f} ms   {ratio(values, times['kernel']):5.2f}x",
                flush=True,
            )
    if {"GLA 4k", "GLA 16k"} <= least.keys():
        print(f"time(16k) / time(4k) = {least['GLA 16k'] / least['GLA 4k']:.2f}")


if __name__ == "__main__":
    main()
