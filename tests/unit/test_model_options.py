"""What the command line lets a user choose about a model."""

from __future__ import annotations

import argparse

import pytest

from spikingbrain.errors import OptionError
from spikingbrain.tools.named_models import ModelOptions, SpikeOptions, add_model_arguments, model_options


def parsed(*arguments: str) -> ModelOptions:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return model_options(parser.parse_args(arguments))


def test_nothing_asked_for_is_the_default() -> None:
    assert parsed() == ModelOptions()


def test_each_option_arrives() -> None:
    found = parsed("--window", "8", "--sinks", "1", "--dtype", "bfloat16", "--cache", "int8", "--batch", "3")
    assert found == ModelOptions(8, 1, dtype="bfloat16", cache="int8", batch=3)
    assert parsed("--spike", "k=2,bits=4").spike == SpikeOptions(2.0, bits=4)


def test_spikes_are_float32() -> None:
    with pytest.raises(OptionError, match=r"(?s)--dtype float16 with --spike.*integers"):
        parsed("--dtype", "float16", "--spike", "k=3")
