"""A stand-in for flash-linear-attention: the public functions that we call, strict about their arguments."""
