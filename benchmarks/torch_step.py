"""A training step and a forward pass of our networks against PyTorch's, on the same device.

    python -m benchmarks.torch_step
    python -m benchmarks.torch_step --config=configs/digits.py --batch=128 --rounds=9

Our training step is the compiled step of `main.py`: loss, gradients, optimizer and moving average;
our forward pass is that of an evaluation, in parts of a batch on a CPU.
PyTorch's is diffusers' `UNet2DModel` of the same layers with a squared error, Adam, a clip of the
gradient norm and a moving average. PyTorch runs in three forms: eager, with channels last, and
compiled. All forms take turns in one process, one run each a round. The table has medians, and the
ratio of PyTorch's best form to ours. Both sides are in float32. It needs
tests/parity/requirements.txt.
"""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from benchmarks.diffusers_unet import like
from experiments.harness.data.splits import Examples
from experiments.harness.processes import cores
from experiments.harness.processes.allocator import keep_memory
from experiments.harness.training.gradients import trained_network
from experiments.harness.training.state import TrainingSetup, first_state, make_setup
from experiments.harness.training.step import make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py", "Whose network.")
_BATCH = flags.DEFINE_integer("batch", 16, "Images in a batch.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Runs of each form.")
_ALLOCATOR = flags.DEFINE_bool("allocator", True, "Whether glibc keeps memory, as in main.py.")
_FORMS = flags.DEFINE_multi_enum(
    "form",
    ["eager", "channels last", "compiled"],
    ["eager", "channels last", "compiled"],
    "Forms of PyTorch's side.",
)

Run = Callable[[], None]
PAUSE = 0.5  # seconds, after which the other library's threads no longer wait by running


def main(argv: list[str]) -> None:
    """Measures, and prints a table."""
    del argv
    if _ALLOCATOR.value:
        keep_memory()
    config = _CONFIG.value
    if config.data.name == "cifar10":
        config.data.update(name="photos")  # images of the same shape that need no download
    config.train.batch_size = _BATCH.value
    setup = make_setup(config)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, torch {_torch().__version__}, batch {_BATCH.value}\n")
    runs: dict[tuple[str, str], Run] = dict(_ours(setup))
    for form in _FORMS.value:
        runs |= _theirs(setup, form)
    seconds = {name: [] for name in runs}
    for run in tqdm(runs.values(), "compiling"):
        run()
    for _ in tqdm(range(_ROUNDS.value), "rounds"):
        for name, run in runs.items():
            time.sleep(PAUSE)
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    _print_table({name: statistics.median(values) for name, values in seconds.items()})


def _print_table(medians: dict[tuple[str, str], float]) -> None:
    print(f"| | ours | {' | '.join(_FORMS.value)} | best / ours |")
    print("| --- " * (len(_FORMS.value) + 3) + "|")
    for part in ("training step", "forward"):
        ours, theirs = medians["ours", part], [medians[form, part] for form in _FORMS.value]
        times = " | ".join(f"{1000 * value:.1f} ms" for value in (ours, *theirs))
        print(f"| {part} | {times} | {min(theirs) / ours:.2f} |")


def _ours(setup: TrainingSetup) -> dict[tuple[str, str], Run]:
    shape = (_BATCH.value, *setup.definition.image_shape)
    images = np.random.default_rng(0).integers(0, 17, shape).astype(np.uint8)
    examples, indices = jax.device_put((Examples(images, None), np.arange(_BATCH.value)))
    state, step = first_state(setup), make_train_step(setup)
    network = setup.definition.network
    params = jax.tree.map(jnp.copy, state.params["network"])
    state = step.packing.pack(state)
    x_t, log_snr = jnp.ones(shape), jnp.zeros(_BATCH.value)
    apply = functools.partial(jax.jit(network.apply), {"params": params})

    def train() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state, examples, indices))

    def forward() -> None:
        jax.block_until_ready(cores.in_parts(apply, x_t, log_snr))

    return {("ours", "training step"): train, ("ours", "forward"): forward}


def _theirs(setup: TrainingSetup, form: str) -> dict[tuple[str, str], Run]:
    torch = _torch()
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    layout = torch.contiguous_format if form == "eager" else torch.channels_last
    network = trained_network(setup.config, setup.definition.network)
    model = like(network, setup.definition.image_shape).to(device, memory_format=layout)
    averages = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=True)
    height, width, _ = setup.definition.image_shape
    inputs = model.config.in_channels
    x_t = torch.randn(_BATCH.value, inputs, height, width, device=device)
    x_t = x_t.contiguous(memory_format=layout)
    eps = torch.randn(_BATCH.value, model.config.out_channels, height, width, device=device)
    t = torch.arange(_BATCH.value, device=device) * 7
    call = torch.compile(model) if form == "compiled" else model
    config: ConfigDict = setup.config.train

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def train() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(call(x_t, t).sample, eps).backward()
        if config.gradient_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, list(model.parameters()), 1 - config.ema_decay)
        finish()

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            call(x_t, t)
        finish()

    return {(form, "training step"): train, (form, "forward"): forward}


def _torch():
    import torch

    return torch


if __name__ == "__main__":
    app.run(main)
