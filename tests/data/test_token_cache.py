"""A large text's tokens stay on the disk, are made once, and are used only where every byte is as it was written."""

import json
import os
import pickle

import numpy as np
import pytest

from sar_kd.config.sections import DataConfig
from sar_kd.data import column_store, token_cache, tokenized_text
from sar_kd.data.column_store import ColumnStore, strings_of
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.files import samples, sources
from sar_kd.data.files.samples import Document
from sar_kd.data.files.sources import StreamedDocuments, load_documents
from sar_kd.data.token_cache import TokenCache
from sar_kd.errors import UsageError
from sar_kd.runtime import files
from sar_kd.runtime.files import LOCK, FolderLock
from sar_kd.tokenization.token_table import fingerprint
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

pytestmark = pytest.mark.slow

EXAMPLES = [{"text": f"Line {n}: a student reads what the teacher wrote. " * 3} for n in range(60)]
CONVERSATIONS = [{"prompt": f"question {n}", "completion": "an answer"} for n in range(8)]


@pytest.fixture
def pair(sp_tokenizer, byte_tokenizer) -> TokenizerPair:
    return _pair(sp_tokenizer, byte_tokenizer)


def _pair(student, teacher) -> TokenizerPair:
    return TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher))


@pytest.fixture
def text(tmp_path, monkeypatch) -> StreamedDocuments:
    return _text(tmp_path / "examples.jsonl", EXAMPLES, monkeypatch)


def _text(path, examples, monkeypatch) -> StreamedDocuments:
    """The training part of these examples, read as a large text."""
    path.write_text("".join(json.dumps(each) + "\n" for each in examples))
    monkeypatch.setattr(sources, "LARGE", 500)
    monkeypatch.setattr(samples, "LONG", 500)
    train, _ = load_documents(DataConfig(train_file=(str(path),)))
    assert isinstance(train, StreamedDocuments)
    return train


class _Cache(TokenCache):
    """A cache that remembers its log lines."""

    def __init__(self, setting):
        self.lines: list[str] = []
        super().__init__(str(setting), self.lines.append)


@pytest.fixture
def cache(tmp_path) -> _Cache:
    return _Cache(tmp_path / "cache")


def _same(one: Dataset, other: Dataset) -> bool:
    def arrays(dataset):
        sides = [getattr(dataset.text, side) for side in ("student", "teacher")]
        streams = [getattr(side, name) for side in sides for name in ("ids", "ends", "has_dummy", "is_target")]
        return [np.asarray(array) for array in [*streams, dataset.text.starts, dataset.blocks.ranges]]

    facts = [
        (list(c.text.names), list(c.text.skipped_documents), c.text.num_bytes, c.documents_of(0)) for c in (one, other)
    ]
    batches = [dataset.micro_batches(3, 2, 1, 0)[0] for dataset in (one, other)]
    equal = [
        np.array_equal(*both) and both[0].dtype == both[1].dtype
        for both in zip(arrays(one), arrays(other), strict=True)
    ]
    tokens = [getattr(batch, side).input_ids.tolist() for side in ("student", "teacher") for batch in batches]
    return all(equal) and facts[0] == facts[1] and tokens[0] == tokens[1] and tokens[2] == tokens[3]


# Column stores


@pytest.fixture(params=["memory", "disk"])
def empty_store(request, tmp_path):
    if request.param == "disk":
        (tmp_path / "store").mkdir()
    return ColumnStore(tmp_path / "store" if request.param == "disk" else None)


def test_columns_grow_and_shrink_alike_in_memory_and_on_the_disk(empty_store):
    numbers, pairs = empty_store.add("numbers", "int32"), empty_store.add("pairs", "int64", 2)
    empty_store.add("nothing", "bool")
    names = empty_store.add_strings("names")
    numbers.append(np.arange(5))
    pairs.append([[1, 2], [3, 4]])
    names.append(["a", "", "\ud83d\u65e5"])
    sizes = empty_store.sizes()
    numbers.append([7, 8])
    pairs.append(np.zeros((0, 2)))
    names.append(["gone"])
    assert empty_store.num_bytes() == 7 * 4 + 2 * 16 + len("a") + 3 + 3 + len("gone") + 4 * 8
    empty_store.truncate(sizes)
    numbers.append([9])
    names.append(["last"])
    found = empty_store.finalize()
    assert found["numbers"].tolist() == [0, 1, 2, 3, 4, 9]
    assert found["numbers"].dtype == np.int32
    assert found["pairs"].tolist() == [[1, 2], [3, 4]]
    assert (found["nothing"].shape, found["nothing"].dtype) == ((0,), bool)
    names = strings_of(found, "names")
    assert names == ["a", "", "\ud83d\u65e5", "last"]
    assert names[-1] == "last"
    assert names[1:3] == ["", "\ud83d\u65e5"]
    with pytest.raises(IndexError):
        names[4]


