"""ml_collections configs, one a data set or study."""
