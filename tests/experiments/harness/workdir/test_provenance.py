"""Every setting is classified for every result, and a stored result is used only where it fits."""

import json

import pytest

from configs import base
from experiments.harness.workdir import dependences, provenance
from experiments.harness.workdir.dependences import (
    EVALUATION,
    GROUPS,
    MEASURED_ERRORS,
    MEASUREMENT,
    NETWORK,
    RESULTS,
    RUN,
    SAMPLES,
    SWEEP,
    WEIGHTS,
)
from tests.experiments import tiny

FLAT = provenance.flatten(base.get_config().to_dict())


def identity(*arguments, data=lambda split: f"the files of {split}"):
    return provenance.identity(*arguments, data=data)


def entries(row):
    """All that a result can depend on, under any condition."""
    for entry in row:
        yield from entries(entry.dependences) if isinstance(entry, dependences.When) else (entry,)


def test_every_setting_is_in_one_group():
    """A new setting fails here until it is classified."""
    for name in FLAT:
        owners = [key for key, names in GROUPS.items() if dependences.is_named(name, names)]
        assert len(owners) == 1, f"{name} is in {owners or 'no group'}: see dependences.GROUPS"
    for names in GROUPS.values():
        for name in names:
            assert any(dependences.is_named(setting, (name,)) for setting in FLAT), (
                f"{name} is gone"
            )
            # A new setting of a section must be classified; an option of one choice need not.
            assert name.count(".") == 2 or name.endswith("splits.") or not name.endswith(".")


def test_every_dependence_exists():
    assert not GROUPS.keys() & RESULTS.keys()
    used = {entry for row in RESULTS.values() for entry in entries(row)}
    used = {entry for entry in used if isinstance(entry, str)}
    assert used <= GROUPS.keys() | RESULTS.keys()
    assert GROUPS.keys() - used == {"speed", "place", "monitoring", "tables"}


@pytest.mark.parametrize("result", RESULTS)
def test_a_condition_reads_settings_that_the_result_depends_on(result):
    """Else a condition could change unnoticed, since one-sided settings do not count."""

    class Recorder(dict):
        def __getitem__(self, name):
            self.read.add(name)
            return super().__getitem__(name)

    settings = Recorder(FLAT)
    settings.read = set()
    groups = set(dependences.active(RESULTS[result], settings))
    exceptions = {"model.variance"} if result == NETWORK else set()
    assert {dependences.group(name) for name in settings.read - exceptions} <= groups


