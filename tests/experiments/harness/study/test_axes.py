"""From axes to cells, and the axes that are refused."""

import itertools

import pytest

from configs import cifar10_ablation, digits, digits_ablation, digits_sigma, digits_timesteps
from experiments import ablate
from experiments.harness.errors import ConfigError
from experiments.harness.study import axes
from tests.experiments import tiny
from tests.mock_cifar10 import mock_tfds

OBJECTIVES = {
    "bound": {"train.objective": "vlb"},
    "clipped": {"train.objective": "min_snr", "train.min_snr.gamma": 1},
}
PREDICTIONS = ("model.parameterization", ("eps", "v"))
GRID = (PREDICTIONS, ("objective", OBJECTIVES))


def study_config(*chosen, **overrides):
    config = digits.get_config()
    config.ablate.axes = chosen
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def names(config):
    """The names of the trainings' directories."""
    return [training.name for training in ablate.make_plan(config).trainings]


def test_cells_are_the_product_of_the_axes():
    study = axes.expand(study_config(*GRID))
    assert list(study.cells) == list(itertools.product(("eps", "v"), ("bound", "clipped")))
    assert study.baseline == ("eps", "bound")
    for (prediction, objective), cell in study.cells.items():
        assert cell.model.parameterization == prediction
        assert cell.train.objective == OBJECTIVES[objective]["train.objective"]
    assert study.cells["v", "clipped"].train.min_snr.gamma == 1.0
    assert study.cells["v", "bound"].train.min_snr.gamma == digits.get_config().train.min_snr.gamma


def test_nothing_but_the_axes_differs_from_the_config():
    config = study_config(*GRID, seed=7, ablate__seeds=(1, 2))
    for cell in axes.expand(config).cells.values():
        alike = cell.copy_and_resolve_references()
        alike.update_from_flattened_dict(
            {
                "model.parameterization": config.model.parameterization,
                "train.objective": config.train.objective,
                "train.min_snr.gamma": config.train.min_snr.gamma,
                "ablate": config.ablate.to_dict(),
            }
        )
        assert alike.to_dict() == config.to_dict()


def test_a_value_may_be_the_config_as_it_is():
    study = axes.expand(study_config(("dropout", {"on": {}, "off": {"model.unet.dropout": 0.0}})))
    assert [cell.model.unet.dropout for cell in study.cells.values()] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("chosen", "contained"),
    [
        ((), "axes = ()"),
        ((("train.objective", ()),), "'train.objective' has no values"),
        ((("loss", {}),), "'loss' has no values"),
        ((("train.objectiv", ("vlb",)),), "did you mean train.objective?"),
        ((("a", {"b": {"train.beta": 0.9}}),), "train.beta is no setting"),
        ((("train", ("vlb",)),), "train is no setting"),
        ((("train.objective", ("vlb", "sample")),), "'sample' is unknown; known: vlb, simple"),
        ((("train.learning_rate", ("high",)),), "must be a finite number"),
        ((("train.learning_rate", (float("nan"),)),), "must be a finite number"),
        ((("train.batch_size", (64, 64.5)),), "must be a whole number"),
        ((("model.unet.dropout", (0.0, 1.5)),), "a number in [0, 1)"),
        ((("train.beta2", (0.9, 0.9)),), "a value twice"),
        ((("a", {"b": {"seed": 1}}),), "config.ablate.seeds"),
        ((("data.name", ("digits", "photos")),), "not paired"),
        ((("data.splits.test", ("test", "other")),), "not paired"),
        ((("data.channels", (1, 3)),), "not paired"),
        ((("data.data_dir", ("a", "b")),), "not paired"),
        ((("ablate.split", ("test", "validation")),), "not paired"),
        ((("ablate.draws", (2, 3)),), "belongs to the study"),
        ((PREDICTIONS, ("b", {"c": {"model.parameterization": "v"}})), "both"),
    ],
)
def test_axes_that_are_none_are_refused(chosen, contained):
    with tiny.refused("config.ablate.axes", contained):
        ablate.check(study_config(*chosen))


@pytest.mark.parametrize("value", [5, ("a",), (("a", "b", "c"),), (("", ("b",)),), (("a", 1),)])
def test_axes_of_another_form_are_refused(value):
    config = digits.get_config()
    with config.unlocked(), config.ignore_type():
        config.ablate.axes = value
    with tiny.refused("config.ablate.axes", "a tuple of"):
        ablate.check(config)


def test_too_many_cells_are_refused_at_once():
    many = tuple(range(1, 301))
    chosen = (("train.batch_size", many), ("train.num_steps", many))
    with tiny.refused("90,000 combinations"):
        ablate.check(study_config(*chosen))


@pytest.mark.parametrize("baseline", [("eps",), ("eps", "hybrid"), ("bound", "eps")])
def test_a_baseline_outside_the_grid_is_refused(baseline):
    with tiny.refused("config.ablate.baseline", "objective: bound, clipped"):
        ablate.check(study_config(*GRID, ablate__baseline=baseline))


def test_cells_that_differ_in_nothing_that_is_measured_are_refused():
    sampling = ("sample.sampler", ("ddim", "euler"))
    with tiny.refused("(ddim) and (euler) are the same"):
        ablate.check(study_config(sampling))
    ablate.check(study_config(sampling, ablate__measures=("quality",)))
    same = {"a": {"train.beta2": 0.9}, "b": {"train.beta2": 0.9}}
    with tiny.refused("(a) and (b) are the same"):
        ablate.check(study_config(("beta2", same)))