# The cache


@pytest.mark.parametrize("setting", ["folder", "off"])
@pytest.mark.parametrize("equal", [False, True])
def test_a_text_on_the_disk_is_the_text_in_memory(pair, sp_tokenizer, text, tmp_path, setting, equal):
    pair = _pair(sp_tokenizer, sp_tokenizer) if equal else pair
    cache = _Cache("off" if setting == "off" else tmp_path / "cache")
    in_memory = build_dataset(list(text), pair, 24, 60)
    for _ in range(2):
        assert _same(build_dataset(text, pair, 24, 60, cache), in_memory)


def test_the_arrays_of_a_large_text_are_files(pair, text, cache):
    found = build_dataset(text, pair, 24, 60, cache).text
    for array in (found.student.ids, found.teacher.ends, found.student.is_target, found.starts):
        assert not array.flags.writeable
        assert isinstance(array.base, np.memmap)


def test_tokens_are_made_once(pair, text, cache, monkeypatch):
    first = build_dataset(text, pair, 24, 60, cache)
    monkeypatch.setattr(tokenized_text, "encode_chunk", None)  # nothing is tokenized any more
    assert _same(build_dataset(text, pair, 24, 60, cache), first)
    assert _same(build_dataset(text, pair, 48, 60, cache), build_dataset(text, pair, 48, 60, cache))
    assert cache.lines[0] == "Tokens: tokenizing 0 million characters, once"
    assert cache.lines[1].endswith(f" MB cached in {_entries(cache)[0]}")
    assert cache.lines[2:] == [f"Tokens: read from {_entries(cache)[0]}"] * 3


def _entries(cache) -> list:
    return [path for path in cache.folder.iterdir() if path.is_dir()]


def test_other_text_another_tokenizer_and_another_library_are_other_entries(
    pair, text, cache, byte_tokenizer, tmp_path, monkeypatch
):
    build_dataset(text, pair, 24, 60, cache)
    build_dataset(text, _pair(byte_tokenizer, byte_tokenizer), 24, 60, cache)
    build_dataset(_text(tmp_path / "other.jsonl", EXAMPLES[1:], monkeypatch), pair, 24, 60, cache)
    monkeypatch.setattr(tokenized_text.importlib.metadata, "version", lambda name: "0")
    build_dataset(text, pair, 24, 60, cache)
    assert len(_entries(cache)) == 4


@pytest.mark.parametrize("chats", [False, True])
def test_block_sizes_share_an_entry_unless_conversations_are_cut_by_them(pair, tmp_path, cache, monkeypatch, chats):
    text = _text(tmp_path / "examples.jsonl", [*EXAMPLES, *CONVERSATIONS * chats], monkeypatch)
    build_dataset(text, pair, 24, 60, cache)
    build_dataset(text, pair, 36, 60, cache)
    assert len(_entries(cache)) == 1 + chats


def test_a_fingerprint_depends_on_what_a_tokenizer_does(byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer):
    import copy

    found = [fingerprint(tokenizer) for tokenizer in (byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer)]
    other = copy.deepcopy(byte_tokenizer)
    other.chat_template = "{{ messages[0].content }}"
    assert fingerprint(copy.deepcopy(byte_tokenizer)) == found[0]
    assert len({*found, fingerprint(other)}) == 4


class _Harm:
    def __reduce__(self):
        return (os.mkdir, ("harmed",))


def _flip(path, at):
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1
    path.write_bytes(content)


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _add_column(entry, name):
    """Name a file that is no column, with its own size and digest."""
    columns = json.loads((entry / "header.json").read_text())["columns"]
    found = {"dtype": "uint8", "width": 0, "size": (entry / name).stat().st_size}
    columns[name] = {**found, "sha256": files.file_digest(entry / name)}
    _edit(entry / "header.json", columns=columns)


