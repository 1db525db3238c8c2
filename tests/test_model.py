import copy
import itertools
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import tokens
from model import GPT, IGNORE, GPTConfig, Growing, KVCache, Linear, attend, context_start, figures, find_checkpoint, pick_device, score

SMALL = {"block_size": 32, "vocab_size": 67, "n_layer": 2, "n_head": 4, "n_embd": 32}
GPT2 = {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True, "qk_norm": False, "tie_embeddings": True}
GROUPED = {"n_kv_head": 2}
WHY = "the stock models of transformers are the reference here"


def randomize(model, seed=0, std=0.3):
    """Every weight far from its initial value, norms and biases too: what is mixed up or left out then shows."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = p.dim() == 1 and name.endswith("weight")
            p.copy_(torch.rand(p.shape, generator=chance) + 0.2 if gain else torch.randn(p.shape, generator=chance) * std)
    return model.eval()


def make(seed=0, std=0.3, **settings):
    return randomize(GPT(GPTConfig(**SMALL | settings)), seed, std)


def ids(*shape, vocab_size=67, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def edit(path, **changes):
    """Change a JSON file's entries; None takes one away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def closest(a, b):
    return (a - b).abs().max().item()


# ---- transformers computes the same ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_embeddings": True},
        GROUPED,
        {"n_kv_head": 1, "head_dim": 12, "rope_theta": 300.0},
        {"norm_eps": 0.1, "intermediate_size": 40},
        GPT2,
        GPT2 | {"norm_eps": 0.1, "intermediate_size": 40},
    ],
)
def test_transformers_computes_what_a_saved_model_does(settings, tmp_path):
    transformers = pytest.importorskip("transformers", reason=WHY)
    model = make(**settings)
    model.save_pretrained(tmp_path, eos_token_id=66)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == {"qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}[model.config.architecture()]
    assert not any(info.values()), info  # no weight missing, left over or of another shape
    assert theirs.config.eos_token_id == 66 and theirs.config.max_position_embeddings == 32
    x = ids(3, 32)
    with torch.no_grad():
        assert closest(model(x), theirs(x).logits) < 1e-4
    theirs.generation_config.eos_token_id = None  # go on to the end
    prompt = ids(1, 5, seed=2)
    expected = theirs.generate(prompt, max_new_tokens=27, do_sample=False, attention_mask=torch.ones_like(prompt), pad_token_id=0)
    assert [i.item() for i in model.generate(prompt.tolist(), 27)] == expected[0, 5:].tolist()


def qwen3(**settings):
    transformers = pytest.importorskip("transformers", reason=WHY)
    sizes = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    return randomize(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes | heads | settings)))


def gpt2(**settings):
    transformers = pytest.importorskip("transformers", reason=WHY)
    sizes = {"vocab_size": 67, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}
    return randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | settings)))


def assert_same(theirs, folder):
    ours, x = GPT.from_pretrained(str(folder)).eval(), ids(2, 40)
    with torch.no_grad():
        assert closest(ours(x), theirs(x).logits) < 1e-4
    assert all(p.requires_grad and p.dtype == torch.float32 for p in ours.parameters())
    return ours


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "head_dim": 20},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 200.0}},
        {"rms_norm_eps": 0.1},
    ],
)
def test_a_qwen3_of_transformers_loads(settings, tmp_path):
    theirs = qwen3(**settings)
    theirs.save_pretrained(tmp_path)
    ours = assert_same(theirs, tmp_path)
    assert ours.config.architecture() == "qwen3"
    assert (ours.lm_head.weight is ours.model["embed_tokens"].weight) == theirs.config.tie_word_embeddings


def test_rope_theta_is_read_from_both_places(tmp_path):
    theirs = qwen3(rope_parameters={"rope_type": "default", "rope_theta": 200.0})
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    edit(file, rope_parameters={"rope_type": "default", "rope_theta": 200.0}, rope_theta=None)
    assert_same(theirs, tmp_path)
    edit(file, rope_parameters=None, rope_theta=200)  # as transformers 4 wrote it
    assert_same(theirs, tmp_path)
    edit(file, rope_theta=10000.0)
    with pytest.raises(AssertionError):
        assert_same(theirs, tmp_path)


