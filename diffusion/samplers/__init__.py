"""Samplers, and the wrappers of samplers and models that sampling uses."""
