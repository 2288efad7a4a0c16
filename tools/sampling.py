"""The command line's options of sampling, for commands that generate text."""

from __future__ import annotations

import argparse
from dataclasses import fields

from spikingbrain.sampling import Sampling


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=_count, default=64, help="new tokens at the most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k most likely tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="among the likeliest that sum up to p")
    parser.add_argument("--min-p", type=float, default=0.0, help="among those p times as likely as the best")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: fewer tokens of prompt and text again"
    )
    parser.add_argument(
        "--presence-penalty", type=float, default=0.0, help="off logits of tokens in the text"
    )
    parser.add_argument("--frequency-penalty", type=float, default=0.0, help="the same for each occurrence")
    parser.add_argument("--seed", type=int, help="of the random numbers; the same seed writes the same text")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("0 or more are generated")
    return value


def sampling(args: argparse.Namespace) -> Sampling:
    """Returns what the options say; raises OptionError for a value outside its range."""
    return Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling)})
