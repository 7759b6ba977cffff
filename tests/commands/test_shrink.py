"""`shrink`: what is cut is what was asked for, and the folder holds just that."""

import json
import math
import os

import pytest
import torch
import transformers
from safetensors import safe_open

from sar_kd.commands.cuts import Goal, choose_layers
from sar_kd.commands.main import main
from sar_kd.config.shrinking import ShrinkConfig
from sar_kd.data.batch import IGNORE_INDEX, TokenBatch, next_token_targets
from sar_kd.errors import UsageError
from sar_kd.evaluation.layer_influence import LayerInfluence, measure_influence
from sar_kd.models.cut import layers
from sar_kd.models.cut.layer_settings import keep_layer_settings
from sar_kd.models.cut.layers import find_layers
from sar_kd.models.pretrained import rebuild_on_meta, silence_transformers
from sar_kd.runtime.files import FolderLock
from tests.helpers.cut_models import CONFIGS, LAYERS, build_to_cut

KEPT = [0, 2, 3, 5]
QUICK = ("llama", "gemma3", "gpt2", "mixtral", "mamba")
TEXT = "Every token of the text is predicted exactly once in an epoch. The loss scale is lowered after an overflow.\n"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 20, encoding="utf-8")
    return path


@pytest.fixture
def saved(tmp_path, byte_tokenizer):
    """saved(name): the folder of a model."""
    silence_transformers()  # a bar of its own would stand before the one line of an error

    def save(name, **overrides):
        folder = tmp_path / "whole"
        build_to_cut(name, len(byte_tokenizer), **overrides).save_pretrained(folder)
        byte_tokenizer.save_pretrained(folder)
        return folder

    return save


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
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _layers(model):
    (found,) = (
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == model.config.num_hidden_layers
        and type(module[0]).__name__.endswith(("Layer", "Block"))
    )
    return found


def _do_nothing(layer):
    forward = layer.forward

    def hand_on(*args, **kwargs):
        states, output = args[0] if args else kwargs["hidden_states"], forward(*args, **kwargs)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    layer.forward = hand_on


IDS = torch.randint(0, 600, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
@torch.no_grad()
def test_the_folder_holds_the_model_without_the_cut_layers(saved, shrink, tmp_path, name, capsys):
    folder = saved(name)
    assert shrink(folder, "--layer_choice 0,2-3,5") == 0, capsys.readouterr().err
    whole, cut = _load(folder), _load(tmp_path / "small")
    for index in set(range(LAYERS)) - set(KEPT):
        _do_nothing(_layers(whole)[index])
    expected, found = (model(input_ids=IDS, use_cache=False).logits for model in (whole, cut))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert cut.config.num_hidden_layers == len(_layers(cut)) == len(KEPT)
    # With its cache it generates what it does without one.
    prompt = IDS[:1, :12]
    generated = cut.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True)
    plain = prompt
    for _ in range(8):
        logits = cut(input_ids=plain, use_cache=False).logits[:, -1]
        logits[:, cut.generation_config.eos_token_id] = -torch.inf
        plain = torch.cat([plain, logits.argmax(-1, keepdim=True)], 1)
    assert generated.tolist() == plain.tolist()


