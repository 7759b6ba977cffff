"""Shared fixtures: three kinds of tokenizer trained in memory on a tiny corpus, and tiny models of both families."""

import dataclasses
import json
import os

# Tests in parallel have a thread each, and so has what they start; torch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from sar_kd.commands.build_embedded import byte_level_bpe, sentencepiece_bpe
from sar_kd.data.batch import IGNORE_INDEX
from sar_kd.preflight import memory_plan
from sar_kd.preflight.dry_run import dry_run
from sar_kd.reporting import drawing

BYTE_VOCAB, SP_VOCAB = 600, 520
_PLANNED = ("per_device_batch_size", "grad_accum_steps")

_ENGLISH = """\
The quick brown fox jumps over the lazy dog.
A student reads what the teacher wrote, and learns from it slowly.
Training in half precision needs care: gradients may overflow.
The loss scale is lowered after every overflow and raised again later.
Nothing is repaired; an update that cannot be trusted is refused.
Two tokenizers cut the same text at different places.
Every token of the text is predicted exactly once in an epoch.
She said "don't", and he didn't; they'll see what we've done.
In 1969 about 650,000,000 people watched; 12.5% of them were asleep.
Numbers such as 3.14159, 2718 and 1000000 are cut into digits.
Return the largest item in an iterable or the largest of two or more arguments.
If the file cannot be read, an error that names it is raised.
This function is equivalent to the one above, but it is faster.
The default value of this argument is None, which means no limit.
Changed in version 3.9: the argument may be given by name.
Words, words, words; commas, colons: and (parentheses) [brackets] {braces}.
UPPER CASE, lower case, Title Case, camelCase and snake_case.
What follows a token is not known before the token has been read.
The mean is divided once by the number of tokens in the window.
A guard is a small object that judges every attempted update in order.
Teachers speak in longer words than their students understand.
Perplexity is the exponential of the mean loss over all tokens.
The router of a mixture of experts chooses two of eight experts.
One rule has one home, and one home has one rule.
Read the text twice, then write down what you remember of it.
It rained for three days, and on the fourth the river rose.
The museum opens at nine and closes at half past five.
He counted to ten, took a deep breath and opened the door.
Bread, butter, cheese, apples, pears and a bottle of water.
Nobody knows how many stars there are in the night sky.
"""
_CODE = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n    print(i, end=' ')\n",
    "class Guard:\n    def __init__(self, limit=2.0):\n        self.limit = limit\n",
    "import numpy as np\n\nx = np.zeros((3, 4), dtype=np.float32)\n",
    "if not finite:\n\traise ValueError('not finite')\nelse:\n\tpass\n",
    "while True:\n    try:\n        break\n    except KeyError:\n        continue\n",
    "SELECT name, count(*) FROM users WHERE id > 100 GROUP BY name;",
    "<html><body class='x'>text &amp; more</body></html>",
    '{"name": "a", "values": [1, 2, 3], "ok": true}\n',
    'int main(void) { return printf("%d\\n", 42); }\n',
    "lambda x: x ** 2 + 2 * x - 1",
    "$ git log --oneline | head -n 5 > out.txt && cat out.txt",
    "a = b = c = 0  # three names\n\n\n\nd = 1\n",
    "https://example.org/path?query=1&other=two#fragment",
    "matrix = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]",
]
_UNICODE = [
    "na\u00efve caf\u00e9, \u00fcber die Stra\u00dfe, \u0153uvre compl\u00e8te",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u041a\u0430\u043a \u0434\u0435\u043b\u0430?",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "emoji \U0001f600 and \U0001f468\u200d\U0001f469\u200d\U0001f467 and \U0001f1eb\U0001f1f7 flags",
    "x \u2264 y \u2227 \u2200\u03b5 > 0: \u2211 a\u2099 \u2192 \u221e",
    "\u201cquotes\u201d \u2013 dashes \u2014 ellipsis\u2026 and \u20ac 5,00",
    "combining e\u0301 and o\u0308, ligature \ufb01, half \u00bd",
    "tabs\tand\u00a0no-break spaces   and   runs",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u03b1\u03b2\u03b3 \u03b4\u03b5\u03b6 \u0391\u0392\u0393",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """One for the session and its parallel parts. No test reads what another session kept, or leaves anything in the
    user's cache."""
    root = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _empty_charts():
    """Drawing is half of a run of a few steps: pages have empty charts, but in tests/reporting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "_svg", lambda draw, height: ("", "<svg></svg>"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_dry_run_of_each_run():
    """A quarter of a run of a few steps is its memory plan: it is made once for equal runs, but in tests/preflight."""
    phases: dict = {}

    def dry_run_once(config, models, *args, **kwargs):
        sections = config.to_dict()
        decisive = {name: sections.get(name) for name in ("loss", "routing", "on_policy", "lora", "optim", "memory")}
        sizes = [sections["data"]["block_size"], *(sections["train"][name] for name in _PLANNED)]
        parts = [
            [
                (name, param.shape, param.dtype, param.device, param.requires_grad)
                for name, param in m.named_parameters()
            ]
            + [m.config.to_json_string()]
            for m in models.values()
        ]
        teacher = sections["models"].get("teacher_model")
        key = repr((decisive, sizes, teacher, list(models), parts, args, kwargs))
        if key not in phases:
            phases[key] = dry_run(config, models, *args, **kwargs)
        return phases[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_plan, "dry_run", dry_run_once)
        yield


@pytest.fixture(scope="session")
def corpus_texts() -> list[str]:
    """60 short texts: English, code, and other scripts."""
    return [*_ENGLISH.splitlines(), *_CODE, *_UNICODE]


@pytest.fixture(scope="session")
def byte_tokenizer(corpus_texts):
    """GPT-2's kind: byte-level BPE."""
    return byte_level_bpe(corpus_texts, BYTE_VOCAB)


@pytest.fixture(scope="session")
def superword_tokenizer(corpus_texts):
    """Byte-level BPE without words: some of its tokens are whole sentences of the corpus."""
    tokenizer, end = Tokenizer(models.BPE()), "<|endoftext|>"
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=900, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus_texts[::7], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session")
def sp_tokenizer(corpus_texts):
    """Gemma's kind: SentencePiece-like BPE with byte fallback, no dummy prefix."""
    return sentencepiece_bpe(corpus_texts[: -len(_UNICODE) + 1], SP_VOCAB)  # most scripts fall back to bytes


@pytest.fixture(scope="session")
def dummy_prefix_tokenizer(corpus_texts):
    """Llama 2's kind: a dummy space before the text, no pre-tokenizer, a vocabulary of its own."""
    space, special = "\u2581", ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    parts = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    words = Regex(f"{space}+(?={space})|{space}?[^{space}\n]+|{space}|\n+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "isolated")  # for training only
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=SP_VOCAB, special_tokens=special + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(corpus_texts[: -len(_UNICODE) + 1], trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] in special]
    definition["pre_tokenizer"] = None
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def make_student():
    """make_student(vocab_size, **config): a tiny dense Llama, the same weights for the same arguments."""

    def make(vocab_size: int = SP_VOCAB, **overrides):
        settings = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return _seeded_model(transformers.LlamaForCausalLM, transformers.LlamaConfig, vocab_size, settings | overrides)

    return make


@pytest.fixture(scope="session")
def make_teacher():
    """make_teacher(vocab_size, **config): a tiny Qwen3 mixture of experts, frozen and in eval mode."""

    def make(vocab_size: int = BYTE_VOCAB, **overrides):
        settings = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        kinds = transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig
        return _seeded_model(*kinds, vocab_size, settings | overrides).requires_grad_(False).eval()

    return make


def _seeded_model(model_class, config_class, vocab_size, settings):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return model_class(config_class(vocab_size=vocab_size, **settings))


@pytest.fixture
def without_targets():
    """without_targets(batch): the batch with all labels masked."""

    def mask(batch):
        none = torch.zeros(0, dtype=torch.int64)
        labels = torch.full_like(batch.student.labels, IGNORE_INDEX)
        student = dataclasses.replace(batch.student, labels=labels, positions=none, targets=none)
        alignment = dataclasses.replace(
            batch.alignment,
            student_positions=none,
            teacher_positions=none,
            strict=none.bool(),
            student_chunks=none,
            num_chunks=0,
        )
        return dataclasses.replace(batch, student=student, alignment=alignment)

    return mask
