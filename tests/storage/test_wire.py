from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategy_files import field, varint

from auto_trans.storage.formats.wire import (
    INT32,
    INT64,
    UINT32,
    WireError,
    WireReader,
    bytes_field,
    bytes_head,
    number_field,
)


def only_field(content):
    """A reader that stands at the contents of the first field, and its number and wire type."""
    reader = WireReader.of_bytes(content)
    return (reader, *next(reader.fields(reader.end)))


@given(st.integers(1, 2**29 - 1), st.integers(-(2**63), 2**63 - 1))
@example(1, -1)
def test_numbers_are_written_as_others_do_and_read_again(number, value):
    assert number_field(number, value) == field(number, value)
    reader, found, wire_type = only_field(field(number, value))
    assert (found, reader.number(wire_type, INT64), reader.position) == (number, value, reader.end)


@given(st.integers(1, 2**29 - 1), st.binary(max_size=300))
def test_bytes_are_written_as_others_do_and_read_again(number, content):
    assert bytes_field(number, content) == bytes_head(number, len(content)) + content == field(number, content)
    reader, found, wire_type = only_field(field(number, content))
    assert (found, reader.extent(wire_type)) == (number, reader.position + len(content))


@pytest.mark.parametrize(
    "allowed, good, bad",
    [(UINT32, 2**32 - 1, -1), (UINT32, 0, 2**32), (INT32, -(2**31), 2**31), (INT32, -1, 2**32 - 1)],
)
def test_numbers_have_a_range(allowed, good, bad):
    reader, _, wire_type = only_field(field(1, good))
    assert reader.number(wire_type, allowed) == good
    reader, _, wire_type = only_field(field(1, bad))
    with pytest.raises(WireError, match="is not from"):
        reader.number(wire_type, allowed)


def test_repeated_numbers_may_be_packed_or_not():
    reader = WireReader.of_bytes(field(1, 5) + field(1, varint(6) + varint(-1)) + field(1, b""))
    found: list[int] = []
    for _, wire_type in reader.fields(reader.end):
        reader.extend(found, wire_type, INT32)
    assert found == [5, 6, -1]


def test_number_of_repeated_numbers_is_limited():
    reader, _, wire_type = only_field(field(1, b"\0" * 1000))
    found: list[int] = []
    with pytest.raises(WireError, match="more than 64 numbers"):
        reader.extend(found, wire_type, INT32)
    assert len(found) == 65, "no more than needed is read"
    reader, _, wire_type = only_field(field(1, 0))
    with pytest.raises(WireError, match="more than 64 numbers"):
        reader.extend([0] * 64, wire_type, INT32)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x0a\x02\x05\x80\x00", "packed numbers that exceed their field"),
        (b"\x0a\x05\x00", "a record that ends at byte 7 at byte 2 of 3"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "a record that ends at byte"),
        (b"\x0b", "wire type 3 instead of 0"),
        (b"\x0d1234", "wire type 5 instead of 0"),
        (b"\x08", "unexpected end at byte 1 of 1"),
        (b"\x08\x80", "unexpected end"),
        (b"\x00\x00", "invalid field number 0"),
        (varint(2**32) + b"\0", "invalid field number"),
    ],
)
def test_malformed_numbers_are_refused(content, message):
    with pytest.raises(WireError, match=message):
        reader, _, wire_type = only_field(content)
        reader.extend([], wire_type, INT32)


@pytest.mark.parametrize(
    "content", [b"\x0b", b"\x0c", b"\x0e", b"\x0f", b"\x0d123", b"\x091234567", b"\x0a\x01", b"\x0a"]
)
def test_what_cannot_be_skipped_is_refused(content):
    reader, _, wire_type = only_field(content)
    with pytest.raises(WireError):
        reader.skip(wire_type)


def test_text_is_short_and_utf8():
    reader, _, wire_type = only_field(field(1, "名前"))
    assert reader.text(wire_type) == "名前"
    for content, message in ((b"\xff", "invalid text"), (b"a" * 65537, "a text of 65537 bytes")):
        reader, _, wire_type = only_field(field(1, content))
        with pytest.raises(WireError, match=message):
            reader.text(wire_type)


def test_field_must_not_exceed_its_message():
    reader, _, wire_type = only_field(field(1, b"\x08\x80") + b"\x01")
    with pytest.raises(WireError, match="exceeds its message, which ends at byte 4"):
        for _, inner in reader.fields(reader.extent(wire_type)):
            reader.skip(inner)


def test_what_is_skipped_is_never_read():
    content = field(1, b"x" * 100_000) + field(2, "name") + field(3, b"y" * 100_000)
    read = []

    def read_at(position, length):
        read.append(length)
        return content[position : position + length]

    reader = WireReader(read_at, len(content), window=16)
    for number, wire_type in reader.fields(reader.end):
        assert number != 2 or reader.text(wire_type) == "name"
        if number != 2:
            reader.skip(wire_type)
    assert sum(read) < 100


def test_file_that_became_shorter_is_noticed():
    reader = WireReader(lambda position, length: b"", 10)
    with pytest.raises(WireError, match="unexpected end"):
        next(reader.fields(10))


def test_no_number_is_read_beyond_the_end_of_its_message():
    content = number_field(1, 5) + b"\x07"  # what follows lies in the same window
    reader = WireReader(lambda position, length: content[position : position + length], 1)
    _, wire_type = next(reader.fields(reader.end))
    with pytest.raises(WireError, match="unexpected end"):
        reader.number(wire_type, INT32)
