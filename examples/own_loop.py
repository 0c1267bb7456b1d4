"""GRPO in a loop of your own, in plain PyTorch and transformers: `python examples/own_loop.py`.

A tiny random model learns to answer with even token ids, in seconds on a CPU.
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from grpo_fast import LossConfig, group_advantages, linear_grpo_loss

PROMPTS, GROUP, LENGTH, VOCABULARY = 4, 16, 8, 64

torch.manual_seed(0)
model = Qwen3ForCausalLM(
    Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
).eval()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
config = LossConfig(loss_type="dapo", epsilon_high=0.28)

for step in range(20):
    prompts = torch.randint(1, VOCABULARY, (PROMPTS, 4)).repeat_interleave(GROUP, dim=0)
    tokens = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=LENGTH
    )
    answers = tokens[:, 4:]
    rewards = (answers % 2 == 0).float().mean(-1)
    advantages = group_advantages(rewards, group_size=GROUP).advantages

    # Row t of the hidden states predicts token t + 1: those before each answer's tokens.
    hidden = model.get_decoder()(tokens).last_hidden_state[:, 3:-1]
    output = linear_grpo_loss(hidden, model.lm_head.weight, answers, advantages, config=config)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step:2d}  reward {rewards.mean():.3f}  entropy {output.metrics['entropy']:.3f}")
