"""What the training loop takes beside the compiled step, and how long it waits for data.

    python -m benchmarks.loop
    python -m benchmarks.loop --config=configs/photos.py --config.data.stream=always --steps=10

The trainer runs as `main.py` runs it, with its log, in a work directory that is thrown away. After
each line of the log the same compiled step runs as many times on one batch that lies on the device,
with nothing around it. Both rates come from the same minutes of the same process, and a ratio is
the median over such pairs. Validation, samples and checkpoints are left out: the trainer's rate is
of steps.
"""

import statistics
import tempfile
import time
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from experiments.harness.setup.definition import define_model
from experiments.harness.setup.params import init_params
from experiments.harness.training.loop import Trainer
from experiments.harness.training.loss import init_history
from experiments.harness.training.optimizer import make_optimizer
from experiments.harness.training.state import init_state
from experiments.harness.training.step import state_shardings
from experiments.harness.workdir import record
from experiments.harness.workdir.checkpoints import Checkpoints
from experiments.harness.workdir.metrics import MetricsLog

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py", "What is trained.")
_STEPS = flags.DEFINE_integer("steps", 100, "Steps between two lines of the log.")
_PAIRS = flags.DEFINE_integer("pairs", 9, "Lines of the log, and as many stretches of bare steps.")


class Paired(MetricsLog):
    """A log that has the bare step timed after each line.

    Attributes:
      trainer: whose log it is.
      found: of each line its images/s, its share of waiting, and the bare step's images/s.
    """

    def __init__(self, workdir: str):
        super().__init__(workdir)
        self.trainer: Trainer | None = None
        self.found: list[tuple[float, float, float]] = []
        self._state: Any = None

    def write(self, step: int, **values: Any) -> None:
        super().write(step, **values)
        if "images_per_second" in values:
            rate = values["images_per_second"], values["data_wait"], self._bare()
            self.found.append(rate)
            tqdm.write(
                f"| {rate[0]:,.1f} | {rate[2]:,.1f} | {rate[0] / rate[2]:.3f} | {rate[1]:.2%} |"
            )

    def _bare(self) -> float:
        """Images a second of the step alone."""
        trainer, of = self.trainer, self.trainer.config
        given = jax.block_until_ready(jax.device_put(trainer.feed.of_step(0)))
        if self._state is None:  # of its own: the step takes over what it is given
            definition, optimizer = trainer.definition, trainer.optimizer
            params = init_params(definition, of.seed)
            self._state = init_state(params, optimizer, init_history(of, definition))
            shardings = state_shardings(definition, optimizer, trainer.mesh)
            self._state = jax.device_put(self._state, shardings)
        began = time.monotonic()
        for _ in range(_STEPS.value):
            self._state = trainer.train_step(self._state, *given)
        jax.block_until_ready(self._state)
        return _STEPS.value * of.train.batch_size / (time.monotonic() - began)


def main(argv: list[str]) -> None:
    """Prints a row for each pair, and the medians."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config = _CONFIG.value
    num_steps = _STEPS.value * _PAIRS.value
    config.train.update(num_steps=num_steps, log_every=_STEPS.value)
    config.train.update(checkpoint_every=num_steps, sample_every=num_steps)
    definition = define_model(config)
    optimizer = make_optimizer(config.train, learns_schedule=config.schedule.name == "learned")
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, batches of {config.train.batch_size}\n")
    print("| trainer, images/s | bare step, images/s | ratio | waiting for data |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as workdir, Checkpoints(workdir) as checkpoints:
        record.record(config, workdir)
        with Paired(workdir) as log:
            log.trainer = Trainer(config, workdir, definition, optimizer, checkpoints, log)
            history = init_history(config, definition)
            log.trainer.run(init_state(init_params(definition, config.seed), optimizer, history))
    ratios = [rate / bare for rate, _, bare in log.found]
    waits = [waited for _, waited, _ in log.found]
    print(
        f"\nmedian ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}), waiting {statistics.median(waits):.2%}"
    )


if __name__ == "__main__":
    app.run(main)
