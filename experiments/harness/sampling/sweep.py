"""Sample quality by sampler and number of steps: a table, a plot, and pictures."""

from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion.samplers.base import Samples
from diffusion.samplers.registry import SAMPLERS
from diffusion.schedules import Levels
from experiments.harness.data import splits
from experiments.harness.pictures import images as images
from experiments.harness.pictures import plots
from experiments.harness.pictures.images import save_png
from experiments.harness.sampling import quality as qualities
from experiments.harness.sampling.draw import Drawer, to_bytes
from experiments.harness.sampling.quality import Quality, Reference, reference
from experiments.harness.setup.trained import Run
from experiments.harness.workdir import provenance
from experiments.harness.workdir.files import read, write_json

REFERENCE = "ancestral"  # the model's own sampler, at all of the schedule's levels


class Entry(NamedTuple):
    """One sampler at one number of steps.

    Attributes:
      sampler: its name.
      num_timesteps: the levels that it stepped through.
      evaluations: of the network, a sample on the average.
      quality: what was measured.
    """

    sampler: str
    num_timesteps: int
    evaluations: float
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        told = self._asdict()
        del told["quality"]
        return told | self.quality._asdict()

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "Entry":
        """From a file."""
        of = Quality(**{name: told[name] for name in Quality._fields})
        return cls(told["sampler"], told["num_timesteps"], told["evaluations"], of)


def sweep(run: Run) -> list[Entry]:
    """Draws with every sampler at every number of steps, and with ancestral sampling at all T.

    All start from the same x_T. An entry is kept in samples/sweep.json as soon as it is measured,
    so that an interrupted sweep goes on where it was. sweep.md and sweep.png lie beside it,
    and a grid of samples of each entry in sweep/.

    Returns:
      The entries, in the order asked for; the reference first.
    """
    config = run.config
    against = reference(config, run.workdir)
    path, identity = run.workdir / provenance.SWEEP, _identity(run, against)
    saved = _saved(path, identity)
    entries, drawers = [], {}
    for name, num_timesteps in _plan(run):
        drawer = drawers.setdefault(name, Drawer(_with_sampler(config, name), run.definition))
        key, grid = f"{name} {num_timesteps}", _grid_path(run, name, num_timesteps)
        if key not in saved or not grid.exists():
            levels = _levels(run, name, num_timesteps)
            made = drawer(run.params, levels, config.quality.num_samples)
            saved[key] = measure(run, against, name, num_timesteps, made)
            save_png(grid, images.grid(to_bytes(run.definition, made.x_0[:64])))
            write_json(path, identity | {"entries": [entry.to_dict() for entry in saved.values()]})
            tqdm.write(_row(saved[key]))
        entries.append(saved[key])
    _write(run, entries)
    return entries


def _plan(run: Run) -> list[tuple[str, int]]:
    """Samplers and numbers of steps; the reference first, and nothing twice."""
    of = run.config.sample.sweep
    names = of.samplers or tuple(SAMPLERS)
    plan = [(REFERENCE, run.definition.levels.num_timesteps)]
    plan += [(name, int(steps)) for name in names for steps in of.num_timesteps]
    return list(dict.fromkeys(plan))


def _levels(run: Run, name: str, num_timesteps: int) -> Levels:
    """By the config's spacing, but for the reference: all of the schedule's own."""
    own = run.definition.levels
    if (name, num_timesteps) == (REFERENCE, own.num_timesteps):
        return own
    return run.levels(num_timesteps)


def measure(run: Run, against: Reference, name: str, num_timesteps: int, made: Samples) -> Entry:
    """The entry of some samples."""
    images = np.asarray(run.definition.quantization.to_level(made.x_0), np.uint8)
    found = qualities.quality(run.config, images, against)
    return Entry(name, num_timesteps, float(made.evaluations.mean()), found)


def _with_sampler(config: ConfigDict, name: str) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.sample.sampler = name
    return changed


def _grid_path(run: Run, name: str, num_timesteps: int) -> epath.Path:
    return run.workdir / "samples" / "sweep" / f"{name}_{num_timesteps:04d}.png"


def _identity(run: Run, against: Reference) -> dict[str, Any]:
    """What all entries of a file have in common."""
    identity = provenance.identity(
        provenance.SWEEP, run.config, run.step, run.workdir, data=splits.fingerprints(run.config)
    )
    return identity | {"features": against.features.name}


def _saved(path: epath.Path, identity: dict[str, Any]) -> dict[str, Entry]:
    """The entries that an earlier sweep with the same settings has measured."""

    def parse(recorded):
        entries = [Entry.from_dict(entry) for entry in recorded["entries"]]
        is_same = provenance.is_same(recorded, identity)
        if recorded["features"] != identity["features"] or not is_same:
            return {}
        return {f"{entry.sampler} {entry.num_timesteps}": entry for entry in entries}

    return read(path, parse) or {}


def to_markdown(entries: list[Entry]) -> str:
    """The table, and what stands above it."""
    head = (
        "| sampler | steps | evaluations | Fréchet | kernel × 1000 | precision | recall |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *map(_row, entries)])


def _row(entry: Entry) -> str:
    of = entry.quality
    return (
        f"| {entry.sampler} | {entry.num_timesteps} | {entry.evaluations:.0f} "
        f"| {of.frechet:.3f} ± {of.frechet_mc_se:.3f} "
        f"| {1e3 * of.kernel:.2f} ± {1e3 * of.kernel_mc_se:.2f} "
        f"| {of.precision:.3f} | {of.recall:.3f} |"
    )


def _write(run: Run, entries: list[Entry]) -> None:
    """The table and the plot."""
    directory = run.workdir / "samples"
    (directory / "sweep.md").write_text(to_markdown(entries) + "\n")
    plots.plot_quality(directory / "sweep.png", [entry.to_dict() for entry in entries])
