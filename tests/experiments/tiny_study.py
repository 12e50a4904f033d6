"""A study of two tiny networks: its config, a finished one, and the files of its directory.

A pytest plugin, as `tiny` is. (PYTEST_DONT_REWRITE)
"""

import numpy as np
import pytest

from experiments import ablate
from tests.experiments import tiny

SIMPLE = "cells/simple,seed=0"
OBJECTIVES = ("train.objective", ("vlb", "simple"))


def study_config(*chosen, **overrides):
    """Four steps of a convolution, for each cell."""
    steps = {f"train__{name}": 4 for name in ("num_steps", "checkpoint_every", "sample_every")}
    config = tiny.config(**steps | overrides)
    config.ablate.axes = chosen or (OBJECTIVES,)
    return config


def tables(directory):
    """The content of the study's own files."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def totals(workdir, key, training):
    return np.load(workdir / "cells" / training / "measurements" / f"{key}.npz")["totals"]


@pytest.fixture(scope="module")
def studied(tmp_path_factory, quick_compiles):
    """A finished study, run without an interruption. Look, and copy before changing anything."""
    workdir = tmp_path_factory.mktemp("study")
    ablate.ablate(study_config(), workdir)
    return workdir
