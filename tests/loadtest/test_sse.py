"""The parser of server-sent events on the cases of the standard, with whole and split chunks."""

import pytest

from loadtest.sse import Event, Parser

MARK = b"\xef\xbb\xbf"
STREAM = (
    b": a comment\n\nevent: a\ndata: one\ndata:two\ndata\n\nid: 7\nretry: 10\ndata:  three\nunknown: x\n\n: more\n\n"
)
EVENTS = [Event("a", b"one\ntwo\n"), Event("message", b" three")]


def events(*chunks: bytes) -> list[Event]:
    parser = Parser(longest=1000)
    return [event for chunk in chunks for event in parser.feed(chunk)]


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_of_the_standard_is_understood(mark: bytes, end: bytes) -> None:
    stream = mark + STREAM.replace(b"\n", end)
    assert events(stream) == EVENTS
    assert events(*(stream[i : i + 1] for i in range(len(stream)))) == EVENTS
    for cut in range(len(stream)):
        assert events(stream[:cut], b"", stream[cut:]) == EVENTS


def test_ends_of_lines_may_be_mixed() -> None:
    assert events(b"data: a\r\n\ndata: b\r\rdata: c\n\r\n") == [Event("message", data) for data in (b"a", b"b", b"c")]


def test_an_event_is_returned_with_its_last_byte() -> None:
    parser = Parser(longest=1000)
    assert list(parser.feed(b"data: a\r\n\r")) == [Event("message", b"a")]
    assert list(parser.feed(b"\ndata: b\n\n")) == [Event("message", b"b")]


def test_an_event_that_never_ends_and_one_without_data_are_none() -> None:
    assert events(b"event: a\n\ndata: x\n") == []
    assert events(b"event: a\n\ndata: x\n\n") == [Event("message", b"x")]


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 99 + b"\n", b"x" * 105])
def test_an_event_without_end_is_refused(piece: bytes) -> None:
    parser = Parser(longest=1000)
    with pytest.raises(ValueError, match="an event of more than 1000 bytes"):
        for _ in range(20):
            assert list(parser.feed(piece)) == []
