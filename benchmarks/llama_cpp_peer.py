"""llama.cpp beside our own programs: models of random weights in its format, and the process that runs them.

It needs a Python that has `llama-cpp-python`, built for this machine; the benchmarks take it as `--llama PYTHON`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from spikingbrain.models.spikingbrain import SpikingBrainConfig

KINDS = {"Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_0": gguf.GGMLQuantizationType.Q4_0}
CACHE_BYTES = {
    "f16": 2,
    "f16-flash": 2,
    "q8_0-flash": 34 / 32,
}  # of one number in the cache, and the form of attention


class LlamaCpp:
    """llama.cpp in a process of its own, one thread; answers in seconds of that thread."""

    def __init__(self, python: str, files: Mapping[str, Path], capacity: int, cache: str = "f16"):
        told = json.dumps({name: str(file) for name, file in files.items()})
        server = Path(__file__).with_name("llama_cpp_server.py")
        self.process = subprocess.Popen(
            [python, str(server), told, str(capacity), cache],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer("ready")

    def prefill(self, name: str, tokens: list[int]) -> float:
        """Returns the seconds of a prompt, from an empty cache."""
        return self._ask(name, "prefill", tokens)[0]

    def decode(self, name: str, depth: int, times: int = 1) -> list[float]:
        """Returns the seconds of single tokens after ``depth`` others."""
        return self._ask(name, "decode", depth, times)

    def peak(self) -> int:
        """Returns the most memory that the process has held, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, *question: object) -> list[float]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        seconds: list[float] = json.loads(self._answer("["))
        return seconds

    def _answer(self, start: str) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        raise SystemExit(
            "llama.cpp ended; does that Python have llama-cpp-python, and the machine the memory?"
        )


def write_llama(file: Path, config: SpikingBrainConfig, kind: str, spread: float = 0.02) -> None:
    """Writes a Llama of the sizes of ``config``: full attention in all layers, random weights, table and head in Q8_0."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(len(config.layers))
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.feed_forward)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.key_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocabulary)
    writer.add_tokenizer_model("none")
    generator = np.random.default_rng(0)

    def linear(name: str, inputs: int, outputs: int, kind: str = kind) -> None:
        weight = generator.standard_normal((outputs, inputs), np.float32) * spread
        writer.add_tensor(name, gguf.quants.quantize(weight, KINDS[kind]), raw_dtype=KINDS[kind])

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(config.width, np.float32))

    query, key = config.heads * config.head_size, config.key_heads * config.head_size
    linear("token_embd.weight", config.width, config.vocabulary, "Q8_0")
    if not config.tied_head:
        linear("output.weight", config.width, config.vocabulary, "Q8_0")
    norm("output_norm.weight")
    for i in range(len(config.layers)):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        linear(f"blk.{i}.attn_q.weight", config.width, query)
        linear(f"blk.{i}.attn_k.weight", config.width, key)
        linear(f"blk.{i}.attn_v.weight", config.width, key)
        linear(f"blk.{i}.attn_output.weight", query, config.width)
        linear(f"blk.{i}.ffn_gate.weight", config.width, config.feed_forward)
        linear(f"blk.{i}.ffn_up.weight", config.width, config.feed_forward)
        linear(f"blk.{i}.ffn_down.weight", config.feed_forward, config.width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
