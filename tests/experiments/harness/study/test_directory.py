"""Studies that grow and shrink in their directories, and directories of something else."""

import numpy as np
import pytest

from experiments import ablate, train
from experiments.harness.study import directory, measures
from experiments.harness.workdir import record
from experiments.harness.workdir.files import write_json
from tests.experiments import tiny
from tests.experiments.tiny_study import OBJECTIVES, SIMPLE, study_config, totals

pytest_plugins = ["tests.experiments.tiny", "tests.experiments.tiny_study"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_a_study_may_grow_and_a_damaged_measurement_is_made_again(studied, tmp_path, monkeypatch):
    workdir = tiny.copy(studied, tmp_path)
    path = workdir / SIMPLE / "measurements" / "simple.npz"
    path.write_bytes(path.read_bytes()[:100])
    began = []
    train_one = train.train
    monkeypatch.setattr(
        train, "train", lambda c, place, **o: began.append(place.name) or train_one(c, place, **o)
    )
    config = study_config(("train.objective", ("vlb", "simple", "min_snr")))
    summary = ablate.ablate(config, workdir)
    assert began == ["simple,seed=0", "min_snr,seed=0"]
    assert {cell.key for cell in summary.cells} == {("vlb",), ("simple",), ("min_snr",)}


def trained(monkeypatch):
    """The names of the work directories that are trained or resumed from now on."""
    began, train_one = [], train.train

    def record(config, place, **options):
        if not measures.is_trained(config, place):
            began.append(place.name)
        return train_one(config, place, **options)

    monkeypatch.setattr(train, "train", record)
    return began


def test_an_axis_may_be_added_whose_values_have_the_former_one(studied, tmp_path, monkeypatch):
    """The trainings are found by their configs, and keep their directories' names."""
    workdir = tiny.copy(studied, tmp_path)
    began = trained(monkeypatch)
    default = study_config().train.beta2
    beta2 = ("train.beta2", (default, 0.5))
    summary = ablate.ablate(study_config(beta2, OBJECTIVES), workdir)
    assert summary.is_complete
    assert began == ["0.5,vlb,seed=0", "0.5,simple,seed=0"]
    for name in OBJECTIVES[1]:
        new = totals(workdir, f"{default},{name}", f"{name},seed=0")
        np.testing.assert_array_equal(new, totals(studied, name, f"{name},seed=0"))


def test_a_shared_training_is_kept_when_another_cell_comes_first(tmp_path, monkeypatch):
    """T of the bound is no matter of L_simple in continuous time, but it is one of its run."""

    def study(*values):
        return study_config(
            ("schedule.num_timesteps", values), train__objective="simple", train__time="continuous"
        )

    ablate.ablate(study(8), tmp_path)
    began = trained(monkeypatch)
    ablate.ablate(study(5, 8), tmp_path)
    ablate.ablate(study(5), tmp_path)  # the training's own T is no value now
    assert not began
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["seed=0"]


def test_a_name_that_another_training_has_is_not_taken(tmp_path, monkeypatch):
    """Of a study with one value the directory is named by the seed alone, whatever the value."""
    ablate.ablate(study_config(("train.objective", ("vlb",))), tmp_path)
    began = trained(monkeypatch)
    ablate.ablate(study_config(("train.objective", ("simple",))), tmp_path)
    (second,) = began
    assert second.startswith("seed=0,")
    summary = ablate.ablate(study_config(), tmp_path)  # both values
    assert began == [second]
    assert summary.is_complete
    assert {path.name for path in (tmp_path / "cells").iterdir()} == {"seed=0", second}


def test_trainings_that_differ_in_speed_only_are_told_apart(tmp_path):
    """Their weights are the same, and the study measures how long they took."""
    chosen, options = ("data.prefetch", (1, 2)), {"ablate__measures": ("speed",)}
    first = ablate.make_plan(study_config(chosen, **options))
    for training in first.trainings:
        record.record(training.config, training.directory(tmp_path))
    plan = ablate.make_plan(study_config(("train.beta2", (0.999,)), chosen, **options))
    # Settings of speed that are on no axis may change.
    config = study_config(chosen, OBJECTIVES, data__workers=3, **options)
    larger = ablate.make_plan(config)
    for grown in (plan, larger):
        found = directory.located(grown.trainings, grown.study, tmp_path)
        names = {t.config.data.prefetch: t.name for t in found if t.config.train.objective == "vlb"}
        assert names == {1: "1,seed=0", 2: "2,seed=0"}


def test_a_config_of_an_earlier_version_does_not_stand_for_each_value(tmp_path):
    """It lacks the setting of a new axis, so its training could be of any value."""
    config = study_config(("train.beta2", (0.9, 0.99)))
    plan = ablate.make_plan(config)
    old = plan.trainings[0].config.to_dict()
    del old["train"]["beta2"]
    place = tmp_path / "cells" / "seed=0"
    place.mkdir(parents=True)
    write_json(place / "config.json", old)
    found = directory.located(plan.trainings, plan.study, tmp_path)
    assert [training.name for training in found] == ["0.9,seed=0", "0.99,seed=0"]


def test_a_value_that_was_taken_out_keeps_its_meaning(studied, tmp_path, monkeypatch):
    workdir = tiny.copy(studied, tmp_path)
    monkeypatch.setattr(train, "train", None)
    summary = ablate.ablate(study_config(("train.objective", ("vlb",))), workdir)
    assert [cell.key for cell in summary.cells] == [("vlb",)]
    other = {"vlb": {}, "simple": {"train.objective": "p2"}}
    with tiny.refused("another study", "train.objective = simple: train.objective was 'simple'"):
        ablate.ablate(study_config(("train.objective", other)), workdir)
    assert ablate.ablate(study_config(), workdir).is_complete


def test_a_value_that_leaves_the_config_is_recorded_with_it(tmp_path):
    """The config's own value of a setting on an axis is a part of the study too."""
    chosen = ("dropout", {"own": {}, "none": {"model.unet.dropout": 0.0}})
    study = ablate.make_plan(study_config(chosen)).study
    directory.record(study, study_config(chosen), tmp_path)
    directory.check(study, study_config(chosen), tmp_path)
    other = study_config(chosen, model__unet__dropout=0.3)
    with tiny.refused("dropout = own: model.unet.dropout was 0.1, now 0.3"):
        directory.check(ablate.make_plan(other).study, other, tmp_path)


@pytest.mark.parametrize(
    ("chosen", "overrides", "contained"),
    [
        ((), {"train__num_steps": 8}, "train.num_steps was 4, now 8"),
        ((), {"ablate__split": "validation"}, "ablate.split was 'test', now 'validation'"),
        ((("train.beta2", (0.9, 0.99)),), {}, "its axes were train.objective, now train.beta2"),
        (
            (OBJECTIVES, ("train.beta2", (0.5, 0.6))),
            {},
            "train.beta2 is new; train.beta2 was 0.999, now 0.5",
        ),
        (
            (("train.objective", {"vlb": {"train.objective": "p2"}}),),
            {},
            "train.objective = vlb: train.objective was 'vlb', now 'p2'",
        ),
    ],
)
def test_the_directory_of_another_study_is_refused(studied, chosen, overrides, contained):
    before = tiny.files(studied)
    with tiny.refused(f"workdir={studied}", "another study", contained):
        ablate.ablate(study_config(*chosen, **overrides), studied)
    assert tiny.files(studied) == before


def test_the_directory_of_a_run_is_refused(studied):
    with tiny.refused("holds a run", "a directory of its own"):
        ablate.ablate(study_config(), studied / SIMPLE)


def test_settings_that_a_training_keeps_are_said(tmp_path, capsys):
    """T is no matter of L_simple in continuous time, but one of its run."""
    for num_timesteps, kept in ((8, False), (5, True), (8, False)):
        config = study_config(
            ("train.learning_rate", (0.05,)),
            schedule__num_timesteps=num_timesteps,
            train__objective="simple",
            train__time="continuous",
        )
        ablate.ablate(config, tmp_path)
        out = capsys.readouterr().out
        assert ("cell seed=0 goes on with schedule.num_timesteps = 8, as it began" in out) is kept
