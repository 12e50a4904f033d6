"""Diffusion models as latent-variable models: train, evaluate and sample.

python main.py --config=configs/digits.py --workdir=runs/digits

trains, evaluates the exact bound on the test split, and samples; the same command resumes.
Any setting of the config can be overridden: --config.train.batch_size=64
"""

from absl import app, flags
from ml_collections import config_flags

from experiments.harness import command_line

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The config file. Left out, it is the one that the work directory was trained with, or "
    "configs/digits.py in a new one. --config.SECTION.NAME=VALUE overrides a setting.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and results go.")
_EXPERIMENT = flags.DEFINE_enum(
    "experiment",
    "all",
    command_line.EXPERIMENTS,
    "What to run: all trains, evaluates and samples; the others do one part of it with what the "
    "work directory holds.",
)


def main(argv: list[str]) -> int:
    """Runs the chosen experiment; the exit status."""
    return command_line.run(_EXPERIMENT.value, _CONFIG.value, _WORKDIR.value, argv[1:])


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
