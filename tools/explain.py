"""``spikingbrain explain``: what ``torch.compile(model, backend="spikingbrain")`` does with a model."""

from __future__ import annotations

import argparse
import json

import spikingbrain
from spikingbrain.tools import user_models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    user_models.add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def run(args: argparse.Namespace) -> int:
    named = user_models.load(args.model)
    found = spikingbrain.explain(named.model, *named.args, options=user_models.options(args), **named.kwargs)
    print(json.dumps(found.to_dict(), indent=1) if args.json else found)
    return 0
