"""Protobuf's wire format: read field by field within strict bounds, and written, without the protobuf library.

A message is a sequence of fields: a key (field number and wire type), then a varint, four or eight bytes, or a length and
that many bytes. Whoever reads knows the schema: it asks for the kind that a field must have, and skips fields that it does
not know. No length is believed before it fits, and what is skipped is never read, so that a file of any size can be walked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable

__all__ = ["INT32", "INT64", "UINT32", "Range", "WireError", "WireReader", "bytes_field", "bytes_head", "number_field"]

Range = tuple[int, int]

UINT32: Range = (0, 2**32 - 1)
INT32: Range = (-(2**31), 2**31 - 1)
INT64: Range = (-(2**63), 2**63 - 1)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_HIGHEST_FIELD = 2**29 - 1
_LONGEST_TEXT = 64 * 1024
_WINDOW_BYTES = 1024


class WireError(ValueError):
    """The bytes are not the message that they should be."""


class WireReader:
    """Reads a message at a position, through a small window.

    Args:
        read: Returns the bytes at (position, length); fewer where there are no more.
        end: Where the outermost message ends, in bytes.
        window: How many bytes are read at once.

    Attributes:
        position: The next byte.
        end: Where the outermost message ends.

    Raises:
        WireError: The bytes are not the message that they should be (any method).
    """

    def __init__(self, read: Callable[[int, int], bytes], end: int, window: int = _WINDOW_BYTES) -> None:
        self._read, self._window_bytes = read, window
        self.position, self.end = 0, end
        self._window, self._start = b"", 0

    @classmethod
    def of_bytes(cls, content: bytes) -> WireReader:
        """Reads a message that is in memory."""
        return cls(lambda position, length: content[position : position + length], len(content), len(content))

    def error(self, what: str) -> WireError:
        """The error that says what is wrong, and where."""
        return WireError(f"{what} at byte {self.position} of {self.end}")

    def fields(self, end: int) -> Iterator[tuple[int, int]]:
        """The fields of the message that ends at ``end``, as (number, wire type); read or skip each before the next."""
        while self.position < end:
            number, wire_type = divmod(self._varint(), 8)
            if not 0 < number <= _HIGHEST_FIELD:
                raise self.error(f"invalid field number {number}")
            yield number, wire_type
        if self.position > end:
            raise self.error(f"a field that exceeds its message, which ends at byte {end},")

    def extent(self, wire_type: int) -> int:
        """Reads the length of a field of bytes, and returns where they end."""
        self._expect(wire_type, _BYTES)
        end = self._varint() + self.position
        if end > self.end:
            raise self.error(f"a record that ends at byte {end}")
        return end

    def text(self, wire_type: int) -> str:
        """Reads a text of at most 64 KiB."""
        length = self.extent(wire_type) - self.position
        if length > _LONGEST_TEXT:
            raise self.error(f"a text of {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self.error("invalid text") from None

    def number(self, wire_type: int, allowed: Range) -> int:
        """Reads a number; where ``allowed`` holds negative ones, they are those of two's complement in 64 bits."""
        self._expect(wire_type, _VARINT)
        return self._number(allowed)

    def extend(self, numbers: list[int], wire_type: int, allowed: Range, most: int = 64) -> None:
        """Adds to repeated numbers what a field holds of them: one, or several that are packed; ``most`` in all."""
        if wire_type != _BYTES:
            numbers.append(self.number(wire_type, allowed))
        else:
            end = self.extent(wire_type)
            while self.position < end and len(numbers) <= most:
                numbers.append(self._number(allowed))
            if self.position > end:
                raise self.error("packed numbers that exceed their field")
        if len(numbers) > most:
            raise self.error(f"more than {most} numbers")

    def skip(self, wire_type: int) -> None:
        """Passes over the contents of a field."""
        if wire_type == _VARINT:
            self._varint()
        elif wire_type == _BYTES:
            self.position = self.extent(wire_type)
        elif wire_type in (_FIXED32, _FIXED64):
            self._take(4 if wire_type == _FIXED32 else 8)
        else:
            raise self.error(f"invalid wire type {wire_type}")

    def _expect(self, wire_type: int, expected: int) -> None:
        if wire_type != expected:
            raise self.error(f"wire type {wire_type} instead of {expected}")

    def _number(self, allowed: Range) -> int:
        low, high = allowed
        value = self._varint()
        if low < 0 and value >> 63:
            value -= 1 << 64
        if not low <= value <= high:
            raise self.error(f"the number {value}, which is not from {low} to {high},")
        return value

    def _varint(self) -> int:
        begin = self.position - self._start
        if 0 <= begin < len(self._window) and self.position < self.end and self._window[begin] < 0x80:
            self.position += 1  # nearly all are one byte, and a strategy is thousands of them
            return self._window[begin]
        value = shift = 0
        while True:
            byte = self._take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise self.error("a number of more than ten bytes")
        if value >> 64:
            raise self.error("a number of more than 64 bits")
        return value

    def _take(self, length: int) -> bytes:
        if self.position + length > self.end:
            raise self.error("unexpected end")
        begin = self.position - self._start
        if begin < 0 or begin + length > len(self._window):
            self._window = self._read(self.position, max(length, self._window_bytes))
            self._start, begin = self.position, 0
            if len(self._window) < length:
                raise self.error("unexpected end")
        self.position += length
        return self._window[begin : begin + length]


def bytes_head(number: int, length: int) -> bytes:
    """What comes before the ``length`` bytes of a field."""
    return _varint(number << 3 | _BYTES) + _varint(length)


def bytes_field(number: int, content: bytes) -> bytes:
    """A field of bytes: a text, a message or packed numbers."""
    return bytes_head(number, len(content)) + content


def number_field(number: int, value: int) -> bytes:
    """A field of a number of at most 64 bits."""
    return _varint(number << 3 | _VARINT) + _varint(value & 2**64 - 1)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
