"""Every way for a run to come to grief, brought about; and what is left of it afterwards."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from diffusion.objectives import OBJECTIVES, Objective, vlb
from experiments.harness import checksums, command_line, data, lock, settings, signals
from experiments.harness import workdir as workdirs
from experiments.harness.checkpoints import Checkpoints, DamagedError, load_ema
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.metrics import MetricsLog
from experiments.harness.state import learning_rate
from experiments.train import train
from tests.experiments import tiny
from tests.stress import kill

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, quick_compiles):
    """Twelve steps of the convolution: config, work directory, final state."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return tiny.config(), workdir, train(tiny.config(), workdir)


def assert_ends_as(uninterrupted, workdir):
    """Goes on with the run, and compares all that it leaves with the one that nothing stopped."""
    config, whole, expected = uninterrupted
    tiny.assert_bit_equal(train(config, workdir), expected)
    assert tiny.metrics(workdir) == tiny.metrics(whole)
    assert tiny.saved_steps(workdir) == tiny.saved_steps(whole)
    assert tiny.best_step(workdir) == tiny.best_step(whole)
    names = {"checkpoints", "config.json", "data.json", "metrics.jsonl", "samples"}
    names.add("damaged_checkpoints")
    assert {p.name for p in workdir.iterdir() if "tfevents" not in p.name} <= names


PROGRAM = """
import os, signal, sys, time
from experiments.harness import command_line, data
from tests.experiments import tiny
workdir = sys.argv[1]
{before}
status = command_line.run("train", tiny.config(), workdir)
print("left behind")
sys.exit(status)
"""
AT_STEP = """
def do():
    {do}
data.batch_indices = tiny.Interruption({step}, data.batch_indices, do)
"""


def program(before, workdir, environment, **variables):
    """The trainer in a process of its own, after a few lines of preparation."""
    command = [sys.executable, "-c", PROGRAM.format(before=before), str(workdir)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, **variables
    )


def last_line(text):
    return text.replace("\r", "\n").strip().splitlines()[-1]


# Signals.


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 6), (signal.SIGINT, 7)])
def test_a_signal_saves_and_ends_and_changes_nothing(number, step, uninterrupted, tmp_path, capfd):
    """In the batch of a step: it is still taken. After step 7 nothing is due, after 8 all is."""
    config, _, _ = uninterrupted
    with pytest.MonkeyPatch.context() as patch:
        send = tiny.Interruption(step, data.batch_indices, lambda: os.kill(os.getpid(), number))
        patch.setattr(data, "batch_indices", send)
        assert command_line.run("train", config, str(tmp_path)) == 128 + number
    line = last_line(capfd.readouterr().err)
    assert line == (
        f"error: interrupted by {number.name}; step {step + 1} is saved in {tmp_path}; "
        "the same command goes on from there"
    )
    assert tiny.saved_steps(tmp_path) == [4, step + 1]
    # What evaluates the latest takes it; it has no metric, and so is never the best.
    like = tiny.state_of(config).ema_params
    assert load_ema(tmp_path, "latest", like)[1] == step + 1
    assert load_ema(tmp_path, "best", like)[1] == 4
    assert_ends_as(uninterrupted, tmp_path)
    assert not (tmp_path / "interrupted").exists()


