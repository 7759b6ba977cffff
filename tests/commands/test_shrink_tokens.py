"""`shrink --vocab_size`: the model and its tokenizer with fewer tokens, in one folder."""

import json

import pytest
import torch
import transformers

from sar_kd.commands.main import main
from sar_kd.errors import UsageError
from sar_kd.models.cut.token_rows import keep_tokens_
from sar_kd.models.pretrained import silence_transformers
from sar_kd.tokenization.token_table import PROBES
from tests.helpers.cut_models import build_to_cut

TEXT = "Every token of the text is predicted exactly once in an epoch. The loss scale is lowered after an overflow.\n"
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"
# Model, tokenizer: a tied head; one of its own; one with a bias; Gemma's.
CASES = {"gpt2": "byte_tokenizer", "llama": "sp_tokenizer", "phi": "byte_tokenizer", "gemma3": "sp_tokenizer"}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 20, encoding="utf-8")
    return path


@pytest.fixture
def saved(tmp_path, request):
    """saved(name): the folder of a model and its tokenizer; some rows of the model have no token."""
    silence_transformers()

    def save(name, padding=8):
        tokenizer = request.getfixturevalue(CASES[name])
        tokenizer.chat_template = TEMPLATE
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
               "pad_token_id": len(tokenizer) + 3}  # fmt: skip
        model = _phi(len(tokenizer) + padding, ids) if name == "phi" else None
        model = model or build_to_cut(name, len(tokenizer) + padding, **ids)
        model.generation_config.suppress_tokens = [len(tokenizer) - 1]
        model.save_pretrained(tmp_path / "whole")
        tokenizer.save_pretrained(tmp_path / "whole")
        tokenizer.chat_template = None
        return tmp_path / "whole"

    return save


def _phi(vocab_size, ids):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    model = transformers.PhiForCausalLM(transformers.PhiConfig(vocab_size=vocab_size, **sizes, **ids)).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.fixture
def shrink(tmp_path, text_file):
    """shrink(folder, words): the exit code; into the folder `small`."""

    def shrink(folder, words):
        texts = ["--train_file", str(text_file), "--validation_file", str(text_file), "--block_size", "32"]
        limits = ["--calibration_chars", "1000", "--eval_chars", "1000", "--device", "cpu"]
        given = ["--model", str(folder), "--output_dir", str(tmp_path / "small")]
        return main(["shrink", *given, *texts, *limits, *words.split()])

    return shrink


