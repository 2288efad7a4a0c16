"""Linear recurrences as plain functions of tensors, block by block: fast enough for training at thousands of steps.

    from spikingbrain.models.recurrences import gla
    o, state = gla(q, k, v, g, output_final_state=True)

All are plain PyTorch and work anywhere; compiled, `linear_recurrence`, `linear_scan` and `selective_scan`, which all others
are written in, become one kernel each. Against the plain loops of `spikingbrain.models.reference` in float64, float32
results are off by about 1e-6 of the largest element; in bfloat16 and float16 arithmetic and states are float32.
"""

from spikingbrain.models.recurrences.delta import delta_rule, gated_delta_rule, kda
from spikingbrain.models.recurrences.elementwise import hgrn, mamba, rg_lru
from spikingbrain.models.recurrences.gated import gla, lightning_attention, retention, rwkv6, simple_gla, ssd
from spikingbrain.models.recurrences.slots import abc, gsa
from spikingbrain.models.recurrences.spiking import lif
from spikingbrain.models.recurrences.ungated import linear_attention, normalised_linear_attention
from spikingbrain.models.recurrences.xlstm import mlstm

__all__ = [
    "abc",
    "delta_rule",
    "gated_delta_rule",
    "gla",
    "gsa",
    "hgrn",
    "kda",
    "lif",
    "lightning_attention",
    "linear_attention",
    "mamba",
    "mlstm",
    "normalised_linear_attention",
    "retention",
    "rg_lru",
    "rwkv6",
    "simple_gla",
    "ssd",
]
