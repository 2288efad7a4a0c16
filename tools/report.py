"""``spikingbrain report``: what is in an artifact, and what the compiler did and refused on the way to it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikingbrain.artifact import REPORT, WEIGHTS, Artifact
from spikingbrain.errors import MissingDependency, TargetError
from spikingbrain.program import EntrySpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, help="an artifact file")
    parser.add_argument("--json", action="store_true", help="the whole report, for programs")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="registers and shared memory of MetaX kernels, by public compilers",
    )


def run(args: argparse.Namespace) -> int:
    artifact = Artifact(args.artifact)
    report = json.loads(bytes(artifact.member(REPORT)))
    if args.kernels:
        return _print_kernels(artifact, report)
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    manifest = artifact.manifest
    producer = ", ".join(f"{name} {version}" for name, version in manifest["producer"].items())
    targets = ", ".join(f"{target['name']} ({target['arch']})" for target in artifact.targets)
    print(f"{args.artifact}: for {targets}, by {producer}")
    for name, entry in manifest["entries"].items():
        spec = EntrySpec.from_manifest(name, entry)
        state = ", state" if spec.uses_state else ""
        print(f"  {name}({', '.join(map(str, spec.inputs))}{state}) -> {', '.join(map(str, spec.outputs))}")
    fields = len(manifest["state"])
    weights = manifest["members"][WEIGHTS]["size"] / 1e6
    print(f"  {len(artifact.weights())} stored tensors, {weights:.1f} MB; {fields} tensors of state")

    for target, options in _options(manifest):
        if settings := options.get("tuning"):
            told = ", ".join(f"{name} {value}" for name, value in settings.items())
            print(f"  settings of kernels for {target}: {told}")
    _print_search(manifest.get("tuned"))

    print("\nwhat the passes did")
    records = report["records"]
    groups = Counter((r["pass_name"], r["status"], r["op"], r["reason"]) for r in records)
    for (pass_name, status, op, reason), count in groups.items():
        first = next(
            r["where"]
            for r in records
            if (r["pass_name"], r["status"], r["op"], r["reason"]) == (pass_name, status, op, reason)
        )
        why = f" ({reason})" if reason else ""
        at = f"  first at {first}" if first else ""
        print(f"  {count:4} x {pass_name}: {status} {op}{why}{at}")

    if steps := report.get("steps"):
        print("\nsteps of a call, by who provides them")
        for name, counts in steps.items():
            print(f"  {name}: " + ", ".join(f"{count} {provider}" for provider, count in counts.items()))

    print("\nseconds")
    for name, seconds in report["timings"]:
        print(f"  {seconds:8.2f}  {name}")
    return 0


def _options(manifest: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the options of each target."""
    further = [(record["name"], record["options"]) for record in manifest.get("further_targets", [])]
    return [(manifest["target"]["name"], manifest["options"]), *further]


def _print_search(tuned: Mapping[str, Any] | None) -> None:
    if not tuned:
        return
    where = f" on {tuned['cpu']}" if "cpu" in tuned else ""
    print(f"\nsettings that were searched, by {tuned['judged_by']}{where}")
    for trial in tuned["trials"]:
        ratios = (f"{entry} {ratio:.3f}x" for entry, ratio in trial["faster"].items())
        result = ", ".join(ratios) or "the same code"
        print(f"  {trial['setting']} {trial['value']}: {result}{', kept' if trial['kept'] else ''}")


def _print_kernels(artifact: Artifact, report: dict[str, Any]) -> int:
    from spikingbrain.backend_maca import toolchains

    codes = [code for target in artifact.targets if "kernels.maca" in (code := artifact.code_for(target))]
    if not codes:
        raise TargetError(f"{artifact.path} has no kernels for MetaX GPUs", hint="compile for target 'maca'")
    source = bytes(codes[0]["kernels.maca"]).decode()
    found = report.get("resources") or toolchains.resources(source)
    if not found:
        raise MissingDependency("no device compiler is installed", hint="install clang (16 or later) or nvcc")
    print("\n".join(toolchains.table(found)))
    return 0
