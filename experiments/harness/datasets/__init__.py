"""Where images come from: one file a kind, each with a function that finds a split of a set."""
