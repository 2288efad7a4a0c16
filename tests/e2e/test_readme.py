"""The README and the guides are tried: code runs, output is as printed, what they name exists."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spikingbrain.artifact import Artifact
from spikingbrain.passes.dialect import Linear
from spikingbrain.passes.raise_linear import RaiseLinear
from spikingbrain.tools import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", (ROOT / page).read_text(), re.M | re.S)


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    environment = {**os.environ, **more}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_five_minute_tour(tmp_path: Path) -> None:
    (tour,) = blocks("README.md", "python")
    (tmp_path / "tour.py").write_text(tour)
    run(sys.executable, "tour.py", cwd=tmp_path)
    assert list(Artifact(tmp_path / "leaky.sbrain").manifest["entries"]) == ["step"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link
    folders = "core|frontend|passes|backend_iree|backend_maca|models|tools|tests|docs|benchmarks"
    for name in re.findall(rf"`((?:{folders})/[\w/.-]*)`", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"`make ([\w-]+)`", text) + re.findall(r"^make ([\w-]+)", text, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_written_as_the_command_line_takes_them(page: Path) -> None:
    joined = page.read_text().replace("\\\n", " ")
    for command in re.findall(r"^ *spikingbrain (.*?)(?: *#.*)?$", joined, re.M):
        words = re.findall(r'"[^"]*"|\S+', command)
        if words[0] not in cli.COMMANDS:
            continue
        help_text = run(sys.executable, "-m", "spikingbrain.tools.cli", words[0], "--help", cwd=ROOT)
        for option in (w for w in words if w.startswith("-")):
            assert re.search(rf"(^|[\s\[,]){option}\b", help_text), f"{words[0]} has no option {option}"


def test_the_pass_guide_shows_the_real_pass(tmp_path: Path) -> None:
    (code,) = blocks("docs/add-a-pass.md", "python")
    assert inspect.getsource(RaiseLinear).strip() == code.strip()
    before, after = blocks("docs/add-a-pass.md", "mlir")
    (tmp_path / "linear.mlir").write_text(before)
    opt = [sys.executable, "-m", "spikingbrain.tools.cli", "opt"]
    output = run(*opt, "-p", "raise-linear", "--clean", tmp_path / "linear.mlir", cwd=tmp_path)
    for line in after.splitlines():
        assert line.strip() in output


def test_the_op_guide_shows_the_real_op() -> None:
    (code,) = blocks("docs/add-an-op.md", "python")
    shown, real = code.split(), (Path(inspect.getfile(Linear)).read_text().split("class Linear(")[1]).split()
    assert shown == ("class Linear(" + " ".join(real)).split()[: len(shown)]


PAPER = """
import sys, torch, spikingbrain
print([s.target.name for s in spikingbrain.targets() if s.target.backend == "paper"])
entry = spikingbrain.Entry((torch.zeros(2),))
made = spikingbrain.export(torch.nn.ReLU(), {"main": entry}, "out", target="paper", options={"title": "mine"})
print(bytes(made.code["program.txt"]).decode().splitlines()[0])
try:
    spikingbrain.load("out")
except spikingbrain.errors.WrongTarget as error:
    print(error.why)
try:
    spikingbrain.export(torch.nn.ReLU(), {"main": entry}, "out", target="paper", options={"colour": "red"})
except spikingbrain.errors.OptionError as error:
    print(error)
"""


def test_the_backend_guide_is_a_backend(tmp_path: Path) -> None:
    """The example is installed as a package of its own would be."""
    (code,) = blocks("docs/add-a-backend.md", "python")
    (point,) = re.findall(r"^paper = \"(.*)\"$", blocks("docs/add-a-backend.md", "toml")[0], re.M)
    (tmp_path / "paper.py").write_text(code)
    facts = tmp_path / "paper-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: paper\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(f"[spikingbrain.backends]\npaper = {point}\n")
    output = run(sys.executable, "-c", PAPER, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert output.splitlines() == [
        "['paper']",
        "// mine",
        "paper does not compute",
        "unknown option 'colour' for the paper backend",
        "  try: known: title",
    ]
    assert json.loads(bytes(Artifact(tmp_path / "out").member("report.json")))["lines"] > 1


def test_the_format_page_names_every_key(tmp_path: Path) -> None:
    (tour,) = blocks("README.md", "python")
    (tmp_path / "tour.py").write_text(tour)
    run(sys.executable, "tour.py", cwd=tmp_path)
    made = Artifact(tmp_path / "leaky.sbrain")
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/artifact.md").read_text(), re.M)
    assert set(listed) == {
        *made.manifest,
        "further_targets",
        "tuned",
    }  # those only where there are several, or a search
