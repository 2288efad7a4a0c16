"""All that a card can prove, by one command within a time: the probe, kept launches of the tests, a whole model, Triton's times.

    python benchmarks/on_a_card.py prepare build/card        # anywhere: writes a folder to carry to the card's machine
    python benchmarks/on_a_card.py run build/card -o results --minutes 9
    python benchmarks/on_a_card.py run build/card -o more --minutes 4 --after results    # what there was no time for

To compare with flash-linear-attention, carry it, too: ``pip download --no-deps fla-core einops -d build/card``.

The folder holds the package as a wheel, what the tests launch on the emulator with its results, and a tiny model. The machine
with the card needs Python 3.10 or later with numpy, and the card's compiler (nvcc; mxcc with ``--device maca``); for the Triton
kernels torch and Triton. `results/results.json` and `results/page.html` are whole at any time, so
that a run which is cut off loses little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What launches kernels on the emulator; tests of the emulator itself are left out by tests/launches.py.
TESTS = ("unit/test_maca*.py", "unit/test_wave*.py", "e2e/test_maca*.py", "e2e/test_targets.py")
MODELS = {"own": "linear=own,matmul=own", "library": ""}  # a tiny model by who computes its products
NEAR = 1e-5  # of the largest logit: the card's exp and its kin differ in the last places
Json = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A part of a run, in a process of its own.

    Attributes:
        share: of the time that is left when it begins, the most that it may take.
        command: arguments for Python, from the folder, the device, the seconds that it has, the file for its results, and
            results of earlier runs.
    """

    name: str
    title: str
    share: float
    command: Callable[[Path, str, float, Path, Json], list[str]]


def _own(step: str) -> Callable[[Path, str, float, Path, Json], list[str]]:
    return lambda folder, device, _, output, __: [
        __file__,
        step,
        str(folder),
        "--device",
        device,
        "-o",
        str(output),
    ]


def _replay(folder: Path, device: str, seconds: float, output: Path, before: Json) -> list[str]:
    files = sorted(map(str, (folder / "launches").glob("*.zip")))
    after = before.get("steps", {}).get("launches", {}).get("done", 0)
    words = ["--device", device, "--seconds", str(seconds - 5), "--after", str(after), "-o", str(output)]
    words += [
        "--patience",
        os.environ.get("SPIKINGBRAIN_PATIENCE", "20"),
    ]  # seconds: launches of tests are short
    return ["-m", "spikingbrain.backend_maca.run.replay", *files, *words]


def _triton(folder: Path, device: str, seconds: float, output: Path, before: Json) -> list[str]:
    script = Path(__file__).with_name("triton_kernels.py")
    done = ";".join(before.get("steps", {}).get("triton", {}).get("problems", {}))
    return [str(script), "--seconds", str(seconds - 20), "-o", str(output), "--without", done]


STEPS = (
    Step("probe", "What the compiler assumes of a card", 0.2, _own("probe")),
    Step("model", "A tiny SpikingBrain-7B: prefill, then tokens as one graph", 0.2, _own("model")),
    Step("launches", "Launches of the tests against the emulator's results", 0.5, _replay),
    Step("triton", "Triton kernels beside eager, inductor and FLA", 1.0, _triton),
)


# On any machine.


def prepare(folder: Path, tests: Sequence[str]) -> None:
    """Writes all that a run needs; takes as long as the tests do."""
    folder.mkdir(parents=True, exist_ok=True)
    _wheel(folder)
    _model(folder)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    chosen = tests or [str(file) for pattern in TESTS for file in sorted((ROOT / "tests").glob(pattern))]
    done = subprocess.run([*command, *chosen, "--keep-launches", str(folder / "launches")], cwd=ROOT)
    if done.returncode:
        print(f"some tests failed (exit code {done.returncode}): what they launched before that is kept")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder} is ready: {size / 2**20:.1f} MiB")


