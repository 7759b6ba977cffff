"""Text to documents to blocks to batches: nothing lost, nothing read twice, and one clear line for every bad file."""

import dataclasses
import gzip
import itertools
import json
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from sar_kd import embedded
from sar_kd.config.sections import DataConfig
from sar_kd.data import blocks
from sar_kd.data.batch import IGNORE_INDEX
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.files.samples import Conversation, Document, Message
from sar_kd.data.files.sources import load_documents
from sar_kd.errors import UsageError
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.token_table import build_token_table
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

KINDS = ("byte", "sp", "dummy_prefix")
PAIRS = [(student, teacher) for student in KINDS for teacher in KINDS]
CROSS = [names for names in PAIRS if names[0] != names[1]]
END = b"\xff"  # stands for an end-of-text token; no text holds this byte
STUDENT_LIMIT, TEACHER_LIMIT = 24, 40


@pytest.fixture(scope="module")
def tokenizers(byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer):
    return dict(zip(KINDS, (byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer), strict=True))


@pytest.fixture(scope="module")
def pairs(tokenizers):
    return {(s, t): _pair(tokenizers[s], tokenizers[t]) for s, t in PAIRS}


@pytest.fixture(scope="module")
def documents(corpus_texts):
    return [Document(f"text {i}", text) for i, text in enumerate(corpus_texts)]


@pytest.fixture(scope="module")
def datasets(pairs, documents):
    return {names: build_dataset(documents, pair, STUDENT_LIMIT, TEACHER_LIMIT) for names, pair in pairs.items()}


def _pair(student, teacher, **how) -> TokenizerPair:
    return TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher), **how)


def _side(dataset: Dataset, which: str):
    """Tokenizer, stream, end token and block ranges of one model."""
    pair = dataset.pair
    ranges = [(getattr(b, f"{which}_start"), getattr(b, f"{which}_end")) for b in dataset.blocks]
    return getattr(pair, which), getattr(dataset.text, which), getattr(pair, f"{which}_end"), ranges


def _text_of_blocks(dataset: Dataset, which: str) -> list[bytes]:
    """The bytes of each block in the tokens of one model, without the spaces that tokenizers put before a text."""
    tokenizer, stream, end_id, ranges = _side(dataset, which)
    pieces = build_token_table(tokenizer, len(tokenizer)).pieces
    dummy = stream.has_dummy

    def spell(i):
        return END if stream.ids[i] == end_id else pieces[stream.ids[i]][int(dummy[i]) :]

    return [b"".join(spell(i) for i in range(start, end)) for start, end in ranges]


# Streams and blocks


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_an_epoch_predicts_every_token_of_every_document_once(datasets, documents, names, which, batch_size):
    dataset = datasets[names]
    tokenizer, _, end_id, _ = _side(dataset, which)
    texts = [dataset.pair.canonical(document.text) for document in documents]
    wanted = [token for ids in encode(tokenizer, texts) for token in (*ids, end_id)]
    predicted = torch.cat([batch.targets for batch in dataset.token_batches(which, batch_size)])
    assert predicted.tolist() == wanted


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_an_evaluation_names_the_document_of_each_target(datasets, documents, names, which):
    dataset = datasets[names]
    tokenizer, _, end_id, _ = _side(dataset, which)
    batches = list(dataset.token_batches(which, 3))
    targets = torch.cat([batch.targets for batch in batches])
    numbers = torch.cat([batch.groups[0] for batch in batches])
    texts = [dataset.pair.canonical(document.text) for document in documents]
    for number, ids in enumerate(encode(tokenizer, texts)):
        assert targets[numbers == number].tolist() == [*ids, end_id]
    assert dataset.text.document_bytes.tolist() == [len(text.encode()) for text in texts]


@pytest.mark.parametrize("names", [("byte", "byte"), ("sp", "byte")])
def test_so_it_does_where_conversations_stand_between_the_documents(pairs, names):
    talk = Conversation("talk", (Message("user", "How?", False), Message("assistant", "Like so.", True)), False)
    documents = [Document("first", "The first text."), talk, Document("last", "And the last one."), talk]
    dataset = build_dataset(documents, pairs[names], 200, 200)
    assert list(dataset.text.names) == ["first", "last", "talk", "talk"]
    assert dataset.text.document_bytes.tolist() == [15, 17, 8, 8]
    for which in ("student", "teacher"):
        (batch,) = dataset.token_batches(which, 9)
        alone = [len(next(build_dataset([each], pairs[names], 200, 200).token_batches(which, 9)).targets)
                 for each in (documents[0], documents[2], talk)]  # fmt: skip
        assert torch.bincount(batch.groups[0]).tolist() == [*alone, alone[-1]]


def test_the_number_of_tokens_is_the_students_and_the_number_of_bytes_the_texts(datasets, documents):
    dataset = datasets["sp", "byte"]
    predicted = sum(len(batch.targets) for batch in dataset.token_batches("student", 4))
    assert dataset.num_tokens == predicted
    assert dataset.text.num_bytes == sum(len(dataset.pair.canonical(d.text).encode()) for d in documents)


