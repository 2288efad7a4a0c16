"""SpikingBrain compiler: PyTorch models in, deployable artifacts out."""
