"""What the training loop takes beside the compiled step, and how long it waits for data.

    python -m benchmarks.loop
    python -m benchmarks.loop --config=configs/photos.py --config.data.stream=always --steps=10

The trainer runs as `main.py` runs it, with its log, in a work directory that is thrown away. After
each log line the same compiled step runs as many times on one batch that lies on the device, with
nothing around it. Both rates come from the same minutes of the same process, and the reported ratio
is the median over such pairs. Validation, samples and checkpoints are left out, since the trainer's
rate counts steps only.
"""

import statistics
import tempfile
import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from experiments.harness.training.log_line import LogLine
from experiments.harness.training.loop import Task, Trainer
from experiments.harness.training.speed import Timing
from experiments.harness.training.state import TrainState, first_state, make_setup
from experiments.harness.workdir import record
from experiments.harness.workdir.checkpoints import Checkpoints
from experiments.harness.workdir.metrics import MetricsLog

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py", "What is trained.")
_STEPS = flags.DEFINE_integer("steps", 100, "Steps between two log lines.")
_PAIRS = flags.DEFINE_integer("pairs", 9, "Log lines, each followed by as many bare steps.")


class BareSteps:
    """A task that times the trainer's compiled step alone. Set `trainer` before its first run.

    Attributes:
      pairs: for each run, the trainer's images/s since the last one, its share of time spent
        waiting for data, and the bare step's images/s.
    """

    trainer: Trainer

    def __init__(self):
        self.pairs: list[tuple[float, float, float]] = []
        self._last, self._state = Timing(), None

    def __call__(self, _: TrainState, timing: Timing) -> None:
        last, self._last = self._last, timing
        num_images = _STEPS.value * self.trainer.setup.config.train.batch_size
        steps, seconds = timing.steps - last.steps, timing.seconds - last.seconds
        rate = num_images * (steps / _STEPS.value) / seconds
        waiting, bare = (timing.waited - last.waited) / seconds, num_images / self._seconds()
        self.pairs.append((rate, waiting, bare))
        tqdm.write(f"| {rate:,.1f} | {bare:,.1f} | {rate / bare:.3f} | {waiting:.2%} |")

    def _seconds(self) -> float:
        """Seconds of the bare steps, on a state of their own, since each step donates its state."""
        batch = jax.block_until_ready(jax.device_put(self.trainer.feed.of_step(0)))
        if self._state is None:
            self._state = self.trainer.packing.pack(first_state(self.trainer.setup))
        began = time.monotonic()
        for _ in range(_STEPS.value):
            self._state = self.trainer.train_step(self._state, *batch)
        jax.block_until_ready(self._state)
        return time.monotonic() - began


def main(argv: list[str]) -> None:
    """Prints a row for each pair, and the medians."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config = _CONFIG.value
    config.train.num_steps = _STEPS.value * _PAIRS.value
    setup = make_setup(config)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, batches of {config.train.batch_size}\n")
    print("| trainer, images/s | bare step, images/s | ratio | waiting for data |")
    print("| --- | --- | --- | --- |")
    bare_steps = BareSteps()
    with (
        tempfile.TemporaryDirectory() as workdir,
        Checkpoints(workdir) as checkpoints,
        MetricsLog(workdir) as log,
    ):
        record.record(config, workdir)
        tasks = [
            Task("log line", _STEPS.value, LogLine(config, log)),
            Task("bare steps", _STEPS.value, bare_steps),
        ]
        bare_steps.trainer = Trainer(setup, workdir, checkpoints, tasks)
        bare_steps.trainer.run(first_state(setup))
    ratios = [rate / bare for rate, _, bare in bare_steps.pairs]
    waits = [waiting for _, waiting, _ in bare_steps.pairs]
    print(
        f"\nmedian ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}), waiting {statistics.median(waits):.2%}"
    )


if __name__ == "__main__":
    app.run(main)
