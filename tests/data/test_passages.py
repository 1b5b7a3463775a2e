"""Passages: nothing lost, each where it says that it is, and a long text held in small pieces."""

from __future__ import annotations

import tracemalloc

import pytest

from fastgan.data import units
from fastgan.data.passages import Passage, read_passages
from fastgan.data.units import BLOCK, Read, TextError, read_lines


def put(folder, text, name="a.txt"):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_blank_lines_part_passages_and_lines_are_the_files(tmp_path):
    path = put(tmp_path, "one\r\ntwo\r\n\r\n \t\r\nthree\r\n\r\n\r\nfour and\r\nfive")
    assert list(read_passages([path])) == [
        Passage(str(path), 1, "one\ntwo"), Passage(str(path), 5, "three"), Passage(str(path), 8, "four and\nfive"),
    ]  # fmt: skip


def test_lines_are_joined_where_there_are_no_blank_ones(tmp_path):
    path = put(tmp_path, "a short line\nanother one\n" + "long " * 8 + "\nthe end\n")
    found = list(read_passages([path], 40))
    assert [(each.line, each.text) for each in found] == [
        (1, "a short line\nanother one"), (3, ("long " * 8).strip()), (4, "the end"),
    ]  # fmt: skip


def test_long_ones_are_cut_at_sentences_then_at_spaces(tmp_path):
    sentence = "Twenty-six letters, no more. "
    path = put(tmp_path, sentence * 5 + "\n\n" + "word " * 20 + "\n\n" + "x" * 90)
    found = [each.text for each in read_passages([path], 70)]
    assert found[:3] == [(sentence * 2).strip(), (sentence * 2).strip(), sentence.strip()]
    assert found[3:5] == [("word " * 14).strip(), ("word " * 6).strip()]
    assert found[5:] == ["x" * 70, "x" * 20]


@pytest.mark.parametrize("size", [20, 33, 1000])
def test_nothing_is_lost_and_every_line_is_right(tmp_path, monkeypatch, size):
    monkeypatch.setattr(units, "BLOCK", 4096)
    # A line that is longer than what is read at once, in the middle of others.
    lines = [f"line {number} has the word w{number}, and ends." for number in range(300)]
    lines[100] = " ".join(f"far{number}" for number in range(2000))
    lines[7] = lines[50] = ""
    path = put(tmp_path, "\n".join(lines))
    words = []
    for each in read_passages([path], size):
        assert 0 < len(each.text) <= size
        for place, part in enumerate(each.text.split("\n")):
            assert part.strip() in lines[each.line - 1 + place]
        words += each.text.split()
    # A cut within a word gives two: compared without spaces.
    assert "".join(words) == "".join("".join(lines).split())


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "a.txt"
    peaks = []
    for count in (60_000, 240_000):
        path.write_text("word after word, and no blank line between. " * count)
        tracemalloc.start()
        assert sum(len(each.text) for each in read_passages([path])) > 40 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 20 * BLOCK


def test_what_is_wrong_is_named(tmp_path):
    good, bad = put(tmp_path, "good"), put(tmp_path, b"one\ntwo \xe9\n", "b.txt")
    with pytest.raises(TextError, match=r"b\.txt: line 2, column 5: byte 8"):
        list(read_passages([good, bad]))
    with pytest.raises(TextError, match=r"c\.txt: there is no text in it \(3 bytes\)"):
        list(read_passages([put(tmp_path, " \n\n", "c.txt")]))
    with pytest.raises(ValueError, match="size must be an integer of at least 20 letters, got 3"):
        list(read_passages([good], 3))


def test_lines_with_their_numbers(tmp_path):
    path = put(tmp_path, "a\n\nb\n")
    assert list(read_lines(path, Read())) == [(1, "a", True), (2, "", True), (3, "b", True)]
    path = put(tmp_path, "c\n" + "x" * (2 * BLOCK + 5) + "\nd")
    found = list(read_lines(path, Read()))
    assert (found[0], found[-1]) == ((1, "c", True), (3, "d", True))
    assert {number for number, _, _ in found[1:-1]} == {2}
    assert [begins for _, _, begins in found[1:-1]] == [True] + [False] * (len(found) - 3)
    assert len(found) > 3
    assert "".join(text for _, text, _ in found[1:-1]) == "x" * (2 * BLOCK + 5)
