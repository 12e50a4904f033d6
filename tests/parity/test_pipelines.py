"""Pipelines of diffusers, imported and exported: schedules, samples and files."""

import inspect
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, recorded
from diffusion.samplers import registry, treatments
from diffusion.samplers.base import sample
from diffusion.schedules import SCHEDULES
from experiments import export, import_
from experiments.harness.errors import ConfigError
from experiments.harness.pipelines import scheduler
from experiments.harness.setup import trained
from tests.parity.test_unet import numpy_weights, theirs

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must:DeprecationWarning"),
    pytest.mark.usefixtures("quick_compiles"),
]

T = 8
RNG = np.random.default_rng(0)
X_T = RNG.normal(size=(2, 8, 8, 1)).astype(np.float32)
NOISE = RNG.normal(size=(T, *X_T.shape)).astype(np.float32)

OPTIONS = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.001},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]
FORMULAS = [
    ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
    ("DDPMScheduler", {"trained_betas": [0.1, 0.2, 0.3, 0.4]}),
    *(
        (name, options)
        for name, options in itertools.product(scheduler.SOLVERS, OPTIONS)
        if options.keys() <= inspect.signature(getattr(diffusers, name)).parameters.keys()
    ),
]


@pytest.fixture(autouse=True)
def no_self_check(monkeypatch):
    """tests/experiments/test_export.py has it; it compiles the network once more."""
    monkeypatch.setattr(import_, "_eps_errors", lambda *_: {"0.00": 0.5, "-5.00": 0.1})


def config_of(settings):
    config = digits.get_config()
    config.update_from_flattened_dict(settings)
    return config


@pytest.mark.parametrize(("name", "options"), FORMULAS)
def test_the_levels_are_those_of_the_scheduler(name, options):
    """Their table is a float32 product of 50 factors; without signal it is 0 or 2^−24.

    Options that their file leaves out have the defaults of that scheduler.
    """
    n = 50 if "trained_betas" not in options else 4
    made = getattr(diffusers, name)(num_train_timesteps=n, **options)
    stated = {"_class_name": name, "num_train_timesteps": n} | options
    config = config_of(scheduler.to_settings(stated).settings)
    schedule = SCHEDULES[config.schedule.name](**config.schedule[config.schedule.name])
    actual = schedule.levels(config.schedule.num_timesteps).alpha_bar[1:]
    np.testing.assert_allclose(actual, made.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-7)


def saved(directory, made, name="centred, one resolution, epsilon"):
    """A pipeline that diffusers saved, and its network."""
    model = theirs(name)
    pipeline = diffusers.DDIMPipeline if "DDIM" in type(made).__name__ else diffusers.DDPMPipeline
    pipeline(model, made).save_pretrained(directory, safe_serialization=True)
    return model


def imported(source, workdir, **settings):
    config = config_of({"diffusers.source": str(source)} | settings)
    report = import_.import_network(config, workdir)
    return trained.load(recorded.get_config(str(workdir)), workdir, writes=False), report


def their_sample(model, made, monkeypatch):
    """The sample from X_T, with our noise."""
    made.set_timesteps(T)
    module = sys.modules[type(made).__module__]
    x = torch.from_numpy(X_T).permute(0, 3, 1, 2)
    for i, timestep in enumerate(made.timesteps):
        noise = torch.from_numpy(NOISE[T - 1 - i]).permute(0, 3, 1, 2)
        monkeypatch.setattr(module, "randn_tensor", lambda *_, z=noise, **__: z)
        with torch.no_grad():
            x = made.step(model(x, timestep).sample, timestep, x).prev_sample
    return x.permute(0, 2, 3, 1).numpy()


def our_sample(run):
    model = treatments.treated(run.model(), run.config.sample.x_0_treatment)
    sampler = registry.SAMPLERS[run.config.sample.sampler](model)
    noise = jnp.asarray(NOISE)
    made = jax.jit(lambda: sample(sampler, run.levels(), lambda t: noise[t[0]], 2, x_T=X_T))()
    return np.asarray(made.x_0)


SAMPLED = {
    "DDPM": ("DDPMScheduler", {"variance_type": "fixed_large"}),
    "DDPM without signal": (
        "DDPMScheduler",
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DDIM of x_0": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "sample"}),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_an_imported_pipeline_samples_the_same(name, tmp_path, monkeypatch):
    """To 1e-4; exported again it has the same weights, bit for bit, and samples the same."""
    kind, options = SAMPLED[name]
    made = getattr(diffusers, kind)(num_train_timesteps=T, beta_end=0.3, **options)
    model = saved(tmp_path / "theirs", made)
    run, _ = imported(tmp_path / "theirs", tmp_path / "W")
    expected, actual = their_sample(model, made, monkeypatch), our_sample(run)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    config = run.config.copy_and_resolve_references()
    config.diffusers.target = str(tmp_path / "ours")
    export.export(config, tmp_path / "W")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    ours, before = numpy_weights(pipeline.unet), numpy_weights(model)
    assert ours.keys() == before.keys()
    assert all(np.array_equal(ours[key], before[key]) for key in before)
    if kind == "DDPMScheduler":
        again = their_sample(pipeline.unet, pipeline.scheduler, monkeypatch)
        np.testing.assert_allclose(again, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_weights_in_torchs_format_and_in_half_precision(tmp_path):
    """Both are read; in bfloat16 they are the rounded ones. A pickle of objects is refused."""
    made = diffusers.DDPMScheduler(num_train_timesteps=T)
    model = saved(tmp_path / "theirs", made)
    folder = tmp_path / "theirs" / "unet"
    model.bfloat16().save_pretrained(folder)
    half, _ = imported(tmp_path / "theirs", tmp_path / "half")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    path = folder / "diffusion_pytorch_model.bin"
    torch.save(model.state_dict(), path)
    pickled, _ = imported(tmp_path / "theirs", tmp_path / "pickled")
    jax.tree.map(np.testing.assert_array_equal, half.params, pickled.params)
    torch.save({"model": model}, path)
    with pytest.raises(ConfigError, match=r"diffusion_pytorch_model\.bin cannot be read"):
        imported(tmp_path / "theirs", tmp_path / "refused")