@pytest.mark.parametrize("names", CROSS)
def test_both_models_read_the_same_bytes_in_every_block(datasets, documents, names):
    dataset = datasets[names]
    student, teacher = _text_of_blocks(dataset, "student"), _text_of_blocks(dataset, "teacher")
    assert len(dataset) > 20
    assert student == teacher
    whole = b"".join(dataset.pair.canonical(document.text).encode() + END for document in documents)
    assert b"".join(student) == whole


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("opening", ["", "\n", "\u65e5"])
def test_no_block_is_longer_than_its_limits(pairs, names, opening):
    documents = [Document(str(n), opening + "ab" * n) for n in range(1, 40)]
    dataset = build_dataset(documents, pairs[names], STUDENT_LIMIT, TEACHER_LIMIT)
    for which, limit in (("student", STUDENT_LIMIT), ("teacher", TEACHER_LIMIT)):
        if which == "student" or dataset.pair.tables is not None:
            assert max(batch.input_ids.shape[1] for batch in dataset.token_batches(which, 1)) <= limit


def test_blocks_are_filled(datasets):
    lengths = [end - start for start, end in _side(datasets["byte", "byte"], "student")[3]]
    assert set(lengths[:-1]) == {STUDENT_LIMIT - 1}


@pytest.mark.parametrize("names", PAIRS)
def test_a_block_names_the_documents_that_it_holds_a_part_of(datasets, documents, names):
    dataset = datasets[names]
    tokenizer, _, _, ranges = _side(dataset, "student")
    owners = []
    for document in documents:
        (ids,) = encode(tokenizer, [dataset.pair.canonical(document.text)])
        owners += [document.name] * (len(dataset.pair.document_starts[0]) + len(ids) + 1)
    for block, (start, end) in enumerate(ranges):
        assert dataset.documents_of(block) == list(dict.fromkeys(owners[start:end]))


def test_text_without_a_common_boundary_names_the_block_size(crossed_pair):
    with pytest.raises(UsageError) as refusal:
        build_dataset([Document("ab", "c " * 40 + "ab" * 50)], crossed_pair, 8, 64)
    assert str(refusal.value) == (
        "--block_size 8: 55.6% of the bytes, more than 5%, would be skipped: the two tokenizers end no token at the "
        "same place within a block ('ababababababababababababababababababababab'); raise it, or use another model"
    ).replace("'" + "ab" * 21 + "'", "'" + "ab" * 20 + "'")


def test_text_whose_common_boundary_is_within_the_block_is_read(crossed_pair):
    dataset = build_dataset([Document("ab", "ababab c " * 5)], crossed_pair, 8, 64)
    assert _text_of_blocks(dataset, "student") == _text_of_blocks(dataset, "teacher")


@pytest.fixture(scope="module")
def crossed_pair(byte_tokenizer):
    """ababab is cut into ab|ab|ab by the student and into a|ba|ba|b by the teacher."""

    def merging(pair):
        definition = json.loads(byte_tokenizer.backend_tokenizer.to_str())
        vocab = {token: i for token, i in definition["model"]["vocab"].items() if len(token) == 1 or "|" in token}
        vocab = {token: i for i, token in enumerate([*sorted(vocab, key=vocab.get), "".join(pair)])}
        definition["model"] |= {"vocab": vocab, "merges": [list(pair)]}
        tokenizer = Tokenizer.from_str(json.dumps(definition))
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")

    return _pair(merging(("a", "b")), merging(("b", "a")))


# Passages without a common end


SPANNING = [("byte", "superword"), ("superword", "byte"), ("sp", "superword"), ("superword", "sp")]
SPANNING_LIMITS = {"byte": (24, 60), "sp": (24, 60), "superword": (12, 20)}


def _ends_by_hand(tokenizer, text: str) -> list[int]:
    """The byte at which each token of a document ends; the end of the text is one more."""
    pieces = build_token_table(tokenizer, len(tokenizer)).pieces
    return [*itertools.accumulate(len(pieces[i]) for i in encode(tokenizer, [text])[0]), len(text.encode()) + 1]


