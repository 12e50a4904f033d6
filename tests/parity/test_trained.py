"""A training checkpoint of the digits, as a pipeline of diffusers, and imported again."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import recorded
from diffusion.samplers import registry
from diffusion.samplers.base import sample
from experiments import evaluate, export, import_
from experiments.harness.setup import trained
from tests.experiments import tiny
from tests.experiments.test_export import exportable

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("quick_compiles"),
]

T, N = 8, 2
NOISE = np.random.default_rng(0).normal(size=(T + 1, N, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compiles):
    """A training checkpoint of random EMA weights, exported to the folder that its config names."""
    directory = tmp_path_factory.mktemp("trained")
    config = exportable(
        schedule__linear_beta__beta_end=0.3,
        # One resolution, which is compiled in seconds.
        model__unet__channel_multipliers=(1,),
        model__unet__attention_resolutions=(),
        sample__x_0_treatment="none",
        diffusers__target=str(directory / "pipeline"),
    )
    workdir = tiny.untrained(directory / "run", config, scale=0.1)
    export.export(config, workdir)
    return trained.load(config, workdir, writes=False)


def pipeline_sample(name, folder, monkeypatch):
    """Pixels in [0, 1] that a pipeline of diffusers draws from our x_T and our noise."""
    pipeline = getattr(diffusers, name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noises = iter(torch.from_numpy(NOISE[::-1].copy()).permute(0, 1, 4, 2, 3))
    for part in (pipeline, pipeline.scheduler):
        module = sys.modules[type(part).__module__]
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(noises))
    return pipeline(batch_size=N, num_inference_steps=T, output_type="np").images


@pytest.mark.parametrize(
    ("name", "sampler"), [("DDPMPipeline", "ancestral"), ("DDIMPipeline", "ddim")]
)
def test_a_pipeline_of_diffusers_draws_our_samples(name, sampler, run, monkeypatch):
    """To 1e-4 of a pixel."""
    expected = pipeline_sample(name, run.config.diffusers.target, monkeypatch)
    made, noise = registry.SAMPLERS[sampler](run.model()), jnp.asarray(NOISE)
    ours = jax.jit(lambda: sample(made, run.levels(), lambda t: noise[t[0]], N, x_T=noise[T]).x_0)()
    pixels = np.clip(np.asarray(ours) / 2 + 0.5, 0, 1)
    assert np.mean((pixels > 0) & (pixels < 1)) > 0.05, "else equal pixels would prove nothing"
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-4)


def test_the_bits_per_dim_come_back_to_the_last_digit(run, tmp_path):
    config = run.config.copy_and_resolve_references()
    config.diffusers.source = config.diffusers.target
    import_.import_network(config, tmp_path)
    again = evaluate.evaluate(recorded.get_config(str(tmp_path)), tmp_path)
    before = evaluate.evaluate(run.config, run.workdir)
    for key in ("bits_per_dim", "bits_per_dim_se", "prior", "diffusion", "reconstruction"):
        assert again[key] == before[key]
