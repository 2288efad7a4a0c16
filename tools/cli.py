"""The command ``spikingbrain``: a thin table of subcommands over library calls."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

from spikingbrain.errors import SpikingBrainError, needs_compiler

# subcommand -> (module with add_arguments and run, help)
COMMANDS = {
    "run": ("spikingbrain.tools.run", "generate text with a model or an artifact"),
    "chat": ("spikingbrain.tools.chat", "talk with a model that was trained to"),
    "compile": ("spikingbrain.tools.compile", "compile a model into an artifact"),
    "tune": ("spikingbrain.tools.tune", "compile a model with settings searched on this machine"),
    "standalone": ("spikingbrain.tools.standalone", "write an artifact as a program in C++"),
    "convert": ("spikingbrain.tools.convert", "make a SpikingBrain of a Llama or Qwen2"),
    "forecast": ("spikingbrain.tools.forecast", "the memory that an artifact will need"),
    "report": ("spikingbrain.tools.report", "what is in an artifact, and how it was compiled"),
    "explain": ("spikingbrain.tools.explain", "what torch.compile with this compiler does with a model"),
    "compare": ("spikingbrain.tools.compare", "find the first op that differs between torch and compiled"),
    "spikes": ("spikingbrain.tools.spikes", "how a model fires on a text: statistics, events, test vectors"),
    "targets": ("spikingbrain.tools.targets", "what can be compiled for, and what runs here"),
    "doctor": ("spikingbrain.tools.doctor", "what this machine has, and what to do about the rest"),
    "opt": ("spikingbrain.tools.opt", "run passes on textual IR"),
    "cache": ("spikingbrain.tools.cache", "show or clear the compile cache"),
}

COMPILER_PACKAGES = ("torch", "torch_mlir", "ml_dtypes", "gguf", "networkx", "iree-base-compiler")


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code: 0 fine, 1 refused with a message, 2 wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="spikingbrain", description="Compiler for brain-inspired language models."
    )
    parser.add_argument(
        "--log", default="warning", choices=["debug", "info", "warning"], help="what to log to standard error"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text)
        if argv and name in argv:  # only the chosen command's module is imported
            importlib.import_module(module).add_arguments(sub)
    args = parser.parse_args(argv)
    logging.basicConfig(level=args.log.upper(), format="%(levelname)s %(name)s: %(message)s")
    try:
        code: int = importlib.import_module(COMMANDS[args.command][0]).run(args)
        return code
    except SpikingBrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in COMPILER_PACKAGES:
            raise
        print(f"error: {needs_compiler(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
