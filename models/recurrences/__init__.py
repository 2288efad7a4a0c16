"""Linear recurrences as plain functions of tensors, block by block: fast enough for training at thousands of steps."""
