"""The bound of a PyTorch network: imported, called on the host, and computed in PyTorch."""

import jax
import numpy as np
import pytest

from diffusion import bound, forward, schedules
from diffusion.reverse import Reverse
from experiments.harness.data import splits
from models import foreign
from tests.parity.test_pipelines import (
    T,
    imported,
    no_self_check,  # noqa: F401
    saved,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

N = 6


def in_pytorch(model, made, x_0, eps):
    """The bound in nats, term by term as the lecture has it, from β and float64.

    Args:
      model: ε̂ of (x_t, t − 1).
      made: the scheduler; its Σ_θ is β.
      x_0: images of 17 grey levels in [−1, 1], [n, c, h, w].
      eps: noises of t = 1 … T.
    """
    normal = torch.distributions.Normal
    beta = made.betas.double()
    alpha_bar = torch.cumprod(1 - beta, 0)
    prior = torch.distributions.kl_divergence(
        normal(alpha_bar[-1].sqrt() * x_0, (1 - alpha_bar[-1]).sqrt()),
        normal(torch.zeros_like(x_0), 1.0),
    )
    total = prior.sum((1, 2, 3))
    for i in range(T):
        x_t = alpha_bar[i].sqrt() * x_0 + (1 - alpha_bar[i]).sqrt() * eps[i]
        with torch.no_grad():
            eps_hat = model(x_t.float(), i).sample.double()
        x_0_hat = (x_t - (1 - alpha_bar[i]).sqrt() * eps_hat) / alpha_bar[i].sqrt()
        if i == 0:
            variance = beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])  # β̃_2
            decoder, half = normal(x_0_hat, variance.sqrt()), 1 / 16
            upper = torch.where(x_0 > 0.999, torch.inf, x_0 + half)
            lower = torch.where(x_0 < -0.999, -torch.inf, x_0 - half)
            probability = decoder.cdf(upper) - decoder.cdf(lower)
            total -= probability.clamp_min(1e-300).log().sum((1, 2, 3))
            continue
        before = alpha_bar[i - 1]
        weight_0 = before.sqrt() * beta[i] / (1 - alpha_bar[i])
        weight_t = (1 - beta[i]).sqrt() * (1 - before) / (1 - alpha_bar[i])
        posterior = (1 - before) / (1 - alpha_bar[i]) * beta[i]
        kl = torch.distributions.kl_divergence(
            normal(weight_0 * x_0 + weight_t * x_t, posterior.sqrt()),
            normal(weight_0 * x_0_hat + weight_t * x_t, beta[i].sqrt()),
        )
        total += kl.sum((1, 2, 3))
    return total.numpy()


class WithoutNoise(torch.nn.Sequential):
    def forward(self, x, noise):
        return super().forward(x)


def test_a_module_is_made_a_function_first():
    with pytest.raises(TypeError, match=r"PyTorch module.*torch_function\(module\)"):
        foreign.denoiser(torch.nn.Identity(), foreign.sigma)


def test_a_module_in_half_precision_receives_its_own():
    module = torch.nn.Conv2d(3, 3, 1).bfloat16()
    function = foreign.torch_function(WithoutNoise(module))
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    weight, bias = (p.detach().float().numpy() for p in module.parameters())
    actual = function(x, np.zeros(2, np.float32), None)
    # bfloat16 has 8 bits: 2^-8 of the sum of absolute terms.
    size = np.abs(x) @ np.abs(weight[:, :, 0, 0].T) + np.abs(bias)
    assert np.all(np.abs(actual - x @ weight[:, :, 0, 0].T - bias) < 2**-7 * size)


def test_three_routes_to_the_bound_agree(tmp_path):
    """With the same noise: to 1e-5 of the imported network, and to float32 of PyTorch's."""
    made = diffusers.DDPMScheduler(
        num_train_timesteps=T, beta_end=0.3, beta_start=0.02, variance_type="fixed_large"
    )
    model = saved(tmp_path / "theirs", made)
    run, _ = imported(
        tmp_path / "theirs", tmp_path / "W", **{"decoder.name": "discretized_gaussian"}
    )
    images = splits.load_data(run.config, "test", splits.first(N)).images
    x_0 = np.asarray(run.definition.quantization.to_data(images))
    noise = forward.example_noise(jax.random.key(0), np.arange(N), x_0.shape[1:])
    ours = run.model()
    timestep = foreign.timestep(run.definition.levels.log_snr[1:])
    called = foreign.denoiser(foreign.torch_function(model), timestep)
    theirs = ours._replace(reverse=Reverse(called, "eps", "beta"))
    totals = [
        np.asarray(jax.jit(lambda x, m=m: bound.bound(m, x, noise, 4).total)(x_0))
        for m in (ours, theirs)
    ]
    np.testing.assert_allclose(totals[1], totals[0], rtol=1e-5)
    to_torch = [np.moveaxis(np.asarray(a, np.float64), -1, 1) for a in (x_0, *_noises(noise))]
    x, *eps = (torch.from_numpy(np.ascontiguousarray(a)) for a in to_torch)
    np.testing.assert_allclose(totals[0], in_pytorch(model, made, x, eps), rtol=1e-4)


def test_a_score_network_with_skip_blocks_steps_as_score_sde_does():
    """google/ncsnpp-* in small, called as docs/checkpoints.md has it: the mean of each step.

    It receives pixels in [0, 1] with noise σ̃/2, and returns their score.
    """
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier",
        mid_block_scale_factor=2**0.5,
        norm_num_groups=None,
    )
    score = foreign.torch_function(network)

    def eps_hat(x, sigma, condition):
        scaled = sigma[:, None, None, None] / 2
        return -scaled * score((x + 1) / 2, sigma / 2, condition)

    denoiser = foreign.denoiser(eps_hat, foreign.sigma, exploding=True)
    ends = 0.01, 5.0
    levels = schedules.linear_log_snr(*(-2 * np.log(2 * end) for end in ends)).levels(T)
    made = diffusers.ScoreSdeVeScheduler(T, sigma_min=ends[0], sigma_max=ends[1])
    pixels = np.random.default_rng(0).uniform(-3, 3, (2, 8, 8, 3)).astype(np.float32)
    for t in (2, T):
        y = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        with torch.no_grad():
            output = network(y, made.discrete_sigmas[t - 1]).sample
        time = (t - 0.5) / (T - 1)  # their index is the next whole number below
        expected = made.step_pred(output, time, y).prev_sample_mean.permute(0, 2, 3, 1).numpy()
        step, p = levels.step(np.full(2, t)), Reverse(denoiser, "eps", "beta")
        alpha_t, alpha_s = np.sqrt(levels.alpha_bar[[t, t - 1]]).astype(np.float32)
        x_t = alpha_t * (2 * pixels - 1)
        mean = p.step(x_t, p.predict("x_0", x_t, step.log_snr), step).mean
        actual = (np.asarray(mean) / alpha_s + 1) / 2
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def _noises(noise):
    """ε of t = 1 … T."""
    return [noise(np.full(N, t)) for t in range(1, T + 1)]
