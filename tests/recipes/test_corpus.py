import gzip
import json
import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warploom.recipes.corpus import Skips, TextSource, is_held_out, stdlib_sources
from warploom.recipes.errors import UserError


def read(*paths, **options):
    skips = Skips()
    source = TextSource(paths=tuple(map(str, paths)), **options)
    return [(d.name, d.text) for d in source.documents(skips)], skips


def test_every_file_that_cannot_serve_is_counted_with_its_reason(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\r\n\0\0\0")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\t\n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    documents, skips = read(tmp_path)
    assert documents == [("good.txt", "good")]
    assert skips.counts == {
        "binary": 2,
        "empty": 2,
        "not UTF-8": 1,
        "unreadable": 1,
        "not a regular file": 1,
    }
    assert str(skips) == (
        "2 binary (image.txt, utf16.txt); 2 empty (blank.txt, empty.txt); "
        "1 not UTF-8 (latin.txt); 1 not a regular file (pipe.txt); 1 unreadable (gone.txt)"
    )


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"skipped: 5 binary \(0.bin, 1.bin, 2.bin, ...\)"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"skipped: none; suffixes: .py"):
        read(tmp_path, suffixes=(".py",))
    with pytest.raises(UserError, match="must be a folder or a file; there is none"):
        read(tmp_path / "nowhere")


def test_text_is_exactly_what_the_file_holds(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree\n".encode())
    assert read(tmp_path)[0] == [("a.txt", "\ufeffone\r\ntwo\rthree\n")]


def test_the_order_is_that_of_the_paths(tmp_path):
    names = ["b/a", "a/z", "a/b/c", "a-b", "B", "ä", "a0"]
    random.Random(0).shuffle(names)
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [name for name, _ in read(tmp_path)[0]] == sorted(names)


def test_files_are_chosen_by_suffix_and_left_out_by_pattern(tmp_path):
    for name in ("a.py", "a.md", "tests/b.py", "x/tests/c.py", "x/y/d.py", "x/test_e.py", "z/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    chosen = read(tmp_path, suffixes=(".py",), exclude=("tests", "test_*", "x/y/*"))[0]
    assert [name for name, _ in chosen] == ["a.py", "z/d.py"]
    assert len(read(tmp_path, suffixes=(".py", ".md"))[0]) == 7


def test_several_paths_are_read_in_the_given_order(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "1.txt").write_text("1")
    (tmp_path / "a.txt").write_text("a")
    assert read(tmp_path / "z", tmp_path / "a.txt")[0] == [("1.txt", "1"), ("a.txt", "a")]


LINES = [
    json.dumps({"text": "eins", "id": 1}),
    json.dumps({"id": 2}),
    json.dumps({"text": 3}),
    '{"text": "half',
    json.dumps(["text"]),
    "",
    json.dumps({"text": "  "}),
    '{"text": "\\ud800"}',
    json.dumps({"text": "zwei\nZeilen ü"}, ensure_ascii=False),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_records_of_json_lines(tmp_path, name):
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wb") as file:
        file.write("\n".join(LINES).encode() + b'\n{"text": "caf\xe9"}\n')
    documents, skips = read(tmp_path / name)
    assert documents == [(f"{name}#1", "eins"), (f"{name}#9", "zwei\nZeilen ü")]
    assert skips.counts == {
        "without text in field 'text'": 3,
        "not JSON": 1,
        "empty": 1,
        "not UTF-8": 2,
    }
    assert read(tmp_path)[0] == documents, "found in a folder too"


def test_another_field_holds_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    assert read(tmp_path, text_field="content")[0] == [("a.jsonl#1", "x")]
    with pytest.raises(UserError, match="1 without text in field 'text'"):
        read(tmp_path)


def test_a_gzip_file_that_is_cut_keeps_its_records_and_is_counted(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    rows = [json.dumps({"text": random.Random(i).randbytes(200).hex()}) for i in range(2000)]
    path.write_bytes(gzip.compress("\n".join(rows).encode())[:100_000])
    documents, skips = read(path)
    assert 0 < len(documents) < 2000
    assert skips.counts["unreadable"] == 1
    data = bytearray(path.read_bytes())
    data[50_000:50_100] = bytes(100)
    path.write_bytes(data)
    assert read(path)[1].counts["unreadable"] == 1


def test_json_lines_are_streamed(tmp_path):
    """The second record is read before the third is looked at."""
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb", buffering=0) as writer, os.fdopen(read_end, "rb") as reader:
        writer.write(b'{"text": "1"}\n{"text": "2"}\n')
        source = TextSource(paths=())
        path = Path(f"/dev/fd/{reader.fileno()}")
        records = source._records("a.jsonl", path, Skips())
        assert [next(records).text, next(records).text] == ["1", "2"]


@given(st.lists(st.text(min_size=1), min_size=2, unique=True), st.floats(0, 1), st.floats(0, 1))
def test_the_side_is_a_function_of_the_key_alone_and_fractions_are_nested(keys, low, high):
    low, high = sorted((low, high))
    for key in keys:
        assert is_held_out(key, low) <= is_held_out(key, high)
    assert not any(is_held_out(key, 0) for key in keys)
    assert all(is_held_out(key, 1) for key in keys)


def test_the_split_is_pinned_and_of_the_stated_share():
    held = [i for i in range(20_000) if is_held_out(f"package/module_{i}.py", 0.05)]
    assert held[:6] == PINNED, "a changed hash moves files between train and held-out"
    assert abs(len(held) / 20_000 - 0.05) < 4 * (0.05 * 0.95 / 20_000) ** 0.5


PINNED = [17, 18, 39, 55, 77, 84]


def test_a_record_s_side_stays_when_lines_are_inserted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(50)))

    def sides():
        source = TextSource(paths=(str(path),))
        return {d.text: is_held_out(d.key, 0.3) for d in source.documents(Skips())}

    before = sides()
    path.write_text(json.dumps({"text": "first"}) + "\n" + path.read_text())
    after = sides()
    after.pop("first")
    assert after == before
    assert len(set(before.values())) == 2


def test_the_listing_sees_every_write(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = TextSource(paths=(str(tmp_path),))
    first = source.listing()
    assert source.listing() == first
    assert first[1] == 3
    stamp = path.stat()
    time.sleep(0.02)  # the clock of the file system ticks every few milliseconds
    path.write_text("two")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    second = source.listing()
    assert second[0] != first[0], "same size and time of writing, another text"
    (tmp_path / "b.txt").write_text("")
    assert source.listing()[0] != second[0]
    assert TextSource(paths=(str(tmp_path),), exclude=("b.txt",)).listing()[0] != second[0]


def test_the_standard_library_is_13_megabytes_of_sources_without_tests():
    skips = Skips()
    documents = list(stdlib_sources().documents(skips))
    names = {d.name for d in documents}
    assert {"argparse.py", "asyncio/base_events.py", "unittest/case.py"} <= names
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert 9e6 < sum(len(d.text.encode()) for d in documents) < 20e6
    held = sum(is_held_out(d.key, 0.05) for d in documents)
    assert 0.02 < held / len(documents) < 0.08
