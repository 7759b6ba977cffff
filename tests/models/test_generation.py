"""Generation, against token-by-token references without cache or padding."""

import math
from collections import Counter

import pytest
import torch
import transformers

from sar_kd.models.generation import Generation, generate

PROMPTS = [[1, 5, 9, 30], [1, 7], [1, 8, 8, 8, 40, 41, 3]]
STOPS = [2, 4]


@pytest.fixture
def model(make_student):
    """A tiny Llama with a head large enough for its most likely tokens to differ."""
    made = make_student(60).eval().requires_grad_(False)
    made.lm_head.weight.data.mul_(30.0)
    return made


def _greedy(model, prompt, limit):
    """The definition: a forward of the whole text for every token."""
    ids = list(prompt)
    for _ in range(limit):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in STOPS:
            return Generation(ids[len(prompt) :], token)
        ids.append(token)
    return Generation(ids[len(prompt) :], None)


@pytest.mark.parametrize("limits", [[20, 20, 20], [3, 11, 20]])
def test_greedy_text_is_that_of_one_prompt_at_a_time_without_a_cache(model, limits):
    generated = generate(model, PROMPTS, stop_token_ids=STOPS, max_new_tokens=limits)
    assert generated == [_greedy(model, prompt, limit) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    assert len({tuple(each.ids) for each in generated}) == 3


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-30, 1e-20])
def test_a_temperature_close_to_0_is_greedy(model, temperature):
    sampled = generate(model, PROMPTS, stop_token_ids=STOPS, max_new_tokens=[20] * 3, temperature=temperature)
    assert sampled == [_greedy(model, prompt, 20) for prompt in PROMPTS]


def test_an_enormous_temperature_is_uniform(model):
    (sampled,) = generate(model, PROMPTS[:1], stop_token_ids=[59], max_new_tokens=[60], temperature=1e300)
    assert sampled.is_finite
    assert len(set(sampled.ids)) > 15 or sampled.stop


def test_a_stop_ends_a_text_and_is_no_part_of_it(model):
    free = _greedy(model, PROMPTS[0], 20).ids
    stop = free[5]
    (generated,) = generate(model, PROMPTS[:1], stop_token_ids=[stop], max_new_tokens=[20])
    assert generated == Generation(free[: free.index(stop)], stop)


def test_a_stop_just_beyond_the_limit_is_ignored(model):
    free = _greedy(model, PROMPTS[0], 20).ids
    first = free.index(free[5])
    (generated, _) = generate(model, PROMPTS[:2], stop_token_ids=[free[5]], max_new_tokens=[first, 20])
    assert generated == Generation(free[:first], None)


def test_the_models_own_generation_config_is_ignored(model):
    plain = generate(model, PROMPTS, stop_token_ids=STOPS, max_new_tokens=[20] * 3)
    model.generation_config.update(repetition_penalty=5.0, top_k=1, min_length=19, no_repeat_ngram_size=1)
    config = model.generation_config
    assert generate(model, PROMPTS, stop_token_ids=STOPS, max_new_tokens=[20] * 3) == plain
    assert model.generation_config is config
    model.generation_config.update(eos_token_id=plain[0].ids[0])
    assert generate(model, PROMPTS, stop_token_ids=STOPS, max_new_tokens=[20] * 3) == plain


@pytest.mark.parametrize("has_draws", [False, True])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_tokens_are_drawn_from_the_tempered_distribution(model, temperature, top_p, has_draws):
    count, prompt = 4000, PROMPTS[1]
    model.lm_head.weight.data.div_(8.0)
    scores = model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature
    expected = scores.softmax(0)
    if top_p < 1.0:  # the fewest tokens that together reach it
        best = expected.sort(descending=True)
        kept = best.indices[: int((best.values.cumsum(0) < top_p).sum()) + 1]
        mask = torch.zeros_like(expected)
        mask[kept] = 1.0
        expected = expected * mask / (expected * mask).sum()
    how = {"temperature": temperature, "top_p": top_p}
    how["draws"] = torch.rand(count, 1, dtype=torch.float64) if has_draws else None
    generated = generate(model, [prompt] * count, stop_token_ids=[59], max_new_tokens=[1] * count, **how)
    drawn = Counter(each.stop if each.stop is not None else each.ids[0] for each in generated)
    distance = sum(abs(drawn[token] / count - float(p)) for token, p in enumerate(expected)) / 2
    spread = sum(math.sqrt(float(p) * (1 - float(p)) / count) for p in expected) * math.sqrt(2 / math.pi) / 2
    assert distance < 1.5 * spread
    assert all(float(expected[token]) > 0 for token in drawn)


