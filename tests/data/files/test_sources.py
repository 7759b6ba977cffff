"""Large text is read as small text is: the same documents, the same part held out, each read when it is its turn."""

import gzip
import json
import os

import pytest

from sar_kd.config.sections import DataConfig
from sar_kd.data.files import samples, sources
from sar_kd.data.files.samples import Document, LongDocument
from sar_kd.data.files.sources import StreamedDocuments, load_documents
from sar_kd.errors import UsageError

EXAMPLES = [{"text": f"line {n}\nof text \U0001f600 {'word ' * (n % 7)}"} for n in range(300)]
CONVERSATIONS = [{"prompt": f"question {n}", "completion": "an answer " * (1 + n % 3)} for n in range(80)]


@pytest.fixture
def files(tmp_path):
    lines = "".join(json.dumps(each) + "\n" for each in EXAMPLES)
    (tmp_path / "examples.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "examples.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "conversations.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in CONVERSATIONS), encoding="utf-8"
    )
    (tmp_path / "lines.txt").write_bytes("\ufeffcaf\u00e9 and tea\r\nsecond \u65e5\u672c line\r\r\n".encode() * 400)
    (tmp_path / "line.txt").write_text("na\u00efve words, one after the other " * 300, encoding="utf-8")
    return tmp_path


def _load(*paths, **settings):
    return load_documents(DataConfig(train_file=tuple(map(str, paths)), **settings))


def _texts(samples) -> list[tuple[str, str]]:
    return [(s.name, s.text if hasattr(s, "text") else "".join(s.chunks())) for s in samples]


@pytest.fixture
def small_is_large(monkeypatch):
    """Let the limits be so low that every file here is large."""
    monkeypatch.setattr(sources, "LARGE", 500)
    monkeypatch.setattr(samples, "LONG", 500)
    monkeypatch.setattr(samples, "CHUNK", 333)


SOURCES = [
    ("examples.jsonl",), ("examples.jsonl.gz",), ("conversations.jsonl",), ("lines.txt",), ("line.txt",),
    ("line.txt", "examples.jsonl"), ("examples.jsonl", "lines.txt"), ("examples.jsonl", "conversations.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize("names", SOURCES)
@pytest.mark.parametrize("validates", [False, True])
def test_a_large_text_is_the_same_documents_as_a_small_one(files, names, validates, monkeypatch, request):
    more = {"validation_file": (str(files / "line.txt"),)} if validates else {}
    small = _load(*(files / name for name in names), **more)
    request.getfixturevalue("small_is_large")
    large = _load(*(files / name for name in names), **more)
    assert isinstance(large[0], StreamedDocuments)
    assert [_texts(part) for part in large] == [_texts(part) for part in small]
    assert [_texts(part) for part in large] == [_texts(part) for part in small]  # read once more
    assert large[0].num_chars == sum(len(text) for _, text in _texts(small[0]))
    assert large[0].has_conversations == ("conversations.jsonl" in names)


def test_what_is_large_is_not_held(files, small_is_large):
    train, _ = _load(files / "lines.txt")
    (document,) = train
    assert isinstance(document, LongDocument)
    assert max(map(len, document.chunks())) <= 333 + 1
    assert not any(isinstance(value, list | str) and len(value) > 100 for value in vars(train).values())


@pytest.mark.parametrize("start", [0, 1, 332, 333, 334, 1000])
@pytest.mark.parametrize("size", [1, 333, 700])
def test_a_part_of_a_long_document_is_that_part(files, small_is_large, start, size):
    (whole,) = samples.read_file("train_file", files / "lines.txt", "text")
    text = "".join(whole.chunks())
    assert text == (files / "lines.txt").read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    part = whole.part(start, start + size, "part")
    assert "".join(part.chunks()) == text[start : start + size]
    assert "".join(part.part(1, size, "its own").chunks()) == text[start + 1 : start + size]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_characters_and_line_ends_survive_any_cut_between_reads(tmp_path, monkeypatch, size):
    text = "\ufeff\r\n a\u00e9\u65e5\U0001f600\r\r\n\r" * 20
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(samples, "CHUNK", max(size, 3))  # a byte order mark comes in one
    monkeypatch.setattr(samples, "LONG", 1)
    (document,) = samples.read_file("train_file", tmp_path / "a.txt", "text")
    assert "".join(document.chunks()) == text[1:].replace("\r\n", "\n")


@pytest.mark.parametrize("at", [0, 1, 332, 333, 700, 998])
@pytest.mark.parametrize("long", [False, True])
def test_the_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch, at, long):
    (tmp_path / "a.txt").write_bytes(b"x" * at + b"\xe9" + b"y" * (1000 - at))
    monkeypatch.setattr(samples, "CHUNK", 333)
    monkeypatch.setattr(samples, "LONG", 1 if long else 10**6)
    with pytest.raises(UsageError, match=rf"is not UTF-8 text \(byte {at}\); convert it first"):
        _load(tmp_path / "a.txt")


def test_a_character_cut_off_at_the_end_is_not_utf8(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"x" * 998 + "\u65e5".encode()[:2])
    monkeypatch.setattr(samples, "CHUNK", 333)
    with pytest.raises(UsageError, match=r"is not UTF-8 text \(byte 998\)"):
        _load(tmp_path / "a.txt")


def test_a_long_file_of_blanks_holds_no_text(tmp_path, small_is_large):
    (tmp_path / "a.txt").write_text(" \n\t" * 1000)
    with pytest.raises(UsageError, match="holds no text"):
        _load(tmp_path / "a.txt")


def test_a_line_beyond_measure_is_refused_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_MAX_LINE", 2**20)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 2**20}))
    with pytest.raises(UsageError, match=r"a.jsonl: line 2 exceeds 1 MB; give it as a .txt file of its own"):
        _load(tmp_path / "a.jsonl")


def test_no_more_is_held_out_than_can_be_measured_often(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_HELD_OUT", 1000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n:09} " * 10}) + "\n" for n in range(5000)))
    train, validation = _load(tmp_path / "a.jsonl")
    assert sum(len(document.text) for document in validation) == 1000
    assert len(train) + len(validation) == 5000


