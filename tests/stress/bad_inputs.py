"""The bad inputs of `tests.stress.inputs`, in groups."""

import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

from configs.base import SETTINGS
from configs.settings.declaration import Bool, Choice, Float, Int, Kind, Name, Tuple
from tests.stress import bad_files, command
from tests.stress.bad_files import Make
from tests.stress.bad_studies import studies
from tests.stress.case import Case, write
from tests.stress.kill import SETTINGS as SMALL

DATA = f"--config={command.ROOT}/configs/digits.py", "--config.train.batch_size=8"


def bad_values(kind: Kind) -> Iterator[str]:
    """Texts that are no value of a kind: of another type, not finite, out of range, unknown."""
    if isinstance(kind, Int | Float):
        yield from ("many", "nan", "None", "")
        if isinstance(kind, Int):
            yield from ("0.5", "1e99")
        low, high = kind.interval[1:-1].split(",")
        for end, bracket, beyond in ((low, kind.interval[0], "-"), (high, kind.interval[-1], "")):
            if "inf" in end:
                yield from () if bracket in "[]" else (f"{beyond}inf",)
            else:
                base, _, power = end.strip().partition("^")
                value = str(int(base) ** int(power)) if power else base
                step = -1 if beyond else 1
                yield (
                    str(float(value) + step) if isinstance(kind, Float) else str(int(value) + step)
                )
    elif isinstance(kind, Bool):
        yield from ("perhaps", "2", "nan")
    elif isinstance(kind, Choice | Name):
        yield from ("nonsense", "nan", "None")
    elif isinstance(kind, Tuple):
        yield from ("5", "nan", "(None,)", "({},)")
        entries = list(bad_values(kind.element))
        quoted = entries if isinstance(kind.element, Int | Float) else map(repr, entries)
        yield from (f"({entry or 'x'},)" for entry in quoted)
        if kind.min_length:
            yield "()"


def settings() -> Iterator[Case]:
    """Each setting with bad values; then settings that are too large for memory, or do not fit."""
    for name, setting in SETTINGS.flat():
        for text in bad_values(setting.kind):
            yield Case(f"{name}={text}", (f"--config.{name}={text}",), name)
    for name, text in TOO_LARGE.items():
        yield Case(f"{name}={text}", (f"--config.{name}={text}",), "config.")


TOO_LARGE = {
    "model.unet.channels": 65536,
    "sample.num_samples": 10**9,
    "train.batch_size": 10**7,
    "evaluate.batch_size": 10**7,
    "evaluate.chunk_size": 10**7,
    "sample.strip_columns": 10**9,
    "analytic.levels": 10**7,
}

MISTAKES = {
    "--config.train.batchsize=64": "--config.train.batch_size?",
    "--config.schedul.name=cosine": "--config.schedule.name?",
    "--config.schedule.name=cosin": "did you mean cosine?",
    "--config.train.batch_size=many": "=many; it must be a whole number in [1, 10^7]",
    "--config.train.batch_size=5000": "= 5000 is more than the 1000 training examples of digits",
    "--config.train.warmup_steps=1001": "at most config.train.num_steps = 1000",
    "--config.model.unet.channel_multipliers=2": "=2; it must be a tuple",
    "--config.model.unet.attention_resolutions=(1e2,)": "[1, 16384]; write 100",
    "--config.model.unet.fourier_exponents=3": "write '(3,)'",
    "--config.model.unet.fourier_exponents=3e0": "write '(3,)'",
    "--config.train.num_steps=1e15": "= 1000000000000000; it must be a whole number",
    "--config.train.num_steps=1.5e0": "=1.5e0; it must be a whole number",
    "--config.train=5": "config.train",
    "--config.train.unet.channels=5": "--config.train.unet.channels",
    "--config..=5": "parse '.'",
    "--config.seed.x=5": "config.seed",
    "--config.data=None": "config.data",
    "--wrkdir=runs/a": "wrkdir",
    "--experiment=evalute": "--experiment=evalute",
    "--experiment=": "--experiment",
    "experiment=sample": "experiment=sample",
    "-": "'-'",
    "--num_processes=two": "num_processes",
    "--distributed=perhaps": "distributed",
    "--config=configs/nothing.py": "configs/digits.py",
    "--config=configs": "configs/digits.py",
    "--config=": "configs/digits.py",
    "--config=:": "configs/digits.py",
    "--config=README.md": "README.md",
    "--config=configs/digits.py:argument": "configs/digits.py:argument",
    "--config=configs/recorded.py:nowhere": "nowhere",
    "--config=configs/recorded.py": "configs/recorded.py",
    "--config=~no-such-user/a.py": "~no-such-user",
    "--config=" + "a" * 5000: "configs/digits.py",
}


