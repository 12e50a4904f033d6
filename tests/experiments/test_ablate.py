"""Studies of two tiny networks: what they measure, kills, several processes, and refusals."""

import concurrent.futures
import errno
import json
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest

from diffusion.statistics.standard_errors import bits_per_dim
from experiments import ablate, evaluate, train
from experiments.harness import command_line
from experiments.harness.data import order
from experiments.harness.errors import RunError
from experiments.harness.study import measures, sharing
from experiments.harness.workdir import lock
from tests.experiments import tiny
from tests.experiments.tiny_study import SIMPLE, study_config, tables, totals
from tests.stress import command

pytest_plugins = ["tests.experiments.tiny", "tests.experiments.tiny_study"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_a_cell_is_a_run_and_its_bound_that_of_an_evaluation(studied):
    """Draw 0 of the noise is an evaluation's. Every experiment opens the work directory."""
    config = study_config(train__objective="simple")
    result = evaluate.evaluate(config, shutil.copytree(studied, studied / "copy") / SIMPLE)
    shutil.rmtree(studied / "copy")
    bound = totals(studied, "simple", "simple,seed=0")
    assert bound.shape == (result["num_examples"], config.ablate.draws)
    mean = bits_per_dim(bound[:, 0].mean(), 64)
    # Sums of float32 terms in another order.
    assert mean == pytest.approx(result["bits_per_dim"], rel=1e-5)


def test_a_finished_study_is_only_reported(studied, monkeypatch):
    before = tables(studied)
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(measures, "measure", None)
    ablate.ablate(study_config(), studied)
    assert tables(studied) == before


def test_a_study_that_was_killed_ends_as_if_it_had_not_been(studied, tmp_path, monkeypatch):
    """By a signal in the second training, then before the second measurement."""
    config, second = study_config(), []
    with monkeypatch.context() as patch:

        def indices(seed, step, *sizes):
            second.append(step == 1)
            if sum(second) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return make_indices(seed, step, *sizes)

        make_indices = order.batch_indices
        patch.setattr(order, "batch_indices", indices)
        assert command_line.run("ablate", config, str(tmp_path)) == 143
    assert tiny.saved_steps(tmp_path / SIMPLE)[-1] < 4
    assert json.loads((tmp_path / "ablation.json").read_text())["is_complete"] is False
    first = tiny.files(tmp_path / "cells/vlb,seed=0")
    with monkeypatch.context() as patch:
        patch.setattr(measures, "measure", None)
        with pytest.raises(TypeError):
            ablate.ablate(config, tmp_path)
    assert tiny.saved_steps(tmp_path / SIMPLE) == [4]
    ablate.ablate(config, tmp_path)
    assert tiny.files(tmp_path / "cells/vlb,seed=0") == first
    assert tables(tmp_path) == tables(studied)


def test_a_measure_that_has_no_value_is_kept_as_such(studied, tmp_path, monkeypatch):
    """The speed of a training without a line in its log is NaN, which JSON does not have."""
    config = study_config(train__objective="simple", ablate__measures=("speed",))
    place = shutil.copytree(studied / SIMPLE, tmp_path / "cell")
    monkeypatch.setattr(measures, "read_metrics", lambda _: [])
    measures.measure(("simple",), config, place, tmp_path)
    loaded = measures.load(("simple",), config, place)
    assert np.isnan(loaded.figures["images_per_second"])
    np.testing.assert_array_equal(loaded.totals, totals(studied, "simple", "simple,seed=0"))


CONFIG_FILE = """
from tests.experiments.tiny_study import study_config as get_config
"""


def test_two_processes_at_once_end_as_one(studied, tmp_path, quick_compiles):
    (tmp_path / "config.py").write_text(CONFIG_FILE)
    flags = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/study", "--experiment=ablate"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [pool.submit(command.run, flags, environment=quick_compiles) for _ in range(2)]
        ended = [run.result() for run in runs]
    assert [end.status for end in ended] == [0, 0], "\n".join(end.stderr for end in ended)
    began = sorted(line for end in ended for line in end.stdout.splitlines() if "cell " in line)
    assert began == ["cell simple,seed=0", "cell vlb,seed=0"]
    one, two = (
        json.loads((d / "ablation.json").read_text()) for d in (studied, tmp_path / "study")
    )
    assert_close(two, one)


def assert_close(actual, expected):
    """Programs that were compiled in another process may round otherwise."""
    if isinstance(expected, dict | list):
        assert len(actual) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_close(actual[key], expected[key])
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-4)
    else:
        assert actual == expected


def some_trainings(*names):
    return [sharing.Training(name, study_config(), ()) for name in names]


