"""Kills a small digits run again and again, at random, and looks at what it ends with.

python -m tests.stress.kill --times 20

Each time is the main job in a new work directory, stopped at most twice by SIGKILL or SIGTERM, at a
random moment or while a checkpoint is being written, and started again until it ends. It has to end
bit-equal to a run that nothing stopped: checkpoints, metrics.jsonl, evaluation and samples.
"""

import argparse
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.harness.training import speed
from experiments.harness.workdir.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
CLOCK = {*speed.TIMING, "seconds", "environment"}  # what depends on how fast the machine is
SETTINGS = {
    "schedule.num_timesteps": 8,
    "model.unet.channels": 8,
    "model.unet.num_groups": 4,
    "model.unet.channel_multipliers": "(1,)",
    "model.unet.num_res_blocks": 1,
    "model.unet.attention_resolutions": "()",
    "train.batch_size": 16,
    "train.num_steps": 400,
    "train.timesteps": "importance",
    "train.log_every": 7,
    "train.checkpoint_every": 50,
    "train.keep_checkpoints": 2,
    "train.sample_every": 100,
    "train.sample_timesteps": 3,
    "train.validation_timesteps": 2,
    "evaluate.chunk_size": 4,
    "evaluate.replicates": 3,
    "sample.num_samples": 4,
    "sample.batch_size": 4,
    "sample.strip_rows": 2,
    "sample.strip_columns": 4,
}


class Stop(NamedTuple):
    """When a run is to be stopped, and how.

    Attributes:
      number: the signal.
      step: as soon as so many are logged; None: as soon as a second checkpoint is being written.
      delay: seconds more to wait.
    """

    number: signal.Signals
    step: int | None
    delay: float

    def __str__(self) -> str:
        when = "in a save" if self.step is None else f"after step {self.step}"
        return f"{self.number.name} {when} + {self.delay:.2f} s"


class Ended(NamedTuple):
    """How a process ended: its exit status, and the seconds from the signal to the end."""

    status: int
    seconds: float
    output: str


def run(
    workdir: pathlib.Path, stop: Stop | None, environment: dict[str, str], experiment: str
) -> Ended:
    """The job until it ends or is stopped."""
    flags = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "main.py", f"--workdir={workdir}", f"--experiment={experiment}"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, *flags], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait(process, workdir, stop)
            started = time.monotonic()
            if stop is not None and process.poll() is None:
                process.send_signal(stop.number)
            status = process.wait(timeout=600)
        finally:
            process.kill()
        seconds = time.monotonic() - started
        output.seek(0)
        return Ended(status, seconds, output.read())


def _wait(process: subprocess.Popen, workdir: pathlib.Path, stop: Stop | None) -> None:
    """Returns when it is time to stop, or there is nothing left to stop."""
    if stop is None:
        return
    seen: set[str] = set()
    while process.poll() is None:
        seen.update(p.name for p in workdir.glob("checkpoints/*tmp*"))
        if len(seen) > 1 if stop.step is None else _last_step(workdir) >= stop.step:
            break
        time.sleep(0.002)
    time.sleep(stop.delay)


def result(workdir: pathlib.Path) -> dict[str, Any]:
    """All that a run ends with and that does not depend on the clock, by name."""
    import orbax.checkpoint as ocp

    def timeless(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: timeless(v) for k, v in tree.items() if k not in CLOCK}
        return tree

    with Checkpoints(workdir, read_only=True) as checkpoints:
        steps, best = checkpoints.steps(), checkpoints.best_step()
    found: dict[str, Any] = {"steps": (steps, best)}
    with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onto which devices is no matter here
        for step in steps:
            state = checkpointer.restore(workdir / "checkpoints" / str(step) / "default")
            for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
                name = f"step {step}: {jax.tree_util.keystr(path)}"
                found[name] = (np.asarray(leaf).dtype.name, np.asarray(leaf).tobytes())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found["metrics.jsonl"] = [timeless(json.loads(line)) for line in lines]
    if (path := workdir / "evaluation.json").exists():
        found["evaluation.json"] = timeless(json.loads(path.read_text()))
    if (path := workdir / "samples" / "samples.npz").exists():
        with np.load(path) as samples:
            found["samples"] = samples["samples"].tobytes()
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names whose values differ."""
    return [name for name in a | b if a.get(name) != b.get(name)]


def plan(rng: random.Random) -> list[Stop]:
    """One or two stops of a run: of its beginning, its training, its saves, or its end."""
    last = SETTINGS["train.num_steps"]
    choices = [
        lambda: (0, rng.uniform(2, 8)),
        lambda: (rng.randint(1, last), rng.uniform(0, 0.2)),
        lambda: (None, rng.uniform(0, 0.05)),
        lambda: (last, rng.uniform(0, 4)),
    ]
    stops = []
    for _ in range(rng.randint(1, 2)):
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        (choice,) = rng.choices(choices, weights=[1, 4, 4, 1])
        stops.append(Stop(number, *choice()))
    return stops


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 if every run ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--steps", type=int, default=SETTINGS["train.num_steps"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experiment", default="all", choices=["all", "train"])
    arguments = parser.parse_args(argv)
    SETTINGS["train.num_steps"] = arguments.steps
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        return _main(pathlib.Path(directory), arguments, rng)


def _main(directory: pathlib.Path, arguments: argparse.Namespace, rng: random.Random) -> int:
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(directory / "cache"))
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    start = functools.partial(run, environment=environment, experiment=arguments.experiment)
    ended = start(directory / "uninterrupted", None)
    assert ended.status == 0, ended.output
    expected = result(directory / "uninterrupted")
    tries = range(arguments.times)
    good = sum(_try(directory / str(i), plan(rng), start, expected) for i in tries)
    print(f"{good} of {len(tries)} bit-equal")
    return 0 if good == len(tries) else 1


def _try(
    workdir: pathlib.Path,
    stops: list[Stop],
    start: Callable[[pathlib.Path, Stop | None], Ended],
    expected: dict[str, Any],
) -> bool:
    """One run with its stops; prints its row of the table."""
    outcomes = []
    for stop in [*stops, None]:
        ended = start(workdir, stop)
        # Until main listens, SIGTERM does what it does to any program.
        allowed = {0} if stop is None else {0, -stop.number, 128 + stop.number}
        if ended.status not in allowed:
            print(f"{workdir.name:>3}  exit status {ended.status}\n{ended.output}", flush=True)
            return False
        if stop is not None:
            how = f"reached {_last_step(workdir)}; exit {ended.status}, {ended.seconds:.1f} s"
            outcomes.append(f"{stop} ({how})")
    wrong = differences(expected, result(workdir))
    outcomes.append("bit-equal" if not wrong else f"differs in {wrong[:5]}")
    print(f"{workdir.name:>3}  {'; '.join(outcomes)}", flush=True)
    return not wrong


def _last_step(workdir: pathlib.Path) -> int:
    """The step of the last whole line of the log."""
    path = workdir / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


if __name__ == "__main__":
    sys.exit(main())
