"""Diffusion models as latent-variable models: train, evaluate and sample.

python main.py --config=configs/digits.py --workdir=runs/digits

trains, evaluates the exact bound on the test split, and samples; the same command resumes.
Any setting of the config can be overridden: --config.train.batch_size=64
"""

import functools

from absl import app, flags
from ml_collections import config_flags

from experiments.harness import arguments

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
    arguments.EXPERIMENTS,
    "What to run: all trains, evaluates, samples and reports; import and export exchange a network "
    "with diffusers; the others do one part with what the work directory holds.",
)
flags.DEFINE_bool("helpconfig", False, "List every setting of the config.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Of several processes that run together: address and port of the first."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Have the cluster say so instead: Slurm, Open MPI, Kubernetes, TPU pods."
)


def main(argv: list[str]) -> int:
    """Runs the chosen experiment; the exit status."""
    # Only now, since they import JAX: help and mistakes need none.
    from experiments.harness import command_line
    from experiments.harness.processes import allocator, compilation, distributed

    if _EXPERIMENT.value not in ("import", "export"):  # they use no memory a second time
        allocator.keep_memory()
    compilation.keep_programs()
    join = functools.partial(
        distributed.initialize,
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        _DISTRIBUTED.value,
    )
    return command_line.run(_EXPERIMENT.value, _CONFIG.value, _WORKDIR.value, argv[1:], join)


if __name__ == "__main__":
    app.run(main, flags_parser=arguments.parse_flags)