class _Tape:
    """The hidden states that go into every layer, and those that leave the last one, in float64."""

    def __init__(self, layers):
        self.layers, self.states = layers, []

    def __enter__(self):
        def before(module, args, kwargs):
            self.states.append((args[0] if args else kwargs["hidden_states"]).double())

        def after(module, args, output):
            self.states.append((output[0] if isinstance(output, tuple) else output).double())

        self.hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers]
        self.hooks.append(self.layers[-1].register_forward_hook(after))
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "mamba"])
@torch.no_grad()
def test_influence_is_that_of_a_naive_count_in_float64(name):
    model = build_to_cut(name, 60)
    batches = []
    for seed, length in ((0, 9), (1, 5)):
        ids = torch.randint(0, 60, (2, length), generator=torch.Generator().manual_seed(seed))
        labels = ids.clone()
        labels[1, 3:] = IGNORE_INDEX  # padding
        batches.append(TokenBatch(ids, labels, *next_token_targets(labels)))
    own = _layers(model)
    found = measure_influence("it", model, own, batches)
    total, count = torch.zeros(LAYERS + 1, LAYERS + 1, dtype=torch.float64), 0
    for batch in batches:
        with _Tape(own) as tape:
            model(input_ids=batch.input_ids, use_cache=False)
        for row in range(2):
            for position in range(batch.input_ids.shape[1] - 1):
                if batch.labels[row, position + 1] == IGNORE_INDEX:
                    continue
                count += 1
                for i, first in enumerate(tape.states):
                    for j, last in enumerate(tape.states):
                        a, b = first[row, position], last[row, position]
                        total[i, j] += 1 - (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()
    assert found.num_tokens == count == 8 + 2 + 4 + 2
    torch.testing.assert_close(1 - found.cosines, total / count, rtol=0, atol=2e-6)
    naive = {first: (total / count)[first, first + 3].item() for first in range(LAYERS - 1 - 3 + 1)}
    assert found.least(3, 1) == min(naive, key=naive.get)


def test_hidden_states_that_are_not_finite_are_named():
    model = build_to_cut("llama", 60)
    model.model.embed_tokens.weight.data[3] = torch.nan
    ids = torch.arange(8)[None]
    batch = TokenBatch(ids, ids, *next_token_targets(ids))
    with pytest.raises(UsageError, match="it: its hidden states are not finite"):
        measure_influence("it", model, _layers(model), [batch])


def _influence(num_layers=12, quiet=(3, 4, 5)):
    """Hidden states that turn by a degree in a quiet layer and by ten in another."""
    angles = torch.tensor([0.0, *(1.0 if i in quiet else 10.0 for i in range(num_layers))]).cumsum(0).deg2rad()
    return LayerInfluence((angles[:, None] - angles).cos().double(), 7)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"layers": "9"}, [0, 1, 2, *range(6, 12)]),
        ({"layers": ".75"}, [0, 1, 2, *range(6, 12)]),
        ({"layers": "9", "layer_choice": "late"}, [*range(7), 10, 11]),
        ({"layers": "4", "layer_choice": "late"}, [0, 1, 2, 11]),
        ({"layers": "4", "layer_choice": "even"}, [0, 4, 7, 11]),
        ({"layers": "9", "layer_choice": "first"}, list(range(9))),
        ({"layers": "1", "layer_choice": "late"}, [11]),
        ({"layer_choice": "0-2, 11,5-6"}, [0, 1, 2, 5, 6, 11]),
    ],
)
def test_each_choice_keeps_its_layers(options, kept):
    assert choose_layers(ShrinkConfig(output_dir="x", **options), _influence(), Goal(1)) == kept


def test_the_last_layers_stay_although_they_change_the_least():
    config = ShrinkConfig(output_dir="x", layers="9")
    assert choose_layers(config, _influence(quiet=(9, 10, 11)), Goal(1))[-2:] == [10, 11]


def test_a_checkpoint_keeps_its_dtypes_and_is_counted_in_them(saved, shrink, tmp_path, capsys):
    folder = saved("llama_tied")
    _load(folder).bfloat16().save_pretrained(folder)
    assert shrink(folder, "--layers 4 --json") == 0
    record = json.loads(capsys.readouterr().out)
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    count = sum(tensor.numel() for tensor in tensors.values())
    assert (record["after"]["parameters"], record["after"]["bytes"]) == (count, 2 * count)  # a tied head counts once
    assert record["before"]["parameters"] == sum(p.numel() for p in _load(folder).parameters())
    assert len(record["influence"]) == LAYERS
    assert len(record["dropped_layers"]) == 2


