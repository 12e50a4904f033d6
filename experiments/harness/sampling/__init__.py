"""Samples of a trained model, edits of images, and sample quality."""