def _load(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi", "gemma3"])
@torch.no_grad()
def test_the_folder_holds_the_rows_of_the_kept_tokens(saved, shrink, tmp_path, name, capsys, request):
    folder = saved(name)
    assert shrink(folder, "--vocab_size 400") == 0, capsys.readouterr().err
    (whole, old), (cut, new) = _load(folder), _load(tmp_path / "small")
    assert len(new) <= 400 == cut.config.vocab_size == cut.get_output_embeddings().weight.shape[0]
    # By their spelling, not by the table that the command made.
    old_id, tokens = old.get_vocab(), sorted(new.get_vocab(), key=new.get_vocab().get)
    ids = torch.randint(0, len(tokens), (2, 24), generator=torch.Generator().manual_seed(0))
    of_old = torch.tensor([old_id[token] for token in tokens])
    expected = whole(input_ids=of_old[ids], use_cache=False).logits[..., of_old]
    found = cut(input_ids=ids, use_cache=False).logits[..., : len(tokens)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    for config in (cut.config, cut.generation_config):
        assert config.eos_token_id == new.eos_token_id
        assert config.pad_token_id == 399  # a row without a token, which the config names
    assert [old_id[tokens[i]] for i in cut.generation_config.suppress_tokens] == [len(old) - 1]
    assert new.chat_template == TEMPLATE
    for text in PROBES:
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"])
    assert cut.generate(ids[:1, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 12)
    if name != "phi":
        tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
        assert (cut.get_output_embeddings().weight is cut.get_input_embeddings().weight) == tied


def test_the_tokens_are_those_of_the_text_that_is_named(saved, shrink, tmp_path, capsys):
    folder, named = saved("gpt2"), tmp_path / "named.jsonl"
    named.write_text(json.dumps({"text": "def while count name return SELECT users GROUP " * 3}))
    words = {}
    for option in ("", f" --vocab_from {named}"):
        assert shrink(folder, f"--vocab_size 280{option}") == 0, capsys.readouterr().err
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
        words[bool(option)] = {token for token in tokenizer.get_vocab() if len(token) > 2}
        (tmp_path / "small").rename(tmp_path / f"small{len(words)}")
    assert words[False] - words[True]
    assert words[True] - words[False]
    assert all(token.strip("\u0120") in named.read_text() for token in words[True] - words[False])


def test_what_it_costs_is_shown(saved, shrink, tmp_path, capsys, byte_tokenizer):
    assert shrink(saved("gpt2", padding=0), "--vocab_size 0.5 --layers 4 --json") == 0
    record = json.loads(capsys.readouterr().out)
    for name, place in (("before", "whole"), ("after", "small")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / place)
        text = (TEXT * 20)[:1000]
        count = len(tokenizer(text)["input_ids"]) + 1  # the end of the text
        assert record[name]["tokens_per_byte"] == pytest.approx(count / 1000)
    assert record["after"]["tokens_per_byte"] >= record["before"]["tokens_per_byte"]
    total, half = len(byte_tokenizer), round(len(byte_tokenizer) / 2)
    assert f"Vocabulary: {half} of {total} tokens kept: 258 that stay in any case; in all, " in record["cuts"][1]
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| tokens a byte | " in card
    assert record["cuts"][1] in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--vocab_size 200",
            "--vocab_size 200: 259 tokens stay in any case (bytes, special and added tokens); keep more",
        ),
        ("--vocab_size 5000", "--vocab_size 5000: keeps 5000 of 608; give a number from 1 to 607"),
        ("--vocab_size many", "--vocab_size many: must be a number of tokens, or a share above 0 and below 1"),
        ("--vocab_size 300 --vocab_from no.txt", "--vocab_from no.txt: cannot be read (No such file or directory)"),
        ("--vocab_from no.txt", "shrink: nothing is to be cut; give --layers, "),
    ],
)
def test_a_wrong_option_is_one_line(saved, shrink, tmp_path, capsys, words, message):
    folder = saved("gpt2")
    assert shrink(folder, words) == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "small").exists()


def test_ids_that_cannot_be_renumbered_are_named(saved, shrink, capsys):
    folder = saved("gpt2")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sequence_bias": [[[5], -1.0]]}))
    assert shrink(folder, "--vocab_size 300") == 2
    assert "sequence_bias in its generation config cannot follow; remove it first" in capsys.readouterr().err


def test_a_tensor_that_cannot_follow_is_named():
    model = build_to_cut("llama", 600)
    model.model.register_buffer("masks", torch.zeros(2, 600))
    with pytest.raises(UsageError, match=r"it: model\.masks has an entry for each token and cannot follow"):
        keep_tokens_("it", model, range(300))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_a_student_of_fewer_tokens_learns_from_its_teacher(saved, shrink, tmp_path, text_file, capsys, name):
    folder = saved(name)
    assert shrink(folder, "--vocab_size 400") == 0
    given = ["--teacher_model", str(folder), "--student_model", str(tmp_path / "small"), "--device", "cpu"]
    texts = ["--train_file", str(text_file), "--validation_file", str(text_file), "--block_size", "32"]
    how = ["--train_steps", "3", "--alignment", "projection", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *given, *texts, *how]) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["applied"]) == ("finished", 3)
    assert summary["val_bits_per_byte_final"] < summary["val_bits_per_byte_start"]
