"""Checkpoints whose files are not what was written."""

import json
import pathlib
import shutil

import pytest
from etils import epath

from experiments.harness.errors import ConfigError
from experiments.harness.setup.trained import load_ema
from experiments.harness.workdir import checksums
from experiments.harness.workdir.checkpoints import Checkpoints, DamagedError
from tests.experiments import tiny
from tests.experiments.faults import assert_ends_as, files_of

pytest_plugins = ["tests.experiments.tiny", "tests.experiments.faults"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x11
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS = {"flip": flip, "truncate": truncate, "remove": pathlib.Path.unlink}


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

    def train_on(checkpoint, *file):
        if not removed and not file:
            removed.append(checkpoint.name)
            with Checkpoints(workdir, keep_last=1) as checkpoints:
                checkpoints.save(4, three[1][3], validation=0.5)
                assert checkpoints.steps() == [4]
        return damage(checkpoint, *file)

    monkeypatch.setattr(checksums, "damage", train_on)
    assert load_ema(workdir, "best", three[1][3]["ema_params"])[1] == 4
    assert removed == ["3"]
