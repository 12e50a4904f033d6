"""Training: state, loss, optimizer, step and loop."""