def flags() -> Iterator[Case]:
    """Flags that are none, and configs that are none."""
    for flag, contained in MISTAKES.items():
        yield Case(flag[:60], (flag,), contained)
    yield Case("no workdir", ("--workdir=",), "--workdir is missing")
    yield Case("a report of nothing", ("--experiment=report",), "holds nothing to report")
    others = ("--experiment=report", "--config.report.file={here}", "{here}")
    yield Case("a report in a directory", others, "config.report.file = ")
    yield Case("a second directory", ("{here}/run", "{here}"), "is no flag")
    yield Case("a flag without a value", ("--experiment",), "experiment")
    for encoding in ("ascii", "cp1252"):
        flag = "--config.data.name=±→\udcff"
        environment = {"PYTHONIOENCODING": encoding}
        yield Case(f"error in {encoding}", (flag,), "data.name", environment=environment)


CONFIG_FILES = {
    "": "get_config",
    "\0": "mine.py",
    "def get_config(:\n": "line 1",
    "x = 1\ny = x / 0\n": "line 2: ZeroDivisionError: division by zero",
    "import sys\nsys.exit(0)\n": "line 2: SystemExit",
    "import absent_package\n": "line 1: ModuleNotFoundError",
    "x = 1\n": "no attribute 'get_config'",
    "get_config = 5\n": "mine.py",
    "def get_config():\n    return get_config()\n": "line 2: RecursionError",
    "def get_config(name):\n    pass\n": "missing 1 required positional argument: 'name'",
    "def get_config():\n    pass\n": "returns a NoneType; it must return a ConfigDict",
    "def get_config():\n    return {}\n": "returns a dict",
    "from ml_collections import ConfigDict as get_config\n": "config.seed is missing",
}
CONFIG_LINES = {
    "config.train.batchsize = 3": "line 6: AttributeError",
    "config.sample.labels = 3": "line 6: TypeError",
    "config.seed = float('nan')": "line 6: TypeError",
    "config.schedule.betas.betas = (float('nan'),) * 1000": "betas",
    "config.schedule.betas.betas = np.full((100, 100), np.nan)": "betas",
    "config.schedule.betas.betas = tuple(np.full((100, 100), np.nan))": "betas",
    "config.schedule.betas.betas = (0.1, 'a\\nb')": "betas",
    "config.schedule.update(name='betas')": "betas",
    "config.data.name = 'a\\nb\\x1b[31m'": "config.data.name",
    "config.data.data_dir = 'a\\0b'; config.data.name = 'npz'": "config.data.data_dir",
    "config.data.name = 'x' * 10**6": "config.data.name",
    "config.train.learning_rate = 10**400": "line 6: OverflowError",
    "config.train.num_steps = 10**5000": "config.train.num_steps",
    "del config.train": "line 6: AttributeError",
    "with config.unlocked(): config.train = 5": "train",
    "with config.unlocked(): config.mine = {'deep': {'nan': 1.0}}": "config.mine is no setting",
}
_CONFIG_FILE = """\
import numpy as np
from configs.digits import get_config as digits

def get_config():
    config = digits()
    {line}
    return config
"""


