"""From a config to objects: the model's definition, its parameters, a trained run."""
