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

SPREAD = 0.02  # standard deviation of a weight
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


def write_llama(file: Path, config: SpikingBrainConfig, kind: str) -> None:
    """Writes a Llama of the sizes of ``config``: full attention in all layers, random weights, table and head in Q8_0."""
    made = _Random(file, "llama", config, kind)
    made.writer.add_head_count(config.heads)
    made.writer.add_key_length(config.head_size)
    made.writer.add_value_length(config.head_size)
    made.writer.add_rope_dimension_count(config.head_size)
    made.writer.add_rope_freq_base(500_000.0)
    query, key = config.heads * config.head_size, config.key_heads * config.head_size
    made.table(config.tied_head)
    for i in range(len(config.layers)):
        made.linear(f"blk.{i}.attn_q.weight", config.width, query)
        made.linear(f"blk.{i}.attn_k.weight", config.width, key)
        made.linear(f"blk.{i}.attn_v.weight", config.width, key)
        made.linear(f"blk.{i}.attn_output.weight", query, config.width)
        made.feed_forward(i)
    made.close()


def write_qrwkv(
    file: Path, config: SpikingBrainConfig, kind: str, rank: int = 32, decay_rank: int = 64
) -> None:
    """Writes a QRWKV (gated linear attention in all layers) of the sizes of ``config``, random weights, table and head in Q8_0.

    It has a gate of the output and low-rank mixes of neighbouring tokens besides, so somewhat more weights.
    """
    made, width = _Random(file, "rwkv6qwen2", config, kind), config.width
    made.writer.add_head_count(0)
    made.writer.add_wkv_head_size(config.head_size)
    made.writer.add_time_mix_extra_dim(rank)
    made.writer.add_time_decay_extra_dim(decay_rank)
    made.writer.add_rescale_every_n_layers(0)
    made.writer.add_token_shift_count(1)
    key = config.key_heads * config.head_size
    made.table(tied=False)
    for i in range(len(config.layers)):
        mix = f"blk.{i}.time_mix_"
        made.linear(f"{mix}receptance.weight", width, width)
        made.linear(f"{mix}key.weight", width, key)
        made.linear(f"{mix}value.weight", width, key)
        made.linear(f"{mix}gate.weight", width, width)
        made.linear(f"{mix}output.weight", width, width)
        made.small(f"{mix}w1.weight", 5 * rank, width)
        made.small(f"{mix}w2.weight", 5, width, rank)
        made.small(f"{mix}lerp_x.weight", 1, 1, width)
        made.small(f"{mix}lerp_fused.weight", 5, 1, 1, width)
        made.small(f"{mix}decay.weight", width)
        made.small(f"{mix}decay_w1.weight", decay_rank, width)
        made.small(f"{mix}decay_w2.weight", width, decay_rank)
        made.feed_forward(i)
    made.close()


class _Random:
    """A file of random weights, with what all architectures have."""

    def __init__(self, file: Path, architecture: str, config: SpikingBrainConfig, kind: str):
        self.config, self.kind, self.generator = config, kind, np.random.default_rng(0)
        self.writer = writer = gguf.GGUFWriter(file, architecture)
        writer.add_block_count(len(config.layers))
        writer.add_context_length(1 << 20)
        writer.add_embedding_length(config.width)
        writer.add_feed_forward_length(config.feed_forward)
        writer.add_head_count_kv(config.key_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(config.vocabulary)
        writer.add_tokenizer_model("none")

    def linear(self, name: str, inputs: int, outputs: int, kind: str = "") -> None:
        made = KINDS[kind or self.kind]
        weight = self.generator.standard_normal((outputs, inputs), np.float32) * SPREAD
        self.writer.add_tensor(name, gguf.quants.quantize(weight, made), raw_dtype=made)

    def small(self, name: str, *shape: int) -> None:
        self.writer.add_tensor(name, self.generator.standard_normal(shape, np.float32) * SPREAD)

    def norm(self, name: str) -> None:
        self.writer.add_tensor(name, np.ones(self.config.width, np.float32))

    def table(self, tied: bool) -> None:
        self.linear("token_embd.weight", self.config.width, self.config.vocabulary, "Q8_0")
        if not tied:
            self.linear("output.weight", self.config.width, self.config.vocabulary, "Q8_0")
        self.norm("output_norm.weight")

    def feed_forward(self, layer: int) -> None:
        self.norm(f"blk.{layer}.attn_norm.weight")
        self.norm(f"blk.{layer}.ffn_norm.weight")
        self.linear(f"blk.{layer}.ffn_gate.weight", self.config.width, self.config.feed_forward)
        self.linear(f"blk.{layer}.ffn_up.weight", self.config.width, self.config.feed_forward)
        self.linear(f"blk.{layer}.ffn_down.weight", self.config.feed_forward, self.config.width)

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
