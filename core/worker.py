"""The compile process: passes and backend stages over one module, in a process of its own.

Native code that aborts takes this process along and not the user's. The job and its results are files in a folder::

    module.mlir, job.json  ->  code/*, report.json  or  error.json

Progress goes to standard output, one line per step.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any


def main(folder: str) -> int:
    workdir = Path(folder)
    job = json.loads((workdir / "job.json").read_text())
    try:
        code, report = compile_module((workdir / "module.mlir").read_text(), job, workdir)
    except Exception as error:
        (workdir / "error.json").write_text(json.dumps(_describe(error)))
        return 1
    (workdir / "code").mkdir(exist_ok=True)
    for name, data in code.items():
        (workdir / "code" / name).write_bytes(data)
    (workdir / "report.json").write_text(json.dumps(report))
    return 0


def compile_module(text: str, job: dict[str, Any], workdir: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Returns the code members and the compile report."""
    from torch_mlir import ir

    from spikingbrain.backend import StageContext, resolve_target
    from spikingbrain.passes import parameters, pipeline
    from spikingbrain.passes.base import Pass, PassContext
    from spikingbrain.passes.context import new_context

    backend, status = resolve_target(job["target"])
    context = PassContext(status.target)
    dump = Path(job["dump"]) if job.get("dump") else None
    timings: list[tuple[str, float]] = []

    def observe(pass_: Pass, module: ir.Module, seconds: float) -> None:
        timings.append((pass_.name, seconds))
        if dump:
            (dump / f"{len(timings):02}-{pass_.name}.mlir").write_text(str(module))

    with new_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        print("passes", flush=True)
        pipeline.run(
            pipeline.default_pipeline(),
            module,
            context,
            verify_each=job.get("verify_each", False),
            observe=observe,
        )
        start = time.perf_counter()
        pipeline.clean(module)
        pipeline.check_lowered(module)
        timings.append(("clean", time.perf_counter() - start))
        stored = {s.key: dataclasses.asdict(s) for s in parameters.all_stored(module)}
        value: Any = module.operation.get_asm(enable_debug_info=True)
    options = backend.options(**job["options"])
    stage_context = StageContext(status.target, options, workdir)
    for name, stage in backend.stages(status.target).items():
        print(name, flush=True)
        start = time.perf_counter()
        value = stage(value, stage_context)
        timings.append((name, time.perf_counter() - start))
        if dump and isinstance(value, str):
            (dump / f"{len(timings):02}-{name}.mlir").write_text(value)
    report = {
        "timings": timings,
        "records": [r.to_dict() for r in context.records],
        "weights": stored,
        **stage_context.report,
    }
    return value, report


def _describe(error: BaseException) -> dict[str, Any]:
    from spikingbrain.errors import SourceLine, SpikingBrainError

    if not isinstance(error, SpikingBrainError):
        import traceback

        return {"type": "PassFailed", "what": f"the compiler failed: {error}", "why": traceback.format_exc()}
    where: Any = error.where
    if isinstance(where, SourceLine):
        where = {"file": where.file, "line": where.line}
    return {
        "type": type(error).__name__,
        "what": error.what,
        "where": where,
        "why": error.why,
        "hint": error.hint,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