@pytest.mark.parametrize("settings", [{}, {"n_inner": 50, "layer_norm_epsilon": 0.1, "activation_function": "gelu_pytorch_tanh"}])
def test_a_gpt2_of_transformers_loads(settings, tmp_path):
    theirs = gpt2(**settings)
    theirs.save_pretrained(tmp_path)
    assert assert_same(theirs, tmp_path).config.architecture() == "gpt2"


def test_openais_gpt2_file_loads(tmp_path):
    """It has no prefix, and the causal mask among the weights; its config.json says less."""
    theirs = gpt2()
    state = {name.removeprefix("transformer."): p.clone() for name, p in theirs.state_dict().items() if name != "lm_head.weight"}
    for layer in range(3):
        state[f"h.{layer}.attn.bias"] = torch.ones(40, 40).tril()[None, None]
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / "model.safetensors")
    config = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1, "model_type": "gpt2"}
    config |= {"layer_norm_epsilon": 1e-05, "n_ctx": 40, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 40, "resid_pdrop": 0.1, "vocab_size": 67}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(theirs, tmp_path)


def test_weights_in_several_files_and_in_bfloat16_load(tmp_path):
    model = qwen3().bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and load_file(files[0]).popitem()[1].dtype == torch.bfloat16
    assert_same(type(model).from_pretrained(tmp_path, dtype=torch.float32), tmp_path)
    files[1].unlink()
    with pytest.raises(ValueError, match="do not fit"):
        GPT.from_pretrained(str(tmp_path))


# ---- Every combination of switches ----

SWITCHES = {"norm": ("rms", "layer"), "positions": ("rotary", "learned"), "mlp": ("swiglu", "gelu")}
SWITCHES |= {"qk_norm": (True, False), "bias": (False, True), "tie_embeddings": (False, True)}
COMBINATIONS = [dict(zip(SWITCHES, values)) for values in itertools.product(*SWITCHES.values())]
TINY = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8, "n_kv_head": 2, "intermediate_size": 12}


def test_every_combination_learns_and_comes_back_as_it_was(tmp_path):
    kinds, x = [], ids(4, 9, vocab_size=11)
    for number, switches in enumerate(COMBINATIONS):
        model = GPT(GPTConfig(**TINY, **switches))
        optimizer, losses = torch.optim.AdamW(model.parameters(), 0.01), []
        for _ in range(3):
            loss = model(x[:, :-1], x[:, 1:])
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), switches
            optimizer.step()
        assert losses == sorted(losses, reverse=True), switches
        randomize(model, number)
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        again = GPT.from_pretrained(str(folder)).eval()
        with torch.no_grad():
            assert again.config == model.config and torch.equal(again(x[:, :-1]), model(x[:, :-1])), switches
        kinds.append(json.loads((folder / "config.json").read_text())["model_type"])
    stock = {tuple(switches.values()): kind for switches, kind in zip(COMBINATIONS, kinds) if kind != "daygpt"}
    assert stock == {
        ("rms", "rotary", "swiglu", True, False, False): "qwen3",
        ("rms", "rotary", "swiglu", True, False, True): "qwen3",
        ("layer", "learned", "gelu", False, True, True): "gpt2",
    }


def test_gpt2_knows_neither_grouped_queries_nor_another_head_dim():
    assert GPTConfig(**SMALL | GPT2).architecture() == "gpt2"
    assert GPTConfig(**SMALL | GPT2 | GROUPED).architecture() == "daygpt"
    assert GPTConfig(**SMALL | GPT2 | {"head_dim": 4}).architecture() == "daygpt"


