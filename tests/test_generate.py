"""Sampling: greedy is Hugging Face's, log-probs are teacher forcing's, a prompt is read once, rows
leave when done."""

import pytest
import torch

from grpo_fast import ConfigError, GrpoFastError, InputError
from grpo_fast.generate import generate, inverse_cdf
from grpo_fast.tiny import tiny_model

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
EOS = 1
# So many that completions of every length happen.
ENDS = list(range(1, 12))
LENGTH = 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # Large weights: a near-uniform model would hide a wrong mask or position.
    return tiny_model(initializer_range=0.3).eval()


def run(model, prompts=PROMPTS, seed=0, **options):
    defaults = {
        "group_size": 3,
        "max_new_tokens": LENGTH,
        "temperature": 1.0,
        "eos_token_ids": [EOS],
        "generator": torch.Generator().manual_seed(seed),
    }
    return generate(model, prompts, **defaults | options)


def flat(groups):
    return [one for group in groups for one in group]


@pytest.mark.parametrize("ends", [[EOS], ENDS], ids=["one-end", "many-ends"])
def test_greedy_is_hugging_face_s(model, ends):
    groups = run(model, temperature=0.0, group_size=2, eos_token_ids=ends)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert [one.token_ids for one in group] == [expected] * 2


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.5), (0.0, 1.0)])
def test_logprobs_are_those_of_teacher_forcing(model, temperature, top_p):
    groups = run(model, temperature=temperature, top_p=top_p, eos_token_ids=ENDS)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group:
            ids = torch.tensor([prompt + one.token_ids])
            logits = model(ids).logits[0, len(prompt) - 1 : -1] / (temperature or 1.0)
            want = logits.log_softmax(-1).gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(one.logprobs), want, atol=1e-4)


def test_a_completion_ends_at_its_first_end_token(model):
    found = flat(run(model, eos_token_ids=ENDS, group_size=16))
    for one in found:
        inside = [token in ENDS for token in one.token_ids]
        assert one.finished == inside[-1]
        assert not any(inside[:-1])
        assert one.finished or len(one.token_ids) == LENGTH
        assert len(one.logprobs) == len(one.token_ids)
    assert {one.finished for one in found} == {True, False}
    assert len({len(one.token_ids) for one in found}) > 4


def test_without_end_tokens_every_completion_has_full_length(model):
    found = flat(run(model, eos_token_ids=[]))
    assert {(len(one.token_ids), one.finished) for one in found} == {(LENGTH, False)}


def test_one_token(model):
    assert {len(one.token_ids) for one in flat(run(model, max_new_tokens=1))} == {1}


def test_a_prompt_is_read_once_and_finished_rows_leave(model):
    shapes, alive = [], []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = flat(run(model, eos_token_ids=ENDS, group_size=16, on_token=alive.append))
    hook.remove()
    lengths = [len(one.token_ids) for one in found]
    ended = [len(one.token_ids) for one in found if one.finished]
    assert shapes[0] == (3, 4), "three prompts, padded to the longest, once"
    # Row k of the log: those still going after token k + 1.
    left = [(48 - sum(n <= step for n in ended), 1) for step in range(1, max(lengths))]
    assert shapes[1:] == left
    assert alive == [48, *(rows for rows, _ in left)]
    assert left[-1][0] < 24


def test_a_batch_where_all_finish_early_stops(model):
    steps = []
    run(model, eos_token_ids=list(range(50)), on_token=steps.append)
    assert steps == [9]


def test_a_row_does_not_depend_on_who_has_finished(model):
    """The same completions when no row ever leaves, cut at their first end token afterwards."""
    leaving = flat(run(model, eos_token_ids=ENDS))
    staying = flat(run(model, eos_token_ids=[]))
    for one, whole in zip(leaving, staying, strict=True):
        size = len(one.token_ids)
        assert one.token_ids == whole.token_ids[:size]
        assert one.logprobs == pytest.approx(whole.logprobs[:size], abs=1e-5)


def test_a_prompt_does_not_depend_on_its_neighbours(model):
    """Greedy alone and beside longer and shorter prompts: padding and positions are invisible."""
    together = run(model, temperature=0.0, group_size=1)
    for prompt, (one,) in zip(PROMPTS, together, strict=True):
        ((alone,),) = run(model, [prompt], temperature=0.0, group_size=1)
        assert one.token_ids == alone.token_ids
        assert one.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_padding_s_content_is_invisible(model):
    assert run(model, pad_token_id=0) == run(model, pad_token_id=33)


def test_same_seed_same_samples(model):
    assert run(model, seed=3) == run(model, seed=3)
    assert run(model, seed=3) != run(model, seed=4)
    torch.manual_seed(7)
    usual = run(model, generator=None)
    torch.manual_seed(7)
    assert run(model, generator=None) == usual


def test_group_members_differ_and_groups_keep_their_order(model):
    prompts = [[token] for token in range(12, 20)]
    groups = run(model, prompts, group_size=4)
    assert [len(group) for group in groups] == [4] * 8
    assert all(len({tuple(one.token_ids) for one in group}) > 1 for group in groups)
    for prompt, group in zip(prompts, groups, strict=True):
        logps = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).tolist()
        for one in group:
            assert one.logprobs[0] == pytest.approx(logps[one.token_ids[0]], abs=1e-4)


def fixed_model(probabilities):
    """A real model whose next token has the same distribution everywhere."""
    model = tiny_model(tie_word_embeddings=False, vocab_size=len(probabilities))
    model.lm_head = torch.nn.Linear(32, len(probabilities))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.tensor(probabilities).log()
    return model


