"""The kernels of the fla package that is installed, by Triton's interpreter; prints errors of our calls of them, as JSON."""

import importlib
import json
import sys
from typing import Any

import torch
from test_vendor_kernels import CASES, recurrence
from triton.runtime import autotuner

from spikingbrain.backend_maca.triton import vendor_fla
from spikingbrain.frontend.ops.linear_recurrence import compute


class Integer(int):
    """A number of a loop: the interpreter hands out plain ones, and kernels cast theirs."""

    def to(self, _: Any) -> "Integer":
        return self


def counted(*bounds: Any) -> Any:
    return map(
        Integer, range(*(int(b.handle.data.item()) if hasattr(b, "handle") else int(b) for b in bounds))
    )


def main() -> None:
    tune = autotuner.Autotuner.__init__

    def first_only(self: Any, fn: Any, names: Any, configs: Any, *given: Any, **named: Any) -> None:
        tune(self, fn, names, configs[:1], *given, **named)  # timing needs a GPU

    autotuner.Autotuner.__init__ = first_only
    for name in ("generalized_delta_rule", "gla", "simple_gla"):
        importlib.import_module(f"fla.ops.{name}")

    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            module.range = counted
    found = {}
    for case, how in CASES.items():
        if how.get("dtype") is torch.bfloat16:  # the interpreter multiplies its bits
            how = how | {"dtype": torch.float16}
        given = recurrence(**how)
        exact = tuple(x.double() if isinstance(x, torch.Tensor) else x for x in given)
        leaves = [x.requires_grad_() for x in exact if isinstance(x, torch.Tensor)]
        wanted = list(compute(*exact))
        results = list(vendor_fla.forward(*given))
        if given[4] is None:
            of_results = [torch.randn_like(x) for x in results]
            gradients = vendor_fla.backward(*of_results, *given)
            results += [g for g, x in zip(gradients, given, strict=False) if x is not None]
            given_back = [g.double() for g in of_results]
            wanted += [g.nan_to_num(0.0) for g in torch.autograd.grad(wanted, leaves, given_back)]
        found[case] = [
            float((a - b.detach()).abs().max() / b.abs().max().clamp(min=1e-30))
            for a, b in zip(results, wanted, strict=True)
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