def test_an_impossible_cell_is_skipped_with_its_reason():
    """A learned Σ_θ is trained by the bound, not by L_simple."""
    config = study_config(
        ("model.variance", ("beta", "learned_range")), ("train.objective", ("vlb", "simple"))
    )
    plan = ablate.make_plan(config)
    assert list(plan.skipped) == [("learned_range", "simple")]
    assert "model.variance" in plan.skipped["learned_range", "simple"]
    assert len(plan.trainings) == 3
    config.ablate.baseline = ("learned_range", "simple")
    with tiny.refused("config.ablate.baseline", "model.variance"):
        ablate.check(config)


def test_a_study_is_refused_if_no_cell_is_possible():
    with tiny.refused("none of the 2 cells", "train.batch_size"):
        ablate.check(study_config(("train.batch_size", (4000, 5000))))


def test_cells_that_are_measured_otherwise_share_a_training():
    """Σ_θ and T of the bound leave the network as it is; the parameterisation does not."""
    chosen = (
        ("evaluate.variance", ("beta", "analytic_diagonal")),
        PREDICTIONS,
        ("ablate.num_timesteps", (10, 50)),
    )
    plan = ablate.make_plan(study_config(*chosen, ablate__seeds=(0, 3)))
    assert [training.name for training in plan.trainings] == [
        "eps,seed=0",
        "eps,seed=3",
        "v,seed=0",
        "v,seed=3",
    ]
    assert all(len(training.cells) == 4 for training in plan.trainings)
    assert [training.config.seed for training in plan.trainings] == [0, 3, 0, 3]
    assert all(config.seed == 0 for config in plan.study.cells.values())


@pytest.mark.parametrize(
    ("objective", "time", "chosen", "number"),
    [
        ("vlb", "discrete", ("decoder.name", ("categorical", "discretized_gaussian")), 2),
        ("simple", "discrete", ("decoder.name", ("categorical", "discretized_gaussian")), 1),
        ("vlb", "discrete", ("model.variance", ("beta", "beta_tilde")), 2),
        ("simple", "discrete", ("model.variance", ("beta", "beta_tilde")), 1),
        ("simple", "discrete", ("schedule.num_timesteps", (100, 1000)), 2),
        ("simple", "continuous", ("schedule.num_timesteps", (100, 1000)), 1),
        ("vlb", "continuous", ("schedule.num_timesteps", (100, 1000)), 2),
    ],
)
def test_what_the_loss_contains_is_trained_and_all_else_is_measured(
    objective, time, chosen, number
):
    """L_simple has neither Σ_θ nor the decoder; in continuous time it has no T."""
    config = study_config(chosen, train__objective=objective, train__time=time)
    assert len(names(config)) == number


def test_t_on_an_axis_is_that_of_the_bound():
    config = study_config(("schedule.num_timesteps", (10, 20)), ablate__num_timesteps=5)
    assert [c.ablate.num_timesteps for c in axes.expand(config).cells.values()] == [0, 0]
    config = study_config(PREDICTIONS, ablate__num_timesteps=5)
    assert [c.ablate.num_timesteps for c in axes.expand(config).cells.values()] == [5, 5]


def test_names_of_directories_are_those_of_the_values_and_differ():
    multipliers = ("model.unet.channel_multipliers", ((1, 2), (1, 2, 2)))
    assert names(study_config(multipliers)) == [
        "%281%2C%202%29,seed=0",
        "%281%2C%202%2C%202%29,seed=0",
    ]
    values = {"x" * 200 + end: {"train.beta2": 0.9 + 0.01 * i} for i, end in enumerate("ab")}
    long = names(study_config(("long", values)))
    assert len(set(long)) == 2
    assert all(len(name) <= 150 for name in long)


def test_the_baseline_is_trained_first():
    assert names(study_config(*GRID, ablate__baseline=("v", "bound")))[0] == "v,bound,seed=0"


def test_each_setting_of_a_registered_part_is_checked_by_its_present_value():
    config = tiny.config()
    with config.unlocked():
        config.model.convolution = {"width": 3}
    config.ablate.axes = (("model.convolution.width", (3, 4)),)
    assert [c.model.convolution.width for c in axes.expand(config).cells.values()] == [3, 4]
    config.ablate.axes = (("model.convolution.width", (3, "4")),)
    with pytest.raises(ConfigError, match=r"of the type of 3"):
        axes.expand(config)


@pytest.mark.parametrize(
    ("module", "num_trainings", "num_cells", "num_skipped"),
    [
        (digits_ablation, 9, 9, 0),
        (digits_timesteps, 8, 9, 1),
        (digits_sigma, 1, 20, 0),
        (cifar10_ablation, 8, 4, 0),
    ],
)
def test_the_studies_of_the_project_are_possible(module, num_trainings, num_cells, num_skipped):
    with mock_tfds(num_examples=128):
        plan = ablate.make_plan(module.get_config())
    assert len(plan.trainings) == num_trainings
    assert len(plan.study.cells) == num_cells
    assert len(plan.skipped) == num_skipped


def test_a_number_of_a_training_that_does_not_exist_is_refused(tmp_path):
    config = study_config(*GRID, ablate__cell=5)
    with tiny.refused("config.ablate.cell = 5", "4 trainings"):
        ablate.ablate(config, tmp_path / "study")
    assert not (tmp_path / "study").exists()
