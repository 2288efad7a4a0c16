"""Spiking layers in plain PyTorch: the adaptive-threshold neuron, integer weights, and the codings of counts as spikes."""

from spikingbrain.models.spiking.codings import (
    CODINGS,
    Budget,
    Firing,
    budget,
    decode,
    encode,
    firing,
    steps_needed,
)
from spikingbrain.models.spiking.convert import SpikeReport, spike
from spikingbrain.models.spiking.embedding import SpikeEmbedding
from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.experts import SpikeExpertLinear, adaptive_spike_experts
from spikingbrain.models.spiking.finite import check_finite
from spikingbrain.models.spiking.linear import SpikeLinear, SpikeLinearTraining, exact_dtype, spike_linear
from spikingbrain.models.spiking.neurons import integrate_and_fire, lif
from spikingbrain.models.spiking.observe import measure_silence
from spikingbrain.models.spiking.order import Ordered, order_channels
from spikingbrain.models.spiking.quantise import (
    check_group_size,
    dequantise_weight,
    quantise_weight,
    weight_codes,
    weight_scale,
)
from spikingbrain.models.spiking.silent import SILENT_NOTE, telling
from spikingbrain.models.spiking.threshold import spike_counts, spiking, threshold

__all__ = [
    "CODINGS",
    "SILENT_NOTE",
    "Budget",
    "Firing",
    "Ordered",
    "SpikeEmbedding",
    "SpikeExpertLinear",
    "SpikeLinear",
    "SpikeLinearTraining",
    "SpikeReport",
    "SpikingError",
    "adaptive_spike_experts",
    "budget",
    "check_finite",
    "check_group_size",
    "decode",
    "dequantise_weight",
    "encode",
    "exact_dtype",
    "firing",
    "integrate_and_fire",
    "lif",
    "measure_silence",
    "order_channels",
    "quantise_weight",
    "spike",
    "spike_counts",
    "spike_linear",
    "spiking",
    "steps_needed",
    "telling",
    "threshold",
    "weight_codes",
    "weight_scale",
]