def test_what_is_printed_is_on_the_page_and_in_the_card(saved, shrink, tmp_path, capsys):
    folder = saved("llama")
    assert shrink(folder, "--layers 0.5 --layer_choice late") == 0
    shown, small = capsys.readouterr().out, tmp_path / "small"
    cut = "Layers: 3 of 6 kept (late, over 369 tokens); cut, counted from 0: 2-4"
    page, card = (small / "shrink.html").read_text(), (small / "README.md").read_text()
    for text in (shown, page, card):
        assert cut in text
        assert "at chance: " in text  # of random weights
    assert page.count("<figure>") == 1
    assert "# small, cut from whole\n" in card
    assert not list(tmp_path.glob(".*partial"))
    values = {line.rsplit("  ", 2)[0].strip(): line.split()[-1] for line in shown.splitlines() if "  " in line}
    assert f"| perplexity | {_value(shown, 'perplexity', 1)} | {values['perplexity']} |" in card
    model = _load(small)
    assert f"{sum(p.numel() for p in model.parameters()):,}" == values["parameters"]


def _value(shown, name, column):
    return next(line for line in shown.splitlines() if line.startswith(name)).split()[column]


def test_the_measures_are_those_of_the_two_folders(saved, shrink, tmp_path, capsys, text_file, byte_tokenizer):
    folder = saved("qwen3")
    assert shrink(folder, "--layers 4 --json") == 0
    record = json.loads(capsys.readouterr().out)
    text = text_file.read_text()[:1000]
    ids = [byte_tokenizer.bos_token_id, *byte_tokenizer(text, add_special_tokens=False)["input_ids"]]
    for name, place in (("before", folder), ("after", tmp_path / "small")):
        model, nats, targets = _load(place).double(), 0.0, [*ids[1:], byte_tokenizer.eos_token_id]
        for first in range(0, len(targets), 31):  # blocks of 32 with their start token
            part = targets[first : first + 31]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[ids[0], *part[:-1]]])).logits[0]
            nats -= logits.log_softmax(-1)[range(len(part)), part].sum().item()
        assert record[name]["bits_per_byte"] == pytest.approx(nats / math.log(2) / 1000, rel=1e-4)
        assert record[name]["perplexity"] == pytest.approx(math.exp(nats / len(targets)), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "shrink: nothing is to be cut; give --layers, --intermediate, --experts or --vocab_size"),
        ("--intermediate 1.0", "--intermediate 1.0: must be a number of channels, or a share above 0 and below 1"),
        ("--intermediate 48", "--intermediate 48: keeps 48 of 48; give a number from 1 to 47"),
        ("--layers 6", "--layers 6: keeps 6 of 6; give a number from 1 to 5"),
        ("--layers 0.99", "--layers 0.99: keeps 6 of 6; give a number from 1 to 5"),
        ("--layers 0.01", "--layers 0.01: keeps 0 of 6; give a number from 1 to 5"),
        ("--layers 1.5", "--layers 1.5: must be a number of layers, or a share above 0 and below 1 such as 0.75"),
        ("--layers 0", "--layers 0: must be a number of layers, or a share above 0 and below 1 such as 0.75"),
        ("--layer_choice late", "--layer_choice late: needs --layers, how many to keep"),
        ("--layer_choice 0-6", "--layer_choice 0-6: the model has layers 0 to 5"),
        ("--layer_choice 0-5", "--layer_choice 0-5: keeps every layer of the model; leave some out"),
        (
            "--layer_choice 0,0",
            "--layer_choice 0,0: must be influence, late, even, first, or a list of different layers such as 0-19,",
        ),
        ("--layer_choice 3-1", "--layer_choice 3-1: must be influence, late, "),
        ("--layers 4 --layer_choice 0-3", "--layer_choice 0-3: says how many layers are kept; leave out --layers"),
        ("--layers 4 --block_size 4096", "--block_size 4096: the model takes 128 tokens at most; lower it"),
        ("--layers 4 --model nowhere/x", "--model nowhere/x: "),
        ("--layers 4 --train_file no.txt", "--train_file no.txt: "),
        ("--layers 4 --calibration_chars 10", "--calibration_chars 10: must be a number of at least 1000"),
        ("--layer 4", "--layer: no such option; did you mean --layers?"),
    ],
)
def test_a_wrong_option_is_one_line(saved, shrink, tmp_path, capsys, words, message):
    assert shrink(saved("llama"), words) == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "small").exists()


