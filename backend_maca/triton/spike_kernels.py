"""Triton kernel of the spiking projection: spike counts times int8 weights, summed exactly in int32.

Counts are integers held in float32. A tile whose counts all fit int8 costs one dot of bytes. A tile with a larger one takes a
second path: counts are written in digits to the base 256, from -128 to 127, and each digit's plane gets a dot and a sum of its
own. Counts beyond LIMIT, which only a clamped threshold makes, are multiplied as float32. Syntax of Triton 3.0.
"""

import triton
import triton.language as tl


@triton.jit
def low_digit(x):
    """Returns the digit of x [...] int32 to the base 256 that lies in -128 to 127."""
    return ((x + 128) & 255) - 128


@triton.jit
def spike_gemm(
    counts, threshold, codes, scale, bias, out, rows, channels, outputs, group_size, groups, code_row, code_column,
    HAS_BIAS: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Stores y = threshold * (sum over groups of scale * (sum of counts * codes)) + bias for BM rows and BN outputs.

    counts [rows, channels], codes at row * code_row + channel * code_column, scale [outputs, groups].
    """
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    y = tl.zeros([BM, BN], dtype=tl.float32)
    for group in range(groups):
        units = tl.zeros([BM, BN], dtype=tl.int32)
        seconds = tl.zeros([BM, BN], dtype=tl.int32)
        thirds = tl.zeros([BM, BN], dtype=tl.int32)
        beyond = tl.zeros([BM, BN], dtype=tl.float32)
        for offset in range(0, group_size, BC):
            within = offset + tl.arange(0, BC)
            c = group * group_size + within
            there = (m < rows)[:, None] & (within < group_size)[None, :]
            s = tl.load(counts + m[:, None] * channels + c[None, :], mask=there, other=0.0)
            there = (within < group_size)[:, None] & (n < outputs)[None, :]
            w = tl.load(codes + n[None, :] * code_row + c[:, None] * code_column, mask=there, other=0)
            held = tl.abs(s) <= LIMIT
            whole = tl.where(held, s, 0.0).to(tl.int32)
            digit = low_digit(whole)
            units += tl.dot(digit.to(tl.int8), w, out_dtype=tl.int32)
            outlying = (tl.sum((digit != whole).to(tl.int32)) > 0) | (tl.sum((held == 0).to(tl.int32)) > 0)
            if outlying:
                rest = (whole - digit) >> 8
                digit = low_digit(rest)
                seconds += tl.dot(digit.to(tl.int8), w, out_dtype=tl.int32)
                thirds += tl.dot(((rest - digit) >> 8).to(tl.int8), w, out_dtype=tl.int32)
                beyond += tl.dot(tl.where(held, 0.0, s), w.to(tl.float32), input_precision="ieee")
        total = units.to(tl.int64) + (seconds.to(tl.int64) << 8) + (thirds.to(tl.int64) << 16)
        factor = tl.load(scale + n * groups + group, mask=n < outputs, other=0.0)
        y += (total.to(tl.float32) + beyond) * factor[None, :]
    v = tl.load(threshold + m, mask=m < rows, other=0.0)
    y = y * v[:, None]
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < outputs, other=0.0)[None, :]
    there = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(out + m[:, None] * outputs + n[None, :], y, mask=there)
