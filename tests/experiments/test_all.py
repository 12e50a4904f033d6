"""The main job: train, evaluate and sample, each only if it is not done already."""

import json

import numpy as np
import pytest

from experiments import all as main_job
from experiments import evaluate, sample
from experiments.harness.errors import ConfigError
from experiments.harness.workdir import record
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_a_second_run_says_that_it_is_finished_and_does_nothing(finished, tmp_path, capsys):
    workdir = tiny.copy(finished.workdir, tmp_path)
    before = tiny.files(workdir)
    main_job.run(finished.config, workdir)
    said, result = capsys.readouterr().out.strip().splitlines()
    assert "is finished" in said
    assert result == finished.output.strip().splitlines()[-1]
    after = tiny.files(workdir)
    assert after.keys() == before.keys()
    changed = {path.name for path in before if path.is_file() and after[path] != before[path]}
    assert changed <= {"config.json"}
    assert after[workdir / "config.json"][1] == before[workdir / "config.json"][1]


def test_a_missing_part_of_a_finished_run_is_done_again(finished, tmp_path, capsys):
    workdir = tiny.copy(finished.workdir, tmp_path)
    before = tiny.files(workdir)
    main_job.run(tiny.config("unet", sample__num_samples=3), workdir)
    assert "is finished" not in capsys.readouterr().out
    with np.load(workdir / "samples" / "samples.npz") as made:
        assert made["samples"].shape == (3, 8, 8, 1)
    (workdir / "samples" / "samples.npz").unlink()
    main_job.run(finished.config, workdir)
    after = tiny.files(workdir)
    # Not evaluated again, and the six samples are the same as ever.
    for name in ("evaluation.json", "evaluation.npz", "evaluations.jsonl"):
        assert after[workdir / name] == before[workdir / name]
    name = workdir / "samples" / "samples.png"
    assert after[name][0] > before[name][0]
    assert after[name][1] == before[name][1]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"sample__num_samples": 5}, "sample"),
        ({"evaluate__split": "validation"}, "evaluate"),
        ({"sample__batch_size": 3, "evaluate__batch_size": 3, "evaluate__chunk_size": 1}, None),
    ],
)
def test_changed_settings_repeat_the_part_that_depends_on_them(
    change, part, finished, tmp_path, capsys, monkeypatch
):
    """`workdir.provenance` says which part depends on which settings."""
    result = json.loads((finished.workdir / "evaluation.json").read_text())
    done = []
    for module, returned in ((sample, None), (evaluate, result)):
        name = module.__name__.rpartition(".")[2]

        def do(config, workdir, checked, name=name, returned=returned):
            done.append(name)
            return returned

        monkeypatch.setattr(module, name, do)
    main_job.run(tiny.config("unet", **change), tiny.copy(finished.workdir, tmp_path))
    assert done == ([part] if part else [])
    assert ("is finished" in capsys.readouterr().out) == (part is None)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"PK\x03\x04"])
@pytest.mark.parametrize(
    ("name", "read"),
    [("evaluation.json", "_evaluation"), ("samples/samples.npz", "_is_sampled")],
)
def test_a_damaged_result_is_none(name, read, content, finished, tmp_path, capsys):
    workdir = tiny.copy(finished.workdir, tmp_path)
    assert getattr(main_job, read)(finished.config, workdir)
    (workdir / name).write_bytes(content)
    assert not getattr(main_job, read)(finished.config, workdir)
    assert f"{workdir / name} is damaged" in capsys.readouterr().out


def test_settings_of_all_parts_are_checked_before_training(tmp_path):
    """The main job checks what it needs at its end before its beginning."""
    with pytest.raises(ConfigError, match=r"config\.sample\.strip_rows = 0"):
        main_job.run(tiny.config(sample__strip_rows=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert record.recorded_config(tmp_path / "run") is None