def test_nothing_is_overwritten(saved, shrink, tmp_path, capsys):
    folder, small = saved("llama"), tmp_path / "small"
    small.mkdir()
    (small / "mine.txt").write_text("mine")
    assert shrink(folder, "--layers 4") == 2
    assert "is there already, and nothing is overwritten; name another folder" in capsys.readouterr().err
    assert [path.name for path in small.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("name", "overrides", "words", "message"),
    [
        # Divides its scores by the place of the layer, which is another one after a cut.
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "--layer_choice 0,2-5", "make another cut"),
        ("qwen3_next", {}, "--layer_choice 0,1,3,5", "cannot generate with a cache"),
    ],
)
def test_a_cut_that_the_model_cannot_follow_is_refused(
    saved, shrink, tmp_path, capsys, name, overrides, words, message
):
    folder = saved(name, **overrides)
    assert shrink(folder, words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --model {folder}")
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_a_second_command_into_the_same_folder_is_refused(saved, shrink, tmp_path, capsys):
    folder, lock = saved("llama"), FolderLock(tmp_path, "output_dir", "small")
    lock.acquire()
    assert shrink(folder, "--layers 2") == 2
    assert capsys.readouterr().err == (
        f"error: --output_dir {tmp_path / 'small'}: process {os.getpid()} is running in it; wait for it, or name "
        "another\n"
    )
    lock.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


@pytest.mark.parametrize(("name", "wrong"), [("qwen3", {"layer_types"}), ("smollm3", {"no_rope_layers"})])
def test_a_setting_that_does_not_follow_is_named(monkeypatch, name, wrong):
    """The cut layers would have the windows and the rotations of others."""

    def keep(settings, num_layers, kept):
        new = keep_layer_settings(settings, num_layers, kept)
        return new | {key: settings[key][: len(kept)] for key in wrong}

    model = build_to_cut(name, 60)
    monkeypatch.setattr(layers, "keep_layer_settings", keep)
    layers.keep_layers_("it", model, "model.layers", [1, 2, 3, 4, 5])
    with pytest.raises(UsageError, match="cannot be cut so, because its config cannot say it"):
        layers.check_follows("it", model, rebuild_on_meta("it", model))


def test_a_class_whose_layers_cannot_be_found_is_named():
    config = transformers.XLMConfig(vocab_size=600, emb_dim=32, n_layers=4, n_heads=2, causal=True)
    with pytest.raises(UsageError, match="it: the layers of XLMWithLMHeadModel cannot be found"):
        find_layers("it", transformers.XLMWithLMHeadModel(config).eval())


@pytest.mark.slow
def test_a_smaller_model_learns_from_the_whole_one_in_float16(saved, shrink, tmp_path, text_file, capsys):
    folder = saved("qwen3")
    assert shrink(folder, "--layers 4") == 0
    given = ["--teacher_model", str(folder), "--student_model", str(tmp_path / "small"), "--device", "cpu"]
    texts = ["--train_file", str(text_file), "--validation_file", str(text_file), "--block_size", "32"]
    how = ["--train_steps", "3", "--model_dtype", "float16", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *given, *texts, *how]) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    assert summary["val_bits_per_byte_final"] < summary["val_bits_per_byte_start"]


def _down(model, name):
    """Every layer behind the activation of a feed-forward part whose width is cut."""
    ends = {"gpt2": "mlp.c_proj", "gpt_neo": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h"}.get(name, "mlp.down_proj")
    return [module for key, module in model.named_modules() if key.endswith(ends)]


@pytest.mark.parametrize(
    "name",
    [
        "llama_tied", "gpt2", "gemma3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen3", "gpt_neo", "gpt_neox", "olmo2", "phi3", "qwen3_moe", "deepseek_v3")
        ),
    ],
)  # fmt: skip
@torch.no_grad()
def test_the_channels_of_the_largest_norm_are_kept(saved, shrink, tmp_path, name, capsys, text_file, byte_tokenizer):
    folder = saved(name)
    assert shrink(folder, "--intermediate 0.75") == 0, capsys.readouterr().err
    whole, cut = _load(folder), _load(tmp_path / "small")
    width = _down(whole, name)[0].weight.shape[0 if name == "gpt2" else 1]
    kept = round(0.75 * width)
    ids = byte_tokenizer(text_file.read_text()[:1000], add_special_tokens=False)["input_ids"]
    ids = [*ids, byte_tokenizer.eos_token_id]
    # The norms one token at a time, in float64; then the other channels are set to 0.
    for down in _down(whole, name):
        down.norms = torch.zeros(width, dtype=torch.float64)
        down.register_forward_pre_hook(_add_squares)
    for first in range(0, len(ids), 31):
        whole(input_ids=torch.tensor([[byte_tokenizer.bos_token_id, *ids[first : first + 31][:-1]]]), use_cache=False)
    for down in _down(whole, name):
        down.is_kept = torch.zeros(width).index_fill(0, down.norms.topk(kept).indices, 1.0)
        down.register_forward_pre_hook(lambda module, args: (args[0] * module.is_kept,))
    expected, found = (model(input_ids=IDS, use_cache=False).logits for model in (whole, cut))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert {down.weight.shape[0 if name == "gpt2" else 1] for down in _down(cut, name)} == {kept}


