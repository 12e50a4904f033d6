import json
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from experiments.harness.pictures.images import save_png
from experiments.harness.workdir import metrics
from experiments.harness.workdir.files import append_jsonl, write_json
from experiments.harness.workdir.metrics import MetricsLog

pytest_plugins = ["tests.experiments.tiny"]


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write_steps(log, steps):
    for step in steps:
        log.write(step, loss=float(step))


def events(workdir):
    """TensorBoard's events in writing order: records of length, checksum, event, checksum."""
    found = []
    for path in sorted(workdir.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(workdir):
    return [(v.tag, e.step, v.simple_value) for e in events(workdir) for v in e.summary.value]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    with MetricsLog(tmp_path / "new") as log:
        log.write(3, loss=jnp.float32(0.5), by_quartile=np.array([1.0, 2.0]), note="warm-up")
        text = (tmp_path / "new" / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "loss": 0.5, "by_quartile": [1.0, 2.0], "note": "warm-up"}\n'


def test_what_is_not_finite_becomes_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        values = [float("nan"), jnp.float32(jnp.inf), jnp.bfloat16(jnp.nan), np.array([1, -np.inf])]
        log.write(1, a=values[0], b=values[1], c=values[2], d=values[3])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "a": null, "b": null, "c": null, "d": [1.0, null]}\n'
    assert scalars(tmp_path) == []


@pytest.mark.parametrize("half_written", [b"", b'{"step": 6, "lo', b'{"step": 6', b"\x00\x00\xff"])
def test_a_resumed_run_repeats_and_misses_no_line(tmp_path, half_written):
    with MetricsLog(tmp_path) as log:
        write_steps(log, range(6))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(half_written)
    with MetricsLog(tmp_path, resume_step=3) as log:
        # The rest stays as it was, to the byte.
        expected = [f'{{"step": {step}, "loss": {float(step)}}}\n' for step in range(4)]
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(expected)
        write_steps(log, range(4, 8))
    assert read_lines(tmp_path) == [{"step": step, "loss": float(step)} for step in range(8)]
    assert {p.name for p in tmp_path.iterdir() if "tfevents" not in p.name} == {"metrics.jsonl"}


def test_a_run_from_the_start_leaves_no_line_of_an_earlier_one(tmp_path):
    with MetricsLog(tmp_path) as log:
        write_steps(log, range(3))
    with MetricsLog(tmp_path) as log:
        write_steps(log, range(2))
    assert [line["step"] for line in read_lines(tmp_path)] == [0, 1]


def test_tensorboard_gets_the_scalars_and_drops_what_a_resumed_run_repeats(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, loss=0.5, by_quartile=[1.0, 2.0], note="text")
        log.write(2, loss=0.25)
    assert scalars(tmp_path) == [("loss", 1, 0.5), ("loss", 2, 0.25)]
    time.sleep(0.01)
    with MetricsLog(tmp_path, resume_step=1) as log:
        log.write(2, loss=0.125)
    assert scalars(tmp_path)[-1] == ("loss", 2, 0.125)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == e.session_log.START]
    assert starts == [0, 2]


@pytest.mark.parametrize("channels", [1, 3])
def test_tensorboard_gets_pictures(tmp_path, channels):
    save_png(tmp_path / "a.png", np.zeros((6, 9, channels), np.uint8))
    metrics.show(tmp_path, 4, pictures={"samples": tmp_path / "a.png"})
    (value,) = [v for e in events(tmp_path) for v in e.summary.value]
    image = value.image
    assert (value.tag, image.height, image.width, image.colorspace) == ("samples", 6, 9, channels)
    assert image.encoded_image_string == (tmp_path / "a.png").read_bytes()


def test_tensorboard_gets_the_settings_and_results_of_a_run(finished):
    values = [v for e in events(finished.workdir) for v in e.summary.value]
    result = json.loads((finished.workdir / "evaluation.json").read_text())
    scalars = {v.tag: v.simple_value for v in values if v.HasField("simple_value")}
    for name in ("bits_per_dim", "bits_per_dim_se", "bits_per_dim_mc_se", "prior"):
        assert scalars[f"test/{name}"] == np.float32(result[name])
    pictures = {v.tag for v in values if v.HasField("image")}
    assert {"test/kl_per_timestep", "test/rate_distortion", "samples"} < pictures
    assert {"samples/samples", "samples/reverse", "samples/forward"} < pictures
    (settings,) = [v for v in values if v.tag == "_hparams_/session_start_info"]
    hparams = HParamsPluginData.FromString(settings.metadata.plugin_data.content)
    hparams = hparams.session_start_info.hparams
    assert hparams["train.batch_size"].number_value == 16
    assert hparams["model.unet.channel_multipliers"].string_value
    assert "evaluate.split" not in hparams


def test_json_files_are_strict_and_whole(tmp_path):
    path = tmp_path / "evaluation.json"
    write_json(path, {"bits_per_dim": np.float64(2.2), "prior": float("nan"), "shape": (8, 8)})

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == {"bits_per_dim": 2.2, "prior": None, "shape": [8, 8]}
    with pytest.raises(TypeError):
        write_json(path, {"model": object()})
    assert json.loads(path.read_text()) == read
    write_json(path, {"name": "β"})
    assert json.loads(path.read_text()) == {"name": "β"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    from etils import epath

    def fail(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(epath.Path(path)), "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_appended_lines_are_lines_of_their_own(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    append_jsonl(path, {"step": 1, "prior": float("inf")})
    with path.open("a") as file:
        file.write('{"step": 2')
    append_jsonl(path, {"step": 3})
    assert path.read_text().splitlines() == [
        '{"step": 1, "prior": null}',
        '{"step": 2',
        '{"step": 3}',
    ]
