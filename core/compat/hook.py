"""The import hook: modules of packages that are absent consist of stand-ins; those of a package that is installed, and can't run
here, keep all but the names that are mapped."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from spikingbrain.compat.table import STAND_INS, VERSIONS
from spikingbrain.errors import NotMapped

_log = logging.getLogger(__name__)
_TABLE = "docs/public-code.md, or `python -m spikingbrain.compat`, lists what is mapped"


class Finder(MetaPathFinder):
    """Serves the packages ``roots``. It comes first in ``sys.meta_path``, and asks the others what is installed."""

    def __init__(self, roots: set[str]):
        self.roots = roots

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root = fullname.partition(".")[0]
        if root not in self.roots:
            return None
        real = installed(fullname, path, self)
        if fullname in STAND_INS:
            if real is not None:
                real.loader = _Mapped(fullname, real.loader)
                return real
            return ModuleSpec(fullname, _Mapped(fullname), origin="spikingbrain.compat", is_package=True)
        if real is None and installed(root, None, self) is None:
            raise NotMapped(f"module '{fullname}' has no stand-in", hint=_TABLE)
        return real


def installed(
    name: str, path: Sequence[str] | None = None, besides: MetaPathFinder | None = None
) -> ModuleSpec | None:
    """Returns where a module is found without stand-ins."""
    for finder in sys.meta_path:
        if finder is not besides and not isinstance(finder, Finder):
            spec = finder.find_spec(name, path)
            if spec is not None:
                return spec
    return None


class _Mapped(Loader):
    def __init__(self, name: str, real: Loader | None = None):
        self.name, self.real = name, real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec) if self.real else None

    def exec_module(self, module: ModuleType) -> None:
        if self.real is None:
            _only_stand_ins(module)
        else:
            try:
                self.real.exec_module(module)
            except (ImportError, OSError) as error:  # a library of the GPU is missing, above all
                _log.warning("%s is installed and cannot be imported (%s): stand-ins only", self.name, error)
                _only_stand_ins(module)
        vars(module).update(STAND_INS[self.name])


def _only_stand_ins(module: ModuleType) -> None:
    name = module.__name__
    if name in VERSIONS:
        module.__version__ = VERSIONS[name]  # type: ignore[attr-defined]

    def missing(attribute: str) -> Any:
        if attribute.startswith("__") or f"{name}.{attribute}" in STAND_INS:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        raise NotMapped(f"'{attribute}' of '{name}' has no stand-in", hint=_TABLE)

    module.__getattr__ = missing  # type: ignore[method-assign]
