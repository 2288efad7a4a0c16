"""Rewrites on the exported FX graph that the importer or torch-mlir would otherwise get wrong or abort on.

Each rewrite names the upstream defect it avoids and can go when the minimal case in its test imports correctly.
"""

from __future__ import annotations

import operator
from pathlib import Path

import torch
from torch import fx

from spikingbrain.frontend.choices import compare_with_choices, sort_choices
from spikingbrain.frontend.grouped_mm import read_weights_in_place
from spikingbrain.frontend.while_loops import carry_closed_over
from spikingbrain.frontend.without_elements import fold_tensors_without_elements

aten = torch.ops.aten

# torch-mlir aborts the process on a negative dim of these ("LLVM ERROR: out of memory" in convert-torch-to-tmtensor).
_SCATTERS = {
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
}
# Identities on values once the graph is functional; they hide the patterns that the raising passes look for.
_IDENTITIES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
}


_COMPARISONS = {getattr(aten, name).Scalar for name in ("gt", "ge", "lt", "le", "eq", "ne")}
# Operator spellings that only the decomposition table would turn into the ops torch-mlir lowers.
_SYNONYMS = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Scalar: aten.bitwise_xor.Scalar,
    # in bodies of higher-order ops torch makes views copies; values are all the same
    aten.view_copy.default: aten.view.default,
    aten.permute_copy.default: aten.permute.default,
    aten.transpose_copy.int: aten.transpose.int,
    aten.t_copy.default: aten.t.default,
    aten.expand_copy.default: aten.expand.default,
    aten.squeeze_copy.default: aten.squeeze.default,
    aten.squeeze_copy.dim: aten.squeeze.dim,
    aten.squeeze_copy.dims: aten.squeeze.dims,
    aten.unsqueeze_copy.default: aten.unsqueeze.default,
    aten.select_copy.int: aten.select.int,
    aten.slice_copy.Tensor: aten.slice.Tensor,
    aten.alias_copy.default: aten.alias.default,
    aten.detach_copy.default: aten.detach.default,
}


def _rank(node: fx.Node) -> int:
    rank: int = node.meta["val"].dim()
    return rank


def make_scatter_dims_positive(graph: fx.Graph) -> int:
    """Adds the rank to negative scatter dims; returns how many were changed."""
    changed = 0
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _SCATTERS and node.args[1] < 0:
            node.args = (node.args[0], node.args[1] + _rank(node), *node.args[2:])
            changed += 1
    return changed


def drop_identities(graph: fx.Graph) -> int:
    """Removes copies and aliases whose result type equals their input's; returns how many."""
    dropped = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _IDENTITIES or not node.args:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        dropped += 1
    return dropped


def drop_idle_casts(graph: fx.Graph) -> int:
    """Removes ``x.to(dtype)`` where x has that dtype already; returns how many."""
    dropped = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target == aten.to.dtype:
            source = node.args[0]
            if source.meta["val"].dtype == node.meta["val"].dtype:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                dropped += 1
    return dropped


def rename_synonyms(graph: fx.Graph) -> int:
    """Gives each op its one name; returns how many changed."""
    changed = 0
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _SYNONYMS:
            node.target = _SYNONYMS[node.target]
            changed += 1
    return changed


def drop_shape_checks(graph: fx.Graph) -> int:
    """Removes runtime assertions on sizes: the artifact checks its arguments against the declared ranges itself."""
    checks = {
        aten._assert_scalar.default,
        aten.sym_constrain_range_for_size.default,
        aten._assert_tensor_metadata.default,
    }
    doomed = [n for n in graph.nodes if n.op == "call_function" and n.target in checks]
    for node in reversed(doomed):
        graph.erase_node(node)
    return len(doomed)


def spell_out_remainders(graph: fx.Graph) -> int:
    """Writes ``a % b`` of sizes as ``a - a // b * b``; returns how many. torch-mlir imports % as an op that it does not lower."""
    found = [n for n in graph.nodes if n.op == "call_function" and n.target is operator.mod]
    for node in found:
        a, b = node.args
        with graph.inserting_before(node):
            whole = graph.call_function(operator.mul, (graph.call_function(operator.floordiv, (a, b)), b))
            rest = graph.call_function(operator.sub, (a, whole))
        for new in (whole.args[0], whole, rest):
            new.meta = {**node.meta, "val": _size(new)}
        node.replace_all_uses_with(rest)
        graph.erase_node(node)
    return len(found)


