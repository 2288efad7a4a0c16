"""The types that generated code works with."""

from __future__ import annotations

# MLIR element type -> (C++ type, bytes).
TYPES = {
    "index": ("int64_t", 8),
    "i64": ("int64_t", 8),
    "i32": ("int32_t", 4),
    "i16": ("int16_t", 2),
    "i8": ("int8_t", 1),
    "i1": ("bool", 1),
    "f64": ("double", 8),
    "f32": ("float", 4),
    "f16": ("half", 2),
    "bf16": ("maca_bfloat16", 2),
}
# Storage type -> (to float, from float with rounding to nearest even).
STORAGE_ONLY = {"f16": ("__half2float", "__float2half"), "bf16": ("__bfloat162float", "__float2bfloat16")}