def _add_squares(module, args):
    for token in args[0].reshape(-1, args[0].shape[-1]):
        module.norms += token.double() ** 2


def test_depth_and_width_are_cut_in_one_command(saved, shrink, tmp_path, capsys):
    assert shrink(saved("llama"), "--layers 4 --intermediate 24") == 0, capsys.readouterr().err
    config = _load(tmp_path / "small").config
    assert (config.num_hidden_layers, config.intermediate_size) == (4, 24)
    card = (tmp_path / "small" / "README.md").read_text()
    assert "Layers: 4 of 6 kept" in card
    assert "Feed-forward: 24 of 48 channels kept in each of 4 parts" in card


@pytest.mark.parametrize("name", ["mixtral", "mamba"])
def test_a_model_without_such_parts_is_named(saved, shrink, capsys, name):
    assert shrink(saved(name), "--intermediate 0.5") == 2
    assert "has no feed-forward parts of a known form" in capsys.readouterr().err


def _use_only(router, kept):
    """Route as Mixtral and Qwen3 do, to the kept experts alone."""

    def forward(states):
        logits = states.reshape(-1, states.shape[-1]) @ router.weight.T
        masked = torch.full_like(logits, -torch.inf)
        masked[:, kept] = logits[:, kept]
        weights, indices = masked.softmax(-1).topk(2)
        return logits, weights / weights.sum(-1, keepdim=True), indices

    router.forward = forward


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_the_experts_that_the_text_uses_most_are_kept(saved, shrink, tmp_path, name, capsys, text_file, byte_tokenizer):
    folder = saved(name, norm_topk_prob=True)
    assert shrink(folder, "--experts 3") == 0, capsys.readouterr().err
    whole, cut = _load(folder), _load(tmp_path / "small")
    routers = [module for module in whole.modules() if type(module).__name__.endswith("TopKRouter")]
    ids = byte_tokenizer(text_file.read_text()[:1000], add_special_tokens=False)["input_ids"]
    ids = [*ids, byte_tokenizer.eos_token_id]
    for router in routers:
        router.counts = [0] * 4
        router.register_forward_hook(_count)
    for first in range(0, len(ids), 31):
        whole(input_ids=torch.tensor([[byte_tokenizer.bos_token_id, *ids[first : first + 31][:-1]]]), use_cache=False)
    for router in routers:
        _use_only(router, sorted(range(4), key=lambda expert: -router.counts[expert])[:3])
    expected, found = (model(input_ids=IDS, use_cache=False).logits for model in (whole, cut))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert getattr(cut.config, "num_experts", None) == 3 or cut.config.num_local_experts == 3
    generated = cut.generate(IDS[:1, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 12)


def _count(router, args, output):
    for expert in output[2].flatten().tolist():
        router.counts[expert] += 1


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("llama", "--experts 2", "LlamaForCausalLM has no experts; leave out --experts"),
        ("mixtral", "--experts 1", "--experts 1: each token takes 2 experts; keep at least as many"),
        ("deepseek_v3", "--experts 2", "chooses its experts in groups"),
    ],
)
def test_experts_that_cannot_be_cut_are_named(saved, shrink, capsys, name, words, message):
    assert shrink(saved(name), words) == 2
    assert message in capsys.readouterr().err
