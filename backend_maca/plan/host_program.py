"""A program in C++ that runs an artifact without Python: its launch plan written out, beside the kernels.

The folder it is written to builds without anything else by ``build.sh``: with mxcc for a card, with nvcc for NVIDIA's,
or with the C++ compiler for the emulator. ``host/`` holds what all such programs share.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain.artifact import ALIGNMENT, STATE, WEIGHTS, Artifact, numpy_dtype
from spikingbrain.backend_maca.emulator_flags import COMMON_FLAGS, KERNEL_FLAGS, MACHINE_FLAGS
from spikingbrain.backend_maca.mxcc import ARCH
from spikingbrain.backend_maca.plan.intervals import Interval, intervals, values_given
from spikingbrain.backend_maca.plan.order import order_of
from spikingbrain.backend_maca.plan.plan import every_step
from spikingbrain.errors import ArtifactError, TargetError, UnsupportedOp

ROOT = Path(__file__).parents[1]
TYPES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "b",
}
_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "and": "&",
    "or": "|",
    "xor": "^",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}
_READ = {
    "float32": "float",
    "float64": "double",
    "int64": "int64_t",
    "int32": "int32_t",
    "int8": "int8_t",
    "bool": "bool",
}
_CALLS = {"div": "quotient", "rem": "remainder", "ceildiv": "ceildiv", "floordiv": "floordiv"}
SIGNATURE = "const char* sb_launch_{}(const unsigned*, const unsigned*, unsigned, void**, int);"


def write(artifact: Artifact, folder: Path) -> None:
    """Writes the program into a folder, made if it is not there; each file is there whole or as it was.

    Raises TargetError without code for MetaX cards, ArtifactError where files cannot be written.
    """
    code = next(
        (c for t in artifact.targets if "kernels.maca" in (c := artifact.code_for(t))),
        None,
    )
    if code is None:
        names = ", ".join(t["name"] for t in artifact.targets)
        raise TargetError(
            f"{artifact.path} has no kernels for MetaX cards",
            why=f"it has code for {names}",
            hint="--target maca",
        )
    plan = json.loads(bytes(code["plan.json"]))
    program = _Program(artifact, plan)
    text = program.text()  # which also gathers the constants
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
            made = Path(name)
            _write_files(artifact, plan, code, program, text, made)
            for file in sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file()):
                (folder / file).parent.mkdir(exist_ok=True)
                os.replace(made / file, folder / file)
    except OSError as error:
        raise ArtifactError(f"cannot write the program into {folder}", why=str(error)) from error


def _write_files(
    artifact: Artifact,
    plan: Mapping[str, Any],
    code: Mapping[str, Any],
    program: _Program,
    text: str,
    folder: Path,
) -> None:
    (folder / "program.cpp").write_text(text)
    (folder / "kernels.maca").write_bytes(bytes(code["kernels.maca"]))
    (folder / "launchers.cpp").write_text(_launchers(plan["kernels"]))
    (folder / "constants.bin").write_bytes(bytes(program.constants))
    with (folder / WEIGHTS).open("wb") as file:
        file.write(artifact.member(WEIGHTS))
    for name in ("machine.h", "main.h"):
        shutil.copyfile(ROOT / "host" / name, folder / name)
    for source, target in (("emulator", "emulator"), ("compat_cuda", "cuda")):
        shutil.copytree(
            ROOT / source, folder / target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    script = folder / "build.sh"
    script.write_text(_build_script(plan))
    script.chmod(0o755)


def _launchers(kernels: Mapping[str, Any]) -> str:
    lines = ['// For the emulator: gives kernels the launch signature.\n#include "kernels.maca"\n']
    return "".join([*lines, *(f"SB_LAUNCHER({name})\n" for name in sorted(kernels))])


def _build_script(plan: Mapping[str, Any]) -> str:
    calls = any("library" in s for e in plan["entries"].values() for s in every_step(e["launches"]))
    mcblas, cublas = (f" -DSB_LIBRARY -l{name}" if calls else "" for name in ("mcblas", "cublas"))
    common, kernel, machine = (" ".join(flags) for flags in (COMMON_FLAGS, KERNEL_FLAGS, MACHINE_FLAGS))
    host = "-std=c++17 -O2 -w -DSB_EMULATOR -Iemulator -I."
    return f"""#!/bin/sh
