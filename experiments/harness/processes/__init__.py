"""Signals, progress bars and several processes that run together."""
