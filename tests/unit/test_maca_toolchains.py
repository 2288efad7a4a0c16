"""Public device compilers take the generated kernels and tell what these need."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikingbrain.backend_maca.toolchains import TOOLCHAINS, Toolchain, Usage, compile_kernels
from spikingbrain.errors import MissingDependency, PassFailed

GOLDEN = Path(__file__).parents[1] / "golden" / "maca"
HEADS = ["mc_runtime.h", "maca_fp16.h", "maca_bfloat16.h", "stdint.h"]

# What kernels may use beyond the golden sources, once each.
REST = """
typedef __NATIVE_VECTOR__(4, float) sums_t;
typedef __NATIVE_VECTOR__(4, int) counts_t;
typedef __NATIVE_VECTOR__(2, uint32_t) halves_t;
extern "C" __global__ void __launch_bounds__(128) rest(const half* __restrict__ x, maca_bfloat16* __restrict__ y) {
  __shared__ float shared[128];
  const int thread = threadIdx.x;
  const float v = __half2float(x[blockIdx.x * 128 + thread]);
  shared[thread] = erff(tanhf(v)) + log1pf(expf(v)) + fmodf(v, 3.0f) + powf(v, 2.0f);
  __syncthreads();
  const uint64_t votes = __ballot_sync(0xffffffffffffffffULL, v > 0);
  sums_t sums = {0.0f, 0.0f, 0.0f, 0.0f};
  counts_t counts = {0, 0, 0, 0};
  halves_t halves = {1u, 2u};
  sums = __builtin_mxc_mma_16x16x16f16(halves, halves, sums);
  sums = __builtin_mxc_mma_16x16x16bf16(halves, halves, sums);
  sums = __builtin_mxc_mma_16x16x4f32(v, v, sums);
  counts = __builtin_mxc_mma_16x16x16i8(thread, thread, counts);
  counts[3] += __popc(thread);
  y[blockIdx.x * 128 + thread] = __float2bfloat16(shared[127 - thread] + __popcll(votes) + sums[0] + counts[3]);
}
"""


def only_where_installed(toolchain: Toolchain) -> None:
    if toolchain.command() is None:
        pytest.skip(f"no compiler for {toolchain.arch}: {toolchain.commands[0]} is not installed")


@pytest.mark.parametrize("toolchain", TOOLCHAINS, ids=lambda t: t.arch)
def test_the_golden_sources_compile(toolchain: Toolchain) -> None:
    only_where_installed(toolchain)
    texts = [p.read_text() for p in sorted(GOLDEN.glob("*.maca"))] + [REST, every_function()]
    source = "".join(f"#include <{name}>\n" for name in HEADS)
    source += "".join(f"namespace golden{i} {{\n{text}}}\n" for i, text in enumerate(texts))
    found = compile_kernels(source, toolchain)
    assert len(found) == sum(text.count("__global__") for text in texts)
    assert all(0 < usage.registers <= 256 and not usage.spilled_bytes for usage in found)
    rest = next(usage for usage in found if usage.kernel == "rest")
    scratch = 0 if toolchain.arch == "gfx90a" else 16 * 64 * 8 + 16  # of the waves that are made of two warps
    assert rest.shared_bytes == 128 * 4 + scratch


def every_function() -> str:
    """A kernel that calls every function of mathematics that the printer may call, in float and in double."""
    pytest.importorskip("torch_mlir")
    from spikingbrain.backend_maca.source.subset import FLOAT_CALLS

    operands = dict.fromkeys(["atan2", "pow", "fmod", "fmax", "fmin", "copysign"], "x, y") | {
        "fma": "x, y, x"
    }
    body = "".join(
        f"  y += {name}SUFFIX({operands.get(name, 'x')});\n" for name in sorted(set(FLOAT_CALLS.values()))
    )
    kernel = """extern "C" __global__ void __launch_bounds__(64) all_of_TYPE(const TYPE* in, TYPE* out) {
  const TYPE x = in[threadIdx.x];
  TYPE y = 1;
BODY  out[threadIdx.x] = signbit(y) ? NAN : INFINITY - y;
}
""".replace("BODY", body)
    kinds = [("float", "f"), ("double", "")]
    return "".join(kernel.replace("SUFFIX", suffix).replace("TYPE", kind) for kind, suffix in kinds)


@pytest.mark.parametrize("toolchain", TOOLCHAINS[1:], ids=lambda t: t.arch)
def test_source_that_does_not_compile_is_reported(toolchain: Toolchain) -> None:
    only_where_installed(toolchain)
    with pytest.raises(
        PassFailed, match=r"refuses the kernels\n  because: kernels\.(cu\(2\)|hip:2)[^$]*nonsense"
    ):
        compile_kernels("#include <mc_runtime.h>\nnonsense;", toolchain)


def test_spilled_registers_are_told() -> None:
    """With few registers allowed, a kernel spills."""
    toolchain = TOOLCHAINS[-1]
    only_where_installed(toolchain)
    body = "".join(f"  y[{i} * n] = v[{i}] * v[{(i * 37) % 96}];\n" for i in range(96))
    source = f"""#include <mc_runtime.h>
extern "C" __global__ void __launch_bounds__(64) __attribute__((amdgpu_num_vgpr(24))) many(
    const float* x, float* y, int n) {{
  float v[96];
  for (int i = 0; i < 96; ++i) v[i] = x[i * n + threadIdx.x];
  __syncthreads();
{body}}}
"""
    (usage,) = compile_kernels(source, toolchain)
    assert usage.spilled_bytes > 0


def test_a_compiler_that_is_missing_is_named() -> None:
    with pytest.raises(MissingDependency, match="no compiler for sm_80 here\n  try: install no-such-nvcc"):
        compile_kernels("", Toolchain("sm_80", ("no-such-nvcc",), "compat_cuda"))


def test_the_words_of_ptxas_are_understood(tmp_path: Path) -> None:
    """A script stands in for nvcc; it checks the command line and answers as the real one does."""
    script = tmp_path / "nvcc"
    script.write_text(r"""#!/bin/sh
case "$*" in *-arch=sm_90*-cubin*-fmad=false*-Xptxas=-v*compat_cuda*kernels.cu) ;; *) echo "wrong: $*" >&2; exit 1;; esac
cat >&2 <<'END'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'b' for 'sm_90'
ptxas info    : Function properties for b
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function 'a' for 'sm_90'
ptxas info    : Function properties for a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, 376 bytes cmem[0]
END
""")
    script.chmod(0o755)
    found = compile_kernels("", Toolchain("sm_90", (str(script),), "compat_cuda"))
    assert found == [Usage("a", 10, 0, 0), Usage("b", 255, 20, 1024)]
