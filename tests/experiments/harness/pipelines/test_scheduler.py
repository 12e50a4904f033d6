"""Schedulers of diffusers as settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from diffusion import bound, forward, reverse
from diffusion.decoders import Quantization, categorical
from diffusion.model import DiffusionModel
from diffusion.schedules import SCHEDULES, from_betas
from experiments.harness.errors import ConfigError
from experiments.harness.pipelines import scheduler


def process(**options):
    return scheduler.to_settings({"_class_name": "DDPMScheduler"} | options)


def schedule_of(settings):
    config = base.get_config()
    config.update_from_flattened_dict(settings)
    return SCHEDULES[config.schedule.name](**config.schedule[config.schedule.name])


def test_the_settings_that_a_scheduler_states():
    settings, assumed = process(
        prediction_type="v_prediction", variance_type="fixed_large", num_train_timesteps=7
    )
    assert settings["model.parameterization"] == "v"
    assert settings["model.variance"] == "beta"
    assert settings["schedule.num_timesteps"] == 7
    assert settings["sample.x_0_treatment"] == "clip", "diffusers' default"
    assert len(schedule_of(settings).knots) == 7
    assert assumed == []


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ({"_class_name": "DDIMScheduler"}, "ddim"),
        ({"_class_name": "UniPCMultistepScheduler"}, "unipc"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpm_solver_pp_2m"),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "sde-dpmsolver++",
            },
            "dpm_solver_pp_2m_sde",
        ),
    ],
)
def test_a_scheduler_without_a_variance_is_said_to_have_none(options, sampler):
    settings, assumed = scheduler.to_settings(options)
    assert settings["sample.sampler"] == sampler
    assert settings["model.variance"] == "beta_tilde"
    assert any("states none" in sentence for sentence in assumed)


@pytest.mark.parametrize(
    ("options", "expected", "remark"),
    [
        ({"thresholding": True}, {"sample.x_0_treatment": "clip"}, None),
        ({"thresholding": True, "sample_max_value": 9}, {"sample.x_0_treatment": "dynamic"}, None),
        (
            {"thresholding": True, "sample_max_value": 9, "dynamic_thresholding_ratio": 0.9},
            {"sample.x_0_treatment": "dynamic"},
            "the quantile 0.995, not 0.9",
        ),
        ({"clip_sample_range": 2.0}, {"sample.x_0_treatment": "none"}, "not clipped"),
        (
            {"_class_name": "EulerAncestralDiscreteScheduler"},
            {"sample.sampler": "ancestral", "model.variance": "beta_tilde"},
            None,
        ),
        (
            {"_class_name": "PNDMScheduler", "variance_type": "fixed_large"},
            {"sample.sampler": "ddim"},
            "samples are drawn by ddim: there is no PNDMScheduler here",
        ),
        ({"use_karras_sigmas": True}, {"sample.spacing": "karras"}, None),
        ({"use_lu_lambdas": True}, {}, "use_lu_lambdas is not known here"),
    ],
)
def test_the_settings_of_samples(options, expected, remark):
    """A difference from their samples is said."""
    settings, assumed = process(**options)
    assert expected.items() <= settings.items()
    assert [remark in sentence for sentence in assumed] == ([True] if remark else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "_class_name = 'ScoreSdeVeScheduler' is unknown"),
        ({"beta_schedule": "laplace"}, "beta_schedule = 'laplace' is unknown; known: linear"),
        ({"prediction_type": "flow"}, "prediction_type = 'flow' is unknown; known: epsilon"),
        ({"variance_type": "learned"}, "variance_type = 'learned' is unknown"),
        ({"rescale_betas_zero_snr": True}, "x̂_0 is undefined at the last level"),
        ({"num_train_timesteps": 1}, "num_train_timesteps = 1; it must be"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type = 'continuous'; a network that receives ¼ log σ",
        ),
    ],
)
def test_what_cannot_be_expressed_is_named(options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        process(**options)
    assert "\n" not in str(raised.value)


def test_a_rescaled_schedule_ends_without_signal_and_keeps_its_start():
    betas = np.linspace(1e-4, 0.02, 50)
    before, after = (
        from_betas(table).levels(50) for table in (betas, scheduler.zero_terminal_snr(betas))
    )
    np.testing.assert_allclose(after.alpha_bar[1], before.alpha_bar[1], rtol=1e-12)
    assert 0 < after.alpha_bar[-1] < 1e-15
    # √ᾱ is an affine function of what it was.
    np.testing.assert_allclose(
        np.diff(np.sqrt(after.alpha_bar[1:])) / np.diff(np.sqrt(before.alpha_bar[1:])),
        np.sqrt(before.alpha_bar[1])
        / (np.sqrt(before.alpha_bar[1]) - np.sqrt(before.alpha_bar[-1])),
        rtol=1e-6,
    )


@pytest.mark.parametrize("parameterization", ["v", "x_0"])
def test_the_bound_at_zero_terminal_snr_is_its_limit(parameterization):
    """The prior's KL is 0, and the last KL ½ SNR_s ‖x_0 − x̂_0‖² with Σ_θ = β̃."""
    betas = scheduler.zero_terminal_snr(np.linspace(1e-4, 0.2, 20))
    levels, quantization = from_betas(betas).levels(20), Quantization(17)
    grey = np.random.default_rng(0).integers(0, 17, (3, 5))
    x_0 = quantization.to_data(grey)
    # x̂_0 = ¼ at the last level, where v = −x_0.
    prediction = {"v": -0.25, "x_0": 0.25}[parameterization]

    def denoiser(x_t, log_snr, condition=None):
        return jnp.full_like(x_t, prediction)

    p = reverse.Reverse(denoiser, parameterization, "beta_tilde")
    model = DiffusionModel(p, categorical(quantization), levels)
    terms = bound.bound(model, x_0, forward.example_noise(jax.random.key(0), np.arange(3), (5,)))
    snr = np.exp(levels.log_snr[-2])
    expected = 0.5 * snr * ((x_0 - 0.25) ** 2).sum(axis=1)
    np.testing.assert_allclose(terms.kl[:, -1], expected, rtol=1e-5)
    assert np.abs(terms.prior).max() < 1e-12
