"""Pipelines of diffusers: what import reads of those that export writes, and what both refuse.

Torch is not needed. tests/parity/test_pipelines.py compares with diffusers.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import recorded
from experiments import export, import_, train
from experiments.harness import command_line
from experiments.harness.errors import ConfigError
from experiments.harness.setup import trained
from experiments.harness.training.state import make_setup
from experiments.harness.workdir.record import IMPORT_FILE
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

safetensors = pytest.importorskip("safetensors.numpy")

UNET = "unet/diffusion_pytorch_model.safetensors"


def exportable(**overrides):
    """A config of the digits whose network a pipeline can express."""
    settings = {
        "schedule__name": "linear_beta",
        "schedule__linear_beta__native_timesteps": 8,
        "model__unet__fourier_exponents": (),
        "model__unet__noise_input": "ddpm_timestep",
    }
    return tiny.config("unet", **settings | overrides)


def exported(directory: pathlib.Path, **overrides) -> pathlib.Path:
    """A folder that export wrote, of a network of random weights."""
    target = directory / "pipeline"
    config = exportable(diffusers__target=str(target), **overrides)
    export.export(config, tiny.untrained(directory / "run", config))
    return target


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, quick_compiles):
    """An exported pipeline. Shared: copy it before changing it."""
    return exported(tmp_path_factory.mktemp("exported"))


def import_from(source, workdir, **overrides):
    config = tiny.config("unet", diffusers__source=str(source), **overrides)
    return import_.import_network(config, workdir)


def edit(path: pathlib.Path, **changes):
    """Changes entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_import_of_an_export_gives_every_tensor_and_setting_back(pipeline, tmp_path):
    report = import_from(pipeline, tmp_path, seed=5, schedule__name="cosine")
    before = exportable(diffusers__source=str(pipeline))
    after = recorded.get_config(str(tmp_path))
    assert after.to_dict() == before.to_dict(), "the sidecar has the settings, not the config"
    run = trained.load(after, tmp_path, writes=False)
    saved = trained.load(before, pipeline.parent / "run", writes=False)
    tiny.assert_bit_equal(run.params, saved.params)
    assert report.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(run.params))
    assert report.assumed == []
    provenance = json.loads((tmp_path / IMPORT_FILE).read_text())
    assert len(provenance["files"][UNET]) == 64, "a SHA-256 digest"


