"""Lossless compression with a trained run: coder, file format, and both directions."""
