"""Runs that are killed, out of space, doubled, or not finite; and all of it at random."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.harness import command_line
from experiments.harness.data import order
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.processes import distributed
from experiments.harness.sampling import draw
from experiments.harness.setup.trained import load_ema
from experiments.harness.training.optimizer import learning_rate
from experiments.harness.workdir import checksums, lock, record
from experiments.harness.workdir.checkpoints import Checkpoints
from experiments.harness.workdir.metrics import MetricsLog
from experiments.train import train
from tests.experiments import tiny
from tests.experiments.faults import assert_ends_as, bad_batches, last_line, program
from tests.stress import kill

pytest_plugins = ["tests.experiments.tiny", "tests.experiments.faults"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_killed_inside_a_save_a_run_goes_on(uninterrupted, tmp_path, quick_compiles):
    """While the checksums of the second checkpoint are being written."""
    before = """
from experiments.harness.workdir import checksums
write, calls = checksums.write, []
def kill(item):
    calls.append(item)
    if len(calls) == 2:
        (item / "checksums.json").write_text("{")
        os.kill(os.getpid(), signal.SIGKILL)
    write(item)
checksums.write = kill
"""
    ended = program(before, tmp_path, quick_compiles)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert tiny.saved_steps(tmp_path) == [4]
    assert list((tmp_path / "checkpoints").glob("8.*tmp*"))
    assert_ends_as(uninterrupted, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_killed_while_an_old_checkpoint_is_removed_none_is_half_there(three, tmp_path):
    """It is renamed first; what a kill leaves of it is cleared up."""
    workdir = tiny.copy(three[0], tmp_path)
    directory = workdir / "checkpoints"
    (directory / "removed").mkdir()
    (directory / "1").rename(directory / "removed" / "1")
    (directory / "removed" / "1" / "default" / "manifest.ocdbt").unlink()
    assert tiny.saved_steps(workdir) == [2, 3]
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == [2, 3]
    assert not (directory / "removed").exists()


def fill_disk(patch, after=0):
    """No checkpoint can be completed, except for the first few."""
    write, calls = checksums.write, []

    def fail(item):
        calls.append(item)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(item))
        write(item)

    patch.setattr(checksums, "write", fail)


def test_a_full_disk_stops_the_run_with_a_line(uninterrupted, tmp_path, monkeypatch, capfd):
    """When the second checkpoint is written, in the background."""
    with monkeypatch.context() as patch:
        fill_disk(patch, after=1)
        assert command_line.run("train", uninterrupted[0], str(tmp_path)) == 1
    errors = [x for x in capfd.readouterr().err.replace("\r", "\n").splitlines() if "error:" in x]
    assert errors == [
        f"error: workdir={tmp_path}: the checkpoint at step 8 could not be written to "
        f"{tmp_path}/checkpoints (no space left on the device); those up to step 4 are intact; "
        "once it can, the same command goes on from there"
    ]
    assert tiny.saved_steps(tmp_path) == [4]
    assert_ends_as(uninterrupted, tmp_path)


def test_what_a_signal_made_it_save_outlives_a_save_that_fails(
    uninterrupted, tmp_path, monkeypatch, capfd
):
    """Until the run has a checkpoint of its own, it is the only one."""
    with monkeypatch.context() as patch:
        send = tiny.Interruption(
            2, order.batch_indices, lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
        patch.setattr(order, "batch_indices", send)
        assert command_line.run("train", uninterrupted[0], str(tmp_path)) == 143
    with monkeypatch.context() as patch:
        fill_disk(patch)
        assert command_line.run("train", uninterrupted[0], str(tmp_path)) == 1
    assert "those up to step 3 are intact" in last_line(capfd.readouterr().err)
    assert tiny.saved_steps(tmp_path) == [3]
    assert_ends_as(uninterrupted, tmp_path)


def test_what_a_signal_made_it_save_goes_when_it_is_behind(three, tmp_path):
    """And with it what a kill left of such a save; but not what is ahead, nor for a reader."""
    workdir = tiny.copy(three[0], tmp_path)
    own, interrupted = workdir / "checkpoints", workdir / "interrupted"
    shutil.copytree(own / "2", interrupted / "4")
    shutil.copytree(own / "2", interrupted / "9.orbax-checkpoint-tmp")
    with Checkpoints(workdir):
        assert tiny.saved_steps(workdir) == [1, 2, 3, 4]
    (interrupted / "4").rename(interrupted / "3")
    assert tiny.saved_steps(workdir) == [1, 2, 3]
    assert interrupted.exists()
    with Checkpoints(workdir) as checkpoints:
        assert not checkpoints.was_interrupted(3)
    assert not interrupted.exists()
    assert tiny.saved_steps(workdir) == [1, 2, 3]


def test_one_of_several_that_cannot_write_says_so_and_ends(three, tmp_path, monkeypatch, capfd):
    """All processes would block one another in the next save. Earlier checkpoints stay."""
    workdir, exits = tiny.copy(three[0], tmp_path), []
    fill_disk(monkeypatch)
    with Checkpoints(workdir, keep_last=1) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(distributed, "is_one_of_several", lambda: True)
        patch.setattr(os, "_exit", exits.append)
        checkpoints.save(4, three[1][3], validation=0.5)
        with pytest.raises(RunError, match="step 4 could not be written"):
            checkpoints.wait()
    assert exits == [1]
    assert tiny.saved_steps(workdir) == [1, 2, 3]
    assert "could not be written (no space left on the device)" in capfd.readouterr().err


def test_samples_that_fail_stop_no_training(uninterrupted, tmp_path, monkeypatch, capfd):
    def fail(*args):
        raise RunError("4 of 4 samples are not finite")

    config, whole, expected = uninterrupted
    monkeypatch.setattr(draw.Drawer, "__call__", fail)
    tiny.assert_bit_equal(train(config, tmp_path), expected)
    assert tiny.metrics(tmp_path) == tiny.metrics(whole)
    assert "step 6: no picture of samples (4 of 4" in capfd.readouterr().out
    assert not (tmp_path / "samples").exists()


def test_no_space_for_a_line_of_the_log_is_a_line(uninterrupted, tmp_path, monkeypatch, capfd):
    write = MetricsLog.write

    def fail(self, step, **values):
        if step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", fail)
        assert command_line.run("train", uninterrupted[0], str(tmp_path)) == 1
    line = last_line(capfd.readouterr().err)
    assert line.startswith(f"error: workdir={tmp_path} cannot be written (No space left on device)")
    assert_ends_as(uninterrupted, tmp_path)


def test_a_second_run_is_refused_while_the_first_one_lives(tmp_path, quick_compiles):
    held = "from experiments.harness.workdir import lock; import os, sys, time\n"
    held += "with lock.held(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    first = subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path)],
        env=quick_compiles,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError) as error:
            train(tiny.config(), tmp_path)
        told = f"workdir={tmp_path} is being trained in by process {first.pid} on {os.uname()[1]}"
        assert str(error.value).startswith(told)
    finally:
        first.kill()
        first.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["training.lock"]
    with lock.held(tmp_path):  # a kill lets go of it
        pass
    assert list(tmp_path.iterdir()) == []


def refuse_locks(monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", fail)


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, capsys):
    refuse_locks(monkeypatch, errno.ENOLCK)
    for workdir in (tmp_path, "gs://bucket/run"):
        with lock.held(workdir):
            pass
    monkeypatch.setattr(lock, "fcntl", None)  # as on Windows
    with lock.held(tmp_path):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("warning: workdir=") for line in lines)


def test_a_lock_file_of_another_user_is_an_error(tmp_path, monkeypatch):
    refuse_locks(monkeypatch, errno.EACCES)
    refused = pytest.raises(ConfigError, match=r"training\.lock cannot be written \(Permission")
    with refused, lock.held(tmp_path):
        pass


def test_a_run_in_training_is_evaluated(uninterrupted, tmp_path):
    workdir = tiny.copy(uninterrupted[1], tmp_path)
    like = tiny.state_of(uninterrupted[0]).ema_params
    with lock.held(workdir):
        load_ema(workdir, "best", like)


def test_bad_steps_may_be_skipped_up_to_a_limit(tmp_path, monkeypatch):
    config = tiny.config(train__skip_nonfinite=2)
    bad_batches(monkeypatch, config, 3, 7)
    assert int(train(config, tmp_path / "a").step) == 12
    lines = [line for line in tiny.metrics(tmp_path / "a") if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2, 2, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)
    # The rate that was used: the optimizer has not counted the skipped steps.
    rates = [line["learning_rate"] for line in lines]
    expected = learning_rate(config.train)
    assert rates == [float(expected(t)) for t in (1, 2, 4, 5, 7, 9)]
    # Counted in the state: a run that goes on from step 4 has one left.
    bad_batches(monkeypatch, config, 3, 7, 9)
    with pytest.raises(
        RunError, match=r"not finite at step 9 .* step 8 is the last saved \(2 such"
    ):
        train(config, tmp_path / "b")
    assert tiny.saved_steps(tmp_path / "b") == [4, 8]


def test_a_skipped_step_changes_nothing_but_the_count(monkeypatch):
    """The state after it is the state before it, one step on."""
    from tests.experiments.harness.training.test_step import Stepper

    config = tiny.config(train__skip_nonfinite=1)
    bad_batches(monkeypatch, config, 3)
    stepper = Stepper(config)
    stepper.step()
    before = jax.device_get(stepper.step())
    after = jax.device_get(stepper.step())
    assert (int(before.step), int(after.step)) == (2, 3)
    for part in ("params", "ema_params", "opt_state", "history"):
        tiny.assert_bit_equal(getattr(after, part), getattr(before, part))
    assert int(after.window.skipped_steps) == 1
    assert int(after.window.first_bad_step) == -1


def test_a_step_that_is_not_finite_is_described(tmp_path, monkeypatch):
    config = tiny.config()
    bad_batches(monkeypatch, config, 7)
    with pytest.raises(RunError) as error:
        train(config, tmp_path)
    message = str(error.value)
    assert message.startswith("the loss is not finite at step 7 (loss by quartile of t: inf, inf, ")
    assert "norm of the gradient by module: " in message
    assert all(f"{name} " in message for name in ("conv", "gain"))
    assert "step 4 is the last saved" in message
    assert "config.train.learning_rate" in message
    assert "\n" not in message


def test_parameters_that_are_not_finite_stop_the_run(tmp_path):
    """A rate of 10³⁹ is infinite in float32; loss and gradient are fine."""
    config = tiny.config(train__learning_rate=1e39, train__warmup_steps=1, train__decay="constant")
    with pytest.raises(
        RunError, match=r"the updated parameter is not finite at.*no checkpoint was saved"
    ):
        train(config, tmp_path)


def test_a_change_that_is_allowed_by_name_is_recorded(tmp_path):
    train(tiny.config(train__decay="constant", train__num_steps=4), tmp_path)
    changed = {"train__decay": "constant", "train__num_steps": 8, "train__learning_rate": 0.01}
    with pytest.raises(ConfigError, match=r"train\.learning_rate was 0\.02, now 0\.01"):
        train(tiny.config(**changed), tmp_path)
    allowing = {**changed, "train__allow_changes": ("train.learning_rate",)}
    train(tiny.config(**allowing, train__log_every=4), tmp_path)
    lines = (tmp_path / record.CHANGES_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "step": 4,
            "changes": ["train.learning_rate was 0.02, now 0.01", "train.num_steps was 4, now 8"],
        }
    ]
    train(tiny.config(**changed), tmp_path)  # which is what it is now
    with pytest.raises(ConfigError, match=r"is no setting; did you mean train\.learning_rate"):
        train(tiny.config(**changed, train__allow_changes=("train.learning_rat",)), tmp_path)


def test_other_data_are_refused_and_allowed_by_name(tmp_path):
    """Of the same shape and another number: every batch would be another."""
    config, data = tiny.config(), record.DataSummary(1000, (8, 8, 1))
    tiny.save(tmp_path, {4: (tiny.state_of(config), 1.0)})
    record.record_data(tmp_path, data)
    record.check_data(config, tmp_path, data)
    fewer = data._replace(num_examples=999)
    with pytest.raises(ConfigError, match=r"a run on 1000 images .* now has 999"):
        record.check_data(config, tmp_path, fewer)
    record.check_data(tiny.config(train__allow_changes=("data.",)), tmp_path, fewer)


def test_an_image_that_cannot_be_read_loses_no_step(uninterrupted, tmp_path, monkeypatch):
    """The state before it is saved; once it can, the run goes on and ends as if it always could."""

    def fail():
        raise ConfigError("a.png cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(order, "batch_indices", tiny.Interruption(7, order.batch_indices, fail))
        with pytest.raises(RunError, match=r"a\.png cannot be read; step 7 is saved"):
            train(uninterrupted[0], tmp_path)
    assert_ends_as(uninterrupted, tmp_path)


def test_a_few_random_kills_change_nothing(capsys, monkeypatch):
    """The short form of `python -m tests.stress.kill`: both stops are inside a save."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    smaller = {
        "train.checkpoint_every": 15,
        "train.sample_every": 60,
        "train.warmup_steps": 20,
        "train.num_steps": 65,  # as in the arguments, so that main's change is undone
        "model.unet.channels": 4,
    }
    for name, value in smaller.items():
        monkeypatch.setitem(kill.SETTINGS, name, value)
    arguments = ["--times=1", "--steps=65", "--seed=5", "--experiment=train"]
    assert kill.main(arguments) == 0
    assert "1 of 1 bit-equal" in capsys.readouterr().out
