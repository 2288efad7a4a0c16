"""Programs of wave kernels to test: compiled for the emulator, run in every thread order, which must agree bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch_mlir import ir

from spikingbrain.backend import StageContext
from spikingbrain.backend_maca.backend import MacaBackend
from spikingbrain.backend_maca.run.emulate import ORDERS
from spikingbrain.passes import dialect, parameters, pipeline, recipes
from spikingbrain.passes.base import Pass, PassContext, Record
from spikingbrain.tuning import USUAL, Tuning

Array = np.ndarray[Any, Any]


def joined(cases: Mapping[str, Any]) -> str:
    """Returns the functions of several cases, the weights of each under names of their own: ``odd.w``."""
    texts = []
    for name, case in cases.items():
        text = case.function(name).replace(" attributes {spikingbrain.weight_arguments}", "")
        texts.append(text.replace('sources = ["', f'sources = ["{name}.'))
    return "".join(texts)


class Program:
    """A module of functions on ``maca-emulator``; ``source`` is its MACA C++, ``records`` what the passes decided."""

    def __init__(self, text: str, passes: Sequence[Pass], tuning: Tuning = USUAL):
        backend = MacaBackend()
        (target,) = [s.target for s in backend.targets() if s.target.name == "maca-emulator"]
        target = replace(target, tuning=tuning)
        with dialect.load(), ir.Location.unknown():
            module = ir.Module.parse(text)
            context = PassContext(target)
            pipeline.run(passes, module, context)
            pipeline.check_lowered(module)
            pipeline.clean(module)
            self.stored = parameters.all_stored(module)
            form: Any = str(module)
        self.records: list[Record] = context.records
        for stage in backend.stages(target).values():
            form = stage(form, StageContext(target, backend.options(providers="linear=own"), Path(".")))
        self.code = {name: memoryview(code) for name, code in form.items()}
        self.source = bytes(form["kernels.maca"]).decode()

    def load(self, weights: Mapping[str, Mapping[str, Array]]) -> Any:
        """Returns the program with the weights of each case."""
        named = {f"{case}.{name}": w for case, each in weights.items() for name, w in each.items()}
        packed = {s.key: recipes.apply(s.recipe, [named[n] for n in s.sources]) for s in self.stored}
        return MacaBackend().load(self.code, {}, packed)


def run(loaded: Any, entry: str, *inputs: Array, orders: Sequence[str] = ORDERS) -> Array:
    """Returns the only result of an entry, the same bits in all thread orders."""
    results: list[Array] = []
    for order in orders:
        loaded.kernels.order = order
        results.append(loaded.call(entry, [loaded.to_device(value) for value in inputs])[0])
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].view(np.uint8), other.view(np.uint8))
    return results[0]
