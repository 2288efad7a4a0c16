"""The house itself: what is installed is what the repository holds, and the slim part stays slim."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

import spikingbrain

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
NOT_PACKAGES = {"tests", "benchmarks", "examples", "docs", "build", "dist"}


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages in a folder whose name has a hyphen and a blank."""
    copy = tmp_path_factory.mktemp("packaging") / "spiking-brain clone"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in {Path(f).parts[0] for f in FOLDERS.values()}:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    out = checkout.parent / "wheel"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    run(*pip, "--no-build-isolation", "--no-deps", "--wheel-dir", out, checkout)
    return next(out.glob("*.whl"))


def test_every_package_folder_is_listed() -> None:
    found = {
        str(file.parent.relative_to(ROOT))
        for file in ROOT.glob("*/**/__init__.py")
        if not set(file.relative_to(ROOT).parts) & NOT_PACKAGES
        and not file.relative_to(ROOT).parts[0].startswith(".")
    }
    assert set(FOLDERS.values()) == found
    assert PROJECT["tool"]["setuptools"]["packages"] == list(FOLDERS)
    for package, folder in FOLDERS.items():
        path = folder.replace("/", ".")  # core/ is `spikingbrain` itself
        assert package == (
            "spikingbrain" + path.removeprefix("core") if path.startswith("core") else f"spikingbrain.{path}"
        )


def test_the_wheel_holds_every_source_file(wheel: Path) -> None:
    expected = {"spikingbrain/py.typed", "spikingbrain/backend_maca/run/probe.maca"}
    for package, folder in FOLDERS.items():
        expected |= {f"{package.replace('.', '/')}/{file.name}" for file in (ROOT / folder).glob("*.py")}
    for folder in ("emulator", "compat_cuda", "compat_amdgcn", "host"):
        files = (ROOT / "backend_maca" / folder).iterdir()
        expected |= {f"spikingbrain/backend_maca/{folder}/{file.name}" for file in files}
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        entry_points = archive.read(
            next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        ).decode()
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    assert names == expected
    assert "spikingbrain = spikingbrain.tools.cli:main" in entry_points


def test_entry_points_resolve() -> None:
    distribution = importlib.metadata.distribution("spikingbrain")
    points = {(p.group, p.name): p for p in distribution.entry_points}
    declared = {("console_scripts", n) for n in PROJECT["project"]["scripts"]}
    for group, entries in PROJECT["project"]["entry-points"].items():
        declared |= {(group, n) for n in entries}
    assert set(points) == declared
    for point in points.values():
        assert callable(point.load())


def test_versions_agree() -> None:
    assert (
        importlib.metadata.version("spikingbrain")
        == PROJECT["project"]["version"]
        == spikingbrain.__version__
    )
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[({re.escape(spikingbrain.__version__)}|Unreleased)\]", changelog, re.M)


def test_pinned_versions_are_installed() -> None:
    pins = [
        requirement.split(";")[0].split("==")
        for extra in PROJECT["project"]["optional-dependencies"].values()
        for requirement in extra
        if "==" in requirement
    ]
    assert len(pins) >= 6
    for name, version in pins:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            assert name == "triton"  # for Linux on x86-64
            continue
        assert installed.split("+")[0] == version.strip(), name


def test_the_slim_part_pins_nothing() -> None:
    assert PROJECT["project"]["dependencies"] == ["numpy", "safetensors", "tokenizers"]


def test_layer_contracts_cover_the_core() -> None:
    """A new module of core/ must be put into the contracts by hand."""
    contracts = {c["name"]: c for c in PROJECT["tool"]["importlinter"]["contracts"]}
    modules = {f"spikingbrain.{file.stem}" for file in (ROOT / "core").glob("*.py")} - {
        "spikingbrain.__init__"
    }
    covered = set(contracts["The core does not know the frontend, models or tools"]["source_modules"])
    assert covered == modules - {"spikingbrain.api"}
    models = set(contracts["Models are plain PyTorch"]["forbidden_modules"])
    rooms = {p for p in FOLDERS if p.count(".") == 1} - {"spikingbrain.models"}
    assert models >= modules | rooms


LOADING = """
import sys
import numpy as np
import spikingbrain
from spikingbrain.tools import cli
try:
    spikingbrain.load(sys.argv[1])
except spikingbrain.errors.ArtifactError:
    pass
spikingbrain.targets()
from spikingbrain.backend_iree import runtime
from spikingbrain.tools import chat, forecast, run
heavy = [m for m in ("torch", "torch_mlir", "spikingbrain.frontend", "spikingbrain.passes") if m in sys.modules]
assert not heavy, heavy
"""


def test_loading_imports_no_compiler(tmp_path: Path) -> None:
    run(sys.executable, "-c", LOADING, tmp_path / "none")


def test_importing_is_quick_and_imports_nothing() -> None:
    code = "import sys; before = set(sys.modules); import spikingbrain; print(*sorted(set(sys.modules) - before))"
    loaded = run(sys.executable, "-c", code).split()
    assert [m for m in loaded if m.split(".")[0] == "spikingbrain"] == ["spikingbrain"]
    assert not {"numpy", "torch", "torch_mlir", "iree"} & set(loaded)


def test_unknown_names_are_refused_in_words() -> None:
    with pytest.raises(AttributeError, match="module 'spikingbrain' has no attribute 'comple'"):
        spikingbrain.comple  # noqa: B018
    for name in spikingbrain.__all__:
        assert getattr(spikingbrain, name)


@pytest.mark.parametrize("mode", ["wheel", "editable", "strict"])
def test_installations(mode: str, checkout: Path, wheel: Path, tmp_path: Path) -> None:
    """The package is found when installed in each way, from a folder with a difficult name."""
    environment = tmp_path / "environment"
    # The packages of this environment, without its installation of spikingbrain.
    venv.EnvBuilder(with_pip=False, symlinks=True).create(environment)
    site = next((environment / "lib").glob("python*/site-packages"))
    own = Path(importlib.metadata.distribution("numpy").locate_file(""))
    strict = ["--config-settings", "editable_mode=strict"] if mode == "strict" else []
    what = [wheel] if mode == "wheel" else ["--editable", checkout, *strict]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", environment / "bin/python"]
    path = {**os.environ, "PYTHONPATH": str(own)}
    run(*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", *what, env=path)
    assert list(site.glob("spikingbrain-*.dist-info"))

    code = f"""
import sys
sys.path.append({str(own)!r})
import spikingbrain, spikingbrain.tools.cli, spikingbrain.backend_maca.backend, spikingbrain.passes.kernels.linear
from importlib.metadata import files, version
print(spikingbrain.__file__)
print(sorted(s.target.backend for s in spikingbrain.targets())[0])
"""
    where, backend = run(environment / "bin/python", "-c", code, cwd=tmp_path).split("\n")[:2]
    inside = environment if mode == "wheel" else checkout
    assert Path(where).is_relative_to(inside.resolve()) or Path(where).is_relative_to(inside)
    assert backend == "iree"
    assert "run" in run(environment / "bin/spikingbrain", "--help", cwd=tmp_path, env=path)
