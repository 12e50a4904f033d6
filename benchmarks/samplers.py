"""Samples a second: each sampler against the bare network, and against diffusers' pipeline.

    python -m benchmarks.samplers
    python -m benchmarks.samplers --network=ddpm --batch=8 --steps=10 --diffusers

The first command times every sampler on the digits network with random weights, as `sample` runs
it. The overhead is the sampler's own time, measured with a network that costs nothing, divided by
the time of as many bare evaluations of the real network in one compiled loop. The last column
divides the sampler's whole time by that of these evaluations, which is a noisier measure. The
second command uses DDPM's CIFAR-10 network with random weights, gives diffusers' `UNet2DModel` the
same weights, and adds the ratio of diffusers' time to ours. All runs take turns in each round, and
a ratio is the median over rounds of the ratios within a round.
"""

import functools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks.diffusers_unet import ddpm_cifar10
from configs import digits
from diffusion.samplers.registry import SAMPLERS
from diffusion.schedules import linear_beta
from experiments.harness.sampling.draw import Drawer
from experiments.harness.setup.definition import ModelDefinition, define_model
from experiments.harness.setup.params import init_params
from models.diffusers_weights import params_from_unet2d
from models.foreign import timestep
from models.unet import UNet

_NETWORK = flags.DEFINE_enum("network", "digits", ("digits", "ddpm"), "Which U-Net to time.")
_BATCH = flags.DEFINE_integer("batch", 64, "Samples drawn together.")
_STEPS = flags.DEFINE_integer("steps", 20, "Number of levels.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds; a ratio is the median over them.")
_DIFFUSERS = flags.DEFINE_bool("diffusers", False, "Time diffusers' loops too (--network=ddpm).")
_OURS = flags.DEFINE_list("samplers", [], "Samplers to time; empty: every one of fixed cost.")

ADAPTIVE = ("adaptive",)  # takes as many evaluations as its tolerance asks for


class Free(nn.Module):
    """A network that costs nothing."""

    @nn.compact
    def __call__(
        self, x_t: jax.Array, log_snr: jax.Array, condition: Any = None, *, train: bool = False
    ) -> jax.Array:
        del log_snr, condition, train
        return self.param("gain", nn.initializers.constant(0.5), ()) * x_t


def main(argv: list[str]) -> None:
    """Times, and prints a table."""
    del argv
    config, definition = _config_and_definition()
    theirs = _their_network() if _DIFFUSERS.value else None
    params = _params(definition) if theirs is None else _params_from(theirs, definition)
    levels = definition.schedule.levels(_STEPS.value)
    names = _OURS.value or [name for name in SAMPLERS if name not in ADAPTIVE]
    free = definition._replace(network=Free())

    runs, evaluations = {}, {}
    for name in names:
        config.sample.sampler = name
        chosen = config.copy_and_resolve_references()
        for label, variant, weights in (
            (name, definition, params),
            (f"{name} alone", free, init_params(free, 0)),
        ):
            run = functools.partial(Drawer(chosen, variant), weights, levels, _BATCH.value)
            evaluations[name] = int(run().evaluations[0])  # compiles, too
            runs[label] = run
    shape = (_BATCH.value, *definition.image_shape)
    for count in sorted(set(evaluations.values())):
        runs[f"bare {count}"] = _bare(definition, params, shape, float(levels.log_snr[-1]), count)
    if theirs is not None:
        runs |= _their_runs(theirs, shape)

    seconds = {name: [] for name in runs}
    for _ in range(_ROUNDS.value):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    _report(seconds, evaluations)


def _config_and_definition() -> tuple[ConfigDict, ModelDefinition]:
    """The digits config, with DDPM's network if asked for; it needs no CIFAR-10 images."""
    config = digits.get_config()
    config.sample.batch_size = _BATCH.value
    definition = define_model(config)
    if _NETWORK.value == "digits":
        return config, definition
    schedule = linear_beta()
    network = UNet(timestep_of=timestep(schedule.knots))
    changed = {"network": network, "image_shape": (32, 32, 3), "parameterization": "eps"}
    return config, definition._replace(schedule=schedule, **changed)


