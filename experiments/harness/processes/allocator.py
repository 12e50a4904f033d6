"""Settings of glibc's allocator, so that a training step reuses the memory of the last one."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER = 2**31 - 1
MEBIBYTES_64 = 64 * 2**20


def keep_memory() -> bool:
    """Has the C library keep freed memory, instead of giving it back to the kernel.

    XLA's CPU backend allocates its working memory anew at each step. glibc maps large blocks and
    unmaps them when they are freed, and the kernel clears each page again: a quarter of a small
    training step. The process then holds its peak memory until it ends.

    Returns:
      Whether the C library is glibc and took the settings; others are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    options = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_TOP_PAD: MEBIBYTES_64}
    return all(mallopt(option, value) for option, value in options.items())
