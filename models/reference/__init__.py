"""Slow, obvious programs that say what the fast ones must compute."""
