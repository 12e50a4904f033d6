"""What a user types and reads: one line for a mistake, one line for a result.

`tests.stress.inputs` has a table of mistakes.
"""

import pathlib
import re
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import base
from experiments.harness import arguments, command_line
from experiments.harness.data import order
from experiments.harness.errors import ConfigError
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = pathlib.Path(__file__).parents[3]


def main(*arguments, **variables):
    """`python main.py …` with what it printed, and the seconds of processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(
        [sys.executable, "main.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **variables,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return finished, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def error_line(stderr):
    """The one line that standard error holds."""
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n")
    return stderr.removeprefix("error: ").strip()


def run(capsys, experiment, config, workdir):
    """As main does once the flags are parsed: the exit status, and the line."""
    capsys.readouterr()
    status = command_line.run(experiment, config, workdir and str(workdir))
    return status, error_line(capsys.readouterr().err)


@pytest.fixture
def no_compilation():
    """Fails the test if anything is compiled."""
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_the_compilation_listener_listens():
    heard = []

    def listen(event, duration, **_):
        heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x * 17.3 + 1)(np.arange(7.0))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert any("backend_compile" in event for event in heard)


def test_a_data_set_that_is_not_there_says_how_to_get_it(tmp_path):
    finished, seconds = main(
        "--config=configs/cifar10.py",
        f"--config.data.data_dir={tmp_path}/data",
        f"--workdir={tmp_path}/run",
    )
    line = error_line(finished.stderr)
    assert line.startswith("config.data.name = 'cifar10'")
    assert f"{tmp_path}/data" in line
    assert "download_and_prepare" in line
    assert finished.returncode == 2
    assert not (tmp_path / "run").exists()
    assert seconds < 15


def test_a_project_with_a_colon_in_its_path_runs_where_it_lies(tmp_path, monkeypatch):
    """ml_collections cuts --config at a colon."""
    monkeypatch.setattr(arguments, "_ROOT", tmp_path / "a:b")
    (tmp_path / "a:b").mkdir()
    monkeypatch.chdir(tmp_path / "a:b")
    assert arguments._of_project("configs/digits.py") == "configs/digits.py"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"has a colon.*; run main\.py in "):
        arguments._of_project("configs/digits.py")


def test_help_lists_the_flags_and_needs_no_jax():
    script = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_path('main.py', "
    script += "run_name='__main__')\nexcept SystemExit: print('jax' in sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.stdout.splitlines()[-1] == "False", finished.stderr
    text = "".join(finished.stdout.split())  # lines are wrapped
    for flag in (
        "--config:",
        "--workdir:",
        "helpconfig",
        "<" + "|".join(arguments.EXPERIMENTS) + ">",
    ):
        assert flag in text
    assert "python main.py --config=configs/digits.py --workdir=runs/digits" in finished.stdout
    assert finished.stderr == ""


def test_every_setting_is_listed():
    finished, seconds = main("--helpconfig")
    lines = finished.stdout.splitlines()
    for name, setting in base.SETTINGS.flat():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert line.split(" ", 1)[1].lstrip().startswith(repr(setting.default))
    assert seconds < 5


@pytest.mark.parametrize("experiment", ["all", "train", "evaluate", "sample"])
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            {"model__unet__channel_multipliers": (1, 2, 2, 2, 2)},
            ("config.model.unet.channel_multipliers = (1, 2, 2, 2, 2)", "8×8", "at most 4"),
        ),
        (
            {"model__unet__channels": 10},
            ("config.model.unet.num_groups = 4", "10", "divisor of 10"),
        ),
        ({"model__unet__dropout": 1.5}, ("config.model.unet.dropout = 1.5", "[0, 1)")),
        (
            {"model__unet__noise_input": "t"},
            ("config.model.unet.noise_input = 't'", "log_snr, ddpm_timestep"),
        ),
        ({"data__name": "digit"}, ("config.data.name = 'digit'", "did you mean digits?")),
        (
            {"schedule__name": "linear_beta", "schedule__linear_beta__beta_end": 1.0},
            ("config.schedule.linear_beta.beta_end = 1.0", "it must be a number in (0, 1)"),
        ),
        ({"schedule__num_timesteps": 0}, ("num_timesteps = 0", "in [1, 10^7]")),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    experiment, overrides, parts, tmp_path, capsys, no_compilation
):
    status, line = run(capsys, experiment, tiny.config("unet", **overrides), tmp_path / "run")
    assert status == 2
    assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("experiment", ["all", "train", "evaluate", "sample"])
def test_a_missing_work_directory_is_one_line(experiment, capsys, no_compilation):
    for workdir in (None, ""):
        status, line = run(capsys, experiment, tiny.config(), workdir)
        assert status == 2
        assert line.startswith("--workdir is missing")


@pytest.mark.parametrize("experiment", ["evaluate", "sample"])
def test_a_work_directory_without_a_checkpoint_is_one_line(
    experiment, tmp_path, capsys, no_compilation
):
    (tmp_path / "empty").mkdir()
    for workdir in (tmp_path / "none", tmp_path / "empty"):
        status, line = run(capsys, experiment, tiny.config(), workdir)
        assert status == 2
        assert line.startswith(f"workdir={workdir} holds no checkpoint")
        assert "train first" in line
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("experiment", ["evaluate", "sample"])
def test_a_checkpoint_of_another_architecture_is_one_line(
    experiment, finished, tmp_path, capsys, no_compilation
):
    before = tiny.files(finished.workdir)
    config = tiny.config("unet", model__unet__channels=16)
    status, line = run(capsys, experiment, config, finished.workdir)
    assert status == 2
    assert line.startswith(f"workdir={finished.workdir} holds ")
    assert "model.unet.channels was 8, now 16" in line
    assert tiny.files(finished.workdir) == before
    # Where nobody wrote down the config, the checkpoint itself tells.
    workdir = tiny.copy(finished.workdir, tmp_path)
    (workdir / "config.json").unlink()
    before = tiny.files(workdir)
    status, line = run(capsys, experiment, config, workdir)
    assert status == 2
    assert "of another architecture" in line
    assert "(3, 3, 5, 8) float32 there and (3, 3, 5, 16) float32 here" in line
    assert tiny.files(workdir) == before


def test_a_resume_with_other_settings_is_one_line(finished, capsys, no_compilation):
    before = tiny.files(finished.workdir)
    config = tiny.config("unet", train__learning_rate=0.5, model__unet__dropout=0.3)
    status, line = run(capsys, "all", config, finished.workdir)
    assert status == 2
    assert line.startswith(f"workdir={finished.workdir} holds a run of another config: ")
    assert "model.unet.dropout was 0.1, now 0.3" in line
    assert "train.learning_rate was 0.02, now 0.5" in line
    assert "allow_changes" not in line  # another network cannot be trained further
    longer = tiny.config("unet", train__num_steps=24)
    status, line = run(capsys, "all", longer, finished.workdir)
    assert status == 2
    assert line.endswith("allow it by --config.train.allow_changes=\"('train.num_steps',)\"")
    assert tiny.files(finished.workdir) == before


def test_a_run_that_diverges_is_one_line(tmp_path, capsys):
    config = tiny.config(train__learning_rate=1e30, train__warmup_steps=1)
    status = command_line.run("train", config, str(tmp_path))
    lines = [x for x in re.split(r"[\r\n]", capsys.readouterr().err) if x.startswith("error: ")]
    assert status == 1
    assert len(lines) == 1
    assert "not finite at step 3" in lines[0]


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(order, "batch_indices", tiny.Interruption(6, order.batch_indices, interrupt))
        status = command_line.run("train", tiny.config(), str(tmp_path))
    lines = [x for x in re.split(r"[\r\n]", capsys.readouterr().err) if x.startswith("error: ")]
    assert status == 130
    assert lines == ["error: interrupted; the same command goes on from the last checkpoint"]
    assert command_line.run("train", tiny.config(), str(tmp_path)) == 0
    assert "trained to step 12" in capsys.readouterr().out


def test_an_experiment_cannot_change_its_config(tmp_path, capsys):
    config = tiny.config(seed=-1)
    with config.unlocked():
        run(capsys, "train", config, tmp_path)
        assert config.is_locked


def test_without_a_config_a_work_directory_goes_on_with_its_own(finished, tmp_path):
    """The finished run was no default digits: read as such, it would be refused."""
    workdir = tiny.copy(finished.workdir, tmp_path)
    done, _ = main(f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    said, result = done.stdout.strip().splitlines()
    assert "is finished" in said
    assert result == finished.output.strip().splitlines()[-1]
    refused, _ = main("--workdir", workdir, "--config.seed=1")
    assert "holds a run of another config: seed was 0, now 1;" in error_line(refused.stderr)