def test_import_without_a_sidecar_takes_data_and_decoder_from_the_config(pipeline, tmp_path):
    """And the rest from the files. Here they lie flat, as in google/ddpm-cifar10-32."""
    flat = tmp_path / "flat"
    shutil.copytree(pipeline / "unet", flat)
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", flat)
    edit(flat / "scheduler_config.json", variance_type="fixed_large", prediction_type="epsilon")
    report = import_from(flat, tmp_path / "W", decoder__name="discretized_gaussian")
    config = recorded.get_config(str(tmp_path / "W"))
    assert config.decoder.name == "discretized_gaussian"
    assert (config.model.variance, config.model.parameterization) == ("beta", "eps")
    assert config.schedule.linear_beta.native_timesteps == 8
    assert config.model.unet.to_dict() == exportable().model.unet.to_dict()
    assert [s for s in report.assumed if "discretized_gaussian" in s]
    assert "no better than ε̂ = 0" in str(report), "random weights"
    # Shards with an index are the same weights.
    weights = safetensors.load_file(flat / "diffusion_pytorch_model.safetensors")
    (flat / "diffusion_pytorch_model.safetensors").unlink()
    names, shards = list(weights), ("a.safetensors", "b.safetensors")
    for shard, part in zip(shards, (names[::2], names[1::2]), strict=True):
        safetensors.save_file({name: weights[name] for name in part}, flat / shard)
    index = {name: shards[n % 2] for n, name in enumerate(names)}
    (flat / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    again = import_from(flat, tmp_path / "W2", decoder__name="discretized_gaussian")
    assert again.eps_error == report.eps_error


def test_an_imported_network_is_trained_in_another_work_directory(pipeline, tmp_path):
    import_from(pipeline, tmp_path / "W")
    config = recorded.get_config(str(tmp_path / "W"))
    with pytest.raises(ConfigError, match=r"holds an imported network.*train\.init_from="):
        train.train(config, tmp_path / "W")
    config.train.init_from = str(tmp_path / "W")
    params = train.initial_params(make_setup(config), tmp_path / "new")()
    tiny.assert_bit_equal(params, trained.load(config, tmp_path / "W", writes=False).params)


def test_the_command_line_runs_both(pipeline, tmp_path, capsys):
    """The module of `import` cannot have this name."""
    config = tiny.config("unet", diffusers__source=str(tmp_path / "nowhere"))
    for experiment, message in (("import", "is no folder"), ("export", "config.diffusers.target")):
        assert command_line.run(experiment, config, str(tmp_path / "W")) == 2
        assert message in capsys.readouterr().err


def classes(num_rows):
    """A pipeline whose table of labels has this many rows."""

    def change(pipeline):
        edit(pipeline / "unet/config.json", num_class_embeds=num_rows)

    return change


def truncate(pipeline):
    path = pipeline / UNET
    path.write_bytes(path.read_bytes()[:-5])


def reshape(pipeline, shape=(9,)):
    weights = safetensors.load_file(pipeline / UNET)
    safetensors.save_file(weights | {"conv_in.bias": np.zeros(shape, np.float32)}, pipeline / UNET)


def options(name, **changes):
    return lambda pipeline: edit(pipeline / name, **changes)


def remove(name):
    return lambda pipeline: (pipeline / name).unlink()


BAD = [
    (remove("unet/config.json"), "config.json is missing"),
    (remove(UNET), "holds no weights; expected diffusion_pytorch_model.safetensors"),
    (truncate, "safetensors is damaged or incomplete"),
    (reshape, r"conv_in.bias has shape \(9,\)"),
    (lambda p: reshape(p, (2, 2, 2)), r"conv_in.bias has shape \(2, 2, 2\)"),
    (options("unet/config.json", layers_per_block=2), "weights missing or left over: down_blocks"),
    (options("unet/config.json", sample_size=32), r"images of shape \(32, 32, 1\), .*'digits'"),
    (options("unet/config.json", down_block_types=["SkipDownBlock2D"] * 2), "supported: 2 of Down"),
    (options("unet/config.json", act_fn="gelu"), "act_fn = 'gelu'; supported: 'silu'"),
    (options("unet/config.json", new_option=1), "unknown option new_option"),
    (options("unet/config.json", block_out_channels=[8, 4]), "none below the first"),
    (options("unet/config.json", out_channels=2), "out_channels = 2; Σ_θ = beta_tilde needs 1"),
    (options("unet/config.json", _class_name="UNet2DConditionModel"), "receives a text"),
    (options("model_index.json", vqvae=["diffusers", "VQModel"]), "a bound on their density"),
    (options("model_index.json", tokenizer=["transformers", "T"]), "text-conditional"),
    (options("unet/config.json", sample_size=8.5), "an option has a wrong type"),
    (options("unet/config.json", layers_per_block="1"), "layers_per_block = '1'; supported"),
    (options("unet/config.json", norm_eps=float("inf")), "norm_epsilon = inf; it must be"),
    (options("scheduler/scheduler_config.json", beta_end="x"), "an option has a wrong type"),
    (options("scheduler/scheduler_config.json", beta_end=2.0), "beta_end = 2.0; it must be"),
    (classes(7), "num_class_embeds = 7; digits has 10 classes"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(pipeline, tmp_path, damage, message):
    copy = pathlib.Path(shutil.copytree(pipeline, tmp_path / "copy"))
    (copy / "latent_variable_model.json").unlink()
    damage(copy)
    with pytest.raises(ConfigError, match=message) as raised:
        import_from(copy, tmp_path / "W")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "W").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [("", "name the folder"), ("model.ckpt", "is a pickle"), ("nowhere", "is no folder")],
)
def test_a_source_that_is_no_folder_is_named(source, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        import_from(source, tmp_path / "W")
    assert not (tmp_path / "W").exists()


def test_import_needs_a_new_work_directory_and_export_a_new_folder(pipeline, tmp_path):
    with pytest.raises(ConfigError, match="holds a run; import into a new directory"):
        import_from(pipeline, pipeline.parent / "run", seed=7)
    config = exportable(diffusers__target=str(pipeline))
    with pytest.raises(ConfigError, match="exists; name a new folder"):
        export.export(config, pipeline.parent / "run")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model.unet.fourier_exponents", (3,), "no Fourier features"),
        ("model.unet.noise_input", "log_snr", "only ddpm_timestep can be exported"),
        ("model.parameterization", "score", "only eps, x_0, v can be exported"),
        ("model.variance", "learned_diagonal", "only beta_tilde, beta, learned_range"),
        ("schedule.name", "learned", "no learned schedule"),
        ("model.unet.channel_multipliers", (2, 2), "the first of a UNet2DModel is 1"),
        ("model.unet.middle_attention", "unnormalized", "with model.unet.scale_shift = True only"),
        ("diffusers.target", "", "name the new folder"),
    ],
)
def test_what_a_pipeline_cannot_express_is_refused_by_name(setting, value, message, tmp_path):
    config = exportable(diffusers__target=str(tmp_path / "pipeline"))
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(ConfigError, match=message) as raised:
        export.export(config, tmp_path / "nowhere")
    assert setting in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("label_dropout", [0.0, 0.1])
def test_labels_come_back(tmp_path, label_dropout, monkeypatch):
    """A network that was never without a label has no row for that in a pipeline."""
    monkeypatch.setattr(import_, "_eps_errors", lambda *_: {"0.00": 0.5})
    settings = {"model__class_conditional": True, "train__label_dropout": label_dropout}
    source = exported(tmp_path, **settings)
    rows = json.loads((source / "unet/config.json").read_text())["num_class_embeds"]
    assert rows == (11 if label_dropout else 10)
    (source / "latent_variable_model.json").unlink()
    report = import_from(source, tmp_path / "W")
    assert any("label" in sentence for sentence in report.assumed)
    config = recorded.get_config(str(tmp_path / "W"))
    assert config.model.class_conditional
    assert (config.train.label_dropout > 0) == (label_dropout > 0)
    before = trained.load(exportable(**settings), tmp_path / "run", writes=False)
    table, original = (
        run.params["network"]["label_embedding"]
        for run in (trained.load(config, tmp_path / "W", writes=False), before)
    )
    np.testing.assert_array_equal(table[:rows], original[:rows])