@pytest.mark.parametrize("what", ["quick_bound", "preview"])
def test_a_signal_ends_what_is_only_looked_at(what, uninterrupted, tmp_path, monkeypatch):
    """The bound on validation and the samples are made again by the run that goes on."""
    from experiments.harness import loop as module

    build = module.Trainer.__init__

    def init(self, *args):
        build(self, *args)
        do = getattr(self, what)

        def stopped(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            return do(*args)

        setattr(self, what, stopped)

    config, _, _ = uninterrupted
    with monkeypatch.context() as patch:
        patch.setattr(module.Trainer, "__init__", init)
        started = time.monotonic()
        assert command_line.run("train", config, str(tmp_path)) == 143
        assert time.monotonic() - started < 50
    step = {"quick_bound": 4, "preview": 6}[what]
    assert max(tiny.saved_steps(tmp_path)) == step
    assert_ends_as(uninterrupted, tmp_path)


def test_a_signal_at_the_last_step_leaves_what_is_due_to_the_next_run(uninterrupted, tmp_path):
    config, _, _ = uninterrupted
    with pytest.MonkeyPatch.context() as patch:
        send = tiny.Interruption(
            11, data.batch_indices, lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
        patch.setattr(data, "batch_indices", send)
        assert command_line.run("train", config, str(tmp_path)) == 143
    assert [line["step"] for line in tiny.metrics(tmp_path)][-1] == 10
    assert_ends_as(uninterrupted, tmp_path)


def test_a_second_signal_leaves_at_once_without_harm(uninterrupted, tmp_path, quick_compiles):
    before = AT_STEP.format(
        step=6,
        do="os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.5);"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
    )
    started = time.monotonic()
    ended = program(before, tmp_path, quick_compiles)
    assert ended.returncode == 143
    assert time.monotonic() - started < 55
    assert "left behind" not in ended.stdout
    assert "a second one leaves at once" in ended.stderr
    assert last_line(ended.stderr).startswith("error: interrupted by SIGTERM")
    assert max(tiny.saved_steps(tmp_path)) == 4
    assert_ends_as(uninterrupted, tmp_path)


def test_a_signal_while_python_does_not_run_ends_the_program(tmp_path, quick_compiles):
    """As in a compilation: here in C code that holds no lock and heeds no signal."""
    before = AT_STEP.format(
        step=0,
        do="import hashlib, threading;"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start();"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    )
    started = time.monotonic()
    ended = program(before, tmp_path, quick_compiles)
    assert ended.returncode == 130, ended.stderr
    assert last_line(ended.stderr).startswith("error: interrupted by SIGINT; the same command")
    assert time.monotonic() - started < 60


def test_outside_of_training_a_signal_raises_where_it_comes():
    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with signals.listening(), pytest.raises(signals.Interrupted) as interrupted:
        work()
    assert interrupted.value.status == 143
    with signals.listening():  # and is forgotten
        signals.check()


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with signals.listening():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


# Damaged checkpoints.


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x11
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS = {"flip": flip, "truncate": truncate, "remove": pathlib.Path.unlink}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A work directory with three checkpoints, ever better, and the last one's state."""
    workdir = tmp_path_factory.mktemp("three")
    # Large enough to lie in files of their own, beside small ones.
    states = {
        step: {"ema_params": {"w": jax.random.normal(jax.random.key(step), (64, 64))}, "n": step}
        for step in (1, 2, 3)
    }
    states = {step: jax.tree.map(jnp.asarray, state) for step, state in states.items()}
    with Checkpoints(workdir) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, 5.0 - step)
    return workdir, states


def files_of(checkpoint):
    return sorted(p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file())


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_file_is_damaged_no_other_state_is_restored(fault, three, tmp_path):
    """Of each file in turn: the state as it was, or the one before; never another, never a crash.

    Where orbax ignores a file, as that of the commit, the state is restored.
    """
    workdir, states = three
    fell_back = set()
    for i, file in enumerate(files_of(workdir / "checkpoints" / "3")):
        copy = tmp_path / str(i)
        shutil.copytree(workdir, copy)
        FAULTS[fault](copy / "checkpoints" / "3" / file)
        before = tiny.files(copy)
        for which in ("best", "latest"):
            restored, step = load_ema(copy, which, states[3]["ema_params"])
            tiny.assert_bit_equal(restored, states[step]["ema_params"])
        assert tiny.files(copy) == before  # a reader moves nothing
        with Checkpoints(copy) as checkpoints:
            state = checkpoints.first_good(
                "latest", lambda step, c=checkpoints: c.restore(step, states[3])
            )
            tiny.assert_bit_equal(state, states[int(state["n"])])
        if int(state["n"]) == 2:
            fell_back.add(file.name)
            assert (copy / "damaged_checkpoints" / "3" / "default").is_dir()
            assert tiny.saved_steps(copy) == [1, 2]
        else:
            assert tiny.saved_steps(copy) == [1, 2, 3]
    assert {"manifest.ocdbt", "_METADATA", "process_0", "metrics"} <= fell_back
    assert fell_back.isdisjoint({"commit_success.txt", "_CHECKPOINT_METADATA"})
    assert len(fell_back) >= 8


def test_every_checkpoint_has_a_checksum_of_every_file_that_is_read(three):
    workdir, _ = three
    for step in (1, 2, 3):
        checkpoint = workdir / "checkpoints" / str(step)
        sums = json.loads((checkpoint / "default" / "checksums.json").read_text())
        unchecked = {"checksums.json", "commit_success.txt", "_CHECKPOINT_METADATA"}
        assert set(sums) == {str(f) for f in files_of(checkpoint) if f.name not in unchecked}
        assert checksums.damage(epath.Path(checkpoint)) is None


def test_a_damaged_checkpoint_is_told_of_in_a_line(three, tmp_path, capsys):
    workdir = tiny.copy(three[0], tmp_path)
    flip(workdir / "checkpoints" / "3" / "default" / "manifest.ocdbt")
    with pytest.raises(DamagedError), Checkpoints(workdir) as checkpoints:
        checkpoints.restore(3, three[1][3])
    capsys.readouterr()
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.choose("best") == 2
        assert checkpoints.save(3, three[1][3])  # its name is free again
    assert capsys.readouterr().out == (
        f"warning: workdir={workdir}: the checkpoint at step 3 is damaged (default/manifest.ocdbt "
        f"is not as it was written); it was moved to {workdir}/damaged_checkpoints/3\n"
    )


def test_a_metric_that_was_changed_chooses_nothing(three, tmp_path):
    """Still JSON, and the best by far."""
    workdir = tiny.copy(three[0], tmp_path)
    path = workdir / "checkpoints" / "1" / "metrics" / "metrics"
    path.write_text(path.read_text().replace("4.0", "0.4"))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.best_step() == 3


def test_where_all_are_damaged_nothing_is_read(three, tmp_path):
    workdir = tiny.copy(three[0], tmp_path)
    for step in (1, 2, 3):
        flip(workdir / "checkpoints" / str(step) / "default" / "manifest.ocdbt")
    with pytest.raises(ConfigError, match="holds no checkpoint that is not damaged"):
        load_ema(workdir, "best", three[1][3]["ema_params"])


def test_a_checkpoint_without_checksums_is_of_an_earlier_version(three, tmp_path):
    workdir = tiny.copy(three[0], tmp_path)
    (workdir / "checkpoints" / "3" / "default" / "checksums.json").unlink()
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.choose("latest") == 3
        tiny.assert_bit_equal(checkpoints.restore(3, three[1][3]), three[1][3])


@pytest.mark.parametrize("damaged", [(12,), (8, 12), (4, 8, 12)])
def test_a_run_goes_on_from_the_newest_good_checkpoint(damaged, uninterrupted, tmp_path, capsys):
    """Down to the beginning."""
    workdir = tiny.copy(uninterrupted[1], tmp_path)
    for step in damaged:
        flip(workdir / "checkpoints" / str(step) / "default" / "manifest.ocdbt")
    assert_ends_as(uninterrupted, workdir)
    out = capsys.readouterr().out
    assert out.count("is damaged") == len(damaged)
    kept = {path.name for path in (workdir / "damaged_checkpoints").iterdir()}
    assert kept == {str(step) for step in damaged}


def test_a_reader_takes_the_next_where_training_removes_its_choice(three, tmp_path, monkeypatch):
    """Between the choice and the reading, as a run that goes on does it."""
    workdir = tiny.copy(three[0], tmp_path)
    removed, damage = [], checksums.damage

    def train_on(checkpoint):
        if not removed:
            removed.append(checkpoint.name)
            with Checkpoints(workdir, keep_last=1) as checkpoints:
                checkpoints.save(4, three[1][3], validation=0.5)
                assert checkpoints.steps() == [4]
        return damage(checkpoint)

    monkeypatch.setattr(checksums, "damage", train_on)
    assert load_ema(workdir, "best", three[1][3]["ema_params"])[1] == 4
    assert removed == ["3"]


# Killed, and out of space.


def test_killed_inside_a_save_a_run_goes_on(uninterrupted, tmp_path, quick_compiles):
    """While the checksums of the second checkpoint are being written."""
    before = """
from experiments.harness import checksums
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


def test_a_full_disk_stops_the_run_with_a_line(uninterrupted, tmp_path, monkeypatch, capfd):
    """When the second checkpoint is written, in the background."""
    write, calls = checksums.write, []

    def fail(item):
        calls.append(item)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(item))
        write(item)

    with monkeypatch.context() as patch:
        patch.setattr(checksums, "write", fail)
        assert command_line.run("train", uninterrupted[0], str(tmp_path)) == 1
    errors = [x for x in capfd.readouterr().err.replace("\r", "\n").splitlines() if "error:" in x]
    assert errors == [
        f"error: workdir={tmp_path}: the checkpoint at step 8 could not be written to "
        f"{tmp_path}/checkpoints (no space left on the device); those up to step 4 are intact; "
        "once it can, the same command goes on from there"
    ]
    assert tiny.saved_steps(tmp_path) == [4]
    assert_ends_as(uninterrupted, tmp_path)


def test_a_failed_save_removes_no_earlier_checkpoint(three, tmp_path, monkeypatch):
    def fail(item):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    workdir = tiny.copy(three[0], tmp_path)
    monkeypatch.setattr(checksums, "write", fail)
    with Checkpoints(workdir, keep_last=1) as checkpoints:
        checkpoints.save(4, three[1][3], validation=0.5)
        with pytest.raises(RunError, match="step 4 could not be written"):
            checkpoints.wait()
    assert tiny.saved_steps(workdir) == [1, 2, 3]


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


# Two runs.


def test_a_second_run_is_refused_while_the_first_one_lives(tmp_path, quick_compiles):
    held = "from experiments.harness import lock; import os, sys, time\n"
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


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", fail)
    with lock.held(tmp_path):
        pass
    with lock.held("gs://bucket/run"):
        pass
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert all(line.startswith("warning: workdir=") for line in told)


def test_a_lock_of_somebody_else_is_no_missing_lock(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(lock.fcntl, "flock", fail)
    refused = pytest.raises(ConfigError, match=r"training\.lock cannot be written \(Permission")
    with refused, lock.held(tmp_path):
        pass


def test_a_run_in_training_is_evaluated(uninterrupted, tmp_path):
    workdir = tiny.copy(uninterrupted[1], tmp_path)
    like = tiny.state_of(uninterrupted[0]).ema_params
    with lock.held(workdir):
        load_ema(workdir, "best", like)


# Steps that are not finite.


def bad_batches(monkeypatch, config, *steps):
    """An objective that is infinite in the batches of these steps."""
    images = settings.load_data(config, "train").images
    size = config.train.batch_size
    first = [data.batch_indices(0, step - 1, len(images), size)[0] for step in steps]
    marks = jnp.asarray(np.stack([images[i] for i in first]) / 8.0 - 1, jnp.float32)

    def objective(reverse, decoder, x_0, *rest):
        loss = vlb().discrete(reverse, decoder, x_0, *rest)
        bad = (x_0[0] == marks).all(axis=(1, 2, 3)).any()
        return loss._replace(term=jnp.where(bad, jnp.inf, loss.term))

    monkeypatch.setitem(OBJECTIVES, "vlb", lambda: Objective(objective, None))


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
    from tests.experiments.test_steps import Stepper

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
    assert "\n" not in message


def test_parameters_that_are_not_finite_stop_the_run(tmp_path):
    """A rate of 10³⁹ is infinite in float32; loss and gradient are fine."""
    config = tiny.config(train__learning_rate=1e39, train__warmup_steps=1, train__decay="constant")
    with pytest.raises(RunError, match="what the step makes of the parameters is not finite at"):
        train(config, tmp_path)


# Changed settings.


def test_a_change_that_is_allowed_by_name_is_recorded(tmp_path):
    train(tiny.config(train__decay="constant", train__num_steps=4), tmp_path)
    changed = {"train__decay": "constant", "train__num_steps": 8, "train__learning_rate": 0.01}
    with pytest.raises(ConfigError, match=r"train\.learning_rate was 0\.02, now 0\.01"):
        train(tiny.config(**changed), tmp_path)
    allowing = {**changed, "train__allow_changes": ("train.learning_rate",)}
    train(tiny.config(**allowing, train__log_every=4), tmp_path)
    lines = (tmp_path / workdirs.CHANGES_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "step": 4,
            "changes": ["train.learning_rate was 0.02, now 0.01", "train.num_steps was 4, now 8"],
        }
    ]
    train(tiny.config(**changed), tmp_path)  # which is what it is now
    with pytest.raises(
        ConfigError, match=r"which is no setting; did you mean train\.learning_rate"
    ):
        train(tiny.config(**changed, train__allow_changes=("train.learning_rat",)), tmp_path)


def test_other_data_are_refused_and_allowed_by_name(tmp_path):
    """Of the same shape and another number: every batch would be another."""
    config, source = tiny.config(), settings.describe_data(tiny.config(), "train")
    tiny.save(tmp_path, {4: (tiny.state_of(config), 1.0)})
    workdirs.record_data(tmp_path, source)
    workdirs.check_data(config, tmp_path, source)
    fewer = source._replace(num_examples=source.num_examples - 1)
    with pytest.raises(ConfigError, match=r"a run on 1000 images .* now has 999"):
        workdirs.check_data(config, tmp_path, fewer)
    workdirs.check_data(tiny.config(train__allow_changes=("data.",)), tmp_path, fewer)


def test_an_image_that_cannot_be_read_loses_no_step(uninterrupted, tmp_path, monkeypatch):
    """The state before it is saved; once it can, the run goes on and ends as if it always could."""

    def fail():
        raise ConfigError("a.png cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(data, "batch_indices", tiny.Interruption(7, data.batch_indices, fail))
        with pytest.raises(RunError, match=r"a\.png cannot be read; step 7 is saved"):
            train(uninterrupted[0], tmp_path)
    assert_ends_as(uninterrupted, tmp_path)


# All of it, at random.


def test_a_few_random_kills_change_nothing(capsys):
    """The short form of `python -m tests.stress.kill`: both stops are inside a save."""
    arguments = ["--times=1", "--steps=220", "--seed=5", "--experiment=train"]
    assert kill.main(arguments) == 0
    assert "1 of 1 bit-equal" in capsys.readouterr().out
