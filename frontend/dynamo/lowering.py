"""From region graphs to callable code: one module for all distinct regions of a graph, compiled in one go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch_mlir import ir

from spikingbrain.backend import SharedMemory, resolve_target
from spikingbrain.build import Code, compile_code
from spikingbrain.errors import CompileError, UnsupportedOp
from spikingbrain.frontend.dynamo.loops import graphs
from spikingbrain.frontend.dynamo.options import CompileOptions
from spikingbrain.frontend.dynamo.region import RegionGraph
from spikingbrain.frontend.importer import GraphImporter
from spikingbrain.frontend.normalise import normalise_region


@dataclass
class CodeUnit:
    """One compiled module, as bytes and, once loaded, as code."""

    target: str
    options: dict[str, Any]
    members: dict[str, bytes]
    _loaded: SharedMemory | None = field(default=None, repr=False)

    def load(self) -> SharedMemory:
        """Returns the code, loaded at the first call."""
        if self._loaded is None:
            backend, _ = resolve_target(self.target)
            manifest = {"target": {"name": self.target}, "options": self.options}
            members = {k: memoryview(v) for k, v in self.members.items()}
            self._loaded = cast(SharedMemory, backend.load(members, manifest, {}))
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}


@dataclass
class Compiled:
    """One distinct region: the module that holds it, what it is called there, how its weights are stored."""

    unit: CodeUnit
    entry: str
    weights: list[dict[str, Any]]


def compile_regions(
    regions: Sequence[RegionGraph], options: CompileOptions, graph_name: str
) -> tuple[dict[str, Compiled], dict[str, CompileError]]:
    """Compiles each distinct region once; returns code and failures, both by the regions' keys.

    All go into one module. If that fails, each is compiled alone, so that one bad region costs no other.
    """
    distinct = {region.key: region for region in regions}
    failures: dict[str, CompileError] = {}
    texts: dict[str, Any] = {}
    if not distinct:
        return {}, {}
    names = {key: f"region_{i}" for i, key in enumerate(distinct)}
    good: dict[str, RegionGraph] = {}
    for key, region in distinct.items():
        for graph in graphs(region.module):
            normalise_region(graph)
        try:
            texts[key] = _import({names[key]: region})
            good[key] = region
        except CompileError as error:
            failures[key] = error
    if not good:
        return {}, failures
    try:
        single = next(iter(good))
        whole = texts[single] if len(good) == 1 else _import({names[k]: r for k, r in good.items()})
        return _load(whole, names, good, options, graph_name), failures
    except CompileError as error:
        if len(good) == 1:
            return {}, {**failures, next(iter(good)): error}
    compiled: dict[str, Compiled] = {}

    def one(key: str) -> None:
        try:
            compiled.update(_load(texts[key], names, {key: good[key]}, options, f"{graph_name}-{names[key]}"))
        except CompileError as error:
            failures[key] = error

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, good))
    return compiled, failures


def _import(regions: Mapping[str, RegionGraph]) -> str:
    importer = GraphImporter()
    for name, region in regions.items():
        try:
            importer.add_graph(region.module, name)
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError, ir.MLIRError) as error:
            why = (str(error) or repr(error)).splitlines()[0][:300]
            raise UnsupportedOp("a region cannot be imported", why=why) from error
    text: str = importer.module.operation.get_asm(enable_debug_info=True)
    return text


def _load(
    module: str,
    names: Mapping[str, str],
    regions: Mapping[str, RegionGraph],
    options: CompileOptions,
    graph_name: str,
) -> dict[str, Compiled]:
    backend_options = options.of_backend
    dump = Path(options.dump) / graph_name if options.dump else None
    code: Code = compile_code(module, options.target, backend_options, dump=dump, use_cache=options.cache)
    unit = CodeUnit(options.target, backend_options, code.members)
    stored = code.report["weight_arguments"]
    return {key: Compiled(unit, names[key], stored.get(names[key], [])) for key in regions}


_OP = re.compile(r"torch\.(?:aten|prims|spikingbrain)\.([A-Za-z0-9_]+)")


def culprit(error: CompileError) -> str | None:
    """Returns the name of the op that a failed lowering blames, such as ``gather``."""
    found = _OP.search(error.what) or _OP.search(error.why)
    return found[1] if found else None
