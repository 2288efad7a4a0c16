"""Configuration of lit for the IR tests: ``lit tests/passes``, or through pytest (tests/unit/test_passes_lit.py)."""

import os
import sys
import tempfile
from pathlib import Path

import lit.formats

config.name = "spikingbrain-passes"  # noqa: F821  (lit defines config and lit_config)
config.suffixes = [".mlir"]  # noqa: F821
config.test_format = lit.formats.ShTest(execute_external=False)  # noqa: F821
config.test_source_root = str(Path(__file__).parent)  # noqa: F821
default = Path(tempfile.gettempdir()) / f"spikingbrain-lit-{os.getuid()}"
config.test_exec_root = lit_config.params.get("exec_root", str(default))  # noqa: F821
tools = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
config.environment["PATH"] = os.pathsep.join(tools)  # noqa: F821
