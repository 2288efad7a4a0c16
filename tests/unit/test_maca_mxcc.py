"""Native code where an SDK is: a script stands in for mxcc, checks its command line and counts its runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch_mlir")

from spikingbrain.backend import StageContext
from spikingbrain.backend_maca import mxcc
from spikingbrain.backend_maca.backend import MacaBackend
from spikingbrain.backend_maca.run import emulate
from spikingbrain.errors import MissingDependency, PassFailed

MXCC = r"""#!/bin/sh
if [ "$*" = --version ]; then cat "$0.version"; exit 0; fi
echo run >> "$0.log"
expected="-offload-arch=xcore1000 -device-obj -O3 -ffp-contract=off kernels.maca -o kernels.mcbin"
[ "$*" = "$expected" ] || { echo "unexpected: $*" >&2; exit 1; }
if grep -q nonsense kernels.maca; then echo "kernels.maca:1: error: nonsense" >&2; exit 1; fi
{ printf '\177ELF'; cat kernels.maca; } > kernels.mcbin
"""
KERNELS = """
module attributes {gpu.container_module} {
  gpu.module @kernels {
    gpu.func @one(%y: memref<64xf32>) kernel attributes {known_block_size = array<i32: 64, 1, 1>} {
      %one = arith.constant 1.0 : f32
      %t = gpu.thread_id x
      memref.store %one, %y[%t] : memref<64xf32>
      gpu.return
    }
  }
}
"""


@pytest.fixture
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stand-in for the SDK, with a cache of its own."""
    root = tmp_path / "maca"
    compiler = mxcc.compiler_of(root)
    compiler.parent.mkdir(parents=True)
    compiler.write_text(MXCC)
    compiler.chmod(0o755)
    Path(f"{compiler}.version").write_text("mxcc version 1.0.0 (build 7)\n")
    (root / "Version.txt").write_text("Version:3.3.0\n")
    monkeypatch.setenv("MACA_PATH", str(root))
    monkeypatch.setattr(mxcc, "cache_folder", lambda: tmp_path / "cache")
    return root


def runs(sdk: Path) -> int:
    log = Path(f"{mxcc.compiler_of(sdk)}.log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def export(target: str = "maca") -> tuple[Mapping[str, bytes], dict[str, Any]]:
    """Runs the last stage, from kernels to the members of the artifact."""
    backend = MacaBackend()
    (status,) = [s for s in backend.targets() if s.target.name == target]
    context = StageContext(status.target, backend.options(), Path("."))
    return backend.stages(status.target)["maca"](KERNELS, context), context.report


def test_native_code_lies_beside_the_source(sdk: Path) -> None:
    code, report = export()
    assert code["kernels.xcore1000.mcbin"] == b"\x7fELF" + code["kernels.maca"]
    assert report["native"]["arch"] == "xcore1000"
    assert report["native"]["compiler"] == "mxcc version 1.0.0 (build 7)\n\nVersion:3.3.0\n"


def test_the_emulator_and_a_machine_without_the_sdk_get_source_only(
    sdk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(export("maca-emulator")[0]) == {"kernels.maca", "plan.json"}
    monkeypatch.delenv("MACA_PATH")
    assert set(export()[0]) == {"kernels.maca", "plan.json"}
    assert runs(sdk) == 0


def test_native_code_is_cached_until_anything_changes(sdk: Path) -> None:
    (target,) = [s.target for s in MacaBackend().targets() if s.target.name == "maca"]
    keys = [MacaBackend().cache_key(target, MacaBackend.options())]
    for _ in range(2):
        mxcc.build("// source", mxcc.find())
    assert runs(sdk) == 1
    mxcc.build("// source, edited", mxcc.find())
    assert runs(sdk) == 2
    for changed in (sdk / "Version.txt", Path(f"{mxcc.compiler_of(sdk)}.version")):
        changed.write_text(changed.read_text() + "patch 1\n")  # the compiler's number stays the same
        mxcc.build("// source", mxcc.find())
        keys.append(MacaBackend().cache_key(target, MacaBackend.options()))
    assert runs(sdk) == 4
    assert len(set(keys)) == 3


def test_what_mxcc_refuses_is_reported_and_not_cached(sdk: Path) -> None:
    for _ in range(2):
        with pytest.raises(PassFailed) as refused:
            mxcc.build("nonsense", mxcc.find())
    assert str(refused.value) == (
        "mxcc refuses the generated kernels\n"
        "  because: kernels.maca:1: error: nonsense\n"
        "  try: unset MACA_PATH to export source only"
    )
    assert runs(sdk) == 2


def test_a_wrong_path_is_an_error(sdk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACA_PATH", str(sdk / "nowhere"))
    with pytest.raises(MissingDependency, match=r"MACA_PATH is '.*nowhere', but its compiler does not run"):
        export()


def test_native_code_that_has_no_place(
    sdk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SPIKINGBRAIN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(mxcc, "cache_folder", lambda: tmp_path / "file")
    assert mxcc.build("// source", mxcc.find())  # made, but not kept
    assert "cannot keep" in caplog.text
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(
        PassFailed, match=r"mxcc has no place for its files\n  because: .*\n  try: set TMPDIR"
    ):
        mxcc.build("// another source", mxcc.find())
    with pytest.raises(emulate.KernelBuildError, match="the compiled kernels have no place\n  because: "):
        emulate.build("#include <mc_runtime.h>\n", [])
