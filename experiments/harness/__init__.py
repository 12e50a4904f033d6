"""What experiments share: data, state, steps, checkpoints, devices, metrics and pictures."""
