"""Progress bars with speed and remaining time; in a log file a line every 20 seconds."""

import sys
from typing import Any

from tqdm import tqdm

from experiments.harness.processes import distributed


def progress(total: int | None, description: str, unit: str, **settings: Any) -> tqdm:
    """A bar over `total` units (None: unknown); further settings are tqdm's."""
    interval = 0.5 if sys.stderr.isatty() else 20.0
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        mininterval=interval,
        maxinterval=60,
        disable=not distributed.is_first(),
        **settings,
    )