@pytest.mark.parametrize("switch", [{"norm": "layer"}, {"positions": "learned"}, {"mlp": "gelu"}, {"qk_norm": False}, {"bias": True}, GPT2 | GROUPED])
def test_transformers_refuses_what_it_would_compute_otherwise(switch, tmp_path):
    transformers = pytest.importorskip("transformers", reason=WHY)
    make(**switch).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="daygpt"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_dropout_acts_in_training_only():
    model, x = make(dropout=0.3), ids(2, 16)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_no_logit_depends_on_what_follows():
    x, y = ids(1, 32), ids(1, 32)
    y[0, 20:] = 3
    for settings in ({}, GPT2 | GROUPED):
        model = make(**settings)
        assert closest(model(x)[:, :20], model(y)[:, :20]) < 1e-4 < closest(model(x)[:, 20:], model(y)[:, 20:])


def test_initial_weights_are_gpt2s():
    model = GPT(GPTConfig(**SMALL | GPT2 | {"n_layer": 8, "n_embd": 64}))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (1 if "norm" in name and "weight" in name else 0)).all(), name
        else:
            assert p.std().item() == pytest.approx(0.005 if "o_proj" in name or "down_proj" in name else 0.02, rel=0.1), name


# ---- What cannot be ----


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n_embd": 30}, "n_embd=30 is not divisible by n_head=4"),
        ({"n_embd": 36}, "head_dim=9 is odd"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"n_kv_head": 3}, "n_head=4 is not divisible by n_kv_head=3"),
        ({"n_kv_head": 8}, "n_kv_head=8"),
        ({"n_kv_head": 0}, "n_kv_head must be a whole number of at least 1"),
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1"),
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"norm": "batch"}, "norm must be one of rms, layer, not 'batch'"),
        ({"positions": "alibi"}, "positions must be one of"),
        ({"mlp": "relu"}, "mlp must be one of"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**SMALL | settings)


def test_learned_positions_may_have_an_odd_head_dim():
    assert make(positions="learned", head_dim=7)(ids(1, 4)).shape == (1, 4, 67)


def refused(folder, words):
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(str(folder))


@pytest.mark.parametrize("left", [0, 5, 100, 0.5, -1])
def test_cut_off_weights_are_refused(left, tmp_path):
    make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * left) if left == 0.5 else left])
    refused(tmp_path, str(tmp_path))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    state = load_file(file)
    edit(config, vocab_size=68)
    refused(tmp_path, r"do not fit its config.json, first lm_head.weight \(6[78], 32\)")
    edit(config, vocab_size=67, num_hidden_layers=1)
    refused(tmp_path, r"do not fit.*layers\.1\.")
    edit(config, num_hidden_layers=2, tie_word_embeddings=True)
    save_file({name: p for name, p in state.items() if name != "model.embed_tokens.weight"}, file)
    refused(tmp_path, "do not fit.*embed_tokens|lm_head")
    file.unlink()
    refused(tmp_path, "do not fit")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "n_embd must be a whole number of at least 1"),
        ({"num_hidden_layers": "two"}, "two|num_hidden_layers|n_layer"),
    ],
)
def test_architectures_that_are_not_computed_are_refused(changes, words, tmp_path):
    make().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **changes)
    refused(tmp_path, words)


@pytest.mark.parametrize("changes", [{"scale_attn_by_inverse_layer_idx": True}, {"activation_function": "relu"}, {"tie_word_embeddings": False}])
def test_other_gpt2s_are_refused(changes, tmp_path):
    make(**GPT2).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **changes)
    refused(tmp_path, *changes)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", '"gpt2"'])
def test_a_config_json_that_is_none_is_refused(content, tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, "damaged|no model|model_type")


def test_a_folder_without_a_model_is_refused(tmp_path):
    refused(tmp_path / "nowhere" / "at" / "all", "there is no model at")
    refused("out/no-such-run", "there is no model at")
    refused(tmp_path, "holds no model")


