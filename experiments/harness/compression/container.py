"""The compressed file: magic bytes, header, stream, checksum. Nothing in it is trusted unread.

8 bytes   magic, the last one the version of the format
4 bytes   length of the header, little-endian
…         header, a JSON object
…         stream, little-endian words of 32 bits
16 bytes  checksum of everything before, BLAKE2b
"""

import hashlib
import json
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8, UInt32

from experiments.harness.errors import ConfigError

_MAGIC, _VERSION = b"\x93DLVMs\n", 1
_START, _CHECKSUM = len(_MAGIC) + 1 + 4, 16
_LONGEST_HEADER = 2**16
_MOST_BYTES = 2**34  # of the pixels of all images


class Header(NamedTuple):
    """What a decoder needs beside the stream and the model.

    Attributes:
      count: how many images.
      shape: (height, width, channels) of each.
      num_levels: grey levels that a pixel can have.
      pixels: their checksum.
      seed: of the initial bits.
      num_initial: words of initial bits.
      is_labelled: whether the stream holds the labels of the images too.
      settings: the settings that the code depends on, by name.
      fingerprint: what computed the code, by name: devices, versions, weights, program.
    """

    count: int
    shape: tuple[int, ...]
    num_levels: int
    pixels: str
    seed: int
    num_initial: int
    is_labelled: bool
    settings: dict[str, Any]
    fingerprint: dict[str, str]


def pack(header: Header, words: UInt32[np.ndarray, "words"]) -> bytes:
    """The content of a compressed file."""
    text = json.dumps(header._asdict(), separators=(",", ":")).encode()
    start = _MAGIC + bytes([_VERSION]) + len(text).to_bytes(4, "little")
    content = start + text + words.astype("<u4").tobytes()
    return content + _checksum(content)


def header_size(content: bytes) -> int:
    """The bytes of a packed file that are no stream."""
    return _START + _header_length(content) + _CHECKSUM


def unpack(content: bytes, name: str) -> tuple[Header, UInt32[np.ndarray, "words"]]:
    """The header and the stream of a compressed file.

    Args:
      content: the file.
      name: of the file, for error messages.

    Raises:
      ConfigError: for a file that is empty, foreign, truncated or damaged, or of another version.
    """
    if not content:
        raise ConfigError(f"{name} is empty")
    if not content.startswith(_MAGIC[: len(content)]):
        raise ConfigError(f"{name} is no compressed file of this program")
    if len(content) < _START + _CHECKSUM:
        raise ConfigError(f"{name} is truncated")
    if content[len(_MAGIC)] != _VERSION:
        raise ConfigError(
            f"{name} has version {content[len(_MAGIC)]} of the format; this program reads "
            f"version {_VERSION}"
        )
    if _checksum(content[:-_CHECKSUM]) != content[-_CHECKSUM:]:
        raise ConfigError(f"{name} is truncated or damaged: its checksum differs")
    end = _START + _header_length(content)
    stream = content[end:-_CHECKSUM]
    try:
        if _header_length(content) > _LONGEST_HEADER or len(stream) % 4:
            raise ValueError("its lengths do not fit")
        header = _checked(Header(**json.loads(content[_START:end])))
        words = np.frombuffer(stream, "<u4").astype(np.uint32)
        if not header.num_initial <= len(words) or (len(words) and not words[-1]):
            raise ValueError("its stream does not fit")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} has no valid header ({error})") from error
    return header, words


def pixel_checksum(images: UInt8[np.ndarray, "n h w c"]) -> str:
    """The checksum of decoded images."""
    return _checksum(np.ascontiguousarray(images).tobytes()).hex()


def _checked(header: Header) -> Header:
    """The header with tuples for lists; ValueError or TypeError if it makes no sense."""
    shape = tuple(header.shape)
    numbers = (header.count, header.num_levels, header.num_initial, header.seed, *shape)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a count is no whole number")
    if len(shape) != 3 or header.count * math.prod(shape) > _MOST_BYTES:
        raise ValueError(f"{header.count} images of shape {shape} are too many")
    if not isinstance(header.settings, dict) or not isinstance(header.fingerprint, dict):
        raise TypeError("its settings are no object")
    return header._replace(shape=shape)


def _header_length(content: bytes) -> int:
    return int.from_bytes(content[_START - 4 : _START], "little")


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM).digest()
