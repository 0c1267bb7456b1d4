"""JSONL to prompts: every bad line by number, order and shuffling a function of the seed."""

import json
import subprocess
import sys

import pytest

from grpo_fast import ConfigError, InputError
from grpo_fast.prompts import Prompt, fingerprint, hold_out, load_prompts, step_prompts
from grpo_fast.tiny import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }}={{ m.content }}.{% endfor %}{% if add_generation_prompt %}a={% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def write(folder, text, encoding="utf-8"):
    path = folder / "data.jsonl"
    path.write_bytes(text.encode(encoding))
    return path


def load(path, tokenizer, max_length=100):
    return load_prompts(path, tokenizer, max_length=max_length)


def chat(*messages):
    rows = [{"role": role, "content": content} for role, content in messages]
    return json.dumps({"prompt": rows}) + "\n"


def test_columns_travel_with_the_prompt_and_missing_ones_are_none(tmp_path, tokenizer):
    path = write(tmp_path, '{"prompt": "ab", "answer": 3}\n\n{"level": [1], "prompt": "c"}\n')
    first, second = load(path, tokenizer)
    assert (first.row, first.text, first.columns) == (1, "ab", {"answer": 3, "level": None})
    assert (second.row, second.columns) == (3, {"answer": None, "level": [1]})
    assert first.token_ids == (3, 4)
    assert first.messages is None


@pytest.mark.parametrize(
    "text",
    [
        '\ufeff{"prompt": "a"}\r\n{"prompt": "b"}\r\n',
        '{"prompt": "a"}\n{"prompt": "b"}',
        '{"prompt": "a"}\n{"prompt": "b"}\n\n \n',
    ],
    ids=["windows", "no-last-newline", "blank-tail"],
)
def test_files_of_every_editor(tmp_path, tokenizer, text):
    assert [prompt.text for prompt in load(write(tmp_path, text), tokenizer)] == ["a", "b"]


def test_separators_inside_a_string_do_not_split_the_line(tmp_path, tokenizer):
    path = write(tmp_path, json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    (prompt,) = load(path, tokenizer)
    assert len(prompt.token_ids) == 5


def test_chat_messages_go_through_the_template(tmp_path, chat_tokenizer):
    path = write(tmp_path, chat(("system", "be"), ("user", "hi")))
    (prompt,) = load(path, chat_tokenizer)
    assert prompt.text == "system=be.user=hi.a="
    assert prompt.messages[1] == {"role": "user", "content": "hi"}
    assert chat_tokenizer.decode(prompt.token_ids) == prompt.text


def test_a_last_assistant_message_is_continued(tmp_path, chat_tokenizer):
    path = write(tmp_path, chat(("user", "hi"), ("assistant", "so")))
    assert load(path, chat_tokenizer)[0].text == "user=hi.assistant=so"


def test_special_tokens_are_added_to_text_and_not_to_a_template(tmp_path):
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 2)]
    )
    assert load(write(tmp_path, '{"prompt": "a"}\n'), tokenizer)[0].token_ids == (2, 3)
    (prompt,) = load(write(tmp_path, chat(("user", "a"))), tokenizer)
    assert prompt.token_ids[0] != 2


