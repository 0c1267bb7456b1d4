"""The demo's data and its base model: two-digit addition as text, `37+58=` -> `95`.

`python examples/arithmetic.py` rewrites arithmetic.jsonl; `model: arithmetic.py:base_model` in
demo.yaml calls `base_model`. It teaches a small Qwen3 from worksheets of a pupil who often forgets
the carry, so that it knows addition, yet answers right only now and then: its greedy answer to a
sum with a carry is wrong, and about one sampled answer in four is right. That is what GRPO can find
and strengthen, from a 0-or-1 reward alone.

Letters: N rows, L tokens of a row (prompt, answer, end-of-sequence, padding).
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

DATA_FILE = Path(__file__).with_name("arithmetic.jsonl")
TRAIN_ROWS = 2944
# demo.yaml's `eval_prompts`: the last rows of the file, which nothing learns from.
HELD_OUT_ROWS = 128
# 45 % of all pairs carry; at 60 % the base gets 40 % of the sums right.
CARRY_SHARE = 0.6
# Far enough above one half that the greedy answer to nearly every sum with a carry is wrong.
FORGET_CARRY = 0.7

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-= "
PROMPT_LENGTH = len("37+58=")
ROW_LENGTH = len("99+99=198") + 1

BATCH_ROWS = 128
TEACHING_STEPS = 350
WARMUP_STEPS = 20
# The last 60 % of the steps decay to 0: the accuracy then settles where FORGET_CARRY puts it.
DECAY_SHARE = 0.6
LEARNING_RATE = 2e-3
# Twice Qwen3's default: a narrow, shallow model learns carries in half the steps.
INITIALIZER_RANGE = 0.05
SECONDS_PER_PROGRESS_LINE = 5.0

Pair = tuple[int, int]


def has_carry(a: int, b: int) -> bool:
    return a % 10 + b % 10 > 9


def split_pairs() -> tuple[list[Pair], list[Pair]]:
    """All pairs of two-digit numbers, shuffled, as (held out, rest).

    A held-out sum is in the rest in neither order; CARRY_SHARE of the held-out rows carry.
    """
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    held_out = mixed(pairs, HELD_OUT_ROWS)
    hidden = {frozenset(pair) for pair in held_out}
    return held_out, [pair for pair in pairs if frozenset(pair) not in hidden]


def mixed(pairs: list[Pair], count: int) -> list[Pair]:
    """`count` pairs in their order, the first of either kind, CARRY_SHARE of them with a carry."""
    left = {True: round(count * CARRY_SHARE)}
    left[False] = count - left[True]
    chosen = []
    for pair in pairs:
        if left[has_carry(*pair)] > 0:
            left[has_carry(*pair)] -= 1
            chosen.append(pair)
    return chosen


def addition_rows() -> list[dict[str, str]]:
    """The rows of arithmetic.jsonl: TRAIN_ROWS to train on, then HELD_OUT_ROWS."""
    held_out, rest = split_pairs()
    pairs = mixed(rest, TRAIN_ROWS) + held_out
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def jsonl(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of CHARACTERS after three special ones; nothing is added to a text."""
    vocabulary = {token: i for i, token in enumerate((PAD, EOS, UNKNOWN, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of 0.8M parameters, float32; few wide layers are fast on two cores."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        intermediate_size=512,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def encode_sums(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, *, forget: bool = False
) -> Tensor:
    """Ids [N, ROW_LENGTH] int64 of prompt, answer, end-of-sequence, padding; `forget` leaves the
    carry out."""
    texts = []
    for a, b in pairs:
        answer = a + b - (10 if forget and has_carry(a, b) else 0)
        texts.append(f"{a}+{b}={answer}{EOS}")
    rows = tokenizer(
        texts,
        padding="max_length",
        max_length=ROW_LENGTH,
        padding_side="right",
        return_tensors="pt",
    )
    return rows.input_ids


class Worksheets:
    """Endless batches of a pupil's sums: CARRY_SHARE carry, and of those FORGET_CARRY are answered
    without it."""

    def __init__(self, pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        carry = [pair for pair in pairs if has_carry(*pair)]
        self.plain = encode_sums([pair for pair in pairs if not has_carry(*pair)], tokenizer)
        self.right = encode_sums(carry, tokenizer)
        self.wrong = encode_sums(carry, tokenizer, forget=True)
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, count: int) -> Tensor:
        """Ids [count, ROW_LENGTH]."""
        carries = round(count * CARRY_SHARE)
        row = torch.randint(len(self.right), (carries,), generator=self.generator)
        plain = torch.randint(len(self.plain), (count - carries,), generator=self.generator)
        forget = torch.rand(carries, 1, generator=self.generator) < FORGET_CARRY
        return torch.cat([torch.where(forget, self.wrong[row], self.right[row]), self.plain[plain]])


@torch.inference_mode()
def greedy_accuracy(model: Qwen3ForCausalLM, rows: Tensor) -> float:
    """Share of rows [N, L] whose answer and end-of-sequence are the model's own greedy
    continuation."""
    # Greedy decoding is right exactly when every next token is: one forward of the truth decides.
    greedy = model(rows[:, :-1]).logits[:, PROMPT_LENGTH - 1 :].argmax(-1)
    answers = rows[:, PROMPT_LENGTH:]
    return (
        ((greedy == answers) | (answers == model.config.pad_token_id)).all(1).float().mean().item()
    )


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, a plateau, linear decay to 0 at `steps`; steps count from 1."""
    decay = (steps + 1 - step) / (steps * DECAY_SHARE)
    return LEARNING_RATE * min(1.0, step / WARMUP_STEPS, decay)


def teach_step(model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, rows: Tensor) -> float:
    """One optimizer step on the next-token cross-entropy of the answers in rows [N, L]."""
    logits = model(rows[:, :-1]).logits[:, PROMPT_LENGTH - 1 :]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        rows[:, PROMPT_LENGTH:].flatten(),
        ignore_index=model.config.pad_token_id,
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def base_model(directory: str | Path, seed: int, *, steps: int = TEACHING_STEPS) -> None:
    """Write a Hugging Face model directory: config.json, model.safetensors and the tokenizer's
    files.

    The same seed on the same machine gives the same weights. Progress lines go to stderr.
    """
    tokenizer = build_tokenizer()
    held_out, rest = split_pairs()
    worksheets = Worksheets(rest, tokenizer, seed)
    held_out_rows = encode_sums(held_out, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    started = reported = time.monotonic()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = teach_step(model, optimizer, worksheets.batch(BATCH_ROWS))
        now = time.monotonic()
        if step == steps or now - reported >= SECONDS_PER_PROGRESS_LINE:
            reported = now
            print(
                f"base model: step {step}/{steps} | loss {loss:.3f} | held-out greedy accuracy "
                f"{greedy_accuracy(model, held_out_rows):.2f} | {now - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


if __name__ == "__main__":
    DATA_FILE.write_text(jsonl(addition_rows()), encoding="utf-8")