def test_a_run_means_its_best_checkpoint_or_its_newest(tmp_path):
    for step in (5, 10, 999_999, 1_000_000):
        make(step).save_pretrained(tmp_path / f"step-{step:06d}")
    (tmp_path / "step-000010.old").mkdir()
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "step-1000000")
    newest = tmp_path / "step-1000000" / "trainer.json"
    newest.write_text(json.dumps({"best": {"step": 10, "val_loss": 1.0}}))
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "step-000010")
    newest.write_text(json.dumps({"best": {"step": 7}}))  # which is gone
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "step-1000000")
    assert find_checkpoint(str(tmp_path / "step-000005")) == str(tmp_path / "step-000005")


# ---- Losses and arithmetic ----


def by_torch(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction="sum")


def loss_and_gradients(model, loss):
    model.zero_grad()
    (loss * 0.37).backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


LARGE = {"vocab_size": 50304, "n_embd": 8, "n_layer": 1}  # its logits are made in pieces of 166 rows


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True}, GPT2, LARGE, LARGE | {"tie_embeddings": True}])
def test_the_loss_and_its_gradients_are_cross_entropys(settings):
    model, x = make(std=0.1, **settings), ids(10, 28, vocab_size=67)
    y = x.roll(-1, 1)
    y[0, 20:], y[7], y[9, -1] = IGNORE, IGNORE, IGNORE
    ours, our_gradients = loss_and_gradients(model, model(x, y))
    exact = copy.deepcopy(model).double()
    theirs, their_gradients = loss_and_gradients(exact, by_torch(exact, x, y))
    assert ours.shape == () and ours.dtype == torch.float32 and ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for (name, _), a, b in zip(model.named_parameters(), our_gradients, their_gradients):
        assert closest(a, b) < 2e-5 * max(1, b.abs().max()), name
    with torch.no_grad():
        assert model(x, y).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_the_loss_under_autocast_is_cross_entropys():
    model, x = make(std=0.1), ids(10, 28)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x, x.roll(-1, 1)), by_torch(model, x, x.roll(-1, 1))
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(theirs.item(), rel=1e-3)
    for a, b in zip(loss_and_gradients(model, ours)[1], loss_and_gradients(model, theirs)[1]):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


def test_gradients_of_several_losses_add_up():
    for settings in ({}, {"tie_embeddings": True}):
        model, x = make(std=0.1, **settings), ids(6, 28)
        expected = loss_and_gradients(model, by_torch(model, x, x))[1]
        model.zero_grad()
        for part in x.split([1, 3, 2]):
            (model(part, part) * 0.37).backward()
        assert all(closest(p.grad, b) < 2e-5 * max(1, b.abs().max()) for p, b in zip(model.parameters(), expected))


def test_a_second_way_back_through_a_loss_is_an_error():
    model, x = make(), ids(2, 8)
    loss = model(x, x)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_targets_that_count_nowhere_give_no_loss_and_no_gradient():
    model, x = make(), ids(2, 8)
    loss, gradients = loss_and_gradients(model, model(x, torch.full_like(x, IGNORE)))
    assert loss == 0 and all((g == 0).all() for g in gradients)


