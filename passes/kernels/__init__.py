"""Hand-scheduled CPU kernels, built with the MLIR builders and called by ``spikingbrain_control.launch``."""