LINE = '{"prompt": "a"}\n'
BAD = {
    "json": (LINE + '{"prompt": \n', r"data.jsonl:2: not valid JSON \(.*column 11\)"),
    "array": ('["prompt"]\n', r'data.jsonl:1: found \["prompt"\], expected one object a line'),
    "nested": ("[" * 100_000 + "\n", r"data.jsonl:1: cannot be used \(.*recursion"),
    "half-a-character": ('{"prompt": "\\ud800"}\n', "data.jsonl:1: cannot be used .*surrogates"),
    "column": (
        '{"question": "a", "answer": 1}\n',
        "data.jsonl:1: no 'prompt' column, found columns question, answer; expected .*: "
        "rename 'question' to 'prompt'",
    ),
    "column-later": (LINE + "{}\n", r"data.jsonl:2: no 'prompt' column, found columns \(none\)"),
    "reserved": ('{"prompt": "a", "completions": 1}\n', "may not be called 'completions'"),
    "empty-file": ("", "data.jsonl has no rows: expected one object a line"),
    "blank-file": ("\n \n", "data.jsonl has no rows"),
    "none": (LINE + '{"prompt": null}\n', "data.jsonl:2: prompt is null, expected text or a list"),
    "empty-prompt": (LINE + '{"prompt": " "}\n', "data.jsonl:2: prompt is empty"),
    "long": (
        LINE + '{"prompt": "abcdef"}\n{"prompt": "abcdefg"}\n',
        "data.jsonl:2: prompt has 6 tokens, max_prompt_length = 5; 2 of 3 prompts are longer, "
        "the longest has 7",
    ),
    "mixed": (
        LINE + chat(("user", "a")),
        "data.jsonl:2: prompt is chat mess.*the first .*text",
    ),
    "no-template": (
        chat(("user", "a")),
        "data.jsonl:1: .* no chat template: write prompts",
    ),
}
BAD_CHAT = {
    "no-messages": ('{"prompt": []}\n', "data.jsonl:1: prompt is an empty list"),
    "no-role": ('{"prompt": [{"content": "a"}]}\n', r"prompt\[0\]\['role'\] is missing, expected"),
    "parts": ('{"prompt": [{"role": "user", "content": [1]}]}\n', r"\['content'\] is \[1\]"),
    "text-inside": ('{"prompt": ["a"]}\n', r'data.jsonl:1: prompt\[0\] is "a", expected chat'),
    "template": (chat(("tool", "a")), r"refuses these messages \(roles tool\): no tools"),
    "mixed": (chat(("user", "a")) + LINE, "data.jsonl:2: prompt is text, the first row's is chat"),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_named(tmp_path, tokenizer, text, message):
    with pytest.raises(InputError, match=message) as caught:
        load(write(tmp_path, text), tokenizer, max_length=5)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text, message", BAD_CHAT.values(), ids=BAD_CHAT.keys())
def test_a_bad_message_is_named(tmp_path, chat_tokenizer, text, message):
    with pytest.raises(InputError, match=message) as caught:
        load(write(tmp_path, text), chat_tokenizer)
    assert "\n" not in str(caught.value)


def test_not_utf_8(tmp_path, tokenizer):
    with pytest.raises(InputError, match="data.jsonl:1: byte 13 is not UTF-8"):
        load(write(tmp_path, '{"prompt": "\u00e9"}', "latin-1"), tokenizer)


def test_missing_file_and_folder(tmp_path, tokenizer):
    write(tmp_path, LINE)
    with pytest.raises(InputError, match="date.jsonl does not exist: did you mean 'data.jsonl'"):
        load(tmp_path / "date.jsonl", tokenizer)
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path, tokenizer)


PROMPTS = [Prompt(row, "x", (3,), {}) for row in range(1, 11)]


def test_the_last_rows_are_held_out():
    train, held_out = hold_out(PROMPTS, 3)
    assert [prompt.row for prompt in held_out] == [8, 9, 10]
    assert [prompt.row for prompt in train] == list(range(1, 8))
    with pytest.raises(ConfigError, match="eval_prompts = 10 leaves nothing to train on of 10"):
        hold_out(PROMPTS, 10)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_every_epoch_has_every_prompt_once_in_its_own_order(count):
    rows = [
        prompt.row
        for step in range(1, 61)
        for prompt in step_prompts(PROMPTS, seed=1, step=step, count=count)
    ]
    epochs = [tuple(rows[k : k + 10]) for k in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(1, 11)) for epoch in epochs)
    assert len(set(epochs)) == 6


def test_a_step_s_prompts_follow_from_seed_and_step_alone():
    """Pinned: another shuffle would make a resumed run another run."""
    found = [p.row for p in step_prompts(PROMPTS, seed=1, step=7, count=3)]
    step_prompts(PROMPTS, seed=5, step=1, count=4)
    assert [p.row for p in step_prompts(PROMPTS, seed=1, step=7, count=3)] == found
    assert [p.row for p in step_prompts(PROMPTS, seed=2, step=7, count=3)] != found
    assert found == [2, 8, 10]


def test_fingerprint_is_of_the_content(tmp_path):
    first = fingerprint(write(tmp_path, "a"))
    assert fingerprint(write(tmp_path, "b")) != first
    assert fingerprint(write(tmp_path, "a")) == first


def test_importing_does_not_load_transformers():
    code = (
        "import sys, grpo_fast.prompts, grpo_fast.rewards, grpo_fast.plugins, grpo_fast.tiny, "
        "grpo_fast.model, grpo_fast.generate; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
