"""Finds spiking projections as people write them, before autograd, and writes them as ops of their own."""
