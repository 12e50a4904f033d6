"""Sample quality by sampler and number of steps: a table, a plot, and pictures."""

from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion.samplers.base import Samples
from diffusion.samplers.registry import SAMPLERS
from diffusion.schedules import Levels
from experiments.harness.data import splits
from experiments.harness.pictures import images, plots
from experiments.harness.pictures.images import save_png
from experiments.harness.sampling import quality as qualities
from experiments.harness.sampling.draw import Drawer, to_bytes, to_grey_levels
from experiments.harness.sampling.quality import Quality, Reference, reference
from experiments.harness.setup.trained import Run
from experiments.harness.workdir import dependences, provenance
from experiments.harness.workdir.files import read, write_json

REFERENCE = "ancestral"  # the model's own sampler, at all of the schedule's levels


class Entry(NamedTuple):
    """One sampler at one number of steps.

    Attributes:
      sampler: its name.
      num_timesteps: the number of levels.
      evaluations: network evaluations per sample, the mean.
      quality: the quality of the samples.
    """

    sampler: str
    num_timesteps: int
    evaluations: float
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        """For a file: one flat dictionary."""
        entry = self._asdict()
        return {name: entry[name] for name in self._fields[:-1]} | self.quality._asdict()

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> "Entry":
        """From a file."""
        quality = Quality(*(entry[name] for name in Quality._fields))
        return cls(*(entry[name] for name in cls._fields[:-1]), quality)


def sweep(run: Run) -> list[Entry]:
    """Samples with every sampler at every number of steps, and with ancestral sampling at all T.

    All start from the same x_T. Each entry is saved in samples/sweep.json when it is measured, so
    that an interrupted sweep resumes. Also written: sweep.md, sweep.png, and a grid of samples of
    each entry in sweep/.

    Returns:
      The entries, in the order asked for; the reference first.
    """
    config = run.config
    data = reference(config, run.workdir)
    path, identity = run.workdir / dependences.SWEEP, _identity(run, data)
    saved = _saved(path, identity)
    entries, drawers = [], {}
    for name, num_timesteps in _plan(run):
        drawer = drawers.setdefault(name, Drawer(_with_sampler(config, name), run.definition))
        key, grid = f"{name} {num_timesteps}", _grid_path(run, name, num_timesteps)
        if key not in saved or not grid.exists():
            levels = _levels(run, name, num_timesteps)
            samples = drawer(run.params, levels, config.quality.num_samples)
            saved[key] = measure(run, data, name, num_timesteps, samples)
            save_png(grid, images.grid(to_bytes(run.definition, samples.x_0[:64])))
            write_json(path, identity | {"entries": [entry.to_dict() for entry in saved.values()]})
            tqdm.write(_row(saved[key]))
        entries.append(saved[key])
    _write(run, entries)
    return entries


def _plan(run: Run) -> list[tuple[str, int]]:
    """Samplers and numbers of steps without repeats; the reference comes first."""
    settings = run.config.sample.sweep
    names = settings.samplers or tuple(SAMPLERS)
    plan = [(REFERENCE, run.definition.levels.num_timesteps)]
    plan += [(name, int(steps)) for name in names for steps in settings.num_timesteps]
    return list(dict.fromkeys(plan))


def _levels(run: Run, name: str, num_timesteps: int) -> Levels:
    """Levels by the config's spacing; for the reference all of the schedule's own."""
    own = run.definition.levels
    if (name, num_timesteps) == (REFERENCE, own.num_timesteps):
        return own
    return run.levels(num_timesteps)


def measure(run: Run, data: Reference, name: str, num_timesteps: int, samples: Samples) -> Entry:
    """The entry of some samples, which are compared with the data."""
    grey_levels = to_grey_levels(run.definition, samples.x_0)
    quality = qualities.quality(run.config, grey_levels, data)
    return Entry(name, num_timesteps, float(samples.evaluations.mean()), quality)


def _with_sampler(config: ConfigDict, name: str) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.sample.sampler = name
    return changed


def _grid_path(run: Run, name: str, num_timesteps: int) -> epath.Path:
    return run.workdir / "samples" / "sweep" / f"{name}_{num_timesteps:04d}.png"


def _identity(run: Run, data: Reference) -> dict[str, Any]:
    """What the entries of a file have in common."""
    identity = provenance.identity(
        dependences.SWEEP, run.config, run.step, run.workdir, data=splits.fingerprints(run.config)
    )
    return identity | {"features": data.features.name}


def _saved(path: epath.Path, identity: dict[str, Any]) -> dict[str, Entry]:
    """The entries that an earlier sweep with the same settings has measured."""

    def parse(recorded):
        entries = [Entry.from_dict(entry) for entry in recorded["entries"]]
        if recorded["features"] != identity["features"]:
            return {}
        if not provenance.is_current(path, recorded, identity):
            return {}
        return {f"{entry.sampler} {entry.num_timesteps}": entry for entry in entries}

    return read(path, parse) or {}


def to_markdown(entries: list[Entry]) -> str:
    """The table."""
    head = (
        "| sampler | steps | evaluations | Fréchet | kernel × 1000 | precision | recall |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *map(_row, entries)])


def _row(entry: Entry) -> str:
    quality = entry.quality
    return (
        f"| {entry.sampler} | {entry.num_timesteps} | {entry.evaluations:.0f} "
        f"| {quality.frechet:.3f} ± {quality.frechet_mc_se:.3f} "
        f"| {1e3 * quality.kernel:.2f} ± {1e3 * quality.kernel_mc_se:.2f} "
        f"| {quality.precision:.3f} | {quality.recall:.3f} |"
    )


def _write(run: Run, entries: list[Entry]) -> None:
    """The table and the plot."""
    directory = run.workdir / "samples"
    (directory / "sweep.md").write_text(to_markdown(entries) + "\n")
    plots.plot_quality(directory / "sweep.png", [entry.to_dict() for entry in entries])
