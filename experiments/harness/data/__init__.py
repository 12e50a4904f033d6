"""Data sets: sources, splits, the order of examples, batches."""