def _passages_by_hand(pair, text: str, limits) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The bytes between neighbouring common ends of a document: what fits into a block, and what does not."""
    sides = [_ends_by_hand(tokenizer, text) for tokenizer in (pair.student, pair.teacher)]
    common = [0, *sorted(set(sides[0]) & set(sides[1]))]
    fit, rest = [], []
    for start, end in itertools.pairwise(common):
        counts = [sum(start < at <= end for at in side) for side in sides]
        (fit if counts[0] < limits[0] and counts[1] < limits[1] else rest).append((start, end))
    return fit, rest


def _spanning_dataset(tokenizers, names, documents, monkeypatch) -> Dataset:
    monkeypatch.setattr(blocks, "MAX_SKIPPED_SHARE", 1.0)
    return build_dataset(documents, _pair(*(tokenizers[name] for name in names)), *SPANNING_LIMITS[names[0]])


@pytest.fixture(scope="module")
def spanning(tokenizers, superword_tokenizer):
    return {**tokenizers, "superword": superword_tokenizer}


@pytest.fixture(scope="module")
def joined(corpus_texts):
    """Three documents, of which one begins and one ends with a sentence that is a single token."""
    return [
        Document("all", "\n".join(corpus_texts)),
        Document("first", corpus_texts[7] + " " + corpus_texts[3]),
        Document("last", corpus_texts[4] + " " + corpus_texts[14]),
    ]


@pytest.mark.parametrize("names", SPANNING)
def test_all_but_passages_without_a_common_end_is_read_once(spanning, names, joined, monkeypatch):
    dataset = _spanning_dataset(spanning, names, joined, monkeypatch)
    pair, limits = dataset.pair, SPANNING_LIMITS[names[0]]
    by_hand = {document.name: _passages_by_hand(pair, document.text, limits) for document in joined}
    wanted = b"".join(
        (document.text.encode() + END)[start:end] for document in joined for start, end in by_hand[document.name][0]
    )
    for which in ("student", "teacher"):
        assert b"".join(_text_of_blocks(dataset, which)) == wanted
    for own, other in zip(*(_text_of_blocks(dataset, which) for which in ("student", "teacher")), strict=True):
        assert own == other
    skipped = {name: rest for name, (_, rest) in by_hand.items()}
    text = dataset.text
    assert text.num_bytes == len(wanted) - len(joined)
    assert text.skipped_bytes == sum(end - start for rest in skipped.values() for start, end in rest) > 0
    assert text.num_bytes + text.skipped_bytes == sum(len(document.text.encode()) for document in joined)
    fitting = [by_hand[document.name][0] for document in joined]
    assert text.document_bytes.tolist() == [sum(end - start for start, end in fit) - 1 for fit in fitting]
    reason = "the two tokenizers end no token at the same place within a block"
    assert text.skipped_passages == [f"{name} ({reason})" for name, rest in skipped.items() for _ in rest]
    for which in ("student", "teacher"):
        targets = torch.cat([batch.targets for batch in dataset.token_batches(which, 3)])
        pieces = build_token_table(getattr(pair, which), len(getattr(pair, which))).pieces
        spelled = b"".join(pieces[i] or END for i in targets.tolist())
        assert spelled == wanted
        assert which == "teacher" or len(targets) == dataset.num_tokens


@pytest.mark.parametrize("names", SPANNING)
def test_no_chunk_joins_tokens_of_both_sides_of_a_skipped_passage(spanning, names, joined, monkeypatch):
    dataset = _spanning_dataset(spanning, names, joined, monkeypatch)
    batch, tables = dataset.batch(list(range(len(dataset)))), dataset.pair.tables
    chunks = batch.alignment.student_chunks, batch.alignment.teacher_chunks
    spelled: list[dict[int, bytes]] = [{}, {}]
    for side, tokens in enumerate((batch.student, batch.teacher)):
        for token, chunk in zip(tokens.targets.tolist(), chunks[side].tolist(), strict=True):
            spelled[side][chunk] = spelled[side].get(chunk, b"") + (tables[side].pieces[token] or END)
    assert spelled[0] == spelled[1]
    assert -1 not in spelled[0]
    alone = [dataset.batch([block]).alignment for block in range(len(dataset))]
    assert batch.alignment.num_chunks == sum(alignment.num_chunks for alignment in alone)


@pytest.mark.parametrize("names", SPANNING)
@pytest.mark.parametrize("size", [5, 17, 60])
def test_blocks_along_a_teachers_skip_the_same_passages(spanning, names, joined, size, monkeypatch):
    """Whatever the blocks of a teacher cache, a passage is skipped only where no block can hold it."""
    dataset = _spanning_dataset(spanning, names, joined, monkeypatch)
    text, limits = dataset.text, [limit - 1 for limit in SPANNING_LIMITS[names[0]]]
    last = len(text.teacher.ids)
    num_bytes = text.num_bytes + text.skipped_bytes
    whole = dataclasses.replace(text, num_bytes=num_bytes, skipped_bytes=0, skipped_passages=())
    along = blocks.pack(whole, *limits, np.append(np.arange(size, last, size), last))
    found = blocks.skip_passages(whole, along, dataset.pair, limits[0])
    assert along != dataset.blocks
    assert found.skipped_ranges == text.skipped_ranges
    assert (found.num_bytes, found.skipped_bytes) == (text.num_bytes, text.skipped_bytes)
    assert max(block.student_end - block.student_start for block in along) <= limits[0]
    assert max(block.teacher_end - block.teacher_start for block in along) <= limits[1]


def test_a_space_that_both_tokenizers_put_before_a_text_is_no_byte_of_a_skipped_passage(
    dummy_prefix_tokenizer, monkeypatch
):
    monkeypatch.setattr(blocks, "MAX_SKIPPED_SHARE", 1.0)
    definition = json.loads(dummy_prefix_tokenizer.backend_tokenizer.to_str())
    definition["model"]["merges"] = []
    letters = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), bos_token="<s>", eos_token="</s>"
    )
    pair = _pair(dummy_prefix_tokenizer, letters)
    text = "The mean and the loss"
    (first, *_) = encode(dummy_prefix_tokenizer, [text])[0]
    assert build_token_table(dummy_prefix_tokenizer, len(dummy_prefix_tokenizer)).pieces[first] == b" The"
    dataset = build_dataset([Document("a", text)] * 2, pair, 24, 4)
    assert dataset.text.num_bytes + dataset.text.skipped_bytes == 2 * len(text)
    kept = b"".join(_text_of_blocks(dataset, "student"))
    assert not kept.startswith(b" The")
    assert dataset.text.num_bytes == len(kept) - 2
    assert dataset.text.document_bytes.tolist() == [len(kept) // 2 - 1] * 2


# Start tokens


def _starts(dataset: Dataset, which: str) -> tuple[int, ...]:
    return dataset.pair.document_starts[0 if which == "student" or dataset.pair.tables is None else 1]


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_every_document_begins_with_the_start_token_of_a_side_that_has_one(pairs, names, which):
    """Documents of one word each, so that many begin inside a block; the end of each is the only other special id."""
    words = ["one", "two", "a b", "x", "\u65e5", "end."] * 7
    dataset = build_dataset([Document(str(i), word) for i, word in enumerate(words)], pairs[names], 24, 40)
    tokenizer, _, end_id, _ = _side(dataset, which)
    start = _starts(dataset, which)
    assert bool(start) == (tokenizer.bos_token_id not in (None, end_id))
    seen = []
    for batch in dataset.token_batches(which, 1):
        inputs, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
        assert inputs[0] == getattr(dataset.pair, f"{which}_start")
        assert len(inputs) <= (24 if which == "student" else 40)
        if start:
            assert inputs[1] != start[0]  # the start token of the block is that of its first document
            after_end = [b for a, b in itertools.pairwise(inputs) if a == end_id]
            assert after_end == list(start) * inputs[1:].count(start[0])
            assert all(label == IGNORE_INDEX for i, label in zip(inputs, labels, strict=True) if i == start[0])
        seen += [label for label in labels if label != IGNORE_INDEX]
    texts = encode(tokenizer, [dataset.pair.canonical(word) for word in words])
    assert seen == [token for ids in texts for token in (*ids, end_id)]


@pytest.mark.parametrize("bos", ["<|im_start|>", "<|endoftext|>", None])
def test_a_start_token_that_begins_a_chat_turn_or_ends_a_text_begins_no_document(byte_tokenizer, bos):
    tokenizer = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    for eos in ("<|endoftext|>", "<|im_end|>"):
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
        assert _pair(wrapped, wrapped).document_starts == ((), ())


def test_the_positions_of_a_documents_beginning_are_a_pair_also_where_one_side_has_a_start_token(datasets, documents):
    """The student's start token and the teacher's end of text predict the same first token of a document."""
    dataset = datasets["sp", "byte"]
    start, end = dataset.pair.student_start, dataset.pair.teacher_end
    found = 0
    for block in range(len(dataset)):
        batch = dataset.batch([block])
        inputs = batch.student.input_ids[0], batch.teacher.input_ids[0]
        positions = batch.student.positions[batch.alignment.student_positions], batch.alignment.teacher_positions
        predicting = [ids[own].tolist() for ids, own in zip(inputs, positions, strict=True)]
        assert [i == start for i in predicting[0][1:]] == [i == end for i in predicting[1][1:]]
        found += predicting[0].count(start)
    assert found >= len(documents)


# Batches


def test_a_batch_opens_with_the_start_token_and_has_unshifted_labels(datasets):
    dataset = datasets["sp", "byte"]
    (batch,) = [batch for i, batch in enumerate(dataset.token_batches("student", 3)) if i == 1]
    ranges = _side(dataset, "student")[3][3:6]
    for row, (start, end) in enumerate(ranges):
        size, ids = end - start, dataset.text.student.ids[start:end].tolist()
        padding = batch.input_ids.shape[1] - 1 - size
        assert batch.input_ids[row].tolist() == [1, *ids, *[1] * padding]
        labels = [IGNORE_INDEX if i == dataset.pair.student_start else i for i in ids]
        assert batch.labels[row].tolist() == [IGNORE_INDEX, *labels, *[IGNORE_INDEX] * padding]


@pytest.mark.parametrize("names", [("sp", "byte"), ("byte", "byte")])
def test_rows_and_targets_are_the_shifted_labels(datasets, names):
    batch = datasets[names].batch([0, 3, 1])
    for one in (batch.student, batch.teacher):
        shifted = torch.cat([one.labels[:, 1:], torch.full((3, 1), IGNORE_INDEX)], dim=1).flatten()
        assert torch.equal(one.positions, (shifted != IGNORE_INDEX).nonzero().squeeze(1))
        assert torch.equal(one.targets, shifted[one.positions])
    assert batch.num_target_tokens == len(batch.student.targets)


def test_equal_tokenizers_are_aligned_row_by_row(datasets):
    dataset = datasets["byte", "byte"]
    batch = dataset.batch([2, 0])
    every = list(range(batch.num_target_tokens))
    a = batch.alignment
    assert a.student_continuations is a.teacher_continuations is None
    assert a.token_end.tolist() == [-1] * len(every)
    assert torch.equal(batch.student.input_ids, batch.teacher.input_ids)
    assert a.student_positions.tolist() == a.student_chunks.tolist() == a.teacher_chunks.tolist() == every
    assert torch.equal(a.teacher_positions, batch.student.positions)
    assert a.strict.all()
    assert a.num_chunks == len(every)
    # The position of a token is the one after the position that predicts it.
    assert torch.equal(a.student_ends, batch.student.positions + 1)
    assert torch.equal(a.teacher_ends, batch.student.positions + 1)


@pytest.mark.parametrize("names", PAIRS)
def test_every_target_row_is_indexed_within_its_batch(datasets, names):
    dataset = datasets[names]
    batch = dataset.batch([5, 0, len(dataset) - 1])
    a = batch.alignment
    assert 0 < len(a.student_positions) <= batch.num_target_tokens
    assert a.student_positions.max() < batch.num_target_tokens
    assert len(a.student_chunks) == batch.num_target_tokens
    assert len(a.teacher_chunks) == len(batch.teacher.targets)
    assert set(a.teacher_positions.tolist()) <= set(batch.teacher.positions.tolist())
    assert a.student_ends.max() < batch.student.input_ids.numel()
    assert a.teacher_ends.max() < batch.teacher.input_ids.numel()


@pytest.mark.parametrize("names", [("sp", "byte"), ("byte", "byte")])
def test_moving_a_batch_moves_every_tensor_in_it(datasets, names):
    batch = datasets[names].batch([0, 1])
    moved = batch.to(torch.device("meta"))

    def tensors(record):
        values = vars(record).values()
        inner = [tensor for value in values if dataclasses.is_dataclass(value) for tensor in tensors(value)]
        return [value for value in values if isinstance(value, torch.Tensor)] + inner

    assert len(tensors(moved)) == len(tensors(batch)) > 10
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert moved.blocks == batch.blocks == (0, 1)


# Order


def _order(dataset: Dataset, steps, batch_size=1, accum_steps=1, seed=0) -> list[int]:
    windows = [dataset.micro_batches(step, batch_size, accum_steps, seed) for step in steps]
    return [block for window in windows for batch in window for block in batch.blocks]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_every_epoch_is_a_permutation_of_the_blocks(datasets, epoch):
    dataset = datasets["sp", "byte"]
    size = len(dataset)
    assert sorted(_order(dataset, range(epoch * size, (epoch + 1) * size))) == list(range(size))


def test_epochs_and_seeds_are_ordered_differently(datasets):
    dataset = datasets["sp", "byte"]
    size = len(dataset)
    orders = [
        _order(dataset, range(size)),
        _order(dataset, range(size, 2 * size)),
        _order(dataset, range(size), seed=1),
    ]
    assert len({tuple(order) for order in orders}) == 3


def test_the_blocks_of_a_step_do_not_depend_on_the_steps_before_it(pairs, documents, datasets):
    fresh = build_dataset(documents, pairs["sp", "byte"], STUDENT_LIMIT, TEACHER_LIMIT)
    in_order = _order(datasets["sp", "byte"], range(60), batch_size=2)
    backwards = [_order(fresh, [step], batch_size=2) for step in reversed(range(60))]
    assert [block for blocks in reversed(backwards) for block in blocks] == in_order


@pytest.mark.parametrize(("batch_size", "accum_steps"), [(4, 1), (2, 2), (1, 4)])
def test_the_blocks_of_a_step_do_not_depend_on_how_its_window_is_split(datasets, batch_size, accum_steps):
    dataset = datasets["sp", "byte"]
    wanted = _order(dataset, range(4 * 30))
    assert _order(dataset, range(30), batch_size, accum_steps) == wanted
    assert len(dataset.micro_batches(0, batch_size, accum_steps, 0)) == accum_steps


# Documents that are not like the others


@pytest.mark.parametrize("names", CROSS)
@pytest.mark.parametrize("text", ["x", " ", "\n", "\U0001f600", "\U0001f600\U0001f468\u200d\U0001f469", "\u65e5"])
def test_the_smallest_documents_are_read(pairs, names, text):
    dataset = build_dataset([Document("small", text)], pairs[names], 24, 40)
    assert dataset.text.skipped_documents == []
    assert _text_of_blocks(dataset, "student") == [text.encode() + END]
    assert len(dataset.batch([0]).student.targets) == dataset.num_tokens


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("bad", ["", "half a pair: \ud83d"])
def test_a_document_that_no_tokenizer_can_encode_is_skipped_by_name(pairs, names, bad):
    dataset = build_dataset([Document("a", "first"), Document("bad", bad), Document("b", "last")], pairs[names], 24, 40)
    assert dataset.text.skipped_documents == ["bad"]
    assert dataset.text.names == ["a", "b"]
    assert dataset.documents_of(0) == ["a", "b"]
    assert dataset.text.num_bytes == len("firstlast")


@pytest.mark.parametrize("names", [("sp", "byte"), ("byte", "sp")])
def test_both_models_read_the_canonical_text(pairs, names):
    dataset = build_dataset([Document("a", "one\u2581two")], pairs[names], 24, 40)
    assert dataset.text.skipped_documents == []
    assert _text_of_blocks(dataset, "student") == _text_of_blocks(dataset, "teacher") == [b"one two" + END]


@pytest.mark.parametrize("names", PAIRS)
def test_a_text_without_a_document_that_can_be_encoded_is_a_usage_error(pairs, names):
    with pytest.raises(UsageError, match="2 of its 2 documents cannot be used: empty, or no Unicode text: a, b"):
        build_dataset([Document("a", ""), Document("b", "\ud800")], pairs[names], 24, 40)


# Ids that the model lacks


@pytest.mark.parametrize("teacher", ["sp", "byte"])
def test_a_template_may_not_write_a_token_that_the_model_has_no_logits_for(tokenizers, teacher):
    size = len(tokenizers["sp"])
    rust = Tokenizer.from_str(tokenizers["sp"].backend_tokenizer.to_str())
    rust.add_special_tokens(["<pad>", "<|turn|>"])
    template = "{% for m in messages %}{{ '<|turn|>' + m.content }}{% endfor %}"
    student = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    other = student if teacher == "sp" else tokenizers["byte"]
    pair = TokenizerPair(student, other, student_vocab_size=size, teacher_vocab_size=len(other))
    messages = Message("user", "One?", False), Message("assistant", "Two.", True)
    documents = [Document("a", "<pad> is text"), Conversation("b", messages, plain=False)]
    assert build_dataset(documents[:1], pair, 64, 64).num_tokens > 5
    with pytest.raises(UsageError, match=rf"--student_model: its chat template writes '<\|turn\|>' \(id {size + 1}\)"):
        build_dataset(documents, pair, 64, 64)


# Tokenizers that change text


def _changing(byte_tokenizer, normalizer):
    definition = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    tokenizer = Tokenizer.from_str(json.dumps(definition | {"normalizer": normalizer}))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def changing(byte_tokenizer):
    """Tokenizers that the verification finds out (it has upper case, and accents), and one that it does not."""
    replace = {"type": "Replace", "pattern": {"String": "colour"}, "content": "color"}
    normalizers = {"lower case": {"type": "Lowercase"}, "decomposed": {"type": "NFD"}, "american": replace}
    return {name: _changing(byte_tokenizer, normalizer) for name, normalizer in normalizers.items()}


CHANGED = {
    "lower case": ("UPPER", "'UPPER' becomes 'upper'"),
    "decomposed": ("\u00e9t\u00e9", "'\u00e9t\u00e9' becomes 'e\u0301te\u0301'"),
    "american": ("colour", "'colour' becomes 'color'"),
}
ALIGNMENTS = {"auto": {}, "uld": {"aligns": True, "projects": False}}


def _mostly_kept(text: str, percent: int) -> list[Document]:
    """Documents of which one, so many percent of all bytes, is `text`."""
    size = len(text.encode())
    return [Document("kept", "a" * (size * (100 - percent) // percent)), Document("changed", text)]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("kind", CHANGED)
def test_a_text_of_which_a_tokenizer_changes_a_little_goes_on_without_it(changing, sp_tokenizer, kind, alignment):
    text, _ = CHANGED[kind]
    for whose, sides in (
        ("teacher", (sp_tokenizer, changing[kind])),
        ("student", (changing[kind], sp_tokenizer)),
    ):
        documents = _mostly_kept(text, percent=3)
        found = build_dataset(documents, _pair(*sides, **ALIGNMENTS[alignment]), 24, 40)
        assert found.text.names == ["kept"]
        assert found.text.skipped_documents == [f"changed (the {whose}'s tokenizer changes its text)"]
        assert (found.text.num_bytes, found.text.skipped_bytes) == (len(documents[0].text), len(text.encode()))
        assert _text_of_blocks(found, "student") == _text_of_blocks(found, "teacher")
        assert len(found.batch([0]).alignment.student_positions) > 0


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_text_of_which_a_tokenizer_changes_too_much_is_refused_with_an_example(
    changing, sp_tokenizer, kind, whose, alignment
):
    text, example = CHANGED[kind]
    sides = (changing[kind], sp_tokenizer) if whose == "student" else (sp_tokenizer, changing[kind])
    pair = _pair(*sides, **ALIGNMENTS[alignment])
    build_dataset(_mostly_kept(text, percent=5), pair, 24, 40)
    with pytest.raises(UsageError) as refusal:
        build_dataset(_mostly_kept(text, percent=10), pair, 24, 40)
    assert str(refusal.value) == (
        f"--{whose}_model: its tokenizer changes text ({example}); 10.0% of the bytes would be skipped, more than 5%; "
        "use another model"
    )


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_of_a_document_only_the_lines_that_a_tokenizer_changes_are_skipped(changing, sp_tokenizer, kind, whose):
    sides = (changing[kind], sp_tokenizer) if whose == "student" else (sp_tokenizer, changing[kind])
    line, changed = "a line of words, or two\n", f"{CHANGED[kind][0]} line\n"
    text, rest = line * 20 + changed + line * 3 + changed + line * 20, line * 43
    found = build_dataset([Document("long", text), Document("b", line)], _pair(*sides), 24, 40).text
    wanted = build_dataset([Document("long", rest), Document("b", line)], _pair(*sides), 24, 40).text
    for own, other in ((found.student, wanted.student), (found.teacher, wanted.teacher)):
        assert own.ids.tolist() == other.ids.tolist()
        assert np.asarray(own.ends).tolist() == np.asarray(other.ends).tolist()
    assert (found.names, found.skipped_documents) == (["long", "b"], [])
    assert found.skipped_passages == [f"long (the {whose}'s tokenizer changes it)"] * 2
    assert found.num_bytes == len(rest) + len(line)
    assert found.skipped_bytes == 2 * len(changed.encode())


def test_what_a_tokenizer_changes_is_no_matter_where_both_are_equal(changing):
    found = build_dataset([Document("a", "UPPER")], _pair(changing["lower case"], changing["lower case"]), 24, 40)
    assert (found.text.names, found.text.skipped_documents) == (["a"], [])


def test_text_that_is_skipped_for_another_reason_does_not_count(changing, sp_tokenizer):
    documents = [Document("empty", ""), Document("bad", "UPPER \ud800"), Document("kept", "lower")]
    found = build_dataset(documents, _pair(sp_tokenizer, changing["lower case"]), 24, 40)
    assert found.text.skipped_documents == ["empty", "bad"]


def test_a_change_of_a_conversation_counts_its_targets(changing, sp_tokenizer):
    pair = _pair(sp_tokenizer, changing["lower case"])
    messages = Message("user", "a question", False), Message("assistant", "UPPER", True)
    changed = Conversation("changed", messages, plain=True)
    kept = changed._replace(name="kept", messages=(messages[0], Message("assistant", "a" * 95, True)))
    found = build_dataset([kept, changed], pair, 200, 200)
    assert found.text.skipped_documents == ["changed (the teacher's tokenizer changes its text)"]
    with pytest.raises(UsageError, match=r"--teacher_model: .* \('UPPER' becomes 'upper'\); 9.5% of the bytes"):
        build_dataset([kept, changed, changed], pair, 200, 200)


# Files


def _load(*paths, **settings) -> tuple[list[Document], list[Document]]:
    return load_documents(DataConfig(train_file=tuple(map(str, paths)), **settings))


LINES = [{"text": f"line {n}\nof text", "body": f"body {n}"} for n in range(40)]


@pytest.fixture
def files(tmp_path):
    rows = "\n".join(json.dumps(row) for row in LINES)
    (tmp_path / "a.txt").write_text("caf\u00e9\n" * 100, encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(rows + "\n\n", encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return tmp_path


def test_a_text_file_is_one_document(files):
    train, validation = _load(files / "a.txt", validation_file=(str(files / "a.txt"),))
    assert train == validation == [Document("a.txt", "caf\u00e9\n" * 100)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("text_field", ["text", "body"])
def test_every_line_of_a_jsonl_file_is_a_document(files, name, text_field):
    train, _ = _load(files / name, validation_file=(str(files / "a.txt"),), text_field=text_field)
    assert train == [Document(f"{name}:{n}", row[text_field]) for n, row in enumerate(LINES, 1)]


def test_several_files_are_read_in_the_order_given(files):
    train, _ = _load(files / "a.jsonl", files / "a.txt", validation_file=(str(files / "a.txt"),))
    assert [train[0].name, train[-1].name] == ["a.jsonl:1", "a.txt"]


def test_lines_without_content_are_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": " \\n"}\n{"text": ""}\n{"text": "five"}\n')
    train, _ = _load(path, validation_file=(str(path),))
    assert [document.name for document in train] == ["a.jsonl:1", "a.jsonl:5"]


ROW = json.dumps({"text": "a" * 90}).encode() + b"\n"
TORN = gzip.compress(ROW * 50)
BAD_FILES = {
    "missing": ("a.txt", None, "--train_file {path}: cannot be read .*No such file"),
    "wrong extension": ("a.pdf", b"a,b", r"--train_file {path}: must be a .txt, .*.json or .parquet file"),
    "compressed text": ("a.txt.gz", b"", r"--train_file {path}: must be a .txt, .*.json or .parquet file"),
    "no extension": ("text", b"words", r"--train_file {path}: must be a .txt, .*.json or .parquet file"),
    "not UTF-8": ("a.txt", b"caf\xe9", r"--train_file {path}: is not UTF-8 text \(byte 3\); convert it first"),
    "not UTF-8 late": (
        "a.jsonl",
        ROW * 200 + b"\xe9\n",
        rf"--train_file {{path}}: is not UTF-8 .*\b(line 201|{200 * len(ROW)})\b",
    ),
    "not JSON": (
        "a.jsonl",
        ROW + b"{'text': 1}\n",
        r"--train_file {path}: line 2 is not JSON \(Expecting property name enclosed in double quotes, column 2\)$",
    ),
    "a line end in a text": (
        "a.jsonl",
        b'{"text": "a',
        r"--train_file {path}: line 1 is not JSON \(Unterminated string starting, column 10\)$",
    ),
    "no such field": ("a.jsonl", b'{"body": "b", "id": 3}', r"--train_file {path}: line 1 .*has: body, id\)"),
    "no text": ("a.jsonl", b'{"text": 3}', "--train_file {path}: line 1 has a number as 'text'; expected text$"),
    "a list": ("a.jsonl", b"[1]", "--train_file {path}: line 1 is a list; expected an object with 'text'"),
    "empty": ("a.txt", b"", "--train_file {path}: holds no text"),
    "only spaces": ("a.txt", b" \n\n", "--train_file {path}: holds no text"),
    "empty lines": ("a.jsonl", b"\n\n", "--train_file {path}: holds no text"),
    "not gzip": ("a.jsonl.gz", ROW, "--train_file {path}: cannot be read .*gzip"),
    "cut short": ("a.jsonl.gz", TORN[: len(TORN) // 2], "--train_file {path}: .*before the end-of-stream"),
    "damaged": ("a.jsonl.gz", TORN[:20] + b"\xff" * 20 + TORN[40:], "--train_file {path}: "),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path, case):
    name, content, message = BAD_FILES[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message.format(path=path)) as error:
        _load(path)
    assert "\n" not in str(error.value)


def test_a_bad_validation_file_is_named_by_its_own_flag(files):
    missing = files / "b.txt"
    with pytest.raises(UsageError, match=f"--validation_file {missing}: cannot be read"):
        _load(files / "a.txt", validation_file=(str(missing),))


# Held-out text

SOURCES = {
    "one file of lines": ["word word\n" * 500],
    "one line": ["word " * 1000],
    "a title and one line": ["Title\n" + "word " * 1000],
    "many documents": ["word word\n" * 20] * 60,
    "a few documents": ["word word\n" * 100] * 3,
    "a small document last": ["word\n" * 2000, "end of it"],
    "a large document last": ["word\n" * 20] * 5 + ["word\n" * 4000],
    "a large document before small ones": ["word\n" * 4000, *["word\n"] * 4],
}


@pytest.mark.parametrize("source", SOURCES)
def test_about_a_twentieth_of_the_text_is_held_out(tmp_path, source):
    texts = SOURCES[source]
    if len(texts) == 1:
        path = tmp_path / "a.txt"
        path.write_text(texts[0])
    else:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train, validation = _load(path)
    held_out = sum(len(document.text) for document in validation)
    assert 0.02 < held_out / sum(map(len, texts)) < 0.12
    assert "".join(document.text for document in train + validation) == "".join(texts)
    assert all(document.text for document in train + validation)


def test_held_out_and_training_documents_have_different_names(files):
    for name in ("a.txt", "a.jsonl"):
        train, validation = _load(files / name)
        assert not {document.name for document in train} & {document.name for document in validation}


def test_text_of_a_few_characters_is_still_split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("tiny text")
    train, validation = _load(path)
    assert train[0].text
    assert validation[0].text


# The datasets package


def test_a_dataset_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="--dataset_name wikitext: needs `pip install datasets`"):
        load_documents(DataConfig(dataset_name="wikitext"))


class _Split(dict):
    @property
    def column_names(self):
        return list(self)


@pytest.fixture
def serve(monkeypatch):
    """serve(answer): make `datasets.load_dataset` give that, or raise it."""

    def install(answer):
        def load_dataset(name, configuration):
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    return install


def test_a_dataset_gives_its_own_splits(serve):
    serve({"train": _Split(text=["a", "", None, " ", "b"]), "validation": _Split(text=["c"])})
    train, validation = load_documents(DataConfig(dataset_name="x"))
    assert train == [Document("train:0", "a"), Document("train:4", "b")]
    assert validation == [Document("validation:0", "c")]


def test_a_dataset_without_a_validation_split_has_text_held_out(serve):
    serve({"train": _Split(text=["word word\n" * 20] * 60)})
    train, validation = load_documents(DataConfig(dataset_name="x"))
    assert len(train) + len(validation) == 60
    assert len(validation) == 3


def test_a_dataset_is_read_from_the_split_that_is_named(serve, monkeypatch):
    serve({"train_sft": _Split(text=["a"]), "validation": _Split(text=["c"])})
    train, validation = load_documents(DataConfig(dataset_name="x", dataset_split="train_sft"))
    assert (train, validation) == ([Document("train_sft:0", "a")], [Document("validation:0", "c")])
    texts = ["word word\n" * 20] * 60
    serve({"train": _Split(text=["a"]), "validation": _Split(text=texts)})
    train, validation = load_documents(DataConfig(dataset_name="x", dataset_split="validation"))
    assert (len(train), len(validation)) == (57, 3)


def test_a_part_of_a_split_is_asked_of_the_package(monkeypatch):
    def load_dataset(name, configuration, split=None):
        texts = [f"text {i}" for i in range(100)]
        return {"train": _Split(text=texts)} if split is None else _Split(text=texts[:10])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    train, validation = load_documents(DataConfig(dataset_name="x", dataset_split="train[:10]"))
    assert train[0] == Document("train[:10]:0", "text 0")
    assert len(train) + len(validation) in (10, 11)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (FileNotFoundError("no\nsuch"), r"--dataset_name x: cannot be loaded \(no\)"),
        (ValueError("unknown configuration"), r"--dataset_name x: cannot be loaded \(unknown configuration\)"),
        ({"test": _Split(text=["a"])}, "--dataset_name x: has no 'train' split .*test.*choose one by --dataset_split"),
        ({"train": _Split(body=["a"])}, "--text_field text: .*body"),
        ({"train": _Split(instruction=["a"], input=["b"])}, r"--text_field text: .*\(it has: instruction, input\)"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_one_clear_line(serve, answer, message):
    serve(answer)
    with pytest.raises(UsageError, match=message):
        load_documents(DataConfig(dataset_name="x"))


# The embedded text


@pytest.fixture(scope="module")
def embedded_text():
    return dict(zip(embedded.SPLITS, embedded.read_text(*embedded.SPLITS), strict=True))


@pytest.mark.slow
def test_no_embedded_text_stands_in_two_splits(embedded_text):
    splits = [set(texts.values()) for texts in embedded_text.values()]
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_splits_have_the_shares_that_are_promised(embedded_text):
    count = sum(map(len, embedded_text.values()))
    ends = [0.0, *embedded.SPLITS.values()]
    for texts, low, high in zip(embedded_text.values(), ends, ends[1:], strict=False):
        assert len(texts) / count == pytest.approx(high - low, abs=0.02)
        assert sum(len(text.encode()) for text in texts.values()) > 40_000


def test_the_embedded_text_is_what_a_run_without_text_reads(embedded_text, monkeypatch):
    everything = [item for texts in embedded_text.values() for item in texts.items()]
    monkeypatch.setattr(embedded, "_documents", lambda: iter(everything))
    train, validation = load_documents(DataConfig())
    assert dict(train) == embedded_text["transfer"]
    assert dict(validation) == embedded_text["validation"]


def test_an_interpreter_without_topics_still_has_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert list(embedded._topics()) == []


@pytest.mark.parametrize("line", ['{"text": "a", "n": ' + "9" * 5000 + "}", "[" * 100_000])
def test_json_beyond_what_python_reads_is_one_clear_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(UsageError, match=r"line 1 is not JSON \(") as error:
        _load(path)
    assert "\n" not in str(error.value)


class _FakeDatasets(types.ModuleType):
    def __init__(self, rows):
        super().__init__("datasets")
        self.rows = rows

    def load_dataset(self, name, configuration):
        return {"train": _FakeSplit({"text": self.rows})}


class _FakeSplit(dict):
    @property
    def column_names(self):
        return list(self)


@pytest.mark.parametrize(("rows", "message"), [(["", None, " "], "holds no text"), ([1, 2], "holds no text")])
def test_a_dataset_without_text_is_one_clear_line(monkeypatch, rows, message):
    monkeypatch.setitem(sys.modules, "datasets", _FakeDatasets(rows))
    with pytest.raises(UsageError, match=message):
        load_documents(DataConfig(dataset_name="d"))