MEMORY = """
import resource, torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(vocab_size=2**19, n_embd=8, n_head=2, n_layer=1, block_size=160))
x = torch.arange(160)[None]
model(x[:, :8], x[:, :8]).backward()  # now the gradients are there
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model(x, x).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory in Linux's unit")
def test_a_large_vocabularys_logits_are_never_there_at_once():
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 160 * 2**19 * 4 / 3  # a third of what the logits would take in float32


@pytest.mark.parametrize("rows", [1, 2, 32, 33])
@pytest.mark.parametrize("out_features", [24, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_multiplied_as_many_are(rows, out_features, bias, monkeypatch):
    calls, product = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a: (calls.append(rows), product(*a))[1])
    torch.manual_seed(0)
    layer, x = Linear(16, out_features, bias=bias), torch.randn(rows, 1, 16)
    with torch.no_grad():
        y = layer(x)
    assert y.shape == (rows, 1, out_features)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=0)
    assert len(calls) == (rows <= 32 and out_features == 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16  # as any Linear


@pytest.mark.parametrize("T", [2, 64, 512, 513])
def test_attention_in_bfloat16_is_that_in_float32(T, monkeypatch):
    calls, product = [], torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **k: (calls.append(T), product(*a, **k))[1])
    exact = [torch.randn(2, 3, T, 16, generator=torch.Generator().manual_seed(i)).bfloat16().float().requires_grad_() for i in range(3)]
    short = [t.detach().bfloat16().requires_grad_() for t in exact]
    ours, theirs = attend(*short, None, 0.0, True), F.scaled_dot_product_attention(*exact, is_causal=True)
    assert ours.dtype == torch.bfloat16 and (ours - theirs).norm() < 0.01 * theirs.norm()
    for out in (ours, theirs):
        (out * torch.linspace(-1, 1, 16)).sum().backward()
    assert all((a.grad - b.grad).norm() < 0.02 * b.grad.norm() for a, b in zip(short, exact))
    assert len(calls) == (T <= 512)
    attend(*short, None, 0.0, False)  # where scores may be large, they stay in float32
    assert len(calls) == (T <= 512)


def test_parameters_and_flops_by_hand():
    model = make(n_kv_head=2, intermediate_size=64)
    matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)  # two layers of q, k and v, o, and the MLP's three
    norms = 2 * (2 * 32 + 2 * 8) + 32
    assert model.count_parameters() == matrices + norms + 2 * 67 * 32
    attention = 12 * 2 * 4 * 8 * 32
    assert model.flops_per_token() == 6 * (matrices + 67 * 32) + attention
    tied = make(n_kv_head=2, intermediate_size=64, tie_embeddings=True)
    assert tied.count_parameters() == model.count_parameters() - 67 * 32 and tied.flops_per_token() == model.flops_per_token()


def test_known_models_have_their_known_sizes():
    with torch.device("meta"):
        small = GPT(GPTConfig(vocab_size=50257, **GPT2))  # OpenAI's smallest
        sizes = {"n_embd": 1024, "n_layer": 28, "n_head": 16, "n_kv_head": 8, "head_dim": 128, "intermediate_size": 3072}
        qwen = GPT(GPTConfig(vocab_size=151936, tie_embeddings=True, **sizes))  # Qwen3-0.6B
    assert small.count_parameters() == 124_439_808
    assert small.flops_per_token() == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 12 * 64 * 1024
    assert qwen.count_parameters() == 596_049_920


# ---- Generation ----


def pick_of(turns):
    """Greedy for turns=1; else the likeliest, the second … in turn, which wanders where greedy runs in circles."""
    return lambda logits, sequences: torch.stack([row.argsort(descending=True)[len(s) % turns] for row, s in zip(logits, sequences)])


def plainly(model, prompt, n, pick):
    """The continuation with neither cache nor batch."""
    sequence = list(prompt)
    for _ in range(n):
        window = sequence[context_start(len(sequence), model.config.block_size) :]
        with torch.no_grad():
            sequence.append(pick(model(torch.tensor([window]))[:, -1].float(), [sequence]).item())
    return sequence[len(prompt) :]


def columns(steps):
    return torch.stack(list(steps), 1).tolist()


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("settings", [{}, GROUPED, GPT2, GPT2 | GROUPED, {"block_size": 15}, {"block_size": 2}])
def test_neither_cache_nor_batch_changes_a_token(settings, turns):
    model, pick = make(std=0.6, **{"block_size": 16} | settings).double(), pick_of(turns)
    prompts = [ids(n, seed=seed).tolist() for seed, n in enumerate((1, 5, 5, 9, 15, 16, 17, 40))]
    expected = [plainly(model, prompt, 36, pick) for prompt in prompts]
    assert turns == 1 or len({tuple(row) for row in expected}) == len(prompts) and min(len(set(row)) for row in expected) > 3
    assert columns(model.generate(prompts, 36, pick)) == expected  # all at once, of different lengths
    assert columns(model.generate(prompts, 36, pick, use_cache=False)) == expected
    assert [columns(model.generate([prompt], 36, pick))[0] for prompt in prompts] == expected
    assert columns(model.generate(prompts[1:3], 36, pick)) == expected[1:3]  # of one length
    assert columns(model.generate(prompts, 1, pick)) == [row[:1] for row in expected]
    if turns == 1:
        assert columns(model.generate(prompts, 36)) == expected


def test_with_the_cache_most_tokens_are_computed_once():
    model, seen = make(), []
    model.model["embed_tokens"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].size(1)))
    list(model.generate([[1, 2, 3], [4]], 30))
    assert seen == [3] + [1] * 29


@pytest.mark.parametrize("settings", [GROUPED, GPT2])
def test_the_cache_works_in_bfloat16(settings):
    model, logits = make(**settings), {True: [], False: []}
    for use_cache in (True, False):

        def pick(new, sequences):
            logits[use_cache].append(new)
            return torch.tensor([len(s) for s in sequences])

        with torch.autocast("cpu", torch.bfloat16):
            list(model.generate([[1, 2, 3], [4]], 40, pick, use_cache))
            growing = Growing(model, [[1]], 1, use_cache)
            growing.logits()
            assert growing.cache.k.dtype == torch.bfloat16 if use_cache else growing.cache is None
    a, b = torch.stack(logits[True]), torch.stack(logits[False])
    assert a.dtype == torch.float32 and (a - b).pow(2).mean().sqrt() < 0.02 * b.std()


def test_a_cache_may_be_filled_in_pieces():
    x = ids(2, 20)
    for settings in (GROUPED, GPT2):
        model = make(**settings)
        cache = KVCache(model.config, 2, 32, "cpu", torch.float32)
        with torch.no_grad():
            expected = model.hidden(x)
            pieces = [model.hidden(piece, cache) for piece in x.split([5, 1, 11, 3], 1)]
            assert closest(torch.cat(pieces, 1), expected) < 1e-4
            cache.lengths = [12, 7]  # and taken back, each row to a place of its own
            again = model.hidden(torch.stack([x[0, 12:18], x[1, 7:13]]), cache)
            assert closest(again[0], expected[0, 12:18]) < 1e-4 and closest(again[1], expected[1, 7:13]) < 1e-4
            assert cache.lengths == [18, 13]


def test_pick_sees_each_sequence_and_decides():
    model, seen = make(), []

    def pick(logits, sequences):
        assert logits.shape == (2, 67) and logits.dtype == torch.float32
        seen.append([list(s) for s in sequences])
        return torch.tensor([7, 8])

    assert columns(model.generate([[1, 2], [3]], 3, pick)) == [[7, 7, 7], [8, 8, 8]]
    assert seen == [[[1, 2], [3]], [[1, 2, 7], [3, 8]], [[1, 2, 7, 7], [3, 8, 8]]]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        list(make().generate([[1], []], 1))


def test_a_context_that_is_full_keeps_its_last_half():
    for block_size in (2, 3, 4, 7, 8, 16):
        start = 0
        for n in range(1, 10 * block_size):
            if n - start > block_size:
                start = n - block_size // 2
            assert context_start(n, block_size) == start, (n, block_size)


# ---- Figures ----


def batches_of(sequence, block_size, batch_size, **options):
    return tokens.windows(tokens.Text(sequence), block_size, batch_size=batch_size, **options)


def test_a_model_that_knows_nothing_has_its_vocabularys_perplexity():
    for vocab_size in (2, 67, 1024):
        model = make(vocab_size=vocab_size)
        torch.nn.init.zeros_(model.lm_head.weight)
        result = figures(score(model, batches_of(ids(100, vocab_size=vocab_size), 32, 2)))
        assert result["perplexity"] == pytest.approx(vocab_size, rel=1e-6) and result["targets"] == 99


def test_score_is_a_plain_sum():
    model, lengths = make(), np.arange(60) % 4  # seven ids more than bytes are known of, and every fourth stands for none
    x, y = ids(5, 32), ids(5, 32, seed=3)
    y[1, :9], y[4] = IGNORE, IGNORE
    with torch.no_grad():
        logits = model(x).double()
    nats = n = right = byte_nats = n_bytes = 0
    for row, targets in zip(logits, y):
        for values, target in zip(row, targets.tolist()):
            if target != IGNORE:
                loss, size = -values.log_softmax(-1)[target].item(), lengths[target] if target < 60 else 0
                nats, n, right = nats + loss, n + 1, right + (values.argmax().item() == target)
                byte_nats, n_bytes = byte_nats + (loss if size else 0), n_bytes + size
    sums = score(model, [(x[:2].numpy(), y[:2].numpy()), (x[2:].numpy(), y[2:].numpy())], lengths)
    assert sums.dtype == torch.float64 and sums.tolist() == pytest.approx([nats, n, right, byte_nats, n_bytes], rel=1e-6)
    result = figures(sums)
    assert result["loss"] == pytest.approx(nats / n) and result["perplexity"] == pytest.approx(math.exp(nats / n))
    assert result["accuracy"] == right / n and result["bits_per_byte"] == pytest.approx(byte_nats / n_bytes / math.log(2)) and result["targets"] == n


def test_bits_per_byte_leaves_out_what_stands_for_no_byte():
    model = make(vocab_size=4)  # id 3 is the end of a text, id 2 stands for two bytes
    torch.nn.init.zeros_(model.lm_head.weight)
    y = torch.tensor([[0, 2, 3, 3, 2, IGNORE]])
    result = figures(score(model, [(y.clamp(min=0), y)], np.array([1, 1, 2, 0])))
    assert result["bits_per_byte"] == pytest.approx(3 * 2 / 5)  # three targets of two bits, over 1 + 2 + 2 bytes
    assert result["targets"] == 5 and result["perplexity"] == pytest.approx(4)


def test_figures_do_not_depend_on_the_batch_size():
    model, sequence = make(), ids(1000)
    results = [score(model, batches_of(sequence, 32, n), np.ones(67, dtype=int)).tolist() for n in (1, 2, 7, 32, 100)]
    assert all(result == pytest.approx(results[0], rel=1e-6) for result in results)
    assert results[0][1] == 999


def test_a_large_vocabulary_is_scored_alike():
    model, x, y = make(**LARGE), ids(25, 28, vocab_size=50304), ids(25, 28, vocab_size=50304, seed=2)
    with torch.no_grad():
        assert score(model, [(x, y)]).tolist()[:2] == pytest.approx([by_torch(model, x, y).item(), 700], rel=1e-5)


def test_scoring_leaves_no_trace():
    model, windows = make(dropout=0.5), list(batches_of(ids(100), 32, 2))
    random_state, weights = torch.get_rng_state(), {name: p.clone() for name, p in model.state_dict().items()}
    expected = score(model.eval(), windows)
    assert not model.training
    assert torch.equal(score(model.train(), windows), expected) and model.training  # dropout was off
    assert torch.equal(torch.get_rng_state(), random_state) and all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="nothing to score"):
        figures(score(make(), [(ids(1, 8), torch.full((1, 8), IGNORE))]))


# ---- Devices ----


def test_the_cpu_computes_in_float32_unless_told():
    assert pick_device("cpu") == (torch.device("cpu"), torch.float32, False)
    assert pick_device("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16, False)
    assert pick_device()[0].type in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("units, expected", [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx512_f": True}, torch.float32)])
def test_a_cpu_with_units_for_bfloat16_trains_in_it(monkeypatch, units, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert pick_device("cpu", training=True)[1] == expected and pick_device("cpu")[1] == torch.float32
    assert pick_device("cpu", "float32", training=True)[1] == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=f"device={device}"):
        pick_device(device)


@pytest.mark.parametrize("device", ["gpu", "tpu", "", "cpu:x", "cuda:99", "cuda:x"])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ValueError, match="device"):
        pick_device(device)


@pytest.mark.parametrize("dtype", ["float64", "fp16", ""])
def test_unknown_number_types_are_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be auto or one of"):
        pick_device("cpu", dtype)
