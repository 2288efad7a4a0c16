"""Triton kernels of the spiking projection: spike counts times int8 weights, summed exactly in int32.

Counts are integers held in float32. A tile whose counts all fit int8 costs one dot of bytes. A tile with a larger one takes a
second path: counts are written in digits to the base 256, from -128 to 127, and each digit's plane gets a dot and a sum of its
own. Three digits hold counts below 2^22; a row with larger ones, which only a clamped threshold makes, is first divided by a
power of two. Syntax of Triton 3.0.
"""

import triton
import triton.language as tl


@triton.jit
def scale_rows(counts, threshold, factors, thresholds, channels, BC: tl.constexpr):
    """Stores for one row the factor, 1 or a lower power of two, that brings counts below 2^22, and threshold / factor.

    The latter is NaN where a count is NaN or infinite.
    """
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BC], dtype=tl.int32)
    for offset in range(0, channels, BC):
        c = offset + tl.arange(0, BC)
        s = tl.load(counts + row * channels + c, mask=c < channels, other=0.0)
        # the bits of floats without sign are in the order of their sizes, NaN on top
        largest = tl.maximum(largest, s.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    exponent = tl.max(largest, 0) >> 23  # a count is below 2^(exponent - 126)
    shift = tl.maximum(exponent - (126 + 22), 0)
    tl.store(factors + row, ((127 - shift) << 23).to(tl.float32, bitcast=True))
    back = ((127 + shift) << 23).to(tl.float32, bitcast=True)
    v = tl.load(threshold + row) * back
    tl.store(thresholds + row, tl.where(exponent == 255, float("nan"), v))


@triton.jit
def low_digit(x):
    """Returns the digit of x [...] int32 to the base 256 that lies in -128 to 127."""
    return ((x + 128) & 255) - 128


@triton.jit
def spike_gemm(
    counts, factors, thresholds, codes, scale, bias, out,
    rows, channels, outputs, group_size, groups, code_row, code_column,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Stores y = threshold * (sum over groups of scale * (sum of counts * codes)) + bias for BM rows and BN outputs.

    counts [rows, channels], codes at row * code_row + channel * code_column, scale [outputs, groups].
    """
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    factor = tl.load(factors + m, mask=m < rows, other=1.0)
    y = tl.zeros([BM, BN], dtype=tl.float32)
    for group in range(groups):
        units = tl.zeros([BM, BN], dtype=tl.int32)
        seconds = tl.zeros([BM, BN], dtype=tl.int32)
        thirds = tl.zeros([BM, BN], dtype=tl.int32)
        for offset in range(0, group_size, BC):
            within = offset + tl.arange(0, BC)
            c = group * group_size + within
            there = (m < rows)[:, None] & (within < group_size)[None, :]
            s = tl.load(counts + m[:, None] * channels + c[None, :], mask=there, other=0.0)
            there = (within < group_size)[:, None] & (n < outputs)[None, :]
            w = tl.load(codes + n[None, :] * code_row + c[:, None] * code_column, mask=there, other=0)
            whole = tl.floor(s * factor[:, None] + 0.5).to(tl.int32)
            digit = low_digit(whole)
            units += tl.dot(digit.to(tl.int8), w, out_dtype=tl.int32)
            rest = (whole - digit) >> 8
            if tl.max(tl.max(tl.abs(rest), 1), 0) > 0:
                digit = low_digit(rest)
                seconds += tl.dot(digit.to(tl.int8), w, out_dtype=tl.int32)
                thirds += tl.dot(((rest - digit) >> 8).to(tl.int8), w, out_dtype=tl.int32)
        total = units.to(tl.int64) + (seconds.to(tl.int64) << 8) + (thirds.to(tl.int64) << 16)
        y += total.to(tl.float32) * tl.load(scale + n * groups + group, mask=n < outputs, other=0.0)[None, :]
    y = y * tl.load(thresholds + m, mask=m < rows, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < outputs, other=0.0)[None, :]
    there = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(out + m[:, None] * outputs + n[None, :], y, mask=there)
