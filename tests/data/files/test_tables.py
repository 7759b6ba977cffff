"""Files of tables, and the forms of public data: the same documents and conversations as from JSON lines."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import pytest

from sar_kd.config.sections import DataConfig
from sar_kd.data.files.samples import Conversation, Document, Message, conversation_of, read_file
from sar_kd.data.files.sources import load_documents
from sar_kd.errors import UsageError

TEXTS = ["one", 'a "quoted", text\nof two lines', "caf\u00e9 \u2028 \u65e5", " "]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
WANTED = list(enumerate(TEXTS, 1))


def _csv(rows, delimiter=",", line_end="\n") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _read(path, text_field="text"):
    return list(read_file("train_file", path, text_field))


FILES = {
    "commas": ("a.csv", _csv(ROWS)),
    "semicolons": ("a.csv", _csv(ROWS, ";")),
    "tabs": ("a.csv", _csv(ROWS, "\t")),
    "Windows": ("a.csv", b"\xef\xbb\xbf" + _csv(ROWS, line_end="\r\n").replace(b"text\nof", b"text\r\nof")),
    "an array": ("a.json", json.dumps(ROWS).encode()),
    "an array below data": ("a.json", json.dumps({"version": 1, "data": ROWS}, ensure_ascii=False, indent=1).encode()),
    "JSON lines": ("a.json", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()),
}


@pytest.mark.parametrize("case", FILES)
def test_every_row_of_a_table_is_a_document(tmp_path, case):
    name, content = FILES[case]
    (tmp_path / name).write_bytes(content)
    assert _read(tmp_path / name) == [Document(f"{name}:{number}", text) for number, text in WANTED]


def test_a_table_is_text_for_training(tmp_path):
    (tmp_path / "a.csv").write_bytes(_csv([{"body": f"text {i}"} for i in range(100)]))
    train, validation = load_documents(DataConfig(train_file=(str(tmp_path / "a.csv"),), text_field="body"))
    assert train[0] == Document("a.csv:1", "text 0")
    assert len(train) + len(validation) in (100, 101)


BAD = {
    "columns": ("a.csv", _csv([{"body": "x", "id": 1}]), r"example 1 has no text .*\(it has: body, id\).*--text_field"),
    "commas": ("a.csv", b"id,text\n1,one\n2,a, b\n", r"row 2 has 3 columns, its header 2 \(id, text\)"),
    "quotes": ("a.csv", b'text\n"one\ntwo\n', r"is no table in CSV \(behind row 0: unexpected end of data\)"),
    "encoding": ("a.csv", b"text\n" + b"word\n" * 9999 + b"caf\xe9\n", r"is not UTF-8 text \(behind row \d+\)"),
    "empty": ("a.csv", b"", "holds no text"),
    "header": ("a.csv", b"text\n", "holds no text"),
    "text": ("a.json", b"[1, 2", r"is not JSON \(Expecting ',' delimiter, line 1 column 6\)"),
    "a number": ("a.json", b"3", "example 1 is a number; expected an object with 'text'"),
    "a number among": ("a.json", b'[{"text": "a"}, 3]', "example 2 is a number"),
    "no text": ("a.json", b'[{"text": 3}]', "example 1 has a number as 'text'; expected text"),
    "its encoding": ("a.json", b'[{"text": "caf\xe9"}]', r"is not UTF-8 text \(byte 14\)"),
    "a line": ("a.json", b'{"text": "a"}\n{"text": }', r"line 2 is not JSON \(Expecting value, line 1 column 10\)"),
    "deep": ("a.json", b"[" * 10**5, "is not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_table_that_cannot_be_read_is_one_clear_line(tmp_path, case):
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"^--train_file {tmp_path / name}: {message}") as error:
        load_documents(DataConfig(train_file=(str(tmp_path / name),)))
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"a\.parquet: needs pyarrow to be read; `pip install pyarrow`"):
        _read(tmp_path / "a.parquet")


class _ArrowError(Exception):
    pass


@pytest.fixture
def arrow(monkeypatch):
    """arrow(rows): a stand-in for pyarrow that holds these rows in every file; the columns that were read."""

    def install(rows):
        read = []

        class ParquetFile:
            schema_arrow = SimpleNamespace(names=list(rows[0]) if rows else [])

            def __init__(self, path):
                if path.read_bytes() != b"PAR1":
                    raise _ArrowError("Parquet magic bytes not found\nin footer")

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def iter_batches(self, size, columns):
                read.extend(columns)
                for first in range(0, len(rows), 2):
                    part = [{name: row[name] for name in columns} for row in rows[first : first + 2]]
                    yield SimpleNamespace(to_pylist=lambda part=part: part)

        parquet = SimpleNamespace(ParquetFile=ParquetFile)
        monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(ArrowException=_ArrowError, parquet=parquet))
        return read

    return install


def test_a_parquet_file_is_read_batch_by_batch_without_columns_that_are_not_needed(tmp_path, arrow):
    read = arrow(ROWS)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert _read(tmp_path / "a.parquet") == [Document(f"a.parquet:{number}", text) for number, text in WANTED]
    assert read == ["text"]
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(UsageError, match=r"b.parquet: is no readable .parquet file \(Parquet magic bytes not found\)$"):
        _read(tmp_path / "b.parquet")
    arrow([{"body": "x", "image": b""}])
    with pytest.raises(UsageError, match=r"example 1 has no text .*\(it has: body, image\)"):
        _read(tmp_path / "a.parquet")


def test_a_parquet_file_is_what_pyarrow_wrote(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    talk = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(talk), tmp_path / "b.parquet")
    assert [document.text for document in _read(tmp_path / "a.parquet")] == [text for _, text in WANTED]
    (found,) = _read(tmp_path / "b.parquet")
    assert [message[:3] for message in found.messages] == [("user", "a", False), ("assistant", "b", True)]


# The forms of public data


def _turns(example) -> list[tuple]:
    return [message[:3] for message in conversation_of("a", example, "here").messages]


ASKED = ("user", "Add.", False)
FORMS = {
    "alpaca": ({"instruction": "Add.", "input": "", "output": "2"}, [ASKED, ("assistant", "2", True)]),
    "alpaca with input": (
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        [("user", "Add.\n\n1 + 1", False), ("assistant", "2", True)],
    ),
    "alpaca without input": ({"instruction": "Add.", "output": "2"}, [ASKED, ("assistant", "2", True)]),
    "alpaca with history": (
        {"instruction": "Add.", "output": "2", "system": "Be brief.", "history": [["Hi", "Hello"]]},
        [
            ("system", "Be brief.", False),
            ("user", "Hi", False),
            ("assistant", "Hello", True),
            ASKED,
            ("assistant", "2", True),
        ],
    ),
    "dolly": (
        {"instruction": "Add.", "context": "1 + 1", "response": "2", "category": "qa"},
        [("user", "Add.\n\n1 + 1", False), ("assistant", "2", True)],
    ),
    "sharegpt": (
        {
            "id": "x",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Add."},
                {"from": "gpt", "value": "2"},
                {"from": "human", "value": "Thanks."},
            ],
        },
        [("system", "Be brief.", False), ASKED, ("assistant", "2", True)],
    ),
    "sharegpt with roles": (
        {"conversations": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "2"}]},
        [ASKED, ("assistant", "2", True)],
    ),
    "sharegpt with a system field": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "2"}]},
        [("system", "Be brief.", False), ASKED, ("assistant", "2", True)],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_public_data_is_a_conversation(form, tmp_path):
    example, wanted = FORMS[form]
    assert _turns(example) == wanted
    (tmp_path / "a.json").write_text(json.dumps([example]), encoding="utf-8")
    (found,) = _read(tmp_path / "a.json")
    assert isinstance(found, Conversation)
    assert not found.plain  # with roles, also where there is no chat template
    assert _turns(example) == [message[:3] for message in found.messages]


def test_a_table_of_instructions_is_conversations(tmp_path):
    (tmp_path / "a.csv").write_bytes(_csv([{"instruction": "Add.", "input": "", "output": "2"}]))
    (found,) = _read(tmp_path / "a.csv")
    assert found.messages == (Message("user", "Add.", False), Message("assistant", "2", True))


@pytest.mark.parametrize(
    "example",
    [
        {"instruction": "Add.", "input": "", "output": ""},
        {"conversations": [{"from": "human", "value": "Add."}]},
        {"conversations": []},
        {"conversations": None},
        {"instruction": "Add.", "output": None},
    ],
)
def test_an_example_without_an_answer_does_not_end_a_run_and_is_named(example):
    found = conversation_of("a", example, "here")
    assert not found.messages
    assert list(example)[-1] in found.fault


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"conversations": "text"}, "here: 'conversations' is text; expected a list of messages"),
        ({"conversations": ["text"]}, "message 1 of 'conversations' is text"),
        ({"conversations": [{"from": "human"}]}, "message 1 of 'conversations' has no 'content'"),
        ({"instruction": "a", "output": 3}, "message 2 of 'output' has a number as 'content'"),
    ],
)
def test_an_example_that_is_not_as_its_form_says_is_refused(example, message):
    with pytest.raises(UsageError, match=message):
        conversation_of("a", example, "here")
