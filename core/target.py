"""What a machine looks like to the passes that schedule for it."""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain.tuning import USUAL, Tuning


@dataclass(frozen=True)
class Target:
    """One machine to compile for.

    Passes read the numbers and never ask which backend is behind them.

    Attributes:
        name: what users write, e.g. ``"cpu"``, ``"x86-64-v3"``, ``"vulkan"``, ``"maca"``.
        kind: ``"cpu"`` or ``"gpu"``.
        backend: name of the backend (entry point in ``spikingbrain.backends``) that serves it.
        arch: instruction set, e.g. ``"x86-64"``, ``"aarch64"``, ``"spirv"``.
        cpu: processor name handed to the code generator, ``"host"`` resolved to a real one.
        features: instruction set extensions the generated code may use, in LLVM's names, e.g. ``"avx512f"``; ``"avx512vnni"``,
            ``"avxvnni"`` and ``"dotprod"`` multiply bytes.
        vector_bits: width of one vector register; 0 when kernels in the vector dialect cannot be emitted
            for the target and the portable linalg form is used.
        vector_registers: how many of them.
        wave_width: lanes that run in lockstep on a GPU; 1 on a CPU.
        shared_bytes: memory shared by a thread block, on a GPU.
        wave_kernels: whether the target takes hand-scheduled kernels in the ``gpu`` dialect
            (``passes/wave_kernels``).
        tuning: settings of kernels for it.
        host_memory: whether a GPU's kernels work on the memory of the process, as an emulator's do.
        accepts: further targets whose code this machine runs.
    """

    name: str
    kind: str
    backend: str
    arch: str
    cpu: str = ""
    features: frozenset[str] = frozenset()
    vector_bits: int = 0
    vector_registers: int = 0
    wave_width: int = 1
    shared_bytes: int = 0
    wave_kernels: bool = False
    tuning: Tuning = USUAL
    host_memory: bool = False
    accepts: frozenset[str] = frozenset()

    @property
    def vector_lanes_f32(self) -> int:
        """Returns how many f32 values one vector register holds (0 without vector kernels)."""
        return self.vector_bits // 32
