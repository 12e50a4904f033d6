"""What `main.py` can run: one module each, with `run(config, workdir)`."""
