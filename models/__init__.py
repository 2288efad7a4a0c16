"""Language models in plain PyTorch. They need only torch and know nothing of the compiler."""
