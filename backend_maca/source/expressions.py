"""What an op computes for its thread, as a C++ expression.

Ops are those of ``subset.py``, which has been verified: nothing here refuses.
"""

from __future__ import annotations

import re

import numpy as np
from torch_mlir import ir

from spikingbrain.backend_maca.lower.mlir import constant, is_natural
from spikingbrain.backend_maca.source import vectors
from spikingbrain.backend_maca.source.subset import (
    BIT_OPS,
    COMPARE_FLOATS,
    COMPARE_INTS,
    EXTREMES,
    FLOAT_CALLS,
    FLOAT_OPS,
    LARGER_AND_SMALLER,
    ONE_BIT_OPS,
    SIGNED_OPS,
    UNSIGNED_OPS,
    WRAPPING_OPS,
)
from spikingbrain.backend_maca.source.types import STORAGE_ONLY, TYPES

# How strongly a text holds together: a word or a call, a product, a sum, anything else.
WORD, PRODUCT, SUM, ANYTHING = 3, 2, 1, 0
CAST = re.compile(r"\((u?int\d+_t|float|double)\)")
WHOLE = re.compile(r"\w[\w.+]*|\d[\d.]*e-\d+f?|(?P<head>\w*(<\w+(, \w+)?>)?)[(\[].*[)\]]")
# Op on indices or floats -> its own binding, and the least of its operands. What C++ adds from the left, ops add so too.
BINDING = {
    "arith.addf": (SUM, SUM, PRODUCT),
    "arith.subf": (SUM, SUM, PRODUCT),
    "arith.mulf": (PRODUCT, PRODUCT, WORD),
    "arith.divf": (PRODUCT, PRODUCT, WORD),
    "arith.addi": (SUM, SUM, SUM),  # integers may be added in any order
    "arith.subi": (SUM, SUM, PRODUCT),
    "arith.muli": (PRODUCT, PRODUCT, WORD),
    "arith.divsi": (PRODUCT, PRODUCT, WORD),
    "arith.remsi": (PRODUCT, PRODUCT, WORD),
    "arith.divui": (PRODUCT, PRODUCT, WORD),
    "arith.remui": (PRODUCT, PRODUCT, WORD),
    "arith.cmpi": (ANYTHING, SUM, SUM),
    "arith.cmpf": (ANYTHING, SUM, SUM),
    "math.rsqrt": (PRODUCT, ANYTHING),
}


