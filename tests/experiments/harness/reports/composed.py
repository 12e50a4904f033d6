"""Work directories composed of small files, as runs would leave them."""

import html.parser
import json
import pathlib
from typing import Any

import numpy as np

from configs import digits
from experiments.harness.pictures.images import save_png
from experiments.harness.workdir.files import write_json, write_npz

SCRIPT = "<script>alert(1)</script>"
DATA = {"data.name": "digits", "data.splits.test": "test"}


def compose(path: pathlib.Path, per_example: Any = (1.0, 3.0), **changes: Any) -> pathlib.Path:
    """A finished run of 20 steps, T = 3, whose evaluation has these bits/dim of each example.

    Args:
      path: the directory to make.
      per_example: the bound of each example.
      **changes: entries of evaluation.json.
    """
    path.mkdir(parents=True)
    config = digits.get_config()
    config.train.num_steps = 20
    write_json(path / "config.json", config.to_dict())
    data = {"num_examples": 1000, "image_shape": [8, 8, 1], "fingerprint": ""}
    write_json(path / "data.json", data)
    lines = [
        {"step": step, "loss": 9.0 / step, "grad_norm": 1.0, "learning_rate": 0.1}
        | {f"loss_quartile_{i}": float(i) for i in (1, 2, 3, 4)}
        | {"images_per_second": 100.0}
        for step in range(2, 21, 2)
    ]
    lines += [{"step": step, "validation_bits_per_dim": 4.0 - step / 20} for step in (10, 20)]
    write_lines(path / "metrics.jsonl", lines)
    versions = {"python": "3.11", "jax": "0.10.2", "device": "cpu", "num_devices": 1}
    start = {"event": "start", "step": 0, "time": "2026-01-02T03:04:05+00:00", **versions}
    end = {"event": "end", "seconds": 61.0, "outcome": "finished"}
    write_lines(path / "sessions.jsonl", [start, end])
    write_evaluation(path, np.asarray(per_example, float), changes)
    save_png(path / "samples" / "samples.png", np.full((9, 9, 1), 200, np.uint8))
    save_png(path / "samples" / "step_00000010.png", np.full((9, 9, 1), 100, np.uint8))
    return path


def write_evaluation(path: pathlib.Path, per_example: np.ndarray, changes: dict[str, Any]) -> None:
    """evaluation.json and evaluation.npz."""
    n, mean = len(per_example), float(per_example.mean())
    result = {
        "bits_per_dim": mean,
        "bits_per_dim_se": float(per_example.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
        "bits_per_dim_mc_se": 0.0125,
        "prior": 0.25,
        "diffusion": mean - 0.5,
        "reconstruction": 0.25,
        "num_examples": n,
        "split": "test",
        "num_timesteps": 3,
        "seed": 0,
        "step": 20,
        "uniform_bits_per_dim": float(np.log2(17)),
        "network_evaluations": 1234,
        "settings": DATA,
        "files": {},
    }
    write_npz(
        path / "evaluation.npz",
        t=np.arange(1, 4),
        log_snr=np.array([4.0, 0.0, -4.0]),
        kl=np.array([0.5, 0.25]),
        x_0_rmse=np.array([0.5, 1.0, 2.0]),
        bits_per_dim_per_example=per_example,
    )
    write_json(path / "evaluation.json", result | changes)


def write_lines(path: pathlib.Path, lines: list[Any]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


class Page(html.parser.HTMLParser):
    """A page, parsed.

    Attributes:
      tags: each tag with its attributes.
      text: all text but that of the style sheet, with single spaces.
    """

    def __init__(self, page: str):
        super().__init__()
        self.tags, self._pieces = [], []
        self.feed(page)
        self.close()
        self.text = " ".join(" ".join(self._pieces).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self._pieces.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each tag of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]