# Builds ./program. Usage: ./build.sh [maca | cuda | emulator]. ARCH is the card's, MACA_PATH the folder of the SDK.
set -eu
cd "$(dirname "$0")"
need() {{
  command -v "$1" >/dev/null || {{ echo "error: there is no $1; $2" >&2; exit 1; }}
}}
case "${{1:-maca}}" in
maca)
  : "${{MACA_PATH:=/opt/maca}}"
  need "$MACA_PATH/mxgpu_llvm/bin/mxcc" "set MACA_PATH to the folder of the SDK, or try: $0 emulator"
  "$MACA_PATH/mxgpu_llvm/bin/mxcc" -x maca program.cpp -o program --maca-path="$MACA_PATH" \\
    --offload-arch="${{ARCH:-{ARCH}}}" -I. -O3 -std=c++17 -ffp-contract=off{mcblas}
  ;;
cuda)
  need nvcc "put CUDA's bin folder into PATH"
  nvcc -x cu -arch="${{ARCH:-native}}" -Icuda -I. -std=c++17 -O3 -fmad=false program.cpp -o program{cublas}
  ;;
emulator)
  CXX="${{CXX:-g++}}"
  need "$CXX" "set CXX to a C++17 compiler"
  build="$(mktemp -d)"
  trap 'rm -rf "$build"' EXIT
  "$CXX" {common} {machine} -Iemulator -c emulator/sb_machine.cpp -o "$build/machine.o"
  "$CXX" {common} {kernel} -Iemulator -I. -c launchers.cpp -o "$build/kernels.o"
  "$CXX" {host} -c program.cpp -o "$build/program.o"
  "$CXX" "$build/program.o" "$build/kernels.o" "$build/machine.o" -lm -o program
  ;;
*)
  echo "usage: $0 [maca | cuda | emulator]" >&2
  exit 2
  ;;
esac
"""


class _Program:
    """Writes ``program.cpp`` and gathers the bytes of ``constants.bin``."""

    def __init__(self, artifact: Artifact, plan: Mapping[str, Any]):
        self.artifact, self.plan = artifact, plan
        self.constants = bytearray()
        self._places: dict[bytes, int] = {}
        self._fixed: dict[tuple[Any, ...], int] = {}  # what is uploaded once -> its number
        self._uploads: list[str] = []
        self._weights = _offsets(artifact)

    def text(self) -> str:
        entries = [self._entry(name, entry) for name, entry in self.plan["entries"].items()]
        table = [self._table_row(name) for name in self.plan["entries"]]
        fields = [self._field(f) for f in self.artifact.manifest.get("state", [])]
        names = sorted(self.plan["kernels"])
        batch = {d for f in self.artifact.manifest.get("state", []) for d in f["shape"] if isinstance(d, str)}
        signatures = "\n".join(SIGNATURE.format(name) for name in names)
        return f"""// Generated by SpikingBrain: the host side of an artifact's entry points. build.sh builds it.
#ifdef SB_EMULATOR
#include "main.h"
extern "C" {{
{signatures}
}}
#else
#include "kernels.maca"
#include "main.h"
#endif
using namespace sb_host;

static std::vector<Buffer> fixed;  // weights and constants, on the machine

static void upload(Machine& m, const Mapping& weights, const Mapping& constants) {{
{"".join(self._uploads)}}}

