"""``spikingbrain opt``: runs passes on textual IR and prints the result; the microscope of the compiler.

spikingbrain opt -p raise-attention,raise-linear model.mlir
spikingbrain opt -p "pack-weights,lower-linear" --target x86-64-v3 --time-passes model.mlir
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from spikingbrain.errors import OptionError, SpikingBrainError

_EXPECTED = re.compile(r"//\s*expected-(error|remark)(?:@([+-]\d+))?\s*\{\{(.*?)\}\}")
_SPLIT = "// -----"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def flag(name: str, text: str) -> None:
        parser.add_argument(name, action="store_true", help=text)

    parser.add_argument("file", nargs="?", default="-", help="IR to read, - for standard input")
    parser.add_argument(
        "-p", "--passes", default="", help="passes separated by commas, or 'all' for the pipeline"
    )
    parser.add_argument("--target", default="cpu", help="target whose description the passes get")
    flag("--split-input-file", f"treat parts between '{_SPLIT}' lines as files of their own")
    flag("--verify-diagnostics", "expect what // expected-error {{text}} and // expected-remark {{text}} say")
    flag("--time-passes", "print the seconds each pass took to standard error")
    parser.add_argument("--dump-each", metavar="DIR", type=Path, help="write the IR after each pass to DIR")
    flag("--no-verify", "do not verify the IR before and after passes")
    flag("--clean", "canonicalize and drop dead code at the end")
    flag("--remarks", "print what passes did and refused to standard error")
    flag("--list", "list the passes in pipeline order and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the tool; returns the exit code."""
    from spikingbrain.passes import pipeline

    if args.list:
        for phase, classes in pipeline.PHASES.items():
            for cls in classes:
                print(f"{phase:10}{cls.name:22}{(cls.__doc__ or '').splitlines()[0]}")
        return 0
    try:
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text()
    except OSError as error:
        raise OptionError(f"cannot read {args.file}: {error.strerror}") from None
    parts = re.split(rf"^{_SPLIT}$", text, flags=re.M) if args.split_input_file else [text]
    outcomes = [_run_part(part, args) for part in parts]
    if not args.verify_diagnostics:
        print(f"{_SPLIT}\n".join(o for o in outcomes if o is not None), end="")
    return 0 if all(o is not None for o in outcomes) else 1


def _run_part(text: str, args: argparse.Namespace) -> str | None:
    """Returns the resulting IR, or None after printing an error (or a diagnostic that was not as expected)."""
    from torch_mlir import ir

    from spikingbrain.backend import resolve_target
    from spikingbrain.passes import dialect, pipeline
    from spikingbrain.passes.base import Pass, PassContext, parse_pass, source_line
    from spikingbrain.passes.context import new_context

    if args.passes == "all":
        passes = pipeline.default_pipeline()
    else:
        names = [p for p in re.split(r",(?![^{]*\})", args.passes) if p]
        passes = [parse_pass(name.strip(), pipeline.PASSES) for name in names]
    context = PassContext(resolve_target(args.target)[1].target)
    found: list[tuple[str, int, str]] = []  # kind, line, text
    count = [0]

    def observe(pass_: Pass, module: ir.Module, seconds: float) -> None:
        count[0] += 1
        if args.time_passes:
            print(f"{seconds:9.4f} s  {pass_.name}", file=sys.stderr)
        if args.dump_each:
            args.dump_each.mkdir(parents=True, exist_ok=True)
            (args.dump_each / f"{count[0]:02}-{pass_.name}.mlir").write_text(str(module))

    result = ""
    with new_context(), ir.Location.unknown():
        try:
            module = ir.Module.parse(text)
            if not args.no_verify:
                dialect.verify(module)
            pipeline.run(passes, module, context, verify_each=not args.no_verify, observe=observe)
            if args.clean:
                pipeline.clean(module)
            result = str(module)
        except dialect.WrongOp as error:
            found.append(("error", error.line, str(error)))
        except ir.MLIRError as error:
            for diagnostic in error.error_diagnostics:
                place = source_line(diagnostic.location)
                found.append(("error", place.line if place else 0, diagnostic.message))
            if not error.error_diagnostics:
                found.append(("error", 0, str(error)))
        except SpikingBrainError as error:
            line = error.where.line if error.where is not None and not isinstance(error.where, str) else 0
            found.append(("error", line, " ".join(str(error).split())))
    for record in context.records:
        line = int(record.where.rpartition(":")[2] or 0)
        if args.remarks:
            print(
                f"{record.where}: {record.pass_name}: {record.status} {record.op} {record.reason}".rstrip(),
                file=sys.stderr,
            )
        if record.status == "refused":
            found.append(("remark", line, f"{record.pass_name}: {record.reason}"))
    if args.verify_diagnostics:
        return result if _as_expected(text, found) else None
    errors = [f for f in found if f[0] == "error"]
    for _, line, message in errors:
        print(f"error: line {line}: {message}", file=sys.stderr)
    return None if errors else result


def _as_expected(text: str, found: list[tuple[str, int, str]]) -> bool:
    """Compares diagnostics with the expected-error and expected-remark comments; prints the differences.

    Remarks that no comment asks for are fine, errors are not.
    """
    wanted: list[tuple[str, int, str]] = []
    for number, text_line in enumerate(text.splitlines(), 1):
        for kind, offset, message in _EXPECTED.findall(text_line):
            wanted.append((kind, number + int(offset or 0), message))
    fine = True
    for kind, line, message in wanted:
        match = next((f for f in found if f[0] == kind and message in f[2] and f[1] in (line, 0)), None)
        if match is None:
            print(f"line {line}: expected {kind} {message!r} did not appear; found {found}", file=sys.stderr)
            fine = False
        else:
            found.remove(match)
    for kind, line, message in found:
        if kind == "error":
            print(f"line {line}: unexpected error {message!r}", file=sys.stderr)
            fine = False
    return fine


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="spikingbrain opt", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
