"""The attention kernels and the portable form against a plain loop."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from torch_mlir import ir

from spikingbrain.backend_iree.dispatch import wrap_kernels
from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes import dialect
from spikingbrain.passes.kernels import attention
from spikingbrain.passes.kernels.attention import emit_attention_launch
from spikingbrain.passes.kernels.attention_portable import lower_attention_portable
from spikingbrain.target import Target

rt = pytest.importorskip("iree.runtime")


def cpu(level: str, bits: int, registers: int, *features: str) -> Target:
    return Target(
        f"x86-64-{level}",
        "cpu",
        "iree",
        "x86-64",
        cpu=f"x86-64-{level}",
        features=frozenset(features),
        vector_bits=bits,
        vector_registers=registers,
    )


TARGETS = {
    "v4": cpu("v4", 512, 32, "fma", "avx512f"),
    "v3": cpu("v3", 256, 16, "fma", "avx2"),
    "v2": cpu("v2", 128, 16),  # no FMA
}
WITHOUT_VECTORS = Target("vulkan", "gpu", "iree", "spirv")


def function(
    name: str,
    heads: tuple[int, int, int],
    rule: tuple[int, int],
    time: str,
    cache: str | None,
    ops: int = 1,
    element: str = "f32",
) -> str:
    """Returns a function of ``ops`` chained attention ops; batch and keys are dynamic, the cache is of ``element``."""
    (h, hk, d), (window, sinks) = heads, rule
    rows = [f"tensor<?x?x{hk}x{d}xf32>"] * 2 + ["tensor<?x?xi64>"]
    cached = [] if cache is None else [r.replace("?x?", f"?x{cache}").replace("f32", element) for r in rows]
    if element == "i8":
        cached += [f"tensor<?x{cache}x{hk}xf32>"] * 2
    types = [f"tensor<?x{time}x{h}x{d}xf32>", f"tensor<?x{time}xi64>", *rows, *cached]
    names = [f"%a{i}" for i in range(len(types))]
    segments = ", ".join("1" if i < len(types) else "0" for i in range(10))
    lines = []
    for i in range(ops):
        query = names[0] if i == 0 else f"%o{i - 1}"
        lines.append(
            f'%o{i} = "spikingbrain.attention"({", ".join([query, *names[1:]])}) {{scale = {d**-0.5} : f64,'
            f" window = {window} : i64, sinks = {sinks} : i64, operandSegmentSizes = array<i32: {segments}>}}"
            f" : ({', '.join(types)}) -> {types[0]}"
        )
    arguments = ", ".join(f"{n}: {t}" for n, t in zip(names, types, strict=True))
    return (
        f"func.func @{name}({arguments}) -> {types[0]} {{\n"
        + "\n".join(lines)
        + f"\nreturn %o{ops - 1} : {types[0]}\n}}\n"
    )


def lowered(text: str, target: Target | None) -> ir.Module:
    """Returns the module with every attention op lowered: to kernels, or portably where target is None."""
    context = dialect.load()
    with context, ir.Location.unknown():
        module = ir.Module.parse(text)
        found: list[Any] = []

        def collect(op: ir.Operation) -> ir.WalkResult:
            if op.name == "spikingbrain.attention":
                found.append(op.opview)
            return ir.WalkResult.ADVANCE

        module.operation.walk(collect)
        for op in found:
            if target is None:
                lower_attention_portable(op)
            else:
                emit_attention_launch(op, target)
        dialect.verify(module)
    return module


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function that compiles ``@prefill`` and ``@decode`` of a case, once per case."""

    @functools.cache
    def build(
        heads: tuple[int, int, int], rule: tuple[int, int], cache: bool, target: str, element: str = "f32"
    ) -> Any:
        if target == "v4" and "avx512f" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this processor has no AVX-512")
        slots = "?" if cache else None
        text = function("prefill", heads, rule, "?", slots, element=element)
        text += function("decode", heads, rule, "1", slots, element=element)
        module = lowered(text, TARGETS.get(target))
        wrap_kernels(module)
        folder = tmp_path_factory.mktemp("attention")
        (folder / "module.mlir").write_text(module.operation.get_asm())
        command = ["iree-compile", str(folder / "module.mlir"), "-o", str(folder / "module.vmfb")]
        command += ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
        command += [f"--iree-llvmcpu-target-cpu={TARGETS.get(target, TARGETS['v3']).cpu}"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        config = rt.Config(device=rt.get_device("local-sync"))
        return rt.load_vm_module(rt.VmModule.mmap(config.vm_instance, str(folder / "module.vmfb")), config)

    return build


def reference(arguments: list[np.ndarray], rule: tuple[int, int]) -> np.ndarray:
    """Attention as the op's docstring says it, one query at a time."""
    query, query_positions, keys, values, positions, *cache = arguments
    if cache:
        keys, values, positions = (
            np.concatenate(p, 1) for p in zip(cache, (keys, values, positions), strict=True)
        )
    window, sinks = rule
    batch, time, heads, size = query.shape
    group = heads // keys.shape[2]
    out = np.zeros(query.shape)
    for b, t in np.ndindex(batch, time):
        i, j = query_positions[b, t], positions[b]
        seen = (j >= 0) & (j <= i)
        if window:
            seen &= (j > i - window) | (j < sinks)
        if not seen.any():
            continue
        for h in range(heads):
            scores = keys[b, seen, h // group].astype(np.float64) @ query[b, t, h] * size**-0.5
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ values[b, seen, h // group] / weights.sum()
    return out


def arguments(
    heads: tuple[int, int, int], time: int, starts: list[int], slots: int | None, seed: int = 0
) -> list[np.ndarray]:
    """Returns random inputs: entry b continues after ``starts[b]`` tokens, of which the cache holds the last.

    Cache slots are in random order, as in a ring, and those never written are empty.
    """
    rng = np.random.default_rng(seed)
    h, hk, d = heads
    batch = len(starts)

    def rows(count: int, n: int) -> np.ndarray:
        return rng.standard_normal((batch, count, n, d), dtype=np.float32)

    new = np.array(starts)[:, None] + np.arange(time)
    result = [rows(time, h), new, rows(time, hk), rows(time, hk), new]
    if slots is not None:
        held = np.full((batch, slots), -1)
        for b, start in enumerate(starts):
            count = min(start, slots)
            held[b, :count] = np.arange(start - count, start)
            rng.shuffle(held[b])
        result += [rows(slots, hk), rows(slots, hk), held]
    return [np.array(a) for a in result]


def check(module: Any, inputs: list[np.ndarray], rule: tuple[int, int], tolerance: float = 5e-6) -> None:
    expected = reference(inputs, rule)
    entries = ["prefill"] + ["decode"] * (inputs[0].shape[1] == 1)
    for entry in entries:
        got = module[entry](*inputs).to_host()
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance, err_msg=entry)


GROUPED, WIDE, ODD = (9, 3, 64), (4, 4, 128), (4, 2, 24)
CASES = [
    (GROUPED, (0, 0), False, "v4"),
    (GROUPED, (40, 2), True, "v4"),
    (WIDE, (33, 0), True, "v4"),
    (ODD, (40, 1), True, "v4"),
    ((20, 1, 128), (40, 1), True, "v4"),  # too many heads per key head for the decode schedule
    (GROUPED, (0, 0), True, "v3"),
    (GROUPED, (40, 2), True, "v3"),
    (WIDE, (40, 1), False, "v3"),
    (GROUPED, (40, 2), True, "v2"),
    ((2, 2, 20), (0, 0), True, "v2"),
    (WIDE, (0, 0), False, "portable"),
    (GROUPED, (40, 2), True, "portable"),
]
WINDOWED = [case for case in CASES if case[1][0] and case[2]]


def named(case: tuple[Any, ...]) -> str:
    heads, rule, cache, target = case
    return f"{target}-{'x'.join(map(str, heads))}-w{rule[0]}s{rule[1]}{'-cache' if cache else ''}"


@pytest.mark.parametrize("case", CASES, ids=named)
class TestAgainstLoop:
    @pytest.mark.parametrize("time", [1, 2, 7, 64, 65, 130])
    def test_lengths(self, compiled: Any, case: tuple[Any, ...], time: int) -> None:
        heads, rule, cache, _ = case
        starts = [37, 5] if cache else [0, 0]
        check(compiled(*case), arguments(heads, time, starts, 50 if cache else None), rule)

    def test_large_scores(self, compiled: Any, case: tuple[Any, ...]) -> None:
        heads, rule, cache, _ = case
        for time in (1, 33):
            inputs = arguments(heads, time, [9], 20 if cache else None)
            inputs[0] *= 5e3
            expected = reference(inputs, rule)
            for entry in ["prefill"] + ["decode"] * (time == 1):
                got = compiled(*case)[entry](*inputs).to_host()
                assert np.isfinite(got).all()
                # A score of 1e4 carries an f32 rounding error of 1e-3 into the exponent.
                np.testing.assert_allclose(got, expected, rtol=0, atol=2e-2)

    def test_query_without_keys_gives_zero(self, compiled: Any, case: tuple[Any, ...]) -> None:
        heads, rule, cache, _ = case
        for time in (1, 40):
            inputs = arguments(heads, time, [100], 16 if cache else None)
            inputs[1][0, ::3] = -1  # padding
            inputs[1][0, 1::3] = 3  # older than every key
            if cache:
                inputs[7][:] = -1
            check(compiled(*case), inputs, rule)
            got = compiled(*case).prefill(*inputs).to_host()
            assert not got[0, ::3].any()
            assert not got[0, 1::3].any()

    def test_batch_entries_do_not_mix(self, compiled: Any, case: tuple[Any, ...]) -> None:
        heads, _, cache, _ = case
        inputs = arguments(heads, 9, [60, 0, 7], 45 if cache else None)
        both = compiled(*case).prefill(*inputs).to_host()
        alone = compiled(*case).prefill(*(a[1:2].copy() for a in inputs)).to_host()
        np.testing.assert_allclose(both[1:2], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", WINDOWED, ids=named)
class TestCache:
    def test_empty(self, compiled: Any, case: tuple[Any, ...]) -> None:
        heads, rule, _, _ = case
        for time in (1, 70):
            check(compiled(*case), arguments(heads, time, [0, 0], 258), rule)

    def test_longer_than_a_block(self, compiled: Any, case: tuple[Any, ...]) -> None:
        heads, rule, _, _ = case
        for time in (1, 3):
            check(compiled(*case), arguments(heads, time, [400, 120], 300), rule)

    def test_of_no_slots(self, compiled: Any, case: tuple[Any, ...]) -> None:
        heads, rule, _, _ = case
        for time in (1, 5):
            check(compiled(*case), arguments(heads, time, [0], 0), rule)

    def test_no_queries_and_no_new_keys(self, compiled: Any, case: tuple[Any, ...]) -> None:
        heads, rule, _, _ = case
        module = compiled(*case)
        assert module.prefill(*arguments(heads, 0, [9], 12)).to_host().shape == (1, 0, heads[0], heads[2])
        inputs = arguments(heads, 3, [9], 12)
        inputs[2:5] = [a[:, :0].copy() for a in inputs[2:5]]
        check(module, inputs, rule)


def narrowed(inputs: list[np.ndarray], element: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns inputs with a cache of ``element``, and the same with the cache as the f32 that it stands for."""
    new, cached, held = inputs[:5], inputs[5:7], inputs[7]
    if element == "i8":
        scales = [np.abs(x).max(-1) / 127 for x in cached]
        codes = [np.rint(x / s[..., None]).astype(np.int8) for x, s in zip(cached, scales, strict=True)]
        decoded = [c * s[..., None] for c, s in zip(codes, scales, strict=True)]
        return [*new, *codes, held, *scales], [*new, *decoded, held]
    if element == "f16":
        halves = [x.astype(np.float16) for x in cached]
        return [*new, *halves, held], [*new, *(x.astype(np.float32) for x in halves), held]
    bits = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in cached]  # cut, not rounded: any bf16 will do
    decoded = [(x.astype(np.uint32) << 16).view(np.float32) for x in bits]
    return [*new, *(x.view(ml_dtypes.bfloat16) for x in bits), held], [*new, *decoded, held]


@pytest.mark.parametrize(
    ("target", "element"),
    [
        ("v4", "i8"),
        ("v3", "f16"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("v2", "bf16"), ("portable", "i8"))),
    ],
)
def test_narrow_caches(compiled: Any, target: str, element: str) -> None:
    heads, rule = (4, 2, 32), (40, 2)
    module = compiled(heads, rule, True, target, element)
    for time in (1, 37):
        inputs, exact = narrowed(arguments(heads, time, [100, 5], 48), element)
        expected = reference(exact, rule)
        for entry in ["prefill"] + ["decode"] * (time == 1):
            np.testing.assert_allclose(module[entry](*inputs).to_host(), expected, rtol=0, atol=1e-5)


def test_f16_needs_the_instruction() -> None:
    with pytest.raises(UnsupportedOp, match="no attention kernel for these element types"):
        lowered(function("f", GROUPED, (0, 0), "?", "?", element="f16"), TARGETS["v2"])


@pytest.mark.parametrize("target", ["v4", "v3"])
def test_positions_in_any_order(compiled: Any, target: str) -> None:
    module, rng = compiled(GROUPED, (40, 2), True, target), np.random.default_rng(3)
    inputs = arguments(GROUPED, 330, [700, 0], 70)
    for positions in (inputs[1], inputs[4], inputs[7]):
        for row in positions:
            rng.shuffle(row)
    inputs[4][:, ::7] = -1
    inputs[1][0, :100] = 699  # before all new keys
    check(module, inputs, (40, 2))


@pytest.mark.parametrize("time", [39, 40, 41, 1500])
def test_lengths_around_the_window_and_beyond(compiled: Any, time: int) -> None:
    check(compiled(ODD, (40, 1), True, "v4"), arguments(ODD, time, [0, 43], 42), (40, 1))


def test_layers_share_the_table_of_bounds() -> None:
    module = lowered(function("a", GROUPED, (40, 2), "?", None, ops=3), TARGETS["v3"])
    function_a = next(op for op in module.body.operations if op.name.value == "a")
    launches = [op.operation for op in function_a.body.blocks[0].operations if "launch" in op.operation.name]
    callees = [op.attributes["callee"].value for op in launches]
    assert [name.startswith("attention_bounds") for name in callees] == [True, False, False, False]


def test_equal_ops_share_a_kernel() -> None:
    text = function("a", GROUPED, (40, 2), "?", "?", ops=2) + function("b", GROUPED, (40, 2), "?", "?")
    text += function("c", GROUPED, (41, 2), "?", "?")
    module = lowered(text, TARGETS["v3"])
    kernels = [op for op in module.body.operations if op.name.value.startswith("attention_prefill")]
    assert len(kernels) == 2


def test_names_do_not_depend_on_the_order() -> None:
    one, two = (function(n, GROUPED, (w, 1), "1", None) for n, w in (("a", 8), ("b", 9)))
    names = [
        {op.name.value for op in lowered(text, TARGETS["v4"]).body.operations}
        for text in (one + two, two + one)
    ]
    assert names[0] == names[1]


def test_scratch_stays_below_the_stack_limit() -> None:
    for target in TARGETS.values():
        for size in (4, 20, 64, 96, 128, 192, 256):
            plan = attention.plan(8, 2, size, target)
            assert plan.rows % (plan.row_vectors * plan.lanes) == 0
            assert plan.key_block % plan.key_tile == 0
            assert size % (plan.head_lanes * plan.value_vectors) == 0


@pytest.mark.parametrize(
    ("heads", "target", "message"),
    [
        ((4, 4, 6), TARGETS["v3"], "not a multiple of 4"),
        ((4, 4, 64), WITHOUT_VECTORS, "no vector registers"),
        ((4, 4, 4096), TARGETS["v4"], "exceeds 32768 bytes of scratch"),
    ],
)
def test_refusals(heads: tuple[int, int, int], target: Target, message: str) -> None:
    with pytest.raises(UnsupportedOp, match=message) as raised:
        lowered(function("f", heads, (0, 0), "?", None), target)
    assert "portable" in raised.value.hint
