"""What an evaluation writes beside its summary: the bound by example and by timestep, and plots."""

from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from diffusion.bound import Bound
from diffusion.schedules import Levels
from diffusion.statistics.standard_errors import bits_per_dim
from experiments.harness.evaluation.allocate import Allocated
from experiments.harness.pictures import plots
from experiments.harness.setup.definition import ModelDefinition
from experiments.harness.workdir.files import write_npz


class Curves(NamedTuple):
    """The bound of a data set by example and by timestep.

    Attributes:
      total: of each example, in nats.
      kl: at t = 2 … T in bits/dim, the mean over examples.
      kl_se: its standard error over examples; None if it is not known.
      eps_error: ‖ε − ε̂‖² at t = 1 … T, the mean over examples.
    """

    total: Float[np.ndarray, "n"]
    kl: Float[np.ndarray, "T-1"]
    kl_se: Float[np.ndarray, "T-1"] | None
    eps_error: Float[np.ndarray, "T"]


def full_curves(terms: Bound, num_dims: int) -> Curves:
    """From the full sum over t."""
    kl, n = bits_per_dim(terms.kl, num_dims), len(terms.kl)
    return Curves(
        total=terms.total,
        kl=kl.mean(axis=0),
        kl_se=kl.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else None,
        eps_error=terms.eps_error.mean(axis=0),
    )


def allocated_curves(allocated: Allocated, levels: Levels, num_dims: int) -> Curves:
    """From a few timesteps per example: the KL is constant on bins of t, ‖x_0 − x̂_0‖² linear."""
    num_terms, bins = levels.num_timesteps - 1, len(allocated.rate)
    time = (np.arange(num_terms + 1) - 0.5) / max(num_terms, 1)  # of t = 1 … T; bins fill [0, 1]
    rate = allocated.rate[(time[1:] * bins).astype(int)]
    # ‖ε − ε̂‖² is that times the SNR, which changes within a bin.
    middles, log_snr = (np.arange(bins) + 0.5) / bins, levels.log_snr[1:]
    x_0_error = allocated.eps_error * np.exp(-np.interp(middles, time, log_snr))
    # The mean over bins differs a little from the estimate, so the curve is scaled to its sum.
    kl = rate * allocated.diffusion.mean() / rate.sum() if rate.any() else rate
    return Curves(
        total=allocated.total,
        kl=bits_per_dim(kl, num_dims),
        kl_se=None,
        eps_error=np.interp(time, middles, x_0_error) * np.exp(log_snr),
    )


def write(
    stem: epath.Path,
    curves: Curves,
    definition: ModelDefinition,
    prior: float,
    reconstruction: float,
) -> None:
    """Writes STEM.npz, STEM_kl_per_timestep.png and STEM_rate_distortion.png.

    Args:
      stem: the path of the files up to their endings.
      curves: the curves.
      definition: the model that they belong to.
      prior: the bound's prior in bits/dim.
      reconstruction: its reconstruction in bits/dim.
    """
    num_dims = int(np.prod(definition.image_shape))
    log_snr = definition.levels.log_snr[1:]
    # ‖x_0 − x̂_0‖² = ‖ε − ε̂‖²/SNR, then from data units to grey levels.
    rmse, quantization = (
        np.sqrt(curves.eps_error * np.exp(-log_snr) / num_dims),
        definition.quantization,
    )
    if quantization is not None:
        rmse = rmse / quantization.spacing
    arrays = {
        "t": np.arange(1, len(log_snr) + 1),
        "log_snr": log_snr,
        "kl": curves.kl,
        "x_0_rmse": rmse,
        "bits_per_dim_per_example": bits_per_dim(curves.total, num_dims),
    }
    if curves.kl_se is not None:
        arrays["kl_se"] = curves.kl_se
    write_npz(f"{stem}.npz", **arrays)
    plots.plot_kl_per_timestep(
        f"{stem}_kl_per_timestep.png",
        kl=curves.kl,
        kl_se=curves.kl_se,
        log_snr=log_snr,
        prior=prior,
        reconstruction=reconstruction,
    )
    plots.plot_rate_distortion(
        f"{stem}_rate_distortion.png",
        kl=curves.kl,
        prior=prior,
        rmse=rmse,
        max_value=None if quantization is None else quantization.num_levels - 1,
    )
