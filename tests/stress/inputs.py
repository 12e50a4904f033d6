"""Runs `main.py` with hundreds of bad inputs, and checks that each is refused as promised.

python -m tests.stress.inputs --only data paths --sample 25 --seed 0

A bad input ends the program with one line on standard error, a status that is not zero, and nothing
written. The line contains a text that each case names. The program may take ten seconds of CPU
time. The imports that all cases share, one to three seconds more, do not count. A table has the
exceptions.
"""

import argparse
import pathlib
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator

from tqdm import tqdm

from tests.stress import command
from tests.stress.bad_inputs import GROUPS
from tests.stress.case import Case

LIMIT = 10.0  # seconds of processor time, since other programs may occupy the machine


def exceptions(case: Case) -> list[str]:
    """How a case is not refused as promised; empty if it is."""
    with tempfile.TemporaryDirectory() as directory:
        here = pathlib.Path(directory)
        case.make(here)
        before = _tree(here)

        def filled(text: str) -> str:
            return text.replace("{here}", str(here))

        flags = [filled(flag) for flag in case.flags]
        if not any(flag.startswith("--workdir=") for flag in flags):
            flags.insert(0, f"--workdir={here}/run")
        environment = {name: filled(value) for name, value in case.environment.items()}
        ended = command.run(flags, pathlib.Path(filled(case.directory)), environment)
        written = [p for p, state in (_tree(here).items() - before.items())]
        broken = list(_broken(ended, filled(case.contained)))
        return broken + [f"wrote {path}" for path in written[:3]]


def _broken(ended: command.Ended, contained: str) -> Iterator[str]:
    """The promises on the end of a process that it broke."""
    line = ended.stderr.strip("\n")
    if ended.status is None:
        yield "did not end within two minutes"
    elif ended.seconds > LIMIT:
        yield f"took {ended.seconds:.0f} s"
    if ended.status == 0:
        yield f"status 0: {ended.stdout[-200:]!r}"
    if "Traceback" in line:
        yield f"traceback: {line.splitlines()[-1][:200]}"
    elif "\n" in line or not line.startswith("error: "):
        yield f"not one line: {line[:300]!r}"
    elif contained not in line:
        yield f"lacks {contained!r}: {line[:300]}"
    if len(line) > 1200 and "Traceback" not in line:
        yield f"a line of {len(line)} characters"


def _tree(here: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Every path beneath a directory, and beside the project's files, with its time and size."""
    paths = [*here.rglob("*"), *command.ROOT.glob("[!.]*"), *pathlib.Path.home().glob("[!.]*")]
    states = {str(path): path.lstat() for path in paths}
    return {p: (s.st_mtime_ns, s.st_size) for p, s in states.items() if "__pycache__" not in p}


def sample(cases: list[tuple[str, Case]], number: int, seed: int) -> list[tuple[str, Case]]:
    """Some cases at random, about as many of each group."""
    random.Random(seed).shuffle(cases)
    seen = Counter()
    ranked = []
    for group, case in cases:
        seen[group] += 1
        ranked.append((seen[group], group, case))
    return [(group, case) for _, group, case in sorted(ranked, key=lambda r: r[:2])[:number]]


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 if every input was refused as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--sample", type=int, help="so many cases, at random")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    cases = [(group, case) for group in arguments.only for case in GROUPS[group]()]
    if arguments.sample is not None:
        cases = sample(cases, arguments.sample, arguments.seed)
    good = 0
    for group, case in tqdm(cases, "bad inputs", unit="case"):
        found = exceptions(case)
        good += not found
        for line in found:
            tqdm.write(f"{group:12}  {case.name[:80]:40}  {line}")
    print(f"{good} of {len(cases)} bad inputs were refused as promised")
    return 0 if good == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
