"""Pipelines that diffusers saved: their files, and what their scheduler says of the process."""