@pytest.mark.parametrize(
    ("result", "overrides", "matter", "do_not"),
    [
        # Three faults of earlier versions: measured errors of other images, results of another
        # directory, and samples without the splits that their pictures show.
        (
            MEASURED_ERRORS,
            {},
            "seed analytic.levels analytic.examples decoder.scaling schedule.linear_log_snr.max "
            "data.split_seed data.held_out data.splits.train",
            "schedule.num_timesteps model.variance evaluate.labels evaluate.split data.flip",
        ),
        (
            SAMPLES,
            {},
            "data.splits.test data.split_seed data.held_out sample.num_samples",
            "evaluate.labels sample.ddim.eta sample.inpaint.known quality.num_samples",
        ),
        (
            EVALUATION,
            {},
            "evaluate.split evaluate.replicates decoder.name data.split_seed",
            "evaluate.labels evaluate.pilot evaluate.ode.probes sample.sampler analytic.levels",
        ),
        (
            EVALUATION,
            {"evaluate__also": ("quality", "ode")},
            "sample.sampler quality.neighbors evaluate.ode.probes",
            "sample.also evaluate.k_sample.num_samples",
        ),
        (
            EVALUATION,
            {"evaluate__variance": "analytic_isotropic", "model__class_conditional": True},
            "analytic.levels analytic.examples evaluate.labels",
            "evaluate.pilot sample.labels",
        ),
        (EVALUATION, {"evaluate__target": 0.01}, "evaluate.max_evaluations", "analytic.levels"),
        (SAMPLES, {"sample__sampler": "ddim"}, "sample.ddim.eta", "sample.variance"),
        (SAMPLES, {"model__class_conditional": True}, "sample.guidance.scale", "evaluate.labels"),
        (SAMPLES, {"sample__variance": "analytic_diagonal"}, "analytic.levels", "evaluate.labels"),
        (
            SAMPLES,
            {"sample__corrector__num_steps": 1},
            "sample.corrector.snr",
            "sample.langevin.snr",
        ),
        (
            SAMPLES,
            {"sample__also": ("inpaint",)},
            "sample.inpaint.known",
            "sample.encode.iterations",
        ),
        (
            SAMPLES,
            {"sample__also": ("sweep",)},
            "sample.sweep.samplers sample.ddim.eta quality.split",
            "variance.split sample.guidance.scales",
        ),
        (
            SAMPLES,
            {"sample__also": ("guidance",)},
            "sample.guidance.scales quality.max_pairs",
            "sample.sweep.samplers",
        ),
        (MEASURED_ERRORS, {"model__class_conditional": True}, "evaluate.labels", "train.ema_decay"),
        (SWEEP, {}, "sample.ddim.eta sample.variance quality.split", "sample.sampler sample.also"),
        (RUN, {}, "seed data.flip model.dtype train.batch_size", "evaluate.split"),
        (WEIGHTS, {}, "seed train.objective decoder.name", "evaluate.variance ablate.draws"),
        (WEIGHTS, {"train__objective": "simple"}, "schedule.num_timesteps", "model.variance"),
        (
            WEIGHTS,
            {"train__objective": "simple", "train__time": "continuous"},
            "train.time",
            "schedule.num_timesteps decoder.name",
        ),
        (
            MEASUREMENT,
            {"train__objective": "simple"},
            "train.beta2 model.variance decoder.name ablate.draws evaluate.variance",
            "ablate.repeats ablate.cell sample.sampler evaluate.split",
        ),
        (MEASUREMENT, {"ablate__measures": ("quality",)}, "sample.sampler", "ablate.repeats"),
        (MEASUREMENT, {"ablate__measures": ("loss_variance",)}, "ablate.repeats", "sample.sampler"),
        (NETWORK, {}, "data.name decoder.scaling", "model.dtype model.variance schedule.name seed"),
        (NETWORK, {"model__variance": "learned_range"}, "model.variance", "train.objective"),
        (NETWORK, {"model__unet__noise_input": "ddpm_timestep"}, "schedule.name", "seed"),
    ],
)
def test_what_matters_to_a_result(result, overrides, matter, do_not):
    settings = provenance.flatten(tiny.config(**overrides).to_dict())
    names = dependences.depends(result, settings)
    assert set(matter.split()) <= names
    assert not set(do_not.split()) & names


@pytest.mark.parametrize(
    "overrides",
    [
        {"profile__num_steps": 3},
        {"devices__fsdp": 2},
        {"data__stream": "always", "data__workers": 1, "data__prefetch": 5},
        {"data__memory_limit_mb": 1},
        {"data__data_dir": "elsewhere"},
        {"model__dtype": "bfloat16", "model__remat": True},
        {"train__num_steps": 99},
    ],
)
def test_how_a_run_is_computed_is_no_part_of_what_was_measured(overrides):
    """So that a finished run is finished with one more worker, or a trace."""
    for result in (EVALUATION, SAMPLES, MEASURED_ERRORS):
        wanted = identity(result, tiny.config(**overrides), 3)
        assert identity(result, tiny.config(), 3) == wanted


def stored(result, config, step=3):
    """An identity as it comes back from a file."""
    return json.loads(json.dumps(identity(result, config, step)))


@pytest.mark.parametrize("result", [EVALUATION, SAMPLES, MEASURED_ERRORS, SWEEP])
def test_a_stored_result_is_known_by_step_and_settings(result):
    config = tiny.config()
    recorded = stored(result, config)
    assert provenance.is_same(recorded, identity(result, config, 3))
    assert not provenance.is_same(recorded, identity(result, config, 4))
    for change in (
        {"schedule__linear_log_snr__max": 7.5},
        {"data__split_seed": 1},
        {"data__held_out": 0.2},
    ):
        other = identity(result, tiny.config(**change), 3)
        assert not provenance.is_same(recorded, other), change


