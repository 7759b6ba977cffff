"""Models and tokenizers that are loaded, and those that are refused in one line."""

from types import SimpleNamespace

import pytest
import transformers
from tokenizers import Tokenizer

from sar_kd.errors import UsageError
from sar_kd.models.loading import load_tokenizers


@pytest.fixture
def load(tmp_path, make_student):
    """load(tokenizer, vocab_size): the pair of a saved folder with a model of that vocabulary and this tokenizer."""

    def load(tokenizer, vocab_size, config=None):
        config = config or make_student(8).config
        config.vocab_size = vocab_size
        config.save_pretrained(tmp_path)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path)
        names = SimpleNamespace(teacher_model=str(tmp_path), student_model=str(tmp_path), trust_remote_code=False)
        return load_tokenizers(names)

    return load


@pytest.mark.parametrize("config", [None, transformers.GPT2Config()])
def test_a_folder_without_a_tokenizer_is_named_with_the_remedy(load, tmp_path, config):
    with pytest.raises(UsageError) as error:
        load(None, 300, config)
    assert str(error.value) == (
        f"--student_model {tmp_path}: has no tokenizer (no tokenizer.json or tokenizer.model); copy the tokenizer "
        "files of the model that it was trained from into it"
    )


def test_a_tokenizer_without_a_vocabulary_is_none(load, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UsageError, match="has no tokenizer"):
        load(None, 300, transformers.GPT2Config())


def _with_tokens(tokenizer, special=(), ordinary=()):
    rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rust.add_special_tokens(list(special))
    rust.add_tokens(list(ordinary))
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **names)


def test_special_tokens_above_the_models_vocabulary_are_accepted(load, sp_tokenizer):
    size = len(sp_tokenizer)
    pair = load(_with_tokens(sp_tokenizer, ["<pad>", "<image>"]), size)
    assert len(pair.student) == size + 2
    assert [len(table.pieces) for table in pair.token_tables] == [size, size]
    assert pair.num_teacher_tokens == size


def test_a_token_of_text_above_the_models_vocabulary_is_named(load, tmp_path, sp_tokenizer):
    size = len(sp_tokenizer)
    with pytest.raises(UsageError) as error:
        load(_with_tokens(sp_tokenizer, ["<pad>"], ["<think>", "</think>"]), size)
    assert str(error.value) == (
        f"--student_model {tmp_path}: its tokenizer can turn text into '<think>' (id {size + 1} and 1 more), for which "
        f"the model has no logits (its vocab_size is {size}); resize the model's embeddings to the tokenizer, or use "
        "the tokenizer that the model was trained with"
    )
