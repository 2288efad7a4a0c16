"""When a spiking projection adds the weights of the channels that fire, "events", and when it multiplies all, "dense".

Events need weights stored by channel. That is decided when a model is compiled, from the share of silent channels that someone
has measured. With one row, on AVX-512, and weights that come from memory, events win above 50 to 70 % silent channels, the later
the fewer channels share a scale; a product of many rows by weights stored so takes up to 4 % longer than by those of dense form
(``benchmarks/spike_events.py``). Whatever was measured, a kernel counts what fires in a call before it takes either way
(``Tuning.firing_percent``).
"""

SILENT_ENOUGH = 0.7  # from which share on weights are stored by channel


def form(silent: float) -> str:
    """Returns the form for a share of silent channels; 0 where it is not known."""
    return "events" if silent >= SILENT_ENOUGH else "dense"
