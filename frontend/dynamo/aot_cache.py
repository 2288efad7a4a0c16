"""Compiled graphs in torch's own cache of AOTAutograd results, so that a second process traces nothing either.

The only module that touches this private API of torch; ``tests/unit/test_private_api.py`` fails when it changes.
``torch.compiler.save_cache_artifacts`` works through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
from torch._functorch._aot_autograd.schemas import SerializableAOTDispatchCompiler
from torch._inductor.output_code import OutputCode

from spikingbrain.backend import resolve_target
from spikingbrain.code_cache import code_parts
from spikingbrain.frontend.dynamo import report
from spikingbrain.frontend.dynamo.on_device import kernels_of
from spikingbrain.frontend.dynamo.options import CompileOptions
from spikingbrain.frontend.dynamo.program import GraphProgram

Compile = Callable[[fx.GraphModule], tuple[GraphProgram, report.GraphReport]]


@dataclass
class CachedGraph(OutputCode):
    """One compiled graph as torch's cache holds it."""

    program: GraphProgram
    report: report.GraphReport
    _run: Callable[[list[Any]], Any] | None = field(default=None, repr=False)
    _boxed_call: bool = True

    def __call__(self, inputs: Sequence[Any]) -> Any:
        return self._run(inputs)  # type: ignore[arg-type, misc]

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        """Makes the graph callable; torch calls this for what it has just compiled and for what it has loaded."""
        if self._run is None:
            self._run = self.program.load()
            report.publish(self.report)

    def prepare_for_serialization(self) -> None:
        """Leaves a graph out of the cache, without torch's warning, if it is not fit to be kept.

        A part may run in eager because the compiler failed: the next process may have more luck, or a kept error. Or
        an op holds a function, which has no form outside this process.
        """
        for region in self.report.regions:
            if region.failed:
                raise BypassAOTAutogradCache(f"{self.report.name}: {region.reason}")
        try:
            pickle.dumps((self.program.names, self.program.constants))
        except Exception as error:
            raise BypassAOTAutogradCache(f"{self.report.name} cannot be stored: {error}") from error

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Nothing to do: there are no Triton kernels."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}


def cacheable(compile_graph: Compile) -> SerializableAOTDispatchCompiler:
    """Wraps a function that compiles one graph, so that AOTAutograd may store what it returns."""

    def compiler(module: fx.GraphModule, _: Sequence[Any]) -> CachedGraph:
        program, made = compile_graph(module)
        return CachedGraph(program, made, program.load())

    return SerializableAOTDispatchCompiler(CachedGraph, compiler)


@contextlib.contextmanager
def enabled(module: fx.GraphModule, options: CompileOptions) -> Iterator[None]:
    """Lets AOTAutograd look for the graph in its cache, and store it with its code, under a key that holds our options.

    Forward and backward are stored together, so the backward is compiled at once and not at its first call.
    """
    module._spikingbrain_key = _key(options)
    wanted = options.cache and not options.dump  # a stored graph would leave nothing in the folder
    settings = {"enable_autograd_cache": wanted and functorch_config.enable_autograd_cache}
    if settings["enable_autograd_cache"]:
        settings |= {"bundled_autograd_cache": True, "force_non_lazy_backward_lowering": True}
    with functorch_config.patch(settings):
        yield


def _key(options: CompileOptions) -> str:
    """Returns what decides about generated code besides the graph. It becomes part of the pickled graph module."""
    backend, status = resolve_target(options.target)
    parts = code_parts(backend, status.target, backend.options(**options.of_backend))
    if kernels := kernels_of(options.target, options.providers):
        parts["kernels"] = kernels.name
    return hashlib.sha256(json.dumps([asdict(options), options.thread_count, parts]).encode()).hexdigest()