def config_files() -> Iterator[Case]:
    """Config files with mistakes."""
    texts = CONFIG_FILES | {_CONFIG_FILE.format(line=k): v for k, v in CONFIG_LINES.items()}
    for text, contained in texts.items():
        name = repr(text if text in CONFIG_FILES else text.splitlines()[5].strip())
        make = functools.partial(write, "mine.py", text.encode())
        yield Case(name, ("--config={here}/mine.py",), contained, make)


LONG = "a" * 5000
WORKDIRS = {
    "gs://bucket/run": "gcsfs",
    "s3://bucket/run": "s3fs",
    "az://bucket/run": "az://bucket/run",
    "http://host/run": "gs://",
    "GS://bucket/run": "GS://bucket/run",
    "~no-such-user/run": "~no-such-user",
    LONG: "5,000 characters",
    "a/" * 2500: "5,000 characters",
    "b" * 300: "File name too long",
    "{here}/file": "is a file",
    "{here}/file/run": "is a file",
    "{here}/pipe": "is a file",
    "{here}/loop/run": "{here}/loop",
    "{here}/nothing": "{here}/nothing",
    "{here}/star*": "with *",
    "/proc/run": "/proc/run",
    "/dev/null": "/dev/null",
}


def paths() -> Iterator[Case]:
    """Work directories and folders of data that are none."""

    def make(here: pathlib.Path) -> None:
        (here / "file").write_text("kept")
        os.mkfifo(here / "pipe")
        (here / "loop").symlink_to(here / "loop")
        (here / "nothing").symlink_to(here / "absent")

    for workdir, contained in WORKDIRS.items():
        yield Case(f"workdir={workdir[:40]}", (f"--workdir={workdir}",), contained, make)
    for name in ("folder", "npz", "idx", "cifar10"):
        for path in (
            "",
            "~no-such-user",
            LONG,
            "{here}/file",
            "{here}/pipe",
            "{here}/loop",
            "gs://a/b",
        ):
            data = f"--config.data.name={name}", f"--config.data.data_dir={path}"
            flags = *data, "--config.data.image_size=8"
            yield Case(
                f"{name} in {path[:40]}",
                flags,
                "config.data." if "file" not in path else "file",
                make,
            )
    for source in ("{here}", "{here}/absent", "{here}/file", "~no-such-user", LONG, "gs://a/b"):
        flags = (f"--config.train.init_from={source}",)
        yield Case(f"init_from={source[:40]}", flags, "config.train.init_from", make)


def data() -> Iterator[Case]:
    """Damaged and unsuitable data sets, made here."""

    def case(group: str, name: str, flags: tuple[str, ...], contained: str, make: Make) -> Case:
        path = "data.npz" if group == "npz file" else "data"
        flags = (*DATA, f"--config.data.data_dir={{here}}/{path}", *flags)
        flags += ("--config.model.class_conditional",) if "with classes" in name else ()
        return Case(f"{group}: {name}", flags, contained, lambda here: make(here / path))

    tables = {
        "npz file": (bad_files.NPZ, ("--config.data.name=npz",)),
        "npz folder": (bad_files.NPZ_FOLDER, ("--config.data.name=npz",)),
        "idx": (bad_files.IDX, ("--config.data.name=idx",)),
        "folder": (
            bad_files.FOLDER,
            ("--config.data.name=folder", "--config.data.image_size=8"),
        ),
    }
    for group, (table, flags) in tables.items():
        for name, (make, contained) in table.items():
            yield case(group, name, flags, contained, make)