def _size(node: fx.Node) -> object:
    """Computes what a node on sizes gives, from its arguments' values."""
    return node.target(*[a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args])


def compare_alike(graph: fx.Graph) -> int:
    """Lets comparisons with a number be with one of the tensor's own kind; returns how many were not.

    torch-mlir folds a comparison of a constant with a number of another kind by reading the wrong bits: other results from
    run to run, or a crash.
    """
    changed = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _COMPARISONS or isinstance(node.args[1], fx.Node):
            continue
        x, number = node.args
        value = x.meta["val"]
        if value.is_floating_point():
            changed += not isinstance(number, float)
            node.args = (x, float(number))
        elif value.dtype == torch.bool or isinstance(number, float):
            common = torch.result_type(value, 0 if isinstance(number, bool) else number)
            with graph.inserting_before(node):
                wide = graph.call_function(aten.to.dtype, (x, common))
            wide.meta = {"val": value.to(common), "stack_trace": node.meta.get("stack_trace")}
            node.args = (wide, float(number) if common.is_floating_point else int(number))
            changed += 1
    return changed


def keep_user_frames(graph: fx.Graph) -> None:
    """Removes this package's own capture frames from the source locations of nodes."""
    own = f'File "{Path(__file__).parent}'
    for node in graph.nodes:
        trace = node.meta.get("stack_trace")
        if not trace or own not in trace:
            continue
        lines = trace.splitlines()
        kept, skipping = [], False
        for line in lines:
            if line.lstrip().startswith("File "):
                skipping = own in line
            if not skipping:
                kept.append(line)
        node.meta["stack_trace"] = "\n".join(kept) + "\n"


def state_epsilon(graph: fx.Graph) -> int:
    """Says the epsilon of rms_norm where it is left to torch; returns how many. torch-mlir takes none then, and 0 / 0 is NaN."""
    changed = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.target != aten.rms_norm.default:
            continue
        x, shape, weight, epsilon = [*node.args, None, None][:4]
        if node.kwargs.get("eps", epsilon) is None:
            wide = torch.promote_types(x.meta["val"].dtype, torch.float32)
            node.args = (x, shape, node.kwargs.get("weight", weight), torch.finfo(wide).eps)
            node.kwargs = {}
            changed += 1
    return changed


def forget_stability(graph: fx.Graph) -> int:
    """Turns sorts that ask to be stable into plain ones, stable on every target; returns how many. torch-mlir lowers no other."""
    found = graph.find_nodes(op="call_function", target=aten.sort.stable)
    for node in found:
        given = dict(zip(("self", "stable", "dim", "descending"), node.args, strict=False)) | node.kwargs
        node.target = aten.sort.default
        node.args, node.kwargs = (given["self"], given.get("dim", -1), given.get("descending", False)), {}
    return len(found)


def normalise(graph: fx.Graph) -> None:
    """Applies every rewrite in place, in the bodies of loops too."""
    for node in graph.nodes:
        body = getattr(graph.owning_module, node.target, None) if node.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            normalise(body.graph)
    carry_closed_over(graph)
    fold_tensors_without_elements(graph)
    read_weights_in_place(graph)
    forget_stability(graph)
    sort_choices(graph)
    compare_with_choices(graph)
    make_scatter_dims_positive(graph)
    state_epsilon(graph)
    drop_identities(graph)
    drop_idle_casts(graph)
    rename_synonyms(graph)
    drop_shape_checks(graph)
    spell_out_remainders(graph)
    compare_alike(graph)
    keep_user_frames(graph)
    graph.eliminate_dead_code()
    graph.lint()


def normalise_region(graph: fx.Graph) -> None:
    """Applies in place what a region of a graph from AOTAutograd needs."""
    make_scatter_dims_positive(graph)
    rename_synonyms(graph)
    spell_out_remainders(graph)
    compare_alike(graph)
    keep_user_frames(graph)
    graph.lint()
