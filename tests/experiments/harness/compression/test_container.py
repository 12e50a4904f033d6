"""The compressed file: what is read is what was written, or one line says what is wrong."""

import json

import numpy as np
import pytest

from experiments.harness.compression import container
from experiments.harness.errors import ConfigError

HEADER = container.Header(
    count=3,
    shape=(2, 2, 1),
    num_levels=17,
    pixels="00",
    seed=0,
    num_initial=2,
    is_labelled=False,
    settings={"order": "bit_swap"},
    fingerprint={"jax": "1"},
)
WORDS = np.array([5, 0, 7], np.uint32)
CONTENT = container.pack(HEADER, WORDS)


def refused(content):
    """The one line that a content is refused with."""
    with pytest.raises(ConfigError) as error:
        container.unpack(content, "a.dlvm")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("a.dlvm ")
    return str(error.value)


def test_what_was_packed_is_unpacked():
    header, words = container.unpack(CONTENT, "a.dlvm")
    assert header == HEADER
    np.testing.assert_array_equal(words, WORDS)
    assert len(CONTENT) == container.header_size(CONTENT) + 4 * len(WORDS)


def test_every_truncation_is_refused():
    assert refused(b"") == "a.dlvm is empty"
    for length in range(1, len(CONTENT)):
        assert "truncated" in refused(CONTENT[:length])


def test_every_flipped_bit_is_refused():
    for place in range(len(CONTENT)):
        for bit in (0, 7):
            damaged = bytearray(CONTENT)
            damaged[place] ^= 1 << bit
            refused(bytes(damaged))


def test_other_files_are_refused():
    assert "is no compressed file of this program" in refused(b"\x89PNG\r\n\x1a\n" + bytes(100))
    version = CONTENT[:7] + bytes([9]) + CONTENT[8:]
    assert "version 9 of the format; this program reads version 1" in refused(version)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"count": 2**40}, "are too many"),
        ({"count": -1}, "no whole number"),
        ({"count": True}, "no whole number"),
        ({"shape": [2, 2]}, "are too many"),
        ({"num_initial": 9}, "its stream does not fit"),
        ({"settings": []}, "no object"),
        ({"shape": 3}, "not iterable"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(changes, wrong):
    """Though its checksum is right; nothing of its size is allocated."""
    assert wrong in refused(container.pack(HEADER._replace(**changes), WORDS))


def test_a_header_that_is_no_json_is_refused():
    text = json.dumps(HEADER._asdict(), separators=(",", ":")).encode()
    assert text in CONTENT
    content = CONTENT[:-16].replace(text, b"x" * len(text))
    assert "no valid header" in refused(content + container._checksum(content))
