"""The lines of the training log: mean losses since the last line, learning rate and speed."""

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.harness.training.optimizer import learning_rate
from experiments.harness.training.speed import Timing, peak_flops, speed_text, speed_values
from experiments.harness.training.state import TrainState
from experiments.harness.workdir.metrics import MetricsLog


class LogLine:
    """Writes the means over the steps since the last line, and their speed. A `Task`'s `run`."""

    def __init__(self, config: ConfigDict, log: MetricsLog):
        self._config, self._log = config, log
        self._learning_rate = learning_rate(config.train)
        self._last_timing = Timing()
        peak = peak_flops(jax.devices()[0].device_kind, config.model.dtype)
        self._peak = None if peak is None else peak * jax.device_count()

    def __call__(self, state: TrainState, timing: Timing) -> str:
        """Writes a line; returns its loss and speed for the progress bar."""
        step, window = int(state.step), jax.device_get(state.window)
        num_steps = int(window.steps) or np.nan  # 0 if all steps were skipped
        loss = float(window.loss / num_steps)
        has_examples = window.quartile_count > 0
        quartile_means = np.where(
            has_examples, window.quartile_loss / np.maximum(window.quartile_count, 1), np.nan
        )
        skipped = {"skipped_steps": int(window.skipped_steps)}
        # The optimizer does not count skipped steps.
        last_update = step - 1 - int(window.skipped_steps)
        last, self._last_timing = self._last_timing, timing
        speed = speed_values(timing, last, self._config.train.batch_size, self._peak)
        is_compiled_since = timing.compile_seconds is not None and last.compile_seconds is None
        self._log.write(
            step,
            loss=loss,
            grad_norm=float(window.grad_norm / num_steps),
            learning_rate=float(self._learning_rate(last_update)),
            **{f"loss_quartile_{i + 1}": float(mean) for i, mean in enumerate(quartile_means)},
            **(skipped if self._config.train.skip_nonfinite > 0 else {}),
            **speed,
            **({"compile_seconds": timing.compile_seconds} if is_compiled_since else {}),
        )
        return f"loss {loss:.4f}{speed_text(speed)}"