class Expressions:
    """Writes expressions over values that have a text; ``needs`` collects headers, helpers and typedefs they use."""

    def __init__(self) -> None:
        self.text: dict[ir.Value, str] = {}
        self._unsigned_text: dict[ir.Value, str] = {}  # of integers that wrap: the sum or product in the cast
        self.needs: set[str] = set()

    def type_name(self, kind: ir.Type) -> str:
        if isinstance(kind, ir.VectorType):
            name, typedef = vectors.type_name(kind)
            self.needs |= {typedef} - {""}
            return name
        self.needs |= {"f16": {"<maca_fp16.h>"}, "bf16": {"<maca_bfloat16.h>"}}.get(str(kind), set())
        return TYPES[str(kind)][0]

    def operand(self, value: ir.Value, least: int = WORD) -> str:
        """Returns the text of a value as an operand: in parentheses if it binds less than ``least``."""
        text = self.text[value]
        return text if self.binding(value) >= least else f"({text})"

    def branch(self, value: ir.Value) -> str:
        """Returns the text of what a condition chooses: in parentheses only if it is a condition itself."""
        text = self.text[value]
        return text if is_whole(text) or not re.search(r"[?<>=!&|]", text) else f"({text})"

    def binding(self, value: ir.Value) -> int:
        """Returns how strongly the text of a value holds together."""
        if is_whole(self.text[value]):
            return WORD
        op = value.owner
        if isinstance(op, ir.Block) or str(value.type) not in ("index", "f32", "f64"):
            return ANYTHING
        if op.name in FLOAT_CALLS or op.name in EXTREMES:
            return WORD
        if not _agrees_with_signed(op):
            return ANYTHING
        return BINDING.get(op.name, (ANYTHING,))[0]

    def element(self, vector: ir.Value, position: int) -> str:
        text = vectors.element(vector.type, self.text[vector], position)
        self.needs |= {"sb_cast"} if text.startswith("sb_cast") else set()
        return text

    def vector(self, kind: ir.VectorType, elements: list[str]) -> str:
        text = vectors.value(kind, elements)
        self.needs |= {helper for helper in ("sb_pair", "sb_quad") if helper in text}
        return text

    def constant_text(self, of: ir.Type, value: float) -> str:
        kind = str(of)
        if kind == "i1":
            return "true" if value else "false"
        if kind in ("index", "i32", "i16", "i8"):
            return str(value)
        if kind == "i64" and abs(value) >= 1 << 31:
            return f"INT64_C({value})" if value > -(1 << 63) else "INT64_MIN"
        if kind == "i64":
            return str(value)
        if np.isnan(value) or np.isinf(value):
            text = "NAN" if np.isnan(value) else "INFINITY" if value > 0 else "-INFINITY"
        else:
            text = str(value) if kind == "f64" else f"{np.float32(value)}f"
        return f"{STORAGE_ONLY[kind][1]}({text})" if kind in STORAGE_ONLY else text

    def expression(self, op: ir.Operation) -> str:
        name = op.name
        if name.startswith("vector.") or name == "ub.poison":
            return self._vector_expression(op)
        kind = str(op.operands[0].type) if len(op.operands) else ""
        plain = kind in ("f32", "f64") or (kind == "index" and _agrees_with_signed(op))
        _, *least = BINDING.get(name, (ANYTHING,)) if plain else (ANYTHING,)
        least = least or [WORD] * len(op.operands)
        operands = [self.operand(v, n) for v, n in zip(op.operands, least, strict=True)]
        if name in FLOAT_OPS:
            return FLOAT_OPS[name].format(*operands)
        if name in FLOAT_CALLS:
            call = FLOAT_CALLS[name] + ("f" if kind == "f32" else "")
            return f"{call}({', '.join(self.text[v] for v in op.operands)})"
        if kind == "i1" and name in ONE_BIT_OPS:
            return f" {ONE_BIT_OPS[name]} ".join(operands)
        if name in WRAPPING_OPS:
            if kind == "index":
                return f" {WRAPPING_OPS[name]} ".join(operands)
            text = f" {WRAPPING_OPS[name]} ".join(
                map(self._unsigned_operand, op.operands, BINDING.get(name, (0, 3, 3))[1:])
            )
            self._unsigned_text[op.results[0]] = text
            return f"({TYPES[kind][0]})({text})"
        if name in LARGER_AND_SMALLER:
            return self._compared(op, kind, plain)
        if name in SIGNED_OPS:
            return self._narrow(kind, SIGNED_OPS[name].format(*operands))
        if name in UNSIGNED_OPS and plain:
            return UNSIGNED_OPS[name].format(*operands)
        if name in UNSIGNED_OPS:
            words = [self._unsigned(kind, o) for o in operands]
            return f"({TYPES[kind][0]})({UNSIGNED_OPS[name].format(*words)})"
        if name in BIT_OPS:
            return self._narrow(kind, f" {BIT_OPS[name][kind == 'i1']} ".join(operands))
        if name == "arith.cmpi":
            sign = COMPARE_INTS[op.attributes["predicate"].value]
            if kind == "i1":  # as a signed number true is -1, below false
                words = operands[::-1] if sign[0] in "<>" else operands
                if sign == "==" and words[1] == "false":
                    return f"!{words[0]}"
                return " ".join([words[0], sign.lstrip("u"), words[1]])
            casts = sign[0] == "u" and not plain
            words = [self._unsigned(kind, o) for o in operands] if casts else operands
            return " ".join([words[0], sign.lstrip("u"), words[1]])
        if name == "arith.cmpf":
            form: str = COMPARE_FLOATS[op.attributes["predicate"].value]
            return form.format(*operands)
        if name == "arith.select":
            return f"{operands[0]} ? {self.branch(op.operands[1])} : {self.branch(op.operands[2])}"
        if name in EXTREMES:
            self.needs.add(EXTREMES[name])
            return f"{EXTREMES[name]}({', '.join(self.text[v] for v in op.operands)})"
        if name == "math.rsqrt":
            f = "f" if kind == "f32" else ""
            return f"1.0{f} / sqrt{f}({self.text[op.operands[0]]})"
        if name == "math.ctpop":
            suffix = "ll" if kind == "i64" else ""
            return f"({TYPES[kind][0]})__popc{suffix}({self._unsigned(kind, operands[0])})"
        if name == "arith.bitcast":
            self.needs.add("sb_cast")
            to, source = self.type_name(op.results[0].type), self.type_name(op.operands[0].type)
            return f"sb_cast<{to}, {source}>({self.text[op.operands[0]]})"
        target, known = op.results[0].type, constant(op.operands[0])
        if name == "arith.truncf" and str(target) == "f32" and known is not None:
            return self.constant_text(target, known)
        return self._conversion(name, kind, str(target), operands[0])

    def _vector_expression(self, op: ir.Operation) -> str:
        kind = op.results[0].type
        if op.name == "ub.poison":  # any value will do
            plural = isinstance(kind, ir.VectorType)
            return (
                self.vector(kind, [self.constant_text(kind.element_type, 0)] * kind.shape[0])
                if plural
                else "0"
            )
        if op.name == "vector.extract":
            return self.element(op.operands[0], op.attributes["static_position"][0])
        if op.name == "vector.broadcast":
            return self.vector(kind, [self.text[op.operands[0]]] * kind.shape[0])
        if op.name == "vector.from_elements":
            return self.vector(kind, [self.text[v] for v in op.operands])
        self.needs.add("sb_cast")
        return f"sb_cast<{self.type_name(kind)}>({self.text[op.operands[0]]})"

    def _unsigned(self, kind: str, operand: str) -> str:
        suffix = {"i32": "u", "i64": "ull", "index": "ull"}.get(kind)
        return f"{operand}{suffix}" if suffix and operand.isdecimal() else f"(u{TYPES[kind][0]}){operand}"

    def _unsigned_operand(self, value: ir.Value, least: int) -> str:
        """Returns an operand of arithmetic that wraps: what was cast back for its own sake is not cast again."""
        kind, text = str(value.type), self.text[value]
        inner = self._unsigned_text.get(value)
        if inner is not None and text == f"({TYPES[kind][0]})({inner})":
            return inner if BINDING.get(value.owner.name, (ANYTHING,))[0] >= least else f"({inner})"
        # narrow types are computed in 32 bits: C++ would widen them to int, which must not overflow
        wide = "i32" if kind in ("i8", "i16") else kind
        return self._unsigned(wide, self.operand(value))

    def _compared(self, op: ir.Operation, kind: str, plain: bool) -> str:
        self.needs.add(LARGER_AND_SMALLER[op.name])
        call = "{}<{}>({}, {})"
        unsigned = op.name.endswith("ui") and not plain
        word = f"u{TYPES[kind][0]}" if unsigned else TYPES[kind][0]
        text = call.format(LARGER_AND_SMALLER[op.name], word, *(self.text[v] for v in op.operands))
        return f"({TYPES[kind][0]}){text}" if unsigned else text

    def _narrow(self, kind: str, text: str) -> str:
        return f"({TYPES[kind][0]})({text})" if kind in ("i8", "i16") else text

    def _conversion(self, name: str, source: str, target: str, operand: str) -> str:
        if name == "arith.extf" and source in STORAGE_ONLY:
            text = f"{STORAGE_ONLY[source][0]}({operand})"
            return text if target == "f32" else f"(double){text}"
        if name == "arith.truncf" and target in STORAGE_ONLY:
            # of f64 by way of f32, as torch has it
            return f"{STORAGE_ONLY[target][1]}({operand if source == 'f32' else f'(float){operand}'})"
        if name == "arith.trunci" and target == "i1":
            return f"({operand} & 1) != 0"
        if source == "i1" and name in ("arith.extsi", "arith.sitofp", "arith.index_cast"):
            return f"({TYPES[target][0]})(-(int){operand})"
        if source == target or {source, target} == {"index", "i64"}:
            return operand
        if name == "arith.fptoui":
            return f"({TYPES[target][0]})(u{TYPES[target][0]}){operand}"
        unsigned = name in ("arith.extui", "arith.uitofp", "arith.index_castui") and source != "i1"
        return f"({TYPES[target][0]}){self._unsigned(source, operand) if unsigned else operand}"


def is_whole(text: str) -> bool:
    """Tells whether nothing beside a text binds more than what is in it: a name, an element, a call, a cast of these."""
    while cast := CAST.match(text):
        text = text[cast.end() :]
    found = WHOLE.fullmatch(text)
    if not found or found["head"] is None:
        return bool(found)
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if not depth and letter in ")]":  # the bracket behind the head is closed
            return i == len(text) - 1
    return False


def _agrees_with_signed(op: ir.Operation) -> bool:
    """Tells whether signed arithmetic gives what an op on indices means: it is signed, or nothing is negative."""
    compares = op.name == "arith.cmpi" and COMPARE_INTS[op.attributes["predicate"].value][0] == "u"
    unsigned = op.name in UNSIGNED_OPS or op.name in ("arith.maxui", "arith.minui")
    return not (compares or unsigned) or all(map(is_natural, op.operands))