def test_a_text_of_one_character_beside_empty_conversations_is_not_held_out_as_a_whole(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n{"messages": []}\n')
    with pytest.raises(UsageError, match="single character"):
        _load(path)


@pytest.mark.parametrize("change", ["longer", "same size", "gone"])
def test_a_file_that_changes_while_it_is_read_is_named(files, small_is_large, change):
    train, _ = _load(files / "examples.jsonl", files / "line.txt")
    content = (files / "examples.jsonl").read_bytes()
    if change == "gone":
        (files / "examples.jsonl").unlink()
    else:
        (files / "examples.jsonl").write_bytes(content * 2 if change == "longer" else content.replace(b"of", b"to"))
        os.utime(files / "examples.jsonl", ns=(1, 1))
    with pytest.raises(
        UsageError, match=r"examples.jsonl: (was changed while it was read; start again|cannot be read)"
    ):
        list(train)


def test_the_digest_of_a_large_text_depends_on_every_text_name_and_part(files, small_is_large):
    (files / "copy.jsonl").write_bytes((files / "examples.jsonl").read_bytes())
    (files / "other.jsonl").write_bytes((files / "examples.jsonl").read_bytes().replace(b"of", b"to", 1))
    held_out = {"validation_file": (str(files / "line.txt"),)}
    found = [
        _load(files / name)[0].digest for name in ("examples.jsonl", "copy.jsonl", "other.jsonl", "conversations.jsonl")
    ]
    found += [_load(files / "examples.jsonl", **held_out)[0].digest, _load(files / "lines.txt")[0].digest]
    assert len(set(found)) == len(found)
    assert _load(files / "examples.jsonl")[0].digest == found[0]


def test_a_dataset_is_read_example_by_example(monkeypatch, small_is_large):
    import sys
    from types import SimpleNamespace

    class Split:
        column_names = ("text",)
        most = 0

        def __getitem__(self, name):
            return (f"example {n} " * 30 for n in range(200))

    split = Split()
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_: {"train": split}))
    train, validation = load_documents(DataConfig(dataset_name="x"))
    assert isinstance(train, StreamedDocuments)
    assert len(list(train)) + len(validation) in (200, 201)
    assert next(iter(train)) == Document("train:0", "example 0 " * 30)


@pytest.mark.parametrize("is_large", [False, True])
def test_empty_examples_are_left_out_and_counted(tmp_path, is_large, request):
    for name, empty in (("train", ["", " \n", "\t"] * 167), ("validation", [""])):
        texts = [*empty[:2], *(f"example {n} " * 30 for n in range(40)), *empty[2:]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "blank.txt").write_text(" \n" * 400)
    if is_large:
        request.getfixturevalue("small_is_large")
    lines, paths = [], [str(tmp_path / name) for name in ("train.jsonl", "blank.txt", "validation.jsonl")]
    config = DataConfig(train_file=tuple(paths[:2]), validation_file=(paths[2],))
    for documents in load_documents(config, lines.append):
        assert isinstance(documents, StreamedDocuments) == is_large
        assert [sample.text for sample in documents] == [f"example {n} " * 30 for n in range(40)]
    assert lines == [
        f"Skipped 502 empty examples of the training text (--train_file {paths[0]} {paths[1]})",
        f"Skipped 1 empty example of the held-out text (--validation_file {paths[2]})",
    ]
    lines.clear()
    train, held_out = load_documents(DataConfig(train_file=(paths[0],)), lines.append)
    assert all(sample.text for sample in (*train, *held_out))
    assert lines == [f"Skipped 501 empty examples of the training text (--train_file {paths[0]})"]
