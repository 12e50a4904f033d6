"""Studies that are not possible, among the bad inputs of `tests.stress.inputs`."""

import pathlib
from collections.abc import Iterator

from tests.stress import command
from tests.stress.bad_files import Make
from tests.stress.case import Case, write

AXES = {
    "()": "a study has at least one axis",
    "5": "config.ablate.axes",
    "('train.objective', ('vlb', 'simple'))": "it must be a tuple of",
    "(('train.objective', ('vlb',)), ('train.objective', ('simple',)))": "it must be a tuple of",
    "(('train.objective', ()),)": "has no values",
    "(('train.objectiv', ('vlb',)),)": "did you mean train.objective?",
    "(('train.objective', ('vlb', 'simpel')),)": "'simpel' is unknown",
    "(('train.learning_rate', (1e-3, 'high')),)": "train.learning_rate = 'high'; it must be",
    "(('train.batch_size', (64, 64.5)),)": "train.batch_size = 64.5; it must be",
    "(('train.batch_size', (5000, 6000)),)": "none of the 2 cells is possible",
    "(('data.name', ('digits', 'photos')),)": "not paired",
    "(('data.splits.test', ('test', 'train')),)": "not paired",
    "(('ablate.split', ('test', 'train')),)": "not paired",
    "(('seed', (0, 1)),)": "config.ablate.seeds",
    "(('sample.sampler', ('ddim', 'euler')),)": "(ddim) and (euler) are the same",
    "(('a', {'b': {'train.beta2': 0.9}, 'c': {'train.beta2': 0.9}}),)": "(b) and (c) are the same",
    "(('a', {'b': {'train.beta2': None}}),)": "train.beta2 = None",
    "(('a', {'b': {'train': 5}}),)": "train is no setting",
}
_GOOD_AXES = "--config.ablate.axes=(('train.objective', ('vlb', 'simple')),)"
_STUDY = "study.json"
STUDY_FILES: dict[str, tuple[Make, str]] = {
    "another study": (
        lambda here: write(_STUDY, b'{"axes": {"train.beta2": {}}, "settings": {}}', here),
        "its axes were train.beta2, now train.objective",
    ),
    "another training": (
        lambda here: write(
            _STUDY,
            b'{"axes": {"train.objective": {}}, "settings": {"train.num_steps": 5}}',
            here,
        ),
        "train.num_steps was 5, now 1000",
    ),
    "a damaged study.json": (lambda here: write(_STUDY, b"{}", here), _STUDY),
    "a run": (lambda here: write("config.json", b"{}", here), "config.json"),
}


def studies() -> Iterator[Case]:
    """Studies that are not possible."""
    base = (f"--config={command.ROOT}/configs/digits.py", "--experiment=ablate")
    for text, contained in AXES.items():
        yield Case(f"axes={text}", (*base, f"--config.ablate.axes={text}"), contained)
    for flag, contained in {
        "--config.ablate.baseline=('simpel',)": "config.ablate.baseline = ('simpel',)",
        "--config.ablate.baseline=('vlb', 'simple')": "it must name a value of each axis",
        "--config.ablate.cell=3": "the study has 2 trainings",
        "--config.ablate.num_timesteps=1": "none of the 2 cells is possible",
    }.items():
        yield Case(flag, (*base, _GOOD_AXES, flag), contained)
    for name, (make, contained) in STUDY_FILES.items():
        workdir = "--workdir={here}/study"

        def make_study(here: pathlib.Path, make: Make = make) -> None:
            make(here / "study")

        yield Case(f"study: {name}", (*base, _GOOD_AXES, workdir), contained, make_study)
