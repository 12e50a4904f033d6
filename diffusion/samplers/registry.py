"""Every sampler, by name."""

from collections.abc import Callable

from diffusion.samplers.adaptive import adaptive
from diffusion.samplers.base import Sampler
from diffusion.samplers.ddpm import ancestral, ddim
from diffusion.samplers.langevin import annealed
from diffusion.samplers.solvers import (
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    dpm_solver_pp_3m,
    dpm_solver_pp_3m_published,
    euler,
    heun,
)
from diffusion.samplers.unipc import unipc

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "dpm_solver_pp_2m_sde": dpm_solver_pp_2m_sde,
    "dpm_solver_pp_3m": dpm_solver_pp_3m,
    "dpm_solver_pp_3m_published": dpm_solver_pp_3m_published,
    "unipc": unipc,
    "adaptive": adaptive,
    "langevin": annealed,
}