def _params(definition: ModelDefinition) -> Any:
    """Random weights, none of them zero."""
    leaves, tree = jax.tree.flatten(init_params(definition, 0))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = (a + 0.02 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True))
    return jax.tree.unflatten(tree, list(moved))


def _bare(
    definition: ModelDefinition, params: Any, shape: tuple[int, ...], log_snr: float, count: int
) -> Callable[[], Any]:
    """A function that evaluates the network `count` times, each time at its last output."""

    @jax.jit
    def loop(params, x, at):
        denoiser = definition.model(params).reverse.denoiser
        return jax.lax.fori_loop(0, count, lambda i, x: denoiser(x, at), x)

    arguments = params, jnp.ones(shape), jnp.full(shape[0], log_snr, jnp.float32)

    def run():
        return jax.block_until_ready(loop(*arguments))

    run()
    return run


def _their_network() -> Any:
    """diffusers' form of DDPM's CIFAR-10 network, on its fastest device, with random weights."""
    import torch

    return ddpm_cifar10().to("cuda" if torch.cuda.is_available() else "cpu")


def _params_from(unet: Any, definition: ModelDefinition) -> Any:
    """diffusers' weights as parameters of our network."""
    weights = {name: value.cpu().numpy() for name, value in unet.state_dict().items()}
    return {"network": params_from_unet2d(weights, definition.network, definition.image_shape)}


def _their_runs(unet: Any, shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """diffusers' loops in eager PyTorch, by the name of our sampler."""
    import diffusers
    import torch

    def loop(scheduler):
        scheduler.set_timesteps(_STEPS.value)
        x = torch.randn(shape[0], shape[3], shape[1], shape[2], device=unet.device)
        with torch.inference_mode():
            for t in scheduler.timesteps:
                x = scheduler.step(unet(x, t).sample, t, x).prev_sample
        return x.cpu()

    schedulers = {
        "ancestral": diffusers.DDPMScheduler(clip_sample=False),
        "ddim": diffusers.DDIMScheduler(clip_sample=False),
        "dpm_solver_pp_2m": diffusers.DPMSolverMultistepScheduler(),
    }
    runs = {}
    for name, scheduler in schedulers.items():
        if name in (_OURS.value or SAMPLERS):
            runs[f"diffusers {name}"] = functools.partial(loop, scheduler)
            runs[f"diffusers {name}"]()
    return runs


def _report(seconds: dict[str, list[float]], evaluations: dict[str, int]) -> None:
    device = jax.devices()[0]
    print(
        f"{_NETWORK.value} network, batch {_BATCH.value}, {_STEPS.value} steps, "
        f"{_ROUNDS.value} rounds; {device.device_kind} x {jax.device_count()}, "
        f"jax {jax.__version__}, Python {platform.python_version()}\n"
    )
    print("| | evaluations | overhead | samples/s | time over the bare network's |")
    print("| --- | --- | --- | --- | --- |")

    def speed(name):
        return f"{_BATCH.value / statistics.median(seconds[name]):.1f}"

    def ratio(one, other):
        pairs = zip(seconds[one], seconds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    for name, count in evaluations.items():
        bare = f"bare {count}"
        own, whole = ratio(f"{name} alone", bare), ratio(name, bare)
        print(f"| {name} | {count} | {own:.2%} | {speed(name)} | {whole:.3f} |")
    theirs = [name for name in seconds if name.startswith("diffusers ")]
    for name in theirs:
        print(f"| {name} | {_STEPS.value} | | {speed(name)} | |")
    for name in theirs:
        ours = name.removeprefix("diffusers ")
        print(f"\ntime of {name} over ours: {ratio(name, ours):.2f}")


if __name__ == "__main__":
    app.run(main)