def _wheel(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"  # a build leaves files behind
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "tests", "__pycache__"))
        for old in folder.glob("spikingbrain-*.whl"):
            old.unlink()
        words = ["--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(source)]
        subprocess.run([sys.executable, "-m", "pip", "wheel", *words], check=True)


def _model(folder: Path) -> None:
    """Exports a tiny model, its products by our kernels and by the library; the emulator says what it should answer."""
    import numpy as np
    import torch
    from torch.export import Dim

    import spikingbrain
    from spikingbrain.models.spikingbrain import SpikingBrain, tiny_7b

    torch.manual_seed(0)
    model = SpikingBrain(tiny_7b()).eval()
    tokens, state = torch.zeros(2, 5, dtype=torch.int64), model.initial_state(2)
    batch, length = Dim("B", min=1, max=8), Dim("T", min=1, max=64)
    last, shapes = {"last_only": True}, {"tokens_BT": {0: batch}, "state": {0: batch}}
    entries = {
        "prefill": spikingbrain.Entry((tokens, state), last, {**shapes, "tokens_BT": {0: batch, 1: length}}),
        "decode": spikingbrain.Entry((tokens[:, :1], state), last, shapes),
    }
    text = np.random.default_rng(0).integers(0, tiny_7b().vocabulary, (2, 20))  # rows enough for the library
    for name, providers in MODELS.items():
        path = folder / f"{name}.sbrain"
        options = {"providers": providers} if providers else {}
        spikingbrain.export(model, entries, path, state="state", target="maca", options=options)
        np.savez(path.with_suffix(".npz"), text=text, answers=_answers(path, "maca-emulator", text)[0])


def _answers(path: Path, device: str, text: Any) -> tuple[Any, list[float]]:
    """Returns the logits after a text and after each of its first tokens once more, and the seconds of each call."""
    import numpy as np

    import spikingbrain

    program = spikingbrain.load(path, device=device)
    state, answers, seconds = program.new_state(batch=len(text)), [], []
    for i in range(-1, 8):
        start = time.perf_counter()
        call, piece = (program.decode, text[:, i : i + 1]) if i >= 0 else (program.prefill, text)
        answers.append(np.array(call(piece, state=state)))
        seconds.append(time.perf_counter() - start)
    return np.stack(answers), seconds


# On the machine with the card: steps that need no more than numpy.


def probe(folder: Path, device: str) -> Json:
    """Returns what the probe of a card finds."""
    from spikingbrain.backend_maca.run import probe
    from spikingbrain.backend_maca.run.driver import open_driver
    from spikingbrain.backend_maca.run.images import image_of
    from spikingbrain.errors import SpikingBrainError

    if device == "maca-emulator":
        name, convention, findings = device, None, probe.run(probe.emulated())
    else:
        try:
            driver = open_driver(device)
        except SpikingBrainError as error:
            return {"no_card": " ".join(str(error).split()), "bad": []}
        image = image_of(driver, {"probe.maca": memoryview(probe.SOURCE.read_bytes())}, "probe")
        name, convention = driver.device_name(), probe.convention_of(driver, image)
        with probe.on_device(driver, image, convention) as launch:
            findings = probe.run(launch)
    found = {finding.name: finding.found for finding in findings}
    return {
        "card": name,
        "arguments": convention,
        "found": found,
        "bad": [n for n, text in found.items() if text],
    }


def model(folder: Path, device: str) -> Json:
    """Returns how far a tiny model's logits are from the emulator's, with our products and with the library's."""
    import numpy as np

    from spikingbrain.errors import SpikingBrainError

    models: Json = {}
    for name in MODELS:
        if not (folder / f"{name}.sbrain").exists():
            continue
        kept = np.load(folder / f"{name}.npz")
        try:
            answers, seconds = _answers(folder / f"{name}.sbrain", device, kept["text"])
        except SpikingBrainError as error:
            models[name] = {"bad": str(error)}
            continue
        apart = np.abs(answers - kept["answers"])
        error = float(apart.max() / np.abs(kept["answers"]).max())
        bad = "" if error < NEAR else f"{error:.1e} of the largest logit"  # NaN is bad, too
        models[name] = {"error": error, "equal": not apart.any(), "seconds": seconds, "bad": bad}
    return {"models": models, "bad": [found["bad"] for found in models.values() if found["bad"]]}


def run_step(step: Callable[[Path, str], Json], folder: Path, device: str, output: Path) -> int:
    from spikingbrain.errors import SpikingBrainError

    try:
        found = step(folder, device)
    except SpikingBrainError as error:
        found = {"why": str(error), "bad": [str(error)]}
    _write(output, json.dumps(found).encode())
    return 1 if found["bad"] else 0


# All steps, one after the other.


def run(folder: Path, output: Path, device: str, minutes: float, before: Json) -> Json:
    """Runs the steps within a time; returns what they found, which is in ``output`` at any time."""
    until = time.monotonic() + 60 * minutes
    output.mkdir(parents=True, exist_ok=True)
    results: Json = {"device": device, "minutes": minutes, "steps": {}, "earlier": before}
    with tempfile.TemporaryDirectory() as site:
        for wheel in folder.glob("*.whl"):  # ours, and others without compiled code
            zipfile.ZipFile(wheel).extractall(site)
        path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        for step in STEPS:
            left = until - time.monotonic()
            if left < LEAST:
                results["steps"][step.name] = {"note": "no time was left"}
            else:
                command = step.command(
                    folder, device, left * step.share, output / f"{step.name}.json", before
                )
                _follow(step, command, left * step.share, output, results, environment)
            _keep(results, output)
            if results["steps"][step.name].get("no_card"):
                break
    return results


LEAST = 15.0  # seconds for which no step begins


def _follow(
    step: Step,
    command: list[str],
    seconds: float,
    output: Path,
    results: Json,
    environment: Mapping[str, str],
) -> None:
    """Runs a step's process, and keeps what it has found so far."""
    start, file = time.monotonic(), output / f"{step.name}.json"
    file.unlink(missing_ok=True)
    with (output / f"{step.name}.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | None = None
            while code is None:
                try:
                    code = child.wait(min(3.0, max(0.1, seconds - (time.monotonic() - start))))
                except subprocess.TimeoutExpired:
                    if time.monotonic() - start > seconds:
                        break
                results["steps"][step.name] = _found(file)
                _keep(results, output)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    found = results["steps"][step.name] = _found(file)
    found["seconds_taken"] = time.monotonic() - start
    if code is None:
        found["note"] = f"stopped after {seconds:.0f} s"
    elif not file.exists():
        said = (output / f"{step.name}.log").read_text(errors="replace").strip()
        found["note"] = f"found nothing (exit code {code}): {said[-600:]}"


def _found(file: Path) -> Json:
    try:
        found: Json = json.loads(file.read_text())
        return found
    except (OSError, ValueError):
        return {}


def _keep(results: Json, output: Path) -> None:
    _write(output / "results.json", json.dumps(results, indent=1).encode())
    _write(output / "page.html", page(results).encode())


def _write(file: Path, data: bytes) -> None:
    """Writes a file so that a reader never sees half of it; the package may not be installed here."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, file)


# What was found, for readers.


def told(name: str, found: Json) -> Iterator[str]:
    """Returns lines about one step."""
    if "card" in found:
        yield f"{found['card']}: {len(found['found']) - len(found['bad'])} of {len(found['found'])} probes pass"
        yield from (f"{probe} fails: {found['found'][probe]}" for probe in found["bad"])
    for products, one in found.get("models", {}).items():
        if one["bad"]:
            yield f"{products} products: {one['bad']}"
            continue
        same = "bit for bit" if one["equal"] else f"to {one['error']:.1e} of the largest"
        yield f"{products} products: logits equal the emulator's {same}; {one['seconds'][-1] * 1e3:.2f} ms for the last token"
    if name == "launches" and "counts" in found:
        counts = ", ".join(f"{count} {status}" for status, count in sorted(found["counts"].items()))
        yield f"{found['done']} of {found['all']} launches: {counts or 'none'}"
        yield f"largest difference of what is near: {found['largest_error']:.1e} of the largest entry"
        yield from (
            f"{bad['status']}: {bad['kernel']} of {bad['test']}: {bad['why']}" for bad in found["bad"]
        )
        yield from (f"not run: {test}" for test in found["not_run"])
    if name == "triton" and "problems" in found:
        yield f"{found['device']}, torch {found['torch']}" + (
            "" if found["complete"] else "; not all problems were run"
        )
        yield from (
            f"{problem}: {row['wrong']}" for problem, row in found["problems"].items() if row["wrong"]
        )
    for reason in ("no_card", "why"):
        if reason in found:
            yield str(found[reason])
    if "note" in found:
        yield str(found["note"])


STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color-scheme: light dark; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
.bar { display: inline-block; height: .7rem; background: #2b6cb0; vertical-align: middle; } .eager { background: #8888; }
ul { overflow-wrap: anywhere; }
"""


def page(results: Json) -> str:
    """Returns what was found as a page that needs nothing else."""
    out = [f"<!doctype html><html lang=en><meta charset=utf-8><title>On a card</title><style>{STYLE}</style>"]
    out.append(f"<h1>On a card: {escape(results['device'])}</h1>")
    for step in STEPS:
        found = results["steps"].get(step.name)
        if found is None:
            continue
        lines = "".join(f"<li>{escape(line)}" for line in told(step.name, found))
        out.append(f"<h2>{escape(step.title)}</h2><ul>{lines}</ul>")
        for problem, row in found.get("problems", {}).items():
            out += _chart(problem, row["times"])
    if results["earlier"]:
        out += ["<hr>", page(results["earlier"])]
    return "\n".join(out)


def _chart(problem: str, times: Json) -> Iterator[str]:
    """Returns the rows of one problem, with bars that grow with the time."""
    if not times:
        return
    longest = max((row["microseconds"] for row in times.values() if "microseconds" in row), default=1.0)
    heads = "".join(f"<th>{head}" for head in (problem, "", "us", "speed / eager", "T/s", "GB/s", "of peak"))
    yield f"<table><tr>{heads}"
    for name, row in times.items():
        if "failed" in row:
            yield f"<tr><td>{escape(name)}<td colspan=6>{escape(row['failed'])}"
            continue
        kind, width = "eager" if name == "eager" else "", 12 * row["microseconds"] / longest
        ratio = f"{row['to_eager']:.2f}" if row["to_eager"] else ""
        share = f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else ""
        numbers = (
            f"{row['microseconds']:.0f}",
            ratio,
            f"{row['tera_operations']:.1f}",
            f"{row['gigabytes']:.0f}",
            share,
        )
        bar = f"<td style='text-align:left'><i class='bar {kind}' style='width:{width:.2f}rem'></i>"
        yield f"<tr><td>{escape(name)}{bar}" + "".join(f"<td>{number}" for number in numbers)
    yield "</table>"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["prepare", "run", "probe", "model"], help="what to do")
    parser.add_argument("folder", nargs="?", type=Path, help="what is carried to the card's machine")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("results"), help="a folder for what is found"
    )
    parser.add_argument("--device", default="maca-cuda", choices=["maca-cuda", "maca", "maca-emulator"])
    parser.add_argument("--minutes", type=float, default=9.0, help="of a run, all in all")
    parser.add_argument("--after", type=Path, help="the folder of an earlier run, which goes on here")
    parser.add_argument("--tests", nargs="*", default=[], help="of what tests to keep launches")
    given = parser.parse_args()
    if not given.what or not given.folder:
        print("nothing is run: 'on_a_card.py prepare FOLDER', then 'run FOLDER' on a machine with a card")
        return 0
    if given.what == "prepare":
        prepare(given.folder, given.tests)
        return 0
    if given.what in ("probe", "model"):
        return run_step(
            {"probe": probe, "model": model}[given.what], given.folder, given.device, given.output
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step's process ends, too
    before = _found(given.after / "results.json") if given.after else {}
    results = run(given.folder, given.output, given.device, given.minutes, before)
    if why := results["steps"]["probe"].get("no_card"):
        print(f"nothing was run: this needs a card; {why}")
        return 2
    for step in STEPS:
        print(step.title)
        print(*(f"  {line}" for line in told(step.name, results["steps"].get(step.name, {}))), sep="\n")
    print(f"{given.output / 'page.html'} has all of it")
    return 1 if any(_is_bad(found) for found in results["steps"].values()) else 0


def _is_bad(found: Json) -> bool:
    wrong = [problem["wrong"] for problem in found.get("problems", {}).values()]
    return any([*wrong, found.get("bad"), "why" in found, "note" in found])


if __name__ == "__main__":
    sys.exit(main())
