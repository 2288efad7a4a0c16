"""Stand-ins for packages that need an NVIDIA GPU, so that model code written for it runs and compiles anywhere.

    import spikingbrain.compat
    spikingbrain.compat.install()

From then on `from fla.ops.gla import chunk_gla`, `from flash_attn import flash_attn_func` and the like give plain PyTorch,
written in the recurrences of `spikingbrain.models` and in scaled dot product attention, which the compiler knows. A script
that must stay as it is runs by ``python -m spikingbrain.compat script.py``.
"""

from __future__ import annotations

import sys

import torch

from spikingbrain.compat.hook import Finder, installed
from spikingbrain.compat.table import STAND_INS, VERSIONS
from spikingbrain.errors import NotMapped

__all__ = ["STAND_INS", "install", "uninstall"]


def install() -> dict[str, str]:
    """Lets imports of packages for GPUs give stand-ins, where the package is absent or there is no GPU.

    Returns what became of each package. May be called again; call it before the model's code is imported.

    Raises:
        NotMapped: a package that is installed and can't run here was imported before, so that others hold its functions.
    """
    given = {}
    for root in VERSIONS:
        if installed(root) is None:
            given[root] = "not installed: stand-ins"
        elif torch.cuda.is_available():
            given[root] = "installed, with a GPU: itself"
        else:
            given[root] = "installed, without a GPU: stand-ins for what is mapped"
    roots = {root for root, what in given.items() if "stand-ins" in what}
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        for root in roots & sys.modules.keys():
            raise NotMapped(
                f"'{root}' was imported before its stand-ins", hint="install() at the very beginning"
            )
        sys.meta_path.insert(0, Finder(roots))
    return given


def uninstall() -> None:
    """Takes the stand-ins back; modules that imported names keep them."""
    for finder in [finder for finder in sys.meta_path if isinstance(finder, Finder)]:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in finder.roots]:
            del sys.modules[name]
