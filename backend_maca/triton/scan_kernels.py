"""Triton kernel of the elementwise recurrence. Syntax of Triton 3.0."""

import triton
import triton.language as tl


@triton.jit
def scan_elements(
    decay, update, first, out, last, steps, channels,
    LOG: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Stores h_t = a_t h_(t-1) + update_t [B, T, C] for BC channels, one step after the other, and the last state [B, C]."""
    tiles = tl.cdiv(channels, BC)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    inside = c < channels
    h = tl.zeros([BC], dtype=tl.float32)
    if HAS_FIRST:
        h = tl.load(first + batch * channels + c, mask=inside, other=0.0)
    for i in range(steps):
        t = i
        if REVERSE:
            t = steps - 1 - i
        place = (batch * steps + t) * channels + c
        a = tl.load(decay + place, mask=inside, other=0.0).to(tl.float32)
        if LOG:
            a = tl.exp(a)
        h = a * h + tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, h.to(out.dtype.element_ty), mask=inside)
    tl.store(last + batch * channels + c, h, mask=inside)