def test_draws_are_an_inverse_of_the_cumulative_distribution(model):
    """Each sequence by its own row: at the edges of a token's interval the token changes, and nothing else does."""
    prompt = PROMPTS[1]
    ends = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().div(0.8).softmax(0).cumsum(0)
    tokens = ends.diff(prepend=torch.zeros(1)).topk(5).indices.tolist()
    middles = [(ends[token] + (ends[token - 1] if token else 0.0)) / 2 for token in tokens]
    draws = torch.stack([*middles, *(ends[token] - 1e-6 for token in tokens)])[:, None]
    generated = generate(
        model, [prompt] * 10, stop_token_ids=[59], max_new_tokens=[1] * 10, temperature=0.8, draws=draws
    )
    assert [each.stop if each.stop is not None else each.ids[0] for each in generated] == tokens * 2


def test_with_draws_a_sequence_does_not_depend_on_the_others(model):
    model.lm_head.weight.data.div_(8.0)
    draws = torch.rand(3, 20, dtype=torch.float64)
    how = {"stop_token_ids": STOPS, "temperature": 1.0, "top_p": 0.9}
    together = generate(model, PROMPTS, max_new_tokens=[20] * 3, draws=draws, **how)
    alone = [
        generate(model, [p], max_new_tokens=[20], draws=own, **how)[0]
        for p, own in zip(PROMPTS, draws.split(1), strict=True)
    ]
    assert together == alone
    assert generate(model, PROMPTS, max_new_tokens=[20] * 3, draws=draws.flip(1), **how) != together


def test_a_sequence_ends_at_logits_that_are_not_finite_and_the_others_go_on(model):
    plain = [_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert plain[0].ids[4] not in plain[1].ids + plain[2].ids
    # This token makes its sequence's logits NaN from there on.
    model.model.embed_tokens.weight.data[plain[0].ids[4]] = math.nan
    broken, *others = generate(model, PROMPTS, stop_token_ids=[58], max_new_tokens=[12] * 3)
    assert broken == Generation(plain[0].ids[:5], None, False)
    assert others == plain[1:]


def test_a_prompt_with_logits_that_are_not_finite_gives_nothing(model):
    model.model.embed_tokens.weight.data[9] = math.nan
    assert generate(model, PROMPTS[:1], stop_token_ids=STOPS, max_new_tokens=[5]) == [Generation([], None, False)]


def test_there_is_no_autograd_graph(model):
    model.requires_grad_(True)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda *args: seen.append(args[-1]))
    generate(model, PROMPTS, stop_token_ids=STOPS, max_new_tokens=[3] * 3)
    handle.remove()
    assert seen
    assert not any(out.requires_grad for out in seen)


def test_a_batch_does_not_run_beyond_a_table_of_positions(make_student):
    """The longest prompt fills GPT-2's positions while the shortest still has most of its tokens to write."""
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=16, initializer_range=0.5
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    prompts, limits = [[3, 4], [5, 6, 7] * 4 + [8, 9]], [14, 2]
    alone = [
        generate(model, [prompt], stop_token_ids=[1], max_new_tokens=[limit])[0]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    assert generate(model, prompts, stop_token_ids=[1], max_new_tokens=limits) == alone
    draws = torch.rand(2, 14, dtype=torch.float64)
    drawn = generate(model, prompts, stop_token_ids=[1], max_new_tokens=limits, temperature=1.0, draws=draws)
    last = generate(model, prompts[1:], stop_token_ids=[1], max_new_tokens=limits[1:], temperature=1.0, draws=draws[1:])
    assert drawn[1:] == last
    assert generate(make_student(40, max_position_embeddings=16), prompts, stop_token_ids=[1], max_new_tokens=limits)
