"""Studies: a grid of runs that differ in a few settings, compared on the same test examples."""
