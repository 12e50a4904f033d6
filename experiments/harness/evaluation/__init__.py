"""Bounds of a trained model over a data set."""
