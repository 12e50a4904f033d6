"""A part of the bad inputs, and inputs that may look bad but are good."""

import pytest

from tests.stress import bad_inputs, command, inputs
from tests.stress.bad_inputs import GROUPS
from tests.stress.case import Case

QUICK = [*bad_inputs.flags(), *bad_inputs.config_files()]
SLOW = [
    (group, case) for group in ("settings", "paths", "data", "studies") for case in GROUPS[group]()
]
SAMPLE = [case for _, case in inputs.sample(SLOW, 24, seed=0)]
CASES = [*QUICK, *SAMPLE, *bad_inputs.processes()]


@pytest.mark.parametrize("case", CASES, ids=[case.name[:60] for case in CASES])
def test_a_bad_input_is_refused_in_one_line_and_nothing_is_written(case):
    assert inputs.exceptions(case) == []


def test_an_input_that_is_not_refused_is_an_exception(tmp_path):
    """It writes, ends with status 0, and prints no error: the table has a line of each."""
    make = lambda here: (here / "a.py").write_text("import os; open('b', 'w'); os._exit(0)")  # noqa: E731
    case = Case("a", ("--config={here}/a.py",), "a", make, directory="{here}")
    found = "\n".join(inputs.exceptions(case))
    assert all(text in found for text in ("status 0", "not one line", "wrote")), found


def refusal(*flags, **options):
    """The line about a batch size that is wrong: what comes before it was accepted."""
    ended = command.run([*flags, "--config.train.batch_size=0"], **options)
    assert ended.status == 2
    assert ended.stderr.count("\n") == 1
    return ended.stderr


def test_a_config_of_the_project_is_found_from_any_directory(tmp_path):
    for config in ("configs/digits.py", f"{command.ROOT}/configs/digits.py"):
        line = refusal(f"--config={config}", f"--workdir={tmp_path}/run", directory=tmp_path)
        assert line.startswith("error: config.train.batch_size = 0; it must be a whole number")


def test_a_whole_number_may_be_written_with_an_exponent(tmp_path):
    flags = ("--workdir", f"{tmp_path}/run", "--config.train.num_steps", "1e1")
    ended = command.run([*flags, "--config.train.warmup_steps=1.1E+1"])
    assert "warmup_steps = 11; it must be at most config.train.num_steps = 10" in ended.stderr


def test_home_is_found_in_the_path_of_a_work_directory(tmp_path):
    """Shells leave the ~ of --workdir=~/run as it is."""
    (tmp_path / "run").write_text("")
    ended = command.run(["--workdir=~/run"], environment={"HOME": str(tmp_path)})
    assert ended.stderr.startswith(f"error: workdir={tmp_path}/run: {tmp_path}/run is a file")


def test_an_output_in_ascii_loses_no_result(tmp_path):
    environment = {"PYTHONIOENCODING": "ascii"}
    ended = command.run(["--helpconfig"], environment=environment)
    assert ended.status == 0, ended.stderr
    assert "\\u03b2_1 \\u2026 \\u03b2_N." in ended.stdout
