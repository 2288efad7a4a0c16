"""``spikingbrain convert``: a Llama or Qwen2 becomes a SpikingBrain checkpoint."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spikingbrain.errors import OptionError, needs_compiler
from spikingbrain.tools.progress import Progress

if TYPE_CHECKING:
    from spikingbrain.models.llama import Llama
    from spikingbrain.models.spikingbrain import SpikingBrain, SpikingBrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder of a Llama or Qwen2 checkpoint, a .gguf file, or smollm2")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--to",
        choices=["7b-style", "76b-style"],
        required=True,
        help="attention by turns, or both kinds side by side with experts",
    )
    parser.add_argument("--window", type=int, default=4096, help="tokens that window attention sees")
    parser.add_argument("--sinks", type=int, help="learned tokens in front of a text (default: 0 or 128)")
    parser.add_argument("--sink-token", type=int, help="token whose embedding the sinks begin as")
    layers = "layers, counted from 0, such as 0,2,4 or none"
    parser.add_argument("--linear-layers", type=_layers, help=f"7b-style, linear attention: {layers}")
    parser.add_argument(
        "--full-layers", type=_layers, help=f"76b-style, full attention beside linear: {layers}"
    )
    parser.add_argument("--dense-layers", type=_layers, help=f"76b-style, without experts: {layers}")
    parser.add_argument("--experts", type=int, default=16, help="76b-style: routed experts of a layer")
    parser.add_argument(
        "--exact-experts",
        action="store_true",
        help="scale experts so that they begin as the dense network exactly",
    )
    parser.add_argument(
        "--separate-projections",
        action="store_true",
        help="76b-style: the linear branch has projections of its own",
    )
    parser.add_argument(
        "--fit", type=Path, metavar="TEXT", help="train each linear layer alone on this text file"
    )
    parser.add_argument("--fit-steps", type=int, default=150)
    parser.add_argument(
        "--spike",
        action="store_true",
        help="write a W8ASpike checkpoint: int8 weights for spike counts (7b-style)",
    )


def run(args: argparse.Namespace) -> int:
    try:
        from spikingbrain.models.checkpoint import check_new
        from spikingbrain.models.errors import ConfigError, WeightsError
        from spikingbrain.models.spiking import SpikingError
        from spikingbrain.models.spikingbrain.convert import convert
    except ModuleNotFoundError as error:
        raise needs_compiler(error) from error

    progress = Progress()
    try:
        check_new(args.output)
        progress(f"read {args.source}")
        source, files = _source(args.source)
        tokenizer = files.get("tokenizer.json")
        model, report = convert(source, _style(args, source), args.sink_token, args.exact_experts)
        print(report)
        if args.fit is not None:
            _fit(model, source, tokenizer, args, progress)
        progress(f"write {args.output}")
        _write(model, args, files)
    except (ConfigError, WeightsError, SpikingError) as error:
        raise OptionError(str(error)) from error
    print(f"{args.output}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
    return 0


def _layers(text: str) -> list[int]:
    return [] if text == "none" else [int(part) for part in text.split(",")]


def _source(text: str) -> tuple[Llama, dict[str, str]]:
    """Returns the model, and what belongs beside its weights: name of a file -> its text."""
    from spikingbrain.models.llama import checkpoint, gguf, smollm2, tokenizer_json
    from spikingbrain.models.spikingbrain.tokenizer import tokenizer_json as tokenizer_of_folder

    path = smollm2.locate() if text == "smollm2" else Path(text)
    if path.is_dir():
        tokenizer = tokenizer_of_folder(path)
        return checkpoint.load(path), {} if tokenizer is None else {"tokenizer.json": tokenizer}
    if not path.is_file():
        raise OptionError(f"no file or folder {text}", hint="a checkpoint's folder, a .gguf file, or smollm2")
    _, model = gguf.load(path)
    metadata = gguf.GgufFile(path).metadata
    last = {"eos_token_id": metadata[key]} if (key := "tokenizer.ggml.eos_token_id") in metadata else {}
    return model, {"tokenizer.json": tokenizer_json(path), "generation_config.json": json.dumps(last)}


def _style(args: argparse.Namespace, source: Llama) -> SpikingBrainConfig:
    from spikingbrain.models.spikingbrain.convert import style_7b, style_76b

    if args.to == "7b-style":
        return style_7b(source.config, args.window, args.linear_layers, args.sinks or 0)
    return style_76b(
        source.config,
        args.window,
        args.full_layers,
        args.dense_layers,
        128 if args.sinks is None else args.sinks,
        args.experts,
        args.separate_projections,
    )


def _fit(
    model: SpikingBrain, source: Llama, tokenizer: str | None, args: argparse.Namespace, progress: Progress
) -> None:
    import torch

    from spikingbrain.models.spikingbrain.fit import attention_pairs, fit_layer

    if tokenizer is None:
        raise OptionError("--fit needs the source's tokenizer", hint="a folder with tokenizer.json in it")
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(tokenizer).encode(args.fit.read_text(encoding="utf-8")).ids
    length, rows = 512, 2
    batches = list(torch.tensor(ids[: len(ids) // (length * rows) * length * rows]).view(-1, rows, length))
    if not batches:
        raise OptionError(
            f"{args.fit} has {len(ids)} tokens", hint=f"at least {length * rows}, better some ten thousand"
        )
    linear = [i for i, layer in enumerate(model.config.layers) if layer.linear and layer.softmax is None]
    for number in linear:

        def tell(step: int, loss: float, number: int = number) -> None:
            progress(f"fit layer {number}: {100 * (step + 1) // args.fit_steps} %")

        pairs = list(attention_pairs(source, number, batches[: args.fit_steps]))
        torch.compiler.reset()
        compiled = partial(torch.compile, backend="spikingbrain")
        losses = fit_layer(model, number, pairs, args.fit_steps, wrap=compiled, progress=tell)
        print(f"layer {number}: relative error {losses[0]:.3f} -> {sum(losses[-5:]) / len(losses[-5:]):.3f}")


def _write(model: SpikingBrain, args: argparse.Namespace, files: dict[str, str]) -> None:
    from spikingbrain.models.spiking import spike
    from spikingbrain.models.spikingbrain.checkpoint import save
    from spikingbrain.models.spikingbrain.spiking_checkpoint import save_spiking

    companions = args.source if Path(args.source).is_dir() else None
    if args.spike:
        print(spike(model))
        save_spiking(model, args.output, companions, files)
    else:
        save(model, args.output, companions, files)
