"""Where images come from: one file a format, each with a function that finds a split."""
