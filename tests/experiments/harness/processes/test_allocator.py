"""Memory that is freed and used again is not mapped anew."""

import platform
import subprocess
import sys

import pytest

from experiments.harness.processes.allocator import keep_memory

# The page faults of writing to 64 MiB that were freed before, as XLA does at each step.
SCRIPT = """
import ctypes, resource
from experiments.harness.processes.allocator import keep_memory
print(keep_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_glibc_keeps_memory():
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    was_set, first, second = ended.stdout.split()
    assert was_set == "True"
    # Pages have 4 KiB or more: the first time a fault for each, then for hardly any.
    assert int(second) < int(first) / 10


def test_other_platforms_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_memory()
