"""From noise to data: samplers and what wraps them."""