@pytest.mark.parametrize(
    ("result", "overrides", "splits"),
    [
        (EVALUATION, {"evaluate__split": "validation"}, "validation"),
        (EVALUATION, {"evaluate__target": 0.01}, "test train"),
        (EVALUATION, {"evaluate__also": ("quality",)}, "test train"),  # a classifier of train
        (MEASURED_ERRORS, {}, "train"),
        (SAMPLES, {}, "test"),
        (SAMPLES, {"sample__variance": "analytic_isotropic"}, "test train"),
        (RUN, {}, ""),  # data.json has it
    ],
)
def test_results_depend_on_the_files_of_these_splits(result, overrides, splits):
    config = tiny.config(**overrides)
    recorded = identity(result, config, 3)
    for split in ("train", "validation", "test"):
        others = {split: "other files"}.get
        changed = identity(result, config, 3, data=lambda name, others=others: others(name, name))
        is_same = provenance.is_same(identity(result, config, 3, data=str), changed)
        assert is_same == (split not in splits.split()), split
    # Earlier versions recorded none, and without the data a stored result can still be used.
    unknown = identity(result, config, 3, data=lambda split: None)
    assert provenance.is_same(recorded, unknown)
    assert provenance.is_same(unknown, recorded)


def test_a_setting_of_another_version_does_not_count():
    config = tiny.config()
    recorded, wanted = stored(EVALUATION, config), identity(EVALUATION, config, 3)
    del recorded["settings"]["evaluate.replicates"]
    recorded["settings"]["evaluate.of_yesterday"] = 1
    assert provenance.is_same(recorded, wanted)


def test_an_unknown_setting_counts_for_every_result():
    """As of a network that a notebook registers."""
    settings = FLAT | {"model.mine.width": 5}
    assert all("model.mine.width" in dependences.depends(result, settings) for result in RESULTS)


def test_bound_optimal_levels_are_part_of_what_was_sampled(tmp_path):
    config = tiny.config(sample__spacing="bound_optimal")
    seen = []
    for levels in ({"2": [3.0, -3.0]}, {"2": [3.0, -4.0]}):
        text = json.dumps({"log_snr": levels, "entries": len(seen)})
        (tmp_path / dependences.OPTIMAL_LEVELS).write_text(text)
        seen.append(identity(SAMPLES, config, 3, tmp_path))
    assert not provenance.is_same(*seen)
    (tmp_path / dependences.OPTIMAL_LEVELS).write_text(json.dumps({"log_snr": levels}))
    assert provenance.is_same(seen[1], identity(SAMPLES, config, 3, tmp_path))


# Identities as the version before this table wrote them, shortened.
FORMER = {
    MEASURED_ERRORS: {
        "step": 3,
        "analytic.levels": 65,
        "data.name": "digits",
        "data.train": "train",
        "scaling": "endpoints",
    },
    SAMPLES: {
        "step": 3,
        "data": "digits",
        "scaling": "endpoints",
        "of.num_samples": 64,
        "of.also": ["sweep"],
        "of.quality.neighbors": 3,
        "of.sweep.samplers": [],
        "sample.sampler": "ancestral",
        "levels": None,
    },
    EVALUATION: {
        "step": 3,
        "bits_per_dim": 1.5,
        "settings": {
            "evaluate.also": ["quality"],
            "samples.sample.sampler": "ancestral",
            "samples.data": "digits",
            "quality.neighbors": 3,
        },
    },
}


@pytest.mark.parametrize(
    ("result", "overrides", "changes"),
    [
        (MEASURED_ERRORS, {}, {"analytic__levels": 3, "decoder__scaling": "midpoints"}),
        (
            SAMPLES,
            {"sample__also": ("sweep",)},
            {
                "sample__num_samples": 3,
                "quality__neighbors": 4,
                "sample__sampler": "heun",
                "sample__corrector__num_steps": 1,
                "decoder__scaling": "midpoints",
                "sample__sweep__samplers": ("heun",),
            },
        ),
        (
            EVALUATION,
            {"evaluate__also": ("quality",)},
            {"sample__sampler": "heun", "quality__neighbors": 4, "evaluate__also": ()},
        ),
    ],
)
def test_results_of_the_version_before_are_known(result, overrides, changes):
    config = base.get_config()
    config.unlock()

    def wanted(settings):
        new = config.copy_and_resolve_references()
        for name, value in settings.items():
            new.update_from_flattened_dict({name.replace("__", "."): value})
        return identity(result, new, 3)

    assert provenance.is_same(FORMER[result], wanted(overrides))
    for name, value in changes.items():
        assert not provenance.is_same(FORMER[result], wanted(overrides | {name: value})), name


def test_a_new_training_run_removes_all_results_of_a_run():
    assert {name for name in RESULTS if "." in name} == set(dependences.FILES_OF_A_RUN)