WORKDIR_FILES: dict[str, tuple[Make, str]] = {
    f"{name}: {what}": (bad_files.replaced(name, content), name)
    for name in ("config.json", "data.json")
    for what, content in {
        "nothing in it": b"",
        "text": b"text",
        "a list": b"[]",
        "an empty object": b"{}",
        "no UTF-8": b"\xff\xfe\x00",
        "nested too deep": b"[" * 10**6,
        "a long number": b'{"num_examples": ' + b"9" * 10**5 + b"}",
        "a directory": None,
    }.items()
}
WORKDIR_FILES |= {
    f"{name}: a file": (bad_files.replaced(name, b""), name)
    for name in ("checkpoints", "samples", "evaluations", "interrupted", "damaged_checkpoints")
}
WORKDIR_FILES |= {
    f"{name}: a directory": (bad_files.replaced(name, None), name)
    for name in ("metrics.jsonl", "sessions.jsonl", "training.lock", "evaluations.jsonl")
}
WORKDIR_FLAGS = {
    "--config.seed=1": "seed was 0, now 1",
    "--config.train.batch_size=8": "train.batch_size was 16, now 8",
    "--config.model.unet.channels=16": "model.unet.channels was 8, now 16",
    "--config.train.num_steps=9": "train.allow_changes",
    "--experiment=evaluate --config.model.unet.channels=16": "model.unet.channels",
    "--experiment=sigma --config.model.parameterization=eps": "model.parameterization",
}


def workdirs() -> Iterator[Case]:
    """Work directories with damaged files, and settings that are not those of their run."""
    trained = functools.cache(_train)
    for name, (make, contained) in WORKDIR_FILES.items():
        copy = bad_files.each(lambda here: shutil.copytree(trained(), here), make)
        yield Case(name, SHORT, contained, lambda here, copy=copy: copy(here / "run"))
    for text, contained in WORKDIR_FLAGS.items():
        flags = (*SHORT, *text.split())
        yield Case(text, flags, contained, lambda here: shutil.copytree(trained(), here / "run"))


SHORT = tuple(
    f"--config.{name}={value}"
    for name, value in (
        SMALL | {"train.num_steps": 4, "train.checkpoint_every": 2, "train.warmup_steps": 1}
    ).items()
)


def _train() -> pathlib.Path:
    """The work directory of a short run."""
    workdir = pathlib.Path(tempfile.mkdtemp()) / "run"
    ended = command.run([*SHORT, f"--workdir={workdir}"], limit=600)
    assert ended.status == 0, ended.stderr
    return workdir


def processes() -> Iterator[Case]:
    """Several processes that cannot find one another."""
    for coordinator, number, process, contained in (
        ("localhost", "2", "0", "--coordinator=localhost"),
        ("localhost:", "2", "0", "--coordinator=localhost:"),
        (":9876", "2", "0", "--coordinator=:9876"),
        ("localhost:99999", "2", "0", "--coordinator=localhost:99999"),
        ("localhost:0", "2", "0", "--coordinator=localhost:0"),
        ("localhost:port", "2", "0", "--coordinator=localhost:port"),
        ("http://localhost:9876", "2", "0", "--coordinator=http://localhost:9876"),
        ("absent.invalid:9876", "2", "1", "--coordinator=absent.invalid:9876"),
        ("localhost:9876", "0", "0", "--num_processes=0"),
        ("localhost:9876", "-1", "0", "--num_processes=-1"),
        ("localhost:9876", "2", "2", "--process_id=2"),
        ("localhost:9876", "2", "-1", "--process_id=-1"),
        ("localhost:9876", "2", None, "--process_id missing"),
        (None, "2", "0", "--coordinator missing"),
    ):
        values = {"coordinator": coordinator, "num_processes": number, "process_id": process}
        flags = tuple(f"--{k}={v}" for k, v in values.items() if v is not None)
        yield Case(" ".join(flags), flags, contained)
    yield Case("--distributed alone", ("--distributed",), "--distributed")
    yield Case("--distributed and more", ("--distributed", "--process_id=0"), "--distributed")


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "settings": settings,
    "flags": flags,
    "config_files": config_files,
    "paths": paths,
    "data": data,
    "workdirs": workdirs,
    "studies": studies,
    "processes": processes,
}