def hold(path, connection):
    """In a process of its own: holds a lock until it is killed."""
    with lock.attempted(path) as is_mine:
        connection.send(is_mine)
        time.sleep(600)


@pytest.fixture
def other_process():
    """Starts a process that holds the lock of a training, and ends it."""
    started = []

    def start(training, workdir):
        directory = training.directory(workdir)
        directory.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=hold, args=(directory / "cell.lock", there))
        process.start()
        started.append(process)
        assert here.recv()
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_what_a_dead_process_has_left_is_taken_over(tmp_path, monkeypatch, other_process):
    monkeypatch.setattr(sharing, "_SECONDS", 0.01)
    first, second = trainings = some_trainings("first", "second")
    process, worked = other_process(first, tmp_path), []

    def work(training):
        worked.append(training.name)
        if training is second:
            process.kill()
            process.join()

    sharing.work_off(trainings, tmp_path, work)
    assert worked == ["second", "first"]
    assert not list(tmp_path.rglob("*.lock"))


def test_one_training_is_refused_while_another_process_works_on_it(tmp_path, other_process):
    (training,) = some_trainings("first")
    process = other_process(training, tmp_path)
    with tiny.refused(training.name, f"process {process.pid}"):
        sharing.work_on(training, tmp_path, lambda training: None)


def refuse_locks(patch):
    def fail(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    patch.setattr(lock.fcntl, "flock", fail)


def test_without_locks_each_training_takes_a_command(studied, tmp_path, monkeypatch):
    refuse_locks(monkeypatch)
    with tiny.refused("without locks", "--config.ablate.cell=1 … 2"):
        ablate.ablate(study_config(), tmp_path)
    assert not (tmp_path / "cells").exists()
    for cell in (1, 2):
        ablate.ablate(study_config(ablate__cell=cell), tmp_path)
    assert tables(tmp_path) == tables(studied)


def test_in_a_bucket_each_training_takes_a_command():
    with pytest.raises(lock.NoLocksError, match="a bucket"), lock.attempted("gs://a/b.lock"):
        pass


def test_what_changes_is_measured_anew_and_nothing_else(studied, tmp_path, monkeypatch):
    """More draws of the noise begin with those of before; another seed has others."""
    workdir = tiny.copy(studied, tmp_path)
    before = totals(workdir, "vlb", "vlb,seed=0")
    monkeypatch.setattr(train, "train", lambda *arguments, **options: None)
    ablate.ablate(study_config(ablate__draws=3), workdir)
    after = totals(workdir, "vlb", "vlb,seed=0")
    np.testing.assert_allclose(after[:, :2], before, rtol=1e-6)
    assert after.shape[1] == 3
    ablate.ablate(study_config(seed=5), workdir)
    assert not np.isclose(totals(workdir, "vlb", "vlb,seed=0"), before).any()


def test_cells_of_one_network_are_measured_with_it(tmp_path):
    """Σ_θ and T on the axes, one training. The model's own Σ_θ is the one of its name, exactly."""
    own = {"own": {"evaluate.variance": ""}, "named": {"evaluate.variance": "beta_tilde"}}
    config = study_config(("Σ_θ", own), ("ablate.num_timesteps", (3, 8)))
    ablate.ablate(config, tmp_path)
    (training,) = (tmp_path / "cells").iterdir()
    assert training.name == "seed=0"
    for t in "38":
        one, other = (totals(tmp_path, f"{name},{t}", training.name) for name in own)
        np.testing.assert_array_equal(one, other)
    assert (totals(tmp_path, "own,3", training.name) > one).all()


def test_a_seed_that_fails_is_listed(tmp_path, monkeypatch):
    train_one = train.train

    def fail(config, place, **options):
        if config.seed == 3 and config.train.objective == "simple":
            raise RunError("the loss is nan")
        return train_one(config, place, **options)

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(RunError, match=r"1 of 4 trainings failed: simple,seed=3"):
        ablate.ablate(study_config(ablate__seeds=(0, 3)), tmp_path)
    text = (tmp_path / "ablation.md").read_text()
    assert "- failed: train.objective = simple, training seed 3: the loss is nan" in text
    assert "| 0; failed: 3 |" in text


def test_a_training_that_fails_leaves_the_others_and_is_tried_again(tmp_path, monkeypatch):
    began = []

    def fail(config, place, **options):
        began.append(place.name)
        raise RunError("the loss is nan")

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", fail)
        with pytest.raises(RunError, match=r"2 of 2 trainings failed: .*the loss is nan"):
            ablate.ablate(study_config(), tmp_path)
    assert began == ["vlb,seed=0", "simple,seed=0"]
    summary = ablate.ablate(study_config(), tmp_path)
    assert not summary.skipped
    assert len(summary.cells) == 2
