"""Loading, the trunk and the head; a model that does more than that is refused, not
approximated."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_fast import ConfigError
from grpo_fast.model import (
    check_head,
    evaluating,
    head,
    hidden_states,
    load_model,
    load_tokenizer,
    pick_device,
    resolve_model,
)
from grpo_fast.tiny import save_tiny, tiny_model

CPU = torch.device("cpu")
PROJECTION = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


def load(folder, dtype=torch.float32):
    return load_model(folder, dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_and_head_are_the_whole_model(tmp_path, dtype, tied):
    save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    model = load(tmp_path / "model", dtype)
    check_head(model)
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    layer = head(model)
    weight, bias = layer.weight, layer.bias
    logits = torch.nn.functional.linear(hidden_states(model, ids), weight, bias)
    assert weight.dtype == dtype
    assert (weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(logits, model(ids).logits)


def test_hidden_states_carry_gradients_and_no_cache(folder):
    model = load(folder)
    hidden_states(model, torch.tensor([[5, 6]])).square().mean().backward()
    assert model.model.embed_tokens.weight.grad.any()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


SMALL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def learned_positions():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, bos_token_id=None)
    ).eval()


@pytest.mark.parametrize("build", [tiny_model, learned_positions])
def test_padding_on_either_side_changes_no_state(build):
    model = build()
    alone = hidden_states(model, torch.tensor([[5, 6, 7]]))
    right = hidden_states(model, torch.tensor([[5, 6, 7, 0, 0], [1, 2, 3, 4, 5]]))
    assert torch.allclose(right[0, :3], alone[0], atol=1e-6)
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    left = hidden_states(model, ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    assert torch.allclose(left[0, 2:], alone[0], atol=1e-6)


def test_a_mask_needs_no_positions_where_they_are_relative():
    model = tiny_model()
    left = hidden_states(model, torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]]))
    alone = hidden_states(model, torch.tensor([[5, 6]]))
    assert torch.allclose(left[0, 2:], alone[0], atol=1e-6)


def test_scale_and_softcap_of_the_logits_are_read_from_the_config():
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
    )

    models = {
        (1.0, 30.0): Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8)),
        (0.125, None): GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)),
        (0.0625, None): CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625)),
    }
    for expected, model in models.items():
        found = head(model)
        assert (found.logit_scale, found.softcap) == expected
        check_head(model)
    scaled = models[0.0625, None]
    scaled.logit_scale = 0.5
    with pytest.raises(ConfigError, match="scaled and softcapped as its config says"):
        check_head(scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_transformation_of_the_logits_is_found(dtype):
    model = tiny_model().to(dtype)
    check_head(model)
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 1.05 * forward(x)
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM are not hidden @ weight.T"):
        check_head(model)


def test_a_bias_of_the_head_is_known():
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(32, 50)
    check_head(model)
    assert head(model).bias.shape == (50,)


def test_weights_that_give_nan_are_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(ConfigError, match="NaN or inf on four tokens"):
        check_head(model)


def test_no_head():
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(**SMALL, head_dim=8)
    with pytest.raises(ConfigError, match="Qwen3Model has no output head"):
        head(Qwen3Model(config))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shard_missing(folder):
    (folder / "model.safetensors").unlink()
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / names["a"]).write_bytes(b"")
    index = json.dumps({"weight_map": names})
    (folder / "model.safetensors.index.json").write_text(index)


def index_damaged(folder):
    (folder / "model.safetensors.index.json").write_text("{")


DAMAGE = {
    "config": (lambda f: (f / "config.json").unlink(), "has no config.json: download one with"),
    "config-json": (lambda f: (f / "config.json").write_text("{"), "could not be loaded: OSError"),
    "weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "has no model.safetensors: save the model",
    ),
    "pickle": (pickled_only, r"no model.safetensors \(pytorch_model.bin is never read"),
    "shard": (shard_missing, "lacks model-00002-of-00002.safetensors"),
    "index": (index_damaged, "index.json is damaged"),
    "cut": (cut_weights, "weights in .* are damaged or cut short"),
    "tensor": (
        lambda f: edit_weights(f, lambda tensors: tensors.pop(PROJECTION)),
        f"lack 1 tensors of Qwen3ForCausalLM, first '{PROJECTION}'",
    ),
    "shape": (
        lambda f: edit_weights(f, lambda t: t.update({PROJECTION: torch.zeros(8, 32)})),
        rf"'{PROJECTION}' in .* has shape \[8, 32\], .* expects \[32, 32\]",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_no_folder(tmp_path):
    (tmp_path / "model-a").mkdir()
    with pytest.raises(ConfigError, match="model-b does not exist: did you mean 'model-a'.*hf "):
        load(tmp_path / "model-b")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file"):
        load(tmp_path / "file")
    with pytest.raises(ConfigError, match="model folder org/name does not exist"):
        resolve_model("org/name", directory=tmp_path / "base", seed=0)


def test_a_missing_or_damaged_tokenizer_is_named(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="could not be loaded: KeyError"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    for action in (load_tokenizer, lambda f: resolve_model(str(f), directory=tmp_path, seed=0)):
        with pytest.raises(ConfigError, match=r"has no tokenizer\.json: save the tokenizer"):
            action(folder)


def test_loading_is_silent_and_leaves_the_logging_as_it_was(folder, capfd, request):
    from transformers.utils import logging

    usual = logging.get_verbosity()
    request.addfinalizer(lambda: logging.set_verbosity(usual))
    logging.set_verbosity_warning()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    assert before[1]
    capfd.readouterr()
    load(folder)
    load_tokenizer(folder)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


MAKER = """
from grpo_fast.tiny import save_tiny

