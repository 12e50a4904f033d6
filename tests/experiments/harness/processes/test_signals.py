"""SIGTERM and SIGINT at every point of a run."""

import os
import signal
import time

import pytest

from experiments import train
from experiments.harness import command_line
from experiments.harness.data import order
from experiments.harness.processes import signals
from experiments.harness.setup.trained import load_ema
from tests.experiments import tiny
from tests.experiments.faults import AT_STEP, assert_ends_as, last_line, program

pytest_plugins = ["tests.experiments.tiny", "tests.experiments.faults"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 6), (signal.SIGINT, 7)])
def test_a_signal_saves_and_ends_and_changes_nothing(number, step, uninterrupted, tmp_path, capfd):
    """In the batch of a step: it is still taken. After step 7 nothing is due, after 8 all is."""
    config, _, _ = uninterrupted
    with pytest.MonkeyPatch.context() as patch:
        send = tiny.Interruption(step, order.batch_indices, lambda: os.kill(os.getpid(), number))
        patch.setattr(order, "batch_indices", send)
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


@pytest.mark.parametrize(("name", "step"), [("make_quick_bound", 4), ("Drawer", 6)])
def test_a_signal_interrupts_validation_and_samples(
    name, step, uninterrupted, tmp_path, monkeypatch
):
    """They are not needed by the steps to come, and the resumed run does them again."""

    def compute(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(train, name, lambda *args: compute)
        started = time.monotonic()
        assert command_line.run("train", uninterrupted[0], str(tmp_path)) == 143
        assert time.monotonic() - started < 50
    assert max(tiny.saved_steps(tmp_path)) == step
    assert_ends_as(uninterrupted, tmp_path)


def test_a_signal_at_the_last_step_leaves_what_is_due_to_the_next_run(uninterrupted, tmp_path):
    config, _, _ = uninterrupted
    with pytest.MonkeyPatch.context() as patch:
        send = tiny.Interruption(
            11, order.batch_indices, lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
        patch.setattr(order, "batch_indices", send)
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