{"".join(entries)}int main(int count, char** words) {{
  const Mapping weights("{WEIGHTS}"), constants("constants.bin");
  static Machine machine;
  upload(machine, weights, constants);
  const std::vector<Entry> entries = {{
{"".join(table)}  }};
  const std::vector<Field> state = {{
{"".join(fields)}  }};
  const int status = main_of(count, words, entries, state, "{next(iter(batch), "")}", constants, machine);
  fixed.clear();
  return status;
}}
"""

    def _place(self, data: bytes) -> int:
        """Returns where in ``constants.bin`` some bytes are."""
        if data not in self._places:
            self.constants += bytes(-len(self.constants) % ALIGNMENT)
            self._places[data] = len(self.constants)
            self.constants += data
        return self._places[data]

    def _fixed_buffer(self, record: Mapping[str, Any]) -> int:
        shape = record["shape"]
        count = int(np.prod(shape, dtype=np.int64))
        size = numpy_dtype(record["dtype"]).itemsize
        if record["role"] == "weight":
            source = f"weights.at({self._weights[record['key']]}, {count * size})"
        else:
            data = base64.b64decode(record["data"])
            data *= count if len(data) == size else 1  # a single value stands for all
            source = f"constants.at({self._place(data)}, {count * size})"
        key = (source, record["dtype"], tuple(shape))
        if key not in self._fixed:
            self._fixed[key] = len(self._fixed)
            made = f"m.upload(Type::{TYPES[record['dtype']]}, {_braced(map(str, shape))}, {source})"
            self._uploads.append(f"  fixed.push_back({made});\n")
        return self._fixed[key]

    def _entry(self, name: str, entry: Mapping[str, Any]) -> str:
        return _Entry(self.plan["kernels"], name, entry, self._fixed_buffer).text()

    def _table_row(self, name: str) -> str:
        entry = self.artifact.manifest["entries"][name]
        inputs = []
        for spec in entry["inputs"]:
            dimensions = []
            for size in spec["shape"]:
                low, high = entry["ranges"].get(size, (0, None)) if isinstance(size, str) else (0, None)
                known = size if isinstance(size, int) else -1
                limit = -1 if high is None else high
                dimensions.append(f"{{{known}, {json.dumps(str(size))}, {low}, {limit}}}")
            inputs.append(
                f"{{{json.dumps(spec['name'])}, Type::{TYPES[spec['dtype']]}, {_braced(dimensions)}}}"
            )
        outputs = len(entry["outputs"]) + len(entry.get("watched", ()))
        state = "true" if entry["uses_state"] else "false"
        types = _braced(f"Type::{TYPES[spec['dtype']]}" for spec in entry["outputs"])
        parts = [json.dumps(name), _braced(inputs), state, str(outputs), types, f"run_{_word(name)}"]
        return f"    {_braced(parts)},\n"

    def _field(self, field: Mapping[str, Any]) -> str:
        dtype = numpy_dtype(field["dtype"])
        fill = _one(field["fill"], field["dtype"])
        shape = _braced(str(-1 if isinstance(d, str) else d) for d in field["shape"])
        at, block, offset = "{}", "{}", 0
        if "block" in field and self.artifact.has(STATE):
            array = self.artifact.state_blocks()[field["name"]]
            at, block = _braced(map(str, field["block"])), _braced(map(str, array.shape))
            offset = self._place(array.tobytes())
        text = "".join(f"\\x{byte:02x}" for byte in fill)
        kind = TYPES[field["dtype"]]
        return f'    {{Type::{kind}, {shape}, std::string("{text}", {dtype.itemsize}), {at}, {block}, {offset}}},\n'


class _Entry:
    """Writes the function of one entry point."""

    def __init__(self, kernels: Mapping[str, Any], name: str, entry: Mapping[str, Any], fixed: Any):
        self.kernels, self.name, self.entry = kernels, name, entry
        self.records, self.fixed = entry["buffers"], fixed
        self.floats: set[int] = set()  # values of the host that are floats
        self.intervals = intervals(entry)
        order, self.places = order_of(entry["launches"])
        self.order = order
        # by the number of the step in the plan; event 0 stands for the beginning
        self.events = {self.places[step]: n for n, step in enumerate(sorted(order.awaited), 1)}

    def text(self) -> str:
        lines = [
            f"static std::vector<Buffer> run_{_word(self.name)}(Machine& m, const std::vector<Buffer>& in) {{"
        ]
        inputs = 0
        temporaries = []
        for i, record in enumerate(self.records):
            if record["role"] == "input":
                lines.append(f"  const Buffer& b{i} = in[{inputs}];")
                inputs += 1
            elif record["role"] == "temporary":
                temporaries.append(f"b{i}")
            else:
                lines.append(f"  const Buffer& b{i} = fixed[{self.fixed(record)}];")
        if temporaries:
            lines.append(f"  Buffer {', '.join(temporaries)};")
        for number, size in enumerate(self.entry["sizes"]):
            lines.append(f"  const int64_t s{number} = {self._size(size)};")
        if self.intervals:
            lines.append("  Buffer workspace;")
        laid = {i: first for interval in self.intervals for i, (first, _) in interval.uses.items()}
        ready: set[int] = set()
        checks = [f"  {self._check(formula, message)}" for formula, message in self.entry["checks"]]
        body = list(dict.fromkeys(checks))
        last = self._last_uses()
        body += [f"  m.reserve(workspace, {self._lives(i)});" for i in self.intervals if i.is_known]
        if self.order.count > 1:
            body += [f"  m.begin({self.order.count});", *(f"  m.wait({s}, 0);" for s in self.order.forks)]
        for number, step in enumerate(self.entry["launches"]):
            stream = step.get("stream", 0)
            begun = (interval for interval in self.intervals if interval.begin == number)
            body += [f"  m.lay(workspace, {self._lives(interval)});" for interval in begun]
            body += [f"  m.begin_life(b{i});" for i, first in laid.items() if first == number]
            body += [f"  m.wait({stream}, {self.events[n]});" for n in step.get("after", ())]
            body += self._step(step, ready, "  ")
            if number in self.events:
                body.append(f"  m.record({self.events[number]}, {stream});")
            body += [f"  b{i} = Buffer();" for i in last.get(number, ()) if i in ready or i in laid]
        if self.order.count > 1:
            ends = [self.events[self.places[step]] for step in self.order.joins]
            body += [*(f"  m.wait(0, {event});" for event in ends), "  m.end();"]
        values = sorted(_values(self.entry["launches"]))
        lines += [f"  {'double' if v in self.floats else 'int64_t'} v{v} = 0;" for v in values]
        outputs = self.entry["outputs"]
        body += self._needs([o["buffer"] for o in outputs], ready, "  ")
        results = [f"b{o['buffer']}.as({self._shape(o['shape'])})" for o in outputs]
        return "\n".join([*lines, *body, f"  return {_braced(results)};", "}\n\n"])

    def _lives(self, interval: Interval) -> str:
        """Returns what lives in an interval, as C++."""
        lives = []
        for i, (first, last) in sorted(interval.uses.items()):
            kind, shape = TYPES[self.records[i]["dtype"]], self._shape(self.records[i]["shape"])
            lives.append(_braced([f"&b{i}", f"Type::{kind}", shape, str(first), str(last)]))
        return _braced(lives)

    def _last_uses(self) -> dict[int, list[int]]:
        """Returns for each step the temporaries whose memory is free after it: for what is launched after it.

        On several streams that is so where all uses are surely done before the next step of each stream.
        """
        uses: dict[int, list[int]] = {}
        for place, number in enumerate(self.places):
            for inner in every_step([self.entry["launches"][number]]):
                used = [a["buffer"] for a in inner.get("arguments", ()) if "buffer" in a]
                for i in [*used, *([inner["buffer"]] if "read" in inner else [])]:
                    uses.setdefault(i, []).append(place)
        kept = {o["buffer"] for o in self.entry["outputs"]}
        ends: dict[int, list[int]] = {}
        for i, places in uses.items():
            if self.records[i]["role"] == "temporary" and i not in kept:
                place = self._free_after(places)
                ends.setdefault(self.places[place], []).append(i)
        return ends

    def _free_after(self, uses: Sequence[int]) -> int:
        """Returns the first place after which all that is launched waits for these uses."""
        order = self.order
        for place in range(uses[-1], len(order.streams)):
            following = {order.streams[p]: p for p in reversed(range(place + 1, len(order.streams)))}
            if all(order.before(use, p) for use in uses for p in following.values()):
                return place
        return len(order.streams) - 1

    def _check(self, formula: Any, message: str) -> str:
        return f"require({self._size(formula)}, {_quoted(self.name)}, {_quoted(message)});"

    def _size(self, size: Any) -> str:
        """Returns a formula as C++."""
        if not isinstance(size, list):
            return _number(size)
        name, *operands = size
        if name == "dim":
            return f"b{operands[0]}.dim({operands[1]})"
        if name in ("value", "size"):
            return f"{name[0]}{operands[0]}"
        texts = [self._size(o) for o in operands]
        if name in _INFIX:
            return f"({texts[0]} {_INFIX[name]} {texts[1]})"
        if name == "select":
            return f"({texts[0]} ? {texts[1]} : {texts[2]})"
        if name in _CALLS:
            return f"sb_host::{_CALLS[name]}({texts[0]}, {texts[1]})"
        sign = {"max": ">", "min": "<"}[name]
        return f"({texts[0]} {sign} {texts[1]} ? {texts[0]} : {texts[1]})"

    def _is_float(self, size: Any) -> bool:
        if not isinstance(size, list):
            return isinstance(size, float)
        name, *operands = size
        if name == "value":
            return operands[0] in self.floats
        if name in ("dim", "size", "eq", "ne", "lt", "le", "gt", "ge"):
            return False
        return any(self._is_float(o) for o in (operands[1:] if name == "select" else operands))

    def _shape(self, shape: Sequence[Any]) -> str:
        return f"Shape{_braced(self._size(s) for s in shape)}"

    def _needs(self, buffers: Sequence[int], ready: set[int], indent: str) -> Iterator[str]:
        for i in dict.fromkeys(buffers):
            record = self.records[i]
            if record["role"] == "temporary" and i not in ready:
                ready.add(i)
                yield f"{indent}m.need(b{i}, Type::{TYPES[record['dtype']]}, {self._shape(record['shape'])});"

    def _steps(self, steps: Sequence[Mapping[str, Any]], ready: set[int], indent: str) -> Iterator[str]:
        for step in steps:
            yield from self._step(step, ready, indent)

    def _step(self, step: Mapping[str, Any], ready: set[int], indent: str) -> Iterator[str]:
        inner = indent + "  "
        if "kernel" in step:
            yield from self._needs([a["buffer"] for a in step["arguments"] if "buffer" in a], ready, indent)
            kernel = self.kernels[step["kernel"]]
            grid = _braced(self._size(s) for s in step["grid"])
            arguments = ", ".join(self._argument(a) for a in step["arguments"])
            name = step["kernel"]
            stream = f", {step['stream']}" if "stream" in step else ""
            yield (
                f'{indent}m.launch(KERNEL({name}), "{name}", {grid}, {kernel["threads"]}, {kernel["dynamic_bytes"]},'
                f"\n{indent}         {{{arguments}}}{stream});"
            )
        elif "library" in step:
            operands = [a["buffer"] for a in step["arguments"]]
            yield from self._needs(operands, ready, indent)
            flags = [*(o == "T" for o in step["operations"]), step["adds"]]
            sizes = [*step["sizes"], *step["leading"], step["batch"], *step["strides"]]
            words = ["true" if f else "false" for f in flags] + [self._size(s) for s in sizes]
            yield f"{indent}m.multiply({_braced(words)}, {', '.join(f'b{i}' for i in operands)});"
        elif "loop" in step:
            low, high, by = (self._size(step[bound]) for bound in ("from", "to", "by"))
            v = f"v{step['loop']}"
            yield f"{indent}for ({v} = {low}; {v} < {high}; {v} += sb_host::step({by})) {{"
            yield from self._steps(step["steps"], set(ready), inner)
            yield f"{indent}}}"
        elif "while" in step:
            yield f"{indent}for (;;) {{"
            inside = set(ready)
            yield from self._steps(step["before"], inside, inner)
            yield f"{inner}if (!({self._size(step['while'])})) break;"
            yield from self._steps(step["steps"], inside, inner)
            yield f"{indent}}}"
        elif "if" in step:
            yield f"{indent}if ({self._size(step['if'])}) {{"
            yield from self._steps(step["then"], set(ready), inner)
            yield f"{indent}}} else {{"
            yield from self._steps(step["else"], set(ready), inner)
            yield f"{indent}}}"
        elif "read" in step:
            yield from self._read(step, ready, indent)
        elif "set" in step:
            self.floats |= {v for v, size in step["set"] if self._is_float(size)}
            given = [f"const auto t{i} = {self._size(s)};" for i, (_, s) in enumerate(step["set"])]
            taken = [f"v{v} = t{i};" for i, (v, _) in enumerate(step["set"])]
            yield f"{indent}{{ {' '.join([*given, *taken])} }}" if given else f"{indent};"
        else:
            yield f"{indent}{self._check(step['check'], step['message'])}"

    def _read(self, step: Mapping[str, Any], ready: set[int], indent: str) -> Iterator[str]:
        buffer, at = step["buffer"], step["at"]
        yield from self._needs([buffer], ready, indent)
        dtype = self.records[buffer]["dtype"]
        if dtype not in _READ:
            raise UnsupportedOp(
                f"a program in C++ cannot read an element of {dtype} to go on with",
                why=f"the entry point '{self.name}' does",
                hint="run the artifact with Python",
            )
        if dtype.startswith("float"):
            self.floats.add(step["read"])
        place: Any = 0
        for size, index in zip(step["shape"], at, strict=True):
            place = ["add", ["mul", place, size], index]
        yield f"{indent}v{step['read']} = m.read<{_READ[dtype]}>(b{buffer}, {self._size(place)});"

    def _argument(self, argument: Mapping[str, Any]) -> str:
        if "buffer" in argument:
            return f"b{argument['buffer']}"
        text, dtype = self._size(argument["value"]), argument.get("dtype", "int64")
        if dtype in ("float32", "float64"):
            return f"Argument::{TYPES[dtype]}({text})"
        if dtype in ("float16", "bfloat16"):
            raise UnsupportedOp(
                f"a program in C++ cannot pass a {dtype} to a kernel", hint="run the artifact with Python"
            )
        return f"int64_t({text})"


def _values(steps: Sequence[Mapping[str, Any]]) -> set[int]:
    """Returns the values of the host that steps give."""
    return {value for step in every_step(steps) for value in values_given(step)}


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return (
            value.hex()
            if np.isfinite(value)
            else {"inf": "INFINITY", "-inf": "-INFINITY"}.get(str(value), "NAN")
        )
    return f"int64_t({value})"


def _one(value: Any, dtype: str) -> bytes:
    """Returns the bytes of one element; bfloat16 rounds to nearest even."""
    if dtype == "bfloat16":
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return np.array(value, dtype).tobytes()


def _offsets(artifact: Artifact) -> dict[str, int]:
    """Returns where in the weights' file each tensor's bytes begin."""
    data = artifact.member(WEIGHTS)
    (length,) = struct.unpack_from("<Q", data, 0)
    header = json.loads(bytes(data[8 : 8 + length]))
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items()}


def _braced(parts: Any) -> str:
    return "{" + ", ".join(parts) + "}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _word(name: str) -> str:
    """Returns a name that C++ takes, different for different ones."""
    return "".join(c if c.isalnum() and c.isascii() else f"_{ord(c):x}_" for c in name)
