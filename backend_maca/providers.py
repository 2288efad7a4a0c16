"""Who computes an op on a MetaX GPU: the one table. `tools.gen_provider_docs` writes it into docs/maca.md.

The first provider of an op is its default. In a launch plan the sizes choose between a library and our kernels; inside a PyTorch
process a provider that does not take a call leaves it to the next one, and ``explain`` tells why. The order is what others
measured on such cards or what the vendor recommends; nothing here is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from spikingbrain.errors import OptionError


@dataclass(frozen=True)
class Provider:
    """One who can compute an op.

    Attributes:
        name: as the option ``providers`` names it.
        takes: which calls it takes.
        proof: what was shown of it, on which machine.
        package: a Python package that it needs.
    """

    name: str
    takes: str
    proof: str
    package: str = ""

    @property
    def missing(self) -> str | None:
        """Returns why it cannot be had on this machine, or None."""
        if self.package and not installed(self.package):
            return f"the Python package {self.package!r} is not installed"
        return None


_EMULATOR = "results on the emulator; compiled for gfx90a, sm_80 and sm_90"
_INTERPRETER = "results and gradients by Triton's interpreter; compiled for gfx942, sm_80 and sm_90"
_OWN = Provider("own", "all", _EMULATOR)
_MCBLAS = Provider(
    "mcblas",
    "more than 16 rows and 16 columns; f32, f16, bf16, i8 into i32",
    "arguments against a BLAS written from its manual; mcblas was not called",
)
_TORCH = Provider(
    "torch", "all that is left: the op's body in torch's kernels", "results and gradients on the CPU"
)
_FLA_PROOF = "results and gradients of fla-core 0.6.0 by Triton's interpreter; the vendor's was not called"

PLAN: Mapping[str, tuple[Provider, ...]] = {
    "linear": (_MCBLAS, _OWN),
    "matmul": (_MCBLAS, _OWN),
}

TORCH: Mapping[str, tuple[Provider, ...]] = {
    "attention": (
        Provider(
            "mcflashattn",
            "float16 and bfloat16, heads of up to 256 channels (values the same), no sinks, no positions as data",
            "results and gradients of a stand-in for `flash_attn`; the vendor's was not called",
            "flash_attn",
        ),
        Provider(
            "triton",
            "heads of up to 256 channels (128 in float32); windows, sinks, grouped heads, fewer queries, positions as data",
            _INTERPRETER,
            "triton",
        ),
        _TORCH,
    ),
    "linear_recurrence": (
        Provider(
            "triton",
            "gates as logarithms, of heads or keys, or none; delta rules forward, with up to 256 keys; not float64",
            _INTERPRETER,
            "triton",
        ),
        Provider(
            "fla",
            "one state for each head, reads of the state after the step, gates as logarithms; up to 16 steps of any kind, more"
            " in float16 and bfloat16 without delta rules and gates of values",
            _FLA_PROOF,
            "fla",
        ),
        _TORCH,
    ),
    "linear_scan": (Provider("triton", "not float64", _INTERPRETER, "triton"), _TORCH),
    "spike_linear": (
        Provider(
            "triton",
            "codes of 8 bits, up to 65,536 channels",
            "results by Triton's interpreter, exact; compiled for gfx942, sm_80 and sm_90",
            "triton",
        ),
        _TORCH,
    ),
}

# Provider -> why nobody can choose it.
NOT_OFFERED: Mapping[str, str] = {
    "Triton kernels in a launch plan": "the vendor's Triton must compile them, and was not at hand; no other one compiles for"
    " MetaX, and a plan of kernels that nobody ran proves nothing",
    "mcoplib": "its operators (routing of experts, norms, quantisation) are not what ops of ours compute: routing is torch's"
    " softmax and topk, norms and gates are fused with what is beside them",
    "McFlashInfer": "it attends over pages of a cache; caches here are not cut into pages",
    "mctlass": "defects of its grouped products were reported; experts are our kernels, or a loop of products",
    "FLA's chunks for delta rules": "they ask for keys and strengths; the op is given the vectors of its rank-one part",
}


def choice(text: str, table: Mapping[str, tuple[Provider, ...]]) -> dict[str, tuple[Provider, ...]]:
    """Returns the providers of every op of a ``table`` in their order: those that ``text`` names are the first.

    Args:
        text: such as ``"linear=own,matmul=mcblas"``.

    Raises:
        OptionError: text of another form, an op or provider that is not known, or one that this machine does not have.
    """
    chosen = dict(table)
    named: set[str] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, mark, name = (word.strip() for word in part.partition("="))
        if not mark:
            raise OptionError(
                f"providers: {part!r} is not understood",
                hint=f"OP=PROVIDER, the op one of {', '.join(table)}",
            )
        if op not in table:
            other, place = (
                (PLAN, "an exported plan") if table is TORCH else (TORCH, "torch.compile with target 'maca'")
            )
            raise OptionError(
                f"providers: {part!r} names no op that has a choice here",
                why=f"{op!r} has one in {place}" if op in other else "",
                hint=f"one of {', '.join(table)}",
            )
        if op in named:
            raise OptionError(f"providers: {op!r} is named twice", hint="one provider for an op")
        named.add(op)
        found = next((p for p in table[op] if p.name == name), None)
        if found is None:
            raise OptionError(
                f"providers: {part!r} names no provider of {op}",
                hint=f"one of {', '.join(p.name for p in table[op])}",
            )
        if found.missing:
            raise OptionError(
                f"providers: {part!r} cannot be had here",
                why=found.missing,
                hint=f"the vendor's build of it, or one of {', '.join(p.name for p in table[op] if not p.missing)}",
            )
        chosen[op] = (found, *(p for p in table[op] if p is not found))
    return chosen


def installed(package: str) -> bool:
    """Returns whether a package is there itself, and not only its stand-in (`spikingbrain.compat`)."""
    finders = [f for f in sys.meta_path if not type(f).__module__.startswith("spikingbrain.")]
    return any(f.find_spec(package, None) is not None for f in finders)


def lines() -> Iterator[tuple[str, str]]:
    """Yields (op, who provides it on this machine, in order), for `spikingbrain doctor`."""
    for place, table in (("plan", PLAN), ("torch", TORCH)):
        for op, providers in table.items():
            told = (f"{p.name} ({p.missing})" if p.missing else p.name for p in providers)
            yield f"{op}, {place}", ", ".join(told)
