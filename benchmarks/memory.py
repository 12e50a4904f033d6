"""Peak device memory of a training step of DDPM's CIFAR-10 network, as the compiler plans it.

    python -m benchmarks.memory
    python -m benchmarks.memory --topology=v5e:2x2

With and without rematerialisation, in float32 and in bfloat16. Nothing is run: the peak is the
compiler's estimate. The table also has the memory that a forward pass stores for the gradient in
JAX's own trace, before a compiler fuses or moves operations. The first command compiles for the
first device of this machine. The second compiles for a TPU: it needs the package libtpu and many
cores, but no TPU.

For a CPU it uses the instruction schedule with the least memory. The default schedule keeps more
threads busy and gains nothing from rematerialisation. A CPU has no bfloat16 convolutions: XLA
computes them in float32 and stores converted copies.
"""

import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import cifar10
from experiments.harness import devices
from experiments.harness.data.splits import Examples
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.params import abstract_params
from experiments.harness.training import gradients, step
from experiments.harness.training.loss import init_history, make_draw, make_loss
from experiments.harness.training.state import make_setup

_BATCH = flags.DEFINE_integer("batch", 128, "Examples in a batch.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "TPUs to compile for; empty: the first device.")

MEBIBYTE = 2**20
CPU_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    # These two concern machine code, which is not run.
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def main(argv: list[str]) -> None:
    """Compiles, and prints a table."""
    del argv
    device = _device()
    target = f"{device.device_kind}, jax {jax.__version__}, on {platform.machine()}"
    print(f"A training step at batch {_BATCH.value}, compiled for one {target}.\n")
    print(
        "| precision | blocks | stored for the gradient | peak "
        "| of it the train state | compiled in |"
    )
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for dtype in ("float32", "bfloat16"):
        for remat in (False, True):
            began = time.monotonic()
            peak, state = _memory(dtype, remat, device)
            stored = bytes_for_gradient(_config(dtype, remat))
            print(
                f"| {dtype} | {'computed again' if remat else 'stored'} "
                f"| {stored / MEBIBYTE:,.0f} MiB | {peak / MEBIBYTE:,.0f} MiB "
                f"| {state / MEBIBYTE:,.0f} MiB | {time.monotonic() - began:.0f} s |",
                flush=True,
            )


def _device() -> jax.Device:
    if not _TOPOLOGY.value:
        return jax.devices()[0]
    from jax.experimental import topologies

    return topologies.get_topology_desc(_TOPOLOGY.value, "tpu").devices[0]


def _memory(dtype: str, remat: bool, device: jax.Device) -> tuple[int, int]:
    """The peak memory of a step, and the memory of the train state, in bytes."""
    config = _config(dtype, remat)
    mesh = Mesh(np.array([[device]]), devices.AXES)
    setup = make_setup(config)._replace(mesh=mesh)
    images = (config.train.batch_size, *setup.definition.image_shape)
    batch = devices.split_batch(mesh)
    examples = Examples(jax.ShapeDtypeStruct(images, jnp.uint8, sharding=batch), None)
    train_step = step.make_train_step(setup, streamed=True)
    options = CPU_OPTIONS if device.platform == "cpu" else None
    lowered = train_step.lower(train_step.packing.abstract(), examples, None)
    plan = lowered.compile(compiler_options=options).memory_analysis()
    # The donated state is both an argument and a result.
    shared = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.temp_size_in_bytes + shared, plan.argument_size_in_bytes


def bytes_for_gradient(config: ConfigDict) -> int:
    """The bytes that a forward pass stores for the gradient, parameters included."""
    definition = define_model(config)
    definition = definition._replace(network=gradients.trained_network(config, definition.network))
    draw, loss_fn = make_draw(config), make_loss(config, definition)
    x_0 = jax.ShapeDtypeStruct((config.train.batch_size, *definition.image_shape), jnp.float32)
    key, history = jax.eval_shape(lambda: (jax.random.key(0), init_history(config, definition)))

    def pullback(params, x_0, key, history):
        draws = draw(key, x_0)
        return jax.vjp(lambda params: loss_fn(params, *draws, history)[0], params)[1]

    leaves = jax.tree.leaves(
        jax.eval_shape(pullback, abstract_params(definition), x_0, key, history)
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _config(dtype: str, remat: bool) -> ConfigDict:
    config = cifar10.get_config()
    config.data.update(name="photos")  # images of the same shape that need no download
    config.train.batch_size = _BATCH.value
    config.model.update(dtype=dtype, remat=remat)
    return config


if __name__ == "__main__":
    app.run(main)