def counts(model, **options):
    """Of 40 x 100 sampled tokens."""
    found = flat(run(model, [[2]], group_size=40, max_new_tokens=100, eos_token_ids=[], **options))
    tokens = torch.tensor([token for one in found for token in one.token_ids])
    return torch.bincount(tokens, minlength=model.lm_head.out_features)


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, [0.125, 0.5, 0.0, 0.125, 0.25]),
        (0.5, 1.0, [1 / 22, 16 / 22, 0.0, 1 / 22, 4 / 22]),
        (1.0, 0.7, [0.0, 2 / 3, 0.0, 0.0, 1 / 3]),
    ],
)
def test_sampling_follows_the_distribution(temperature, top_p, expected):
    model = fixed_model([0.125, 0.5, 0.0, 0.125, 0.25])
    found = counts(model, temperature=temperature, top_p=top_p)
    want = 4000 * torch.tensor(expected)
    assert not found[want == 0].any()
    chi_square = ((found - want)[want > 0] ** 2 / want[want > 0]).sum()
    assert chi_square < 16.3, "0.1 % of seeds go beyond at three degrees of freedom"


def test_chunks_of_rows_change_nothing(model, monkeypatch):
    usual = run(model, top_p=0.9)
    monkeypatch.setattr("grpo_fast.generate.ENTRIES_PER_CHUNK", 100)
    assert run(model, top_p=0.9) == usual


@pytest.mark.parametrize(
    "top_p, kept", [(0.01, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9, 4), (1.0, 4)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    probs = torch.tensor([0.125, 0.5, 0.125, 0.25]).expand(1001, -1)
    token = inverse_cdf(probs, torch.linspace(0, 1 - 2**-53, 1001, dtype=torch.float64), top_p)
    assert set(token.tolist()) == set([1, 3, 0, 2][:kept])


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_no_impossible_token_at_the_ends_of_the_interval(noise, top_p):
    probs = torch.tensor([[0.0, 0.4, 0.6, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.1, 0.8, 0.0]])
    token = inverse_cdf(probs, torch.full((3,), noise, dtype=torch.float64), top_p)
    assert (probs.gather(1, token[:, None]) > 0).all()


def test_the_tail_of_a_large_vocabulary_is_sampled():
    """Behind a sum of 1/2, float32 would lose every token below 3e-8."""
    tail = 2**16
    probs = torch.full((1, 1 + tail), 2**-26)
    probs[0, 0] = 1 - tail * 2**-26
    share = tail * 2**-26
    noise = torch.tensor([1 - share / 2], dtype=torch.float64)
    assert inverse_cdf(probs, noise).item() == pytest.approx(1 + tail / 2, abs=1)


@pytest.mark.parametrize("training", [True, False])
def test_half_precision_and_mode(training):
    half = tiny_model(attention_dropout=0.5).to(torch.bfloat16).train(training)
    groups = run(half)
    assert half.training == training
    assert groups == run(half), "no dropout while sampling"
    assert not half.model.embed_tokens.weight.is_inference()
    half(torch.tensor([PROMPTS[0]])).logits.sum().backward()


def test_the_mode_comes_back_after_an_error():
    model = tiny_model().train()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(GrpoFastError, match="logits are NaN at completion token 0"):
        run(model)
    assert model.training


def sliding_windows():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            sliding_window=3,
            initializer_range=0.3,
        )
    )


def learned_positions():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=None,
            eos_token_id=None,
            initializer_range=0.3,
        )
    )


@pytest.mark.parametrize("build", [sliding_windows, learned_positions])
def test_other_architectures(build):
    """Rotary positions are relative and forgive a shift by the padding; learned ones do not."""
    model = build().eval()
    for prompt, group in zip(PROMPTS, run(model, eos_token_ids=ENDS), strict=True):
        for one in group:
            logps = model(torch.tensor([prompt + one.token_ids])).logits[0].log_softmax(-1)
            want = logps[len(prompt) - 1 : -1].gather(1, torch.tensor(one.token_ids)[:, None])
            assert one.logprobs == pytest.approx(want[:, 0].tolist(), abs=1e-4)


def test_a_cache_that_cannot_drop_rows_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ConfigError, match="MambaForCausalLM returns no past.*DynamicCache"):
        run(mamba)


def test_a_static_cache_is_refused(model, monkeypatch):
    from transformers import StaticCache

    forward = model.forward

    def static(**kwargs):
        output = forward(**kwargs)
        output.past_key_values = StaticCache(config=model.config, max_cache_len=16)
        return output

    monkeypatch.setattr(model, "forward", static)
    with pytest.raises(ConfigError, match="returns a StaticCache in its past_key_values"):
        run(model)


BAD = {
    "empty-prompt": ({"prompts": [[1], []]}, InputError, r"prompt_ids\[1\] is empty"),
    "vocabulary": ({"prompts": [[50]]}, InputError, r"has token 50 .* outside \[0, 50\)"),
    "negative": ({"prompts": [[3, -1]]}, InputError, r"prompt_ids\[0\] has .* -1 outside"),
    "group": ({"group_size": 0}, ConfigError, "group_size = 0 is out of range"),
    "tokens": ({"max_new_tokens": 0}, ConfigError, "max_new_tokens = 0 is out of range"),
    "temperature": ({"temperature": -1.0}, ConfigError, "temperature = -1.0 is out of range"),
    "nan": ({"temperature": float("nan")}, ConfigError, "temperature = nan is out of range"),
    "top-p": ({"top_p": 0.0}, ConfigError, "top_p = 0.0 is out of range"),
}


@pytest.mark.parametrize("options, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(model, options, error, message):
    with pytest.raises(error, match=message) as caught:
        run(model, **options)
    assert "\n" not in str(caught.value)


def test_no_prompts(model):
    assert run(model, []) == []