def build(directory, seed):
    assert not list(directory.iterdir())
    (directory / "half").write_text("")
    with open(CALLS, "a") as file:
        file.write("x")
    if seed == 1:
        raise KeyboardInterrupt
    if seed == 2:
        raise ValueError("no data")
    if seed != 3:
        save_tiny(directory)
"""


@pytest.fixture
def maker(tmp_path):
    calls = tmp_path / "calls"
    (tmp_path / "make.py").write_text(f"CALLS = {str(calls)!r}\n{MAKER}")
    return f"{tmp_path}/make.py:build", tmp_path / "run" / "base_model", calls


def test_a_model_is_made_once(maker):
    spec, directory, calls = maker
    for _ in range(2):
        assert resolve_model(spec, directory=directory, seed=0) == directory
    assert calls.read_text() == "x"
    assert list(directory.parent.iterdir()) == [directory], "nothing is left beside it"
    check_head(load(directory))
    assert load_tokenizer(directory)("ab")["input_ids"] == [3, 4]
    with pytest.raises(ConfigError, match="was made by .*build with seed 0, .*build with seed 9: "):
        resolve_model(spec, directory=directory, seed=9)


def test_a_function_is_the_same_by_any_path(maker, monkeypatch):
    spec, directory, calls = maker
    monkeypatch.chdir(directory.parent.parent)
    for name in ("make.py:build", spec, "./make.py:build"):
        resolve_model(name, directory=directory, seed=0)
    assert calls.read_text() == "x"


def test_what_was_not_finished_is_never_used(maker):
    spec, directory, calls = maker
    with pytest.raises(KeyboardInterrupt):
        resolve_model(spec, directory=directory, seed=1)
    assert not directory.exists()
    with pytest.raises(ConfigError, match=r"raised ValueError: no data \(make.py:\d+\)"):
        resolve_model(spec, directory=directory, seed=2)
    with pytest.raises(ConfigError, match=r"make.py:build' wrote no config.json"):
        resolve_model(spec, directory=directory, seed=3)
    assert not directory.exists()
    resolve_model(spec, directory=directory, seed=0)
    assert calls.read_text() == "xxxx"


def test_a_folder_is_itself(folder, tmp_path):
    assert resolve_model(str(folder), directory=tmp_path / "base", seed=0) == folder


def test_every_module_gets_its_own_mode_back():
    model = tiny_model().train()
    model.model.layers[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training


def test_devices(monkeypatch):
    assert pick_device("cpu") == CPU
    for gpus, auto in ((0, "cpu"), (2, "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus > 0)
        assert pick_device("auto").type == auto
        assert pick_device("cpu") == CPU
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="device = 'cuda:2': .* sees 2 GPUs"):
        pick_device("cuda:2")
    for name in ("gpu", "cuda:x", "mps", ""):
        with pytest.raises(ConfigError, match=f"device = '{name}' is not available: choose auto"):
            pick_device(name)
