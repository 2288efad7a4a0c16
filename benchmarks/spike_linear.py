"""Compares the spiking linear with int8 linears of torch and ONNX Runtime, and with inductor on its fake-quantised float form.

    python benchmarks/spike_linear.py [--shapes 2048x2048 ...] [--rows 1 8 128 512] [--bits 8] [--group 0]

All on one thread, interleaved in one process, timed by the thread's CPU clock. Shapes are columns x channels (N x K). Few rows
cycle through copies of the weight that together are larger than the last cache. For each shape: the best time of ours, with its
share of two limits measured in the same rounds, a loop of dot products over registers alone and a read of memory; and each
peer's time divided by ours, the median over rounds. Ours and fake-quant inductor compute thresholds per row, the int8 peers their
own dynamic scale of a whole tensor.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import iree.compiler.tools as compiler
import iree.runtime as runtime
import numpy as np
import torch
from timing import Call, interleave, keep_memory, mean, ratio
from torch_mlir import ir
from torch_mlir.dialects import arith, func, vector

from spikingbrain.backend_iree import targets
from spikingbrain.backend_iree.dispatch import wrap_kernels
from spikingbrain.passes import dialect, pipeline, recipes
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.kernels.builders import get, index, launch, load, loop, splat, store
from spikingbrain.passes.kernels.spike_dot import Dot, choose
from spikingbrain.passes.spike_to_int import SpikeToInt
from spikingbrain.passes.weights_to_arguments import WeightsToArguments
from spikingbrain.target import Target

SHAPES = ["2048x2048", "2048x8192", "8192x2048", "576x576", "576x1536", "3584x18944"]
ROUND_SECONDS = 0.03
CYCLE_BYTES = 160 << 20  # of weight that few rows go through: several times the last cache
MOST_COPIES = 64  # in one program
PEAK_STEPS = 20000
READ_BYTES = 256 << 20


def compiled(module: ir.Module, target: Target) -> tuple[Any, Any]:
    """Returns the functions of a module of launches, and their device."""
    wrap_kernels(module)
    flags = [f"--iree-llvmcpu-target-cpu={target.cpu}", "--iree-input-demote-f64-to-f32=false"]
    code = compiler.compile_str(str(module), target_backends=["llvm-cpu"], extra_args=flags)
    config = runtime.Config("local-sync")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code))
    return context.modules.module, config.device


def on_device(device: Any, array: np.ndarray[Any, Any]) -> Any:
    tensor = torch.from_numpy(array).clone()  # aligned as IREE wants it
    return runtime.DeviceArray(device, device.from_dlpack_capsule(torch.utils.dlpack.to_dlpack(tensor)))


# Ours


def program(n: int, k: int, m: int, bits: int, groups: int, copies: int, silent: float = 0.0) -> str:
    """Returns a function of ``copies`` inputs, each projected by a weight of its own; ``silent``: the share told."""
    element = "i16" if bits == 16 else "i8"
    x, v, y = f"tensor<{m}x{k}xf32>", f"tensor<{m}xf32>", f"tensor<{m}x{n}xf32>"
    w, s = f"tensor<{n}x{k}x{element}>", f"tensor<{n}x{groups}xf32>"
    body = ""
    for i in range(copies):
        body += f"""
  %w{i} = "spikingbrain.parameter"() {{sources = ["w{i}"], recipe = []}} : () -> {w}
  %s{i} = "spikingbrain.parameter"() {{sources = ["s{i}"], recipe = []}} : () -> {s}
  %c{i}, %v{i} = "spikingbrain.spike_encode"(%x{i}) {{k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}}
    : ({x}) -> ({x}, {v})
  %y{i} = "spikingbrain.spike_linear"(%c{i}, %v{i}, %w{i}, %s{i}) {{bits = {bits} : i64, silent = {silent} : f64}}
    : ({x}, {v}, {w}, {s}) -> {y}"""
    names = range(copies)
    arguments = ", ".join(f"%x{i}: {x}" for i in names)
    return f"""func.func @main({arguments}) -> ({", ".join([y] * copies)}) attributes {{spikingbrain.weight_arguments}} {{{body}
  return {", ".join(f"%y{i}" for i in names)} : {", ".join([y] * copies)}
}}"""


def ours(
    xs: Sequence[torch.Tensor],
    codes: Sequence[Any],
    scale: torch.Tensor,
    bits: int,
    target: Target,
    silent: float = 0.0,
) -> Call:
    """Returns a call of all copies of our projection."""
    (n, k), m, groups = codes[0].shape, len(xs[0]), scale.shape[1]
    copies = min(MOST_COPIES, len(codes))
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(program(n, k, m, bits, groups, copies, silent))
        context = PassContext(target)
        pipeline.run([SpikeToInt(), WeightsToArguments()], module, context)
        pipeline.clean(module)
        functions, device = compiled(module, target)
    stored = context.weight_arguments["main"]
    rows = [on_device(device, x.numpy()) for x in xs[:copies]]
    scales = {
        s.key: on_device(device, recipes.apply(s.recipe, [scale.numpy()]))
        for s in stored
        if s.sources[0][0] == "s"
    }
    calls = []
    for first in range(0, len(codes) - copies + 1, copies):
        arguments = list(rows)
        for s in stored:
            name = s.sources[0]
            if name[0] == "s":
                arguments.append(scales[s.key])
            else:
                packed = recipes.apply(s.recipe, [codes[first + int(name[1:])]])
                arguments.append(on_device(device, packed))
        calls.append(arguments)
    main = functions["main"]
    return lambda: [main(*arguments) for arguments in calls]


# Limits


def kernel(name: str, types: list[ir.Type], body: Callable[..., None]) -> None:
    entry = func.FuncOp(name, ([ir.IndexType.get()] * 3 + types, []), visibility="private").add_entry_block()
    with ir.InsertionPoint(entry):
        body(*entry.arguments[3:])
        func.ReturnOp([])


def peak(dot: Dot, target: Target) -> Call:
    """Returns a call that does PEAK_STEPS times 24 dot products on registers alone."""
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.create()
        i32 = ir.IntegerType.get_signless(32)
        seed = ir.MemRefType.get([1], i32)
        result = ir.MemRefType.get([dot.lanes], i32)

        def body(source: ir.Value, out: ir.Value) -> None:
            counts = dot.counts(get(source, [0]))
            sums = [splat(get(source, [0]), dot.lanes)] * 24

            def step(_: ir.Value, *values: ir.Value) -> list[ir.Value]:
                # the sums are weights too, or products would leave the loop
                return [dot.multiply_add(v, vector.bitcast(counts.type, v), counts) for v in values]

            total = loop(0, PEAK_STEPS, 1, step, sums)
            for value in total[1:]:
                total[0] = arith.xori(total[0], value)
            store(total[0], out, [0])

        tensors = [ir.RankedTensorType.get(t.shape, i32) for t in (seed, result)]
        with ir.InsertionPoint(module.body):
            kernel("peak", [seed, result], body)
            main = func.FuncOp("main", ([tensors[0]], [tensors[1]])).add_entry_block()
        with ir.InsertionPoint(main):
            grid = [index(1)] * 3
            func.ReturnOp([launch("peak", tensors[1], grid, main.arguments).result])
        functions, device = compiled(module, target)
    source = on_device(device, np.ones(1, np.int32))
    return lambda: functions["main"](source)


def read(dot: Dot, target: Target) -> Call:
    """Returns a call that reads READ_BYTES of memory at four places at a time."""
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.create()
        i32, streams = ir.IntegerType.get_signless(32), 4
        words = READ_BYTES // 4
        source = ir.MemRefType.get([words], i32)
        result = ir.MemRefType.get([dot.lanes], i32)

        def body(memory: ir.Value, out: ir.Value) -> None:
            def step(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                return [
                    arith.xori(s, load(memory, [arith.addi(at, index(i * words // streams))], dot.lanes))
                    for i, s in enumerate(sums)
                ]

            sums = loop(0, words // streams, dot.lanes, step, [splat(0, dot.lanes)] * streams)
            for value in sums[1:]:
                sums[0] = arith.xori(sums[0], value)
            store(sums[0], out, [0])

        tensors = [ir.RankedTensorType.get(t.shape, i32) for t in (source, result)]
        with ir.InsertionPoint(module.body):
            kernel("read", [source, result], body)
            main = func.FuncOp("main", ([tensors[0]], [tensors[1]])).add_entry_block()
        with ir.InsertionPoint(main):
            grid = [index(1)] * 3
            func.ReturnOp([launch("read", tensors[1], grid, main.arguments).result])
        functions, device = compiled(module, target)
    memory = on_device(device, np.ones(words, np.int32))
    return lambda: functions["main"](memory)


# Peers


def torch_dynamic(xs: Sequence[torch.Tensor], codes: Sequence[Any], scale: torch.Tensor) -> Call:
    """torch.ops.quantized.linear_dynamic, oneDNN, weights per channel."""
    torch.backends.quantized.engine = "onednn" if hasattr(torch.backends, "quantized") else ""
    zero = torch.zeros(len(scale), dtype=torch.int64)
    packed = []
    for code in codes:
        weight = torch._make_per_channel_quantized_tensor(
            torch.from_numpy(code), scale[:, 0].double(), zero, 0
        )
        packed.append(torch.ops.quantized.linear_prepack(weight, None))
    apply = torch.ops.quantized.linear_dynamic
    return lambda: [
        apply(x, w, reduce_range=False) for x, w in zip(_cycled(xs, len(packed)), packed, strict=True)
    ]


def fake_quant(xs: Sequence[torch.Tensor], codes: Sequence[Any], scale: torch.Tensor) -> Call:
    """The same numbers in floats, compiled by inductor."""
    weights = [torch.from_numpy(c).float() * _spread(scale, c.shape[1]) for c in codes]

    def spiking(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mean = x.abs().mean(-1, keepdim=True, dtype=torch.float64).float()
        threshold = (mean / 3).clamp(1e-5, 1e4)
        return torch.nn.functional.linear((x / threshold).round() * threshold, weight)

    torch._dynamo.reset()
    with torch.no_grad():
        apply = torch.compile(spiking)
        apply(xs[0], weights[0])

    def call() -> Any:
        with torch.no_grad():
            return [apply(x, w) for x, w in zip(_cycled(xs, len(weights)), weights, strict=True)]

    return call


def onnx_dynamic(xs: Sequence[torch.Tensor], codes: Sequence[Any], scale: torch.Tensor) -> Call:
    """ONNX Runtime: DynamicQuantizeLinear, MatMulInteger, scales per channel; several copies in one graph."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    m, (n, k) = len(xs[0]), codes[0].shape
    copies = min(len(codes), max(1, (1 << 30) // (n * k)))
    nodes, stored, inputs, outputs = [], [], [], []
    for i, code in enumerate(codes[:copies]):
        inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [m, k]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [m, n]))
        stored.append(numpy_helper.from_array(np.ascontiguousarray(code.T), f"w{i}"))
        stored.append(numpy_helper.from_array(scale[:, 0].numpy(), f"s{i}"))
        stored.append(numpy_helper.from_array(np.zeros(n, np.int8), f"z{i}"))
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [f"x{i}"], [f"q{i}", f"a{i}", f"o{i}"]),
            helper.make_node("MatMulInteger", [f"q{i}", f"w{i}", f"o{i}", f"z{i}"], [f"m{i}"]),
            helper.make_node("Cast", [f"m{i}"], [f"f{i}"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"a{i}", f"s{i}"], [f"b{i}"]),
            helper.make_node("Mul", [f"f{i}", f"b{i}"], [f"y{i}"]),
        ]
    graph = helper.make_graph(nodes, "linears", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = {f"x{i}": x.numpy() for i, x in enumerate(_cycled(xs, copies))}
    call: Call = lambda: session.run(None, feed)  # noqa: E731
    call.copies = copies  # type: ignore[attr-defined]
    return call


def _cycled(xs: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    return [xs[i % len(xs)] for i in range(count)]


def _spread(scale: torch.Tensor, k: int) -> torch.Tensor:
    return scale.repeat_interleave(k // scale.shape[1], dim=1)


# The comparison


def expected(x: torch.Tensor, code: Any, scale: torch.Tensor) -> torch.Tensor:
    threshold = (x.double().abs().mean(-1, keepdim=True).float() / 3).clamp(1e-5, 1e4)
    counts = (x / threshold).round().double()
    weight = torch.from_numpy(code).double() * _spread(scale, code.shape[1]).double()
    return (counts @ weight.T * threshold.double()).float()


def compare(n: int, k: int, m: int, settings: argparse.Namespace, target: Target) -> str:
    """Returns one line of the report."""
    bits, group = settings.bits, settings.group or k
    dot = choose(target, bits)
    if dot is None:
        raise SystemExit(f"no dot products of {bits} bits on this machine")
    copies = max(2, round(CYCLE_BYTES * 8 / (n * k * bits))) if m < 64 else 1
    copies = max(1, copies // MOST_COPIES) * MOST_COPIES if copies > MOST_COPIES else copies
    rng = np.random.default_rng(0)
    high = 1 << (min(bits, 8) - 1)
    element = np.int16 if bits == 16 else np.int8
    codes = [rng.integers(-high, high, (n, k), dtype=np.int8).astype(element) for _ in range(copies)]
    scale = torch.from_numpy(rng.uniform(0.001, 0.002, (n, k // group)).astype(np.float32))
    xs = [torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32)) for _ in range(copies)]
    candidates: dict[str, Call] = {"ours": ours(xs, codes, scale, bits, target)}
    first = candidates["ours"]()[0]
    result = (first[0] if isinstance(first, list | tuple) else first).to_host()
    np.testing.assert_allclose(result, expected(xs[0], codes[0], scale).numpy(), rtol=1e-4, atol=1e-3)
    notes = []
    peers = {"oneDNN": torch_dynamic, "inductor": fake_quant, "ONNX Runtime": onnx_dynamic}
    bytes_ = [c.astype(np.int8) for c in codes]
    for name, make in peers.items():
        if name in settings.peers:
            try:
                candidates[name] = make(xs, bytes_, scale)
            except (ImportError, RuntimeError) as error:
                notes.append(f"{name} skipped: {str(error).splitlines()[0]}")
    candidates["limit"] = read(dot, target) if m < 64 else peak(dot, target)
    count = {name: getattr(call, "copies", copies) for name, call in candidates.items()} | {"limit": 1}
    found = interleave(candidates, settings.rounds, mean(ROUND_SECONDS, time.thread_time))
    times = {name: values / count[name] for name, values in found.items()}
    best = {name: min(t) for name, t in times.items()}
    line = f"{n:5d} x {k:5d} {m:4d} rows: {best['ours'] * 1e6:9.1f} us"
    limit = times["limit"] / times["ours"]
    if m < 64:
        share = limit * (n * k * bits / 8) / READ_BYTES
        line += (
            f", {n * k * bits / 8 / best['ours'] / 1e9:5.1f} of {READ_BYTES / best['limit'] / 1e9:5.1f} GB/s"
        )
    else:
        work = PEAK_STEPS * 24 * dot.lanes * dot.width
        share = limit * (m * n * k) / work
        line += f", {2 * m * n * k / best['ours'] / 1e9:5.0f} of {2 * work / best['limit'] / 1e9:5.0f} Gop/s"
    line += f" ({np.median(share):.0%})"
    for name in times.keys() - {"ours", "limit"}:
        line += f", {name} {ratio(times[name], times['ours']):.2f}x"
    return "; ".join([line, *notes])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="columns x channels")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128, 512])
    parser.add_argument("--bits", type=int, default=8, choices=[4, 8, 16])
    parser.add_argument("--group", type=int, default=0, help="channels with one scale; 0 for all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--target", default="cpu", help="of another instruction set, e.g. x86-64-v3")
    parser.add_argument("--peers", nargs="*", default=["oneDNN", "inductor", "ONNX Runtime"])
    settings = parser.parse_args()
    keep_memory()  # a result that is mapped anew costs more than a small product
    torch.set_num_threads(1)
    target = targets.known()[settings.target].target
    for rows in settings.rows:
        for shape in settings.shapes:
            n, k = map(int, shape.split("x"))
            print(compare(n, k, rows, settings, target), flush=True)


if __name__ == "__main__":
    main()
