"""One run of a model for its own sake: on copies of its arguments, with gradients, leaving the model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Run:
    """The tensors that a model returned, and the gradients of its leaves by their names."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def run(
    model: Callable[..., Any], called: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Run:
    """Calls ``called``, which is ``model`` or made from it, with copies of the arguments and the same random numbers.

    Gradients are of a fixed random combination of the outputs. The model's buffers keep their values.
    """
    own_args, own_kwargs = pytree.tree_map_only(torch.Tensor, _copy, (tuple(args), dict(kwargs)))
    with torch.random.fork_rng(devices=[]), kept_buffers(model):
        torch.manual_seed(0)
        result = called(*own_args, **own_kwargs)
        named = {
            f"output {pytree.keystr(path)}".rstrip(): value
            for path, value in pytree.tree_flatten_with_path(result)[0]
            if isinstance(value, torch.Tensor)
        }
        outputs = {name: value.detach().clone() for name, value in named.items()}
        names = {id(t): f"argument {i}" for i, t in enumerate(pytree.tree_leaves((own_args, own_kwargs)))}
        if isinstance(model, nn.Module):
            names.update({id(p): n for n, p in model.named_parameters()})
        torch.manual_seed(1)
        found = differentiate(list(named.values()), torch.randn_like)
    gradients = {
        f"gradient of {names.get(id(leaf), id(leaf))}": value for leaf, value in found if value is not None
    }
    return Run(outputs, gradients)


def differentiate(
    results: Sequence[torch.Tensor], cotangent: Callable[[torch.Tensor], torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Returns the leaves that ``results`` depend on, with their gradients, and leaves their ``.grad`` alone."""
    roots = [t for t in results if t.requires_grad and t.grad_fn]
    if not roots:
        return []
    leaves = list(_leaves(roots))
    return list(
        zip(
            leaves,
            torch.autograd.grad(roots, leaves, [cotangent(t) for t in roots], allow_unused=True),
            strict=True,
        )
    )


def _leaves(roots: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    waiting: list[Any] = [t.grad_fn for t in roots]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)


@contextlib.contextmanager
def kept_buffers(model: Any) -> Iterator[None]:
    """Gives a module's buffers, such as running statistics, back the values they had."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                if not torch.equal(buffer, old):
                    buffer.copy_(old)


def fresh(
    model: Callable[..., Any], compiler: Callable[..., Any], dynamic: bool | None = None
) -> Callable[..., Any]:
    """Returns ``model`` under a Dynamo backend; nothing compiled before is used, nor changed.

    Dynamo looks code up by the backend's identity: the function made here finds nothing, and is found by nobody.
    """

    def unique(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compiler(module, inputs)

    compiler_of_torch: Any = torch.compile  # its overloads leave out ``isolate_recompiles``
    made: Callable[..., Any] = compiler_of_torch(
        model, backend=unique, dynamic=dynamic, isolate_recompiles=True
    )
    return made


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