DAMAGES = {
    **{f"a flipped bit in {name}": (lambda e, name=name: _flip(e / name, 17)) for name in (
        "student_ids", "student_ends", "student_is_target", "teacher_ids", "teacher_has_dummy", "starts", "names",
    )},
    "a short file": lambda e: os.truncate(e / "teacher_ids", 100),
    "a missing file": lambda e: (e / "starts").unlink(),
    "no header": lambda e: (e / "header.json").unlink(),
    "a torn header": lambda e: os.truncate(e / "header.json", 100),
    "a pickle for a header": lambda e: (e / "header.json").write_bytes(pickle.dumps(_Harm())),
    "nested header": lambda e: (e / "header.json").write_text("[" * 100_000),
    "a list for a header": lambda e: (e / "header.json").write_text("[]"),
    "another format": lambda e: _edit(e / "header.json", format=0),
    "another text's": lambda e: _edit(e / "header.json", key="0" * 64),
    "a column outside": lambda e: _add_column(e, "../../examples.jsonl"),
    "objects": lambda e: _edit(e / "header.json", columns={"names": {"dtype": "object", "width": 0, "size": 1}}),
    "a size that is no number": lambda e: _edit(e / "header.json", columns={"names": {
        "dtype": "uint8", "width": 0, "size": "many", "sha256": ""}}),
    "a file": lambda e: (__import__("shutil").rmtree(e), e.write_text("text")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_entry_is_named_and_rebuilt(pair, text, cache, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = build_dataset(list(text), pair, 24, 60)
    build_dataset(text, pair, 24, 60, cache)
    (entry,) = _entries(cache)
    DAMAGES[damage](entry)
    assert _same(build_dataset(text, pair, 24, 60, cache), first)
    assert cache.lines[2].startswith(f"Tokens: {entry} is damaged (")
    assert cache.lines[2].endswith("); rebuilding it")
    assert len(cache.lines) == 5
    assert _same(build_dataset(text, pair, 24, 60, cache), first)
    assert cache.lines[5:] == [f"Tokens: read from {entry}"]
    assert not (tmp_path / "harmed").exists()


def test_without_a_cache_nothing_stays(pair, text, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(token_cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    cache = _Cache("off")
    dataset = build_dataset(text, pair, 24, 60, cache)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert dataset.micro_batches(0, 2, 1, 0)[0].num_target_tokens > 0
    assert cache.lines == ["Tokens: tokenizing 0 million characters"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, UsageError])
def test_an_interruption_leaves_nothing_behind(pair, text, cache, monkeypatch, error):
    def stop(*args):
        raise error

    monkeypatch.setattr(tokenized_text, "encode_chunk", stop)
    with pytest.raises(error):
        build_dataset(text, pair, 24, 60, cache)
    assert list(cache.folder.iterdir()) == []


def test_leftovers_of_a_killed_run_are_removed_and_files_of_a_running_one_are_not(pair, text, cache):
    dead, living = (cache.folder / f"{'0' * 32}-{name}.partial" for name in ("dead", "living"))
    for path in (dead, living):
        path.mkdir(parents=True)
    (dead / LOCK).write_text("1")
    lock = FolderLock(living)
    lock.acquire()
    build_dataset(text, pair, 24, 60, cache)
    assert not dead.exists()
    assert living.exists()
    lock.release()


def test_a_folder_that_cannot_be_written_is_named(pair, text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=rf"--token_cache {tmp_path}/file/in: cannot be written \(Not a directory\)"):
        build_dataset(text, pair, 24, 60, _Cache(tmp_path / "file" / "in"))


def test_a_disk_without_room_is_an_error_after_the_first_chunk(pair, text, cache, monkeypatch):
    monkeypatch.setattr(tokenized_text, "_CHUNK", 500)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("", (), {"free": 2**24}))
    with pytest.raises(UsageError, match=r"--token_cache .*: no room for the text's tokens .*name another folder"):
        build_dataset(text, pair, 24, 60, cache)
    assert list(cache.folder.iterdir()) == []


def test_small_text_is_not_cached(pair, cache):
    build_dataset([Document("a", "some words")], pair, 24, 60, cache)
    assert not cache.folder.exists()


def test_the_cache_is_the_users_own_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert TokenCache("").folder == tmp_path / "own" / "sar_kd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TokenCache("").folder == tmp_path / ".cache" / "sar_kd"
    assert TokenCache(str(tmp_path / "named")).folder == tmp_path / "named"
    monkeypatch.setattr(token_cache.os.path, "expanduser", lambda path: path)  # nobody's home
    monkeypatch.setattr(token_cache.tempfile, "gettempdir", lambda: "/temporary")
    assert str(TokenCache("").folder) == "/temporary/sar_kd"


def test_a_header_is_read_before_any_column(tmp_path):
    made = ColumnStore(tmp_path)
    made.add("numbers", "int64").append([1, 2])
    made.metadata["a"] = 1
    made.finalize("key")
    columns, metadata = column_store.open_column_store(tmp_path, "key")
    assert (columns["numbers"].tolist(), metadata) == ([1, 2], {"a": 1})
    with pytest.raises(column_store.DamagedStore, match="it holds something else"):
        column_store.open_column_store(tmp_path, "other")
    with pytest.raises(FileNotFoundError):
        column_store.open_column_store(tmp_path / "none", "key")
