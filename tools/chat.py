"""``spikingbrain chat``: a conversation with a model, line by line."""

from __future__ import annotations

import argparse
import sys

import spikingbrain
from spikingbrain.chat import Chat
from spikingbrain.errors import CallError
from spikingbrain.tools import named_models
from spikingbrain.tools.run import obtain
from spikingbrain.tools.sampling import add_sampling_arguments, sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="an artifact file, or a model known by name such as smollm2")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_sampling_arguments(parser)
    parser.set_defaults(tokens=512)
    named_models.add_model_arguments(parser)
    named_models.add_device_argument(parser)
    parser.add_argument("--no-memory-check", action="store_true", help="try even where memory is too small")
    parser.add_argument("--quiet", action="store_true", help="print replies only")


def run(args: argparse.Namespace) -> int:
    chosen = sampling(args)
    path, _ = obtain(args)
    chat = Chat(
        spikingbrain.load(path, device=args.device, check_memory=not args.no_memory_check),
        args.system,
        chosen,
    )
    if not args.quiet:
        print("A line is a turn; /reset begins anew, the end of input ends.", file=sys.stderr)
    while (line := _read(args.quiet)) is not None:
        if line == "/reset":
            chat.reset()
        elif line:
            _reply(chat, line, args.tokens)
    return 0


def _read(quiet: bool) -> str | None:
    """Returns the next line, None at the end."""
    if not quiet and sys.stdin.isatty():
        print("> ", end="", flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _reply(chat: Chat, line: str, tokens: int) -> None:
    try:
        for piece in chat.say(line, tokens):
            print(piece, end="", flush=True)
        print()
    except CallError as error:  # such as a full cache: what to do is the user's to say
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print()
