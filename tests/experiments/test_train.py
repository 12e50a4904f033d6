"""Training as a whole: what a run leaves behind, however often it is stopped and goes on."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments.harness.data import order
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.processes import shared_programs
from experiments.harness.training import loop
from experiments.harness.workdir import provenance, record
from experiments.train import train
from tests.experiments import faults, tiny

pytest_plugins = ["tests.experiments.tiny", "tests.experiments.faults"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def interrupt_at(monkeypatch, step):
    """Ctrl-C before a step: `step` steps have been taken."""

    def interrupt():
        raise KeyboardInterrupt

    stop = tiny.Interruption(step, order.batch_indices, interrupt)
    monkeypatch.setattr(order, "batch_indices", stop)


def train_until(config, workdir, step):
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, step)
        with pytest.raises(KeyboardInterrupt):
            train(config, workdir)


def test_a_resumed_unet_equals_an_uninterrupted_one(finished, tmp_path):
    """Twelve steps whose checkpoints at 8 and 12 were lost: the last eight are done again."""
    workdir = tiny.copy(finished.workdir, tmp_path)
    for step in (8, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert tiny.saved_steps(workdir) == [4]
    state = train(finished.config, workdir)
    assert int(state.step) == 12
    tiny.assert_bit_equal(state, tiny.restore(finished.config, finished.workdir))
    assert tiny.saved_steps(workdir) == tiny.saved_steps(finished.workdir) == [4, 8, 12]
    tiny.assert_bit_equal(
        tiny.restore(finished.config, workdir, 8),
        tiny.restore(finished.config, finished.workdir, 8),
    )
    assert tiny.metrics(workdir) == tiny.metrics(finished.workdir)


def test_interruptions_do_not_change_the_result(uninterrupted, tmp_path):
    """Before the first checkpoint, just after it, and later."""
    config, workdir, expected = uninterrupted
    for step in (2, 5, 7, 11):
        train_until(config, tmp_path, step)
    tiny.assert_bit_equal(train(config, tmp_path), expected)
    assert tiny.metrics(tmp_path) == tiny.metrics(workdir)


def test_a_finished_run_returns_at_once_and_changes_nothing(uninterrupted, monkeypatch):
    config, workdir, expected = uninterrupted
    before = tiny.files(workdir)
    interrupt_at(monkeypatch, 12)
    monkeypatch.setattr(loop.Trainer, "compile_and_take_first_step", None)  # a step would fail
    tiny.assert_bit_equal(train(config, workdir), expected)
    after = tiny.files(workdir)
    assert after.keys() == before.keys()
    assert all(after[p][1] == before[p][1] for p in before)
    changed = {p.name for p in before if after[p] != before[p]} - {workdir.name}
    assert changed <= {"config.json", "parts.json"}


def test_a_constant_rate_may_be_trained_further(tmp_path):
    """With nothing in the run that depends on its length, 4 steps and then 4 are 8."""
    short, long = (tiny.config(train__decay="constant", train__num_steps=n) for n in (4, 8))
    train(short, tmp_path / "a")
    state = train(long, tmp_path / "a")
    tiny.assert_bit_equal(state, train(long, tmp_path / "b"))
    assert record.recorded_config(tmp_path / "a")["train"]["num_steps"] == 8
    with pytest.raises(ConfigError, match=r"train\.num_steps was 8, now 9"):
        train(tiny.config(train__decay="cosine", train__num_steps=9), tmp_path / "a")


def test_logs_and_checkpoints_do_not_change_the_parameters(uninterrupted, tmp_path):
    config, _, expected = uninterrupted
    other = tiny.config(
        train__log_every=5,
        train__checkpoint_every=12,
        train__sample_every=12,
        train__validation_timesteps=1,
        evaluate__batch_size=100,
        sample__num_samples=3,
    )
    state = train(other, tmp_path)
    for part in ("step", "params", "ema_params", "opt_state"):
        tiny.assert_bit_equal(getattr(state, part), getattr(expected, part))
    # So they may change when a run goes on.
    again = train(config, tmp_path)
    tiny.assert_bit_equal(again, state)


def test_resuming_with_other_settings_lists_every_difference(uninterrupted):
    _, workdir, _ = uninterrupted
    before = tiny.files(workdir)
    other = tiny.config(train__learning_rate=0.1, model__parameterization="eps", seed=3)
    differences = (
        "model.parameterization was 'v', now 'eps'",
        "seed was 0, now 3",
        "train.learning_rate was 0.02, now 0.1",
    )
    with tiny.refused(f"workdir={workdir} holds a run of another config: ", *differences) as error:
        train(other, workdir)
    assert str(error.value).count(" was ") == 3
    assert tiny.files(workdir) == before


def test_a_run_leaves_its_config_metrics_samples_and_checkpoints(uninterrupted):
    config, workdir, state = uninterrupted
    written = json.loads((workdir / "config.json").read_text())
    assert provenance.flatten(written) == provenance.flatten(config.to_dict())
    assert tiny.saved_steps(workdir) == [4, 8, 12]
    tiny.assert_bit_equal(tiny.restore(config, workdir), state)
    assert {p.name for p in (workdir / "samples").iterdir()} == {
        "step_00000006.png",
        "step_00000012.png",
    }
    assert list(workdir.glob("events.out.tfevents*"))


def test_metrics_say_what_each_step_was_like(uninterrupted):
    _, workdir, _ = uninterrupted
    lines = tiny.metrics(workdir)
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6, 8, 10, 12]
    validated = [line for line in lines if "validation_bits_per_dim" in line]
    assert [line["step"] for line in validated] == [4, 8, 12]
    for line in logged:
        # Stratified: 16 draws of 8 levels put 4 of them into each quartile at every step, so that
        # the loss is the plain mean of the quartiles' means. In float32 sums of 32 losses.
        quartiles = [line[f"loss_quartile_{i}"] for i in (1, 2, 3, 4)]
        assert np.mean(quartiles) == pytest.approx(line["loss"], rel=1e-5)
    rates = {line["step"]: line["learning_rate"] for line in logged}
    # The rate of the step that was the last: the second of three steps of warm-up, …
    assert rates[2] == pytest.approx(0.02 / 3, rel=1e-6)
    # … and, of the nine steps of the cosine, the first and the last.
    assert rates[4] == pytest.approx(0.02, rel=1e-6)
    assert rates[12] == pytest.approx(0.01 * (1 + np.cos(np.pi * 8 / 9)), rel=1e-5)


def test_the_seed_changes_everything_that_is_random(uninterrupted, tmp_path):
    _, workdir, state = uninterrupted
    other = train(tiny.config(seed=1, train__num_steps=12), tmp_path)
    kernels = (s.params["network"]["conv"]["kernel"] for s in (other, state))
    assert np.abs(np.subtract(*kernels)).min() > 0
    assert tiny.metrics(tmp_path)[0]["loss"] != tiny.metrics(workdir)[0]["loss"]


def test_each_program_is_compiled_once(tmp_path):
    """A run three times as long, with three times the lines, samples and checkpoints."""

    def compiled(num_steps):
        events = []

        def listen(event, seconds, **_):
            events.extend([event] if event.endswith("backend_compile_duration") else [])

        shared_programs._programs.clear()  # so that earlier runs compiled nothing for this one
        jax.monitoring.register_event_duration_secs_listener(listen)
        config = tiny.config(train__num_steps=num_steps, train__sample_every=4)
        train(config, tmp_path / str(num_steps))
        jax.monitoring.unregister_event_duration_listener(listen)
        return len(events)

    few = compiled(4)
    assert 0 < compiled(12) <= few


def diverging(**overrides):
    """Rate 0 at step 1, 10³⁰ at step 2: the loss of step 3 squares weights of 10³⁰."""
    settings = {"train__learning_rate": 1e30, "train__warmup_steps": 1, "train__decay": "constant"}
    return tiny.config(**settings | overrides)


@pytest.mark.parametrize("log_every", [1, 100])
def test_no_state_is_saved_after_the_bad_step_and_the_last_good_one_stays(
    tmp_path, monkeypatch, log_every
):
    """Whether the log or the check before a checkpoint is the first to look."""
    config = tiny.config(train__checkpoint_every=1, train__log_every=log_every)
    faults.bad_batches(monkeypatch, config, 3)
    for _ in range(2):  # nothing about it is random: going on from there ends in the same place
        with pytest.raises(RunError, match=r"not finite at step 3 .* step 2 is the last saved"):
            train(config, tmp_path)
        assert tiny.saved_steps(tmp_path) == [1, 2]
        assert [line["step"] for line in tiny.metrics(tmp_path) if "loss" not in line] == [1, 2]
    for step in (1, 2):
        good = tiny.restore(config, tmp_path, step)
        assert int(good.step) == step
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good))


def test_a_state_whose_bound_is_not_finite_is_not_saved(tmp_path):
    """Step 2 has a finite loss, and weights of 10³⁰ behind it."""
    with pytest.raises(RunError, match="bound on validation is inf at step 2"):
        train(diverging(train__checkpoint_every=1), tmp_path)
    assert tiny.saved_steps(tmp_path) == [1]


def test_settings_that_cannot_work_touch_nothing(tmp_path):
    for overrides, named in (
        ({"train__batch_size": 0}, "config.train.batch_size = 0"),
        ({"train__batch_size": 5000}, "config.train.batch_size = 5000 is more than the 1000"),
        ({"train__init_from": str(tmp_path / "none")}, "config.train.init_from="),
    ):
        with pytest.raises(ConfigError) as error:
            train(tiny.config(**overrides), tmp_path / "run")
        assert str(error.value).startswith(named)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def source(tmp_path):
    """Another run, whose best weights are not its latest."""
    states = {step: tiny.state_of(tiny.config(), scale=1.0, seed=step) for step in (1, 2, 3)}
    tiny.save(
        tmp_path / "source",
        {step: (states[step], bpd) for step, bpd in ((1, 3.0), (2, 2.0), (3, 2.5))},
    )
    return tmp_path / "source", states[2].ema_params


def test_a_warm_start_begins_with_the_best_averaged_weights(source, tmp_path):
    """A rate of 0 in the first step of the warm-up leaves them as they were."""
    directory, best = source
    before = tiny.files(directory)
    config = tiny.config(
        train__init_from=str(directory),
        train__num_steps=2,
        train__warmup_steps=1,
        train__checkpoint_every=1,
    )
    assert int(train(config, tmp_path / "run").step) == 2
    state = tiny.restore(config, tmp_path / "run", 1)
    tiny.assert_bit_equal(jax.device_get(state.params), best)
    # Adam starts anew: it has seen one gradient.
    assert int(state.opt_state[1][0].count) == 1
    assert tiny.files(directory) == before


def test_a_warm_started_run_resumes_without_its_source(source, tmp_path):
    directory, _ = source
    config = tiny.config(train__init_from=str(directory))
    expected = train(config, tmp_path / "a")
    train_until(config, tmp_path / "b", 6)
    shutil.rmtree(directory)
    tiny.assert_bit_equal(train(config, tmp_path / "b"), expected)


def test_a_quartile_without_examples_has_no_loss(tmp_path):
    """At T = 2 the first and the third: null in the log, and not 0."""
    shortest = {"schedule__num_timesteps": 2, "train__num_steps": 2, "train__sample_timesteps": 2}
    train(tiny.config(**shortest), tmp_path)
    line = next(line for line in tiny.metrics(tmp_path) if "loss" in line)
    known = [line[f"loss_quartile_{i}"] is not None for i in (1, 2, 3, 4)]
    assert known == [False, True, False, True]
