"""train.py as a user runs it, on the CPU: real processes, real kills, tiny models.

A process forked from one that has imported torch already starts at once, so each run is one (see `child`); the tests of torchrun and of
torch.compile start theirs from nothing. Where a run is to be killed at an exact place, the process does it to itself: Python tells of every
file it opens or renames (sys.addaudithook), and there it sends itself the signal.
"""
import csv
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import config
import tokens
import train
from budget import lr_factor
from model import GPT, GPTConfig, run_steps, score, figures

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "train.py")
TINY = {
    "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "batch_tokens": 128, "max_steps": 60, "warmup_steps": 5, "dropout": 0.1,
    "eval_interval": 60, "checkpoint_interval": 10, "log_interval": 1, "sample_tokens": 4, "device": "cpu", "dtype": "float32", "compile": False,
}  # fmt: skip
PLAIN = {"dropout": 0.0, "max_steps": 20, "eval_interval": 20, "warmup_steps": 3}

# ---- Running it ----


def child(arguments, folder, env, at):
    """In a process of its own: `python train.py ARGUMENTS`, its output into files; at=(event, path's end, n, signal) strikes it at the n-th such event."""
    os.chdir(folder)
    os.environ.update(env)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}{env.get('RANK', '')}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if at:
        event, path, which, number = at
        times = itertools.count(1)

        def strike(name, args):
            if name == event and any(str(a).endswith(path) for a in args) and next(times) == which:
                os.kill(os.getpid(), number)

        sys.addaudithook(strike)
    sys.path.insert(0, ROOT)
    sys.argv = [SCRIPT, *arguments]
    runpy.run_path(SCRIPT, run_name="__main__")


@pytest.fixture(scope="module")
def start():
    """start(folder, **settings): begins a run in folder/run; returns its process."""
    processes, begun = multiprocessing.get_context("forkserver"), []
    processes.set_forkserver_preload(["torch._dynamo", "torch.distributed", "matplotlib.pyplot", "tiktoken", "safetensors.torch", "pytest"])

    def start_(folder, env={}, at=None, arguments=(), **settings):
        given = {"out": folder / "run"} | settings
        arguments = [*map(str, arguments), *(f"--{name}={value}" for name, value in given.items() if value is not None)]
        process = processes.Process(target=child, args=(arguments, str(folder), env, at))
        process.start()
        begun.append(process)
        return process

    yield start_
    for process in begun:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def run(start, data):
    """run(folder, **settings): a tiny run in folder/run, to its end."""

    def run_(folder, tiny=True, **settings):
        process = start(folder, **({"data": data} | TINY if tiny else {}) | settings)
        process.join(120)
        assert not process.is_alive(), "the run hangs"
        result = SimpleNamespace(code=process.exitcode, out=folder / "run", settings=settings)
        result.stdout, result.stderr = ((folder / name).read_text() for name in ("stdout", "stderr"))
        return result

    return run_


def good(result):
    assert result.code == 0, result.stdout + result.stderr
    return result


def one_line(result, *words):
    """The run ended over a mistake of the user's, and said so in one line."""
    assert result.code == 2, result.stdout + result.stderr
    assert result.stderr.startswith("train.py: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr
    return result


def weights(run, step):
    return load_file(run.out / f"step-{step:06d}" / "model.safetensors")


def state(run, step):
    return load_file(run.out / f"step-{step:06d}" / "trainer.safetensors")


def trainer(run, step):
    return json.loads((run.out / f"step-{step:06d}" / "trainer.json").read_text())


def same(a, b):
    """To the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def metrics(run, *columns):
    """Rows of metrics.csv as tuples of these columns."""
    with open(run.out / "metrics.csv", newline="") as f:
        return [tuple(row[c] for c in columns) for row in csv.DictReader(f)]


def values(run, column):
    """What stands in a column, as numbers."""
    return [float(value) for (value,) in metrics(run, column) if value]


def figures_of(run):
    return json.loads((run.out.parent / "figures.json").read_text())


def equal(run, other):
    """Two runs of 60 steps: the same weights, optimizer state and figures to the last bit."""
    assert same(weights(run, 60), weights(other, 60)) and same(state(run, 60), state(other, 60))
    columns = "step", "tokens", "loss", "lr", "grad_norm", "val_loss", "val_bpb"
    assert metrics(run, *columns) == metrics(other, *columns)
    assert trainer(run, 60)["best"] == trainer(other, 60)["best"]


def contents(folder):
    """Every file under a folder, and what is in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def nothing_written(run, *beside):
    assert {path.name for path in run.out.parent.iterdir()} == {"stdout", "stderr", *beside}


# ---- Data ----


def sentences(n, seed):
    words = "the a cat dog bird sees hears finds one small big red house tree and under over quickly .".split()
    return " ".join(random.Random(seed).choices(words, k=n))


def write_data(folder, text, encoding=None, validation=0.1):
    encoding = encoding or tokens.get_tokenizer("bytes")
    ids = np.array([encoding.eot_token, *encoding.encode_ordinary(text)], dtype=np.uint16)
    cut, shards = int(len(ids) * (1 - validation)), {}
    os.makedirs(folder)
    for split, part in (("train", ids[:cut]), ("val", ids[cut:])):
        writer = tokens.ShardWriter(folder, split, np.uint16, 10**6)
        writer.write(part)
        writer.close()
        shards[split] = writer.shards
    names = {"name": encoding.name, "kind": "bytes", "vocab_size": encoding.n_vocab}
    if encoding.name != "bytes":
        names |= {"kind": "trained", "pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
        tokens.write_tokenizer_file(encoding, os.path.join(folder, "tokenizer.tiktoken"))
    config.write_json(os.path.join(folder, "meta.json"), {"format_version": 1, "tokenizer": names, "shards": shards})
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "words", sentences(4000, 1))


@pytest.fixture(scope="module")
def other_vocabulary(tmp_path_factory):
    text = sentences(4000, 1)
    return write_data(tmp_path_factory.mktemp("data") / "pairs", text, tokens.train_tokenizer([text], 300))


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """straight(optimizer): 60 steps without interruption, with dropout."""
    return functools.cache(lambda optimizer="muon": good(run(tmp_path_factory.mktemp(optimizer), optimizer=optimizer, json="figures.json")))


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    """20 steps of four sequences at once, without dropout."""
    return good(run(tmp_path_factory.mktemp("plain"), **PLAIN))


# ---- Schedule and optimizers ----


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid", "constant"])
def test_warm_up_rises_evenly_from_above_zero_to_the_peak(schedule):
    factors = [lr_factor(step, schedule, 10, 100, 0.1) for step in range(11)]
    assert factors == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert factors[0] > 0 and factors[10] == 1


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
@pytest.mark.parametrize("warmup_steps, max_steps", [(0, 2), (0, 100), (10, 100), (7, 1000)])
def test_the_last_step_is_at_the_floor_and_none_before_it_rises(schedule, warmup_steps, max_steps):
    factors = [lr_factor(step, schedule, warmup_steps, max_steps, 0.1) for step in range(warmup_steps, max_steps)]
    assert factors[0] == 1 and factors[-1] == 0.1
    assert factors == sorted(factors, reverse=True)


def test_the_schedules_are_what_their_names_say():
    cosine, trapezoid, constant = ([lr_factor(step, s, 0, 101, 0.0) for step in range(101)] for s in ("cosine", "trapezoid", "constant"))
    assert cosine == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 100) for step in range(101)])
    assert trapezoid[:61] == pytest.approx([1] * 61) and trapezoid[80] == pytest.approx(0.5)
    assert constant == [1] * 101


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid", "constant"])
@pytest.mark.parametrize("warmup_steps, max_steps", [(0, 1), (1, 1), (10, 1), (10, 10), (10, 11), (20, 10)])
def test_a_run_shorter_than_its_warm_up_never_passes_the_peak_or_stands_still(schedule, warmup_steps, max_steps):
    factors = [lr_factor(step, schedule, warmup_steps, max_steps, 0.1) for step in range(max_steps)]
    assert all(0 < f <= 1 for f in factors)
    assert factors == sorted(factors)


def matrices(*shape, least=0.03):
    """Random matrices with singular values from `least` to 1."""
    u, s, v = torch.linalg.svd(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    return u @ torch.diag_embed(torch.linspace(1, least, s.size(-1)).expand_as(s)) @ v


def newton_schulz(g):
    """Of one matrix, as in Jordan's own code (github.com/KellerJordan/Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.T if g.size(0) > g.size(1) else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        A = x @ x.T
        B = b * A + c * A @ A
        x = a * x + B @ x
    return x.T if g.size(0) > g.size(1) else x


@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 96, 32), (1, 32, 96), (5, 48, 48), (3, 64, 24), (3, 24, 64)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_directions(shape):
    g = matrices(*shape)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    inner = u.mT @ train.orthogonalize(g) @ v.mT
    assert inner.diagonal(dim1=-2, dim2=-1).min() > 0.6 and inner.diagonal(dim1=-2, dim2=-1).max() < 1.3
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 96, 32), (3, 32, 96)])
def test_orthogonalize_of_a_batch_is_that_of_each_matrix(shape):
    g = matrices(*shape) * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1)  # whatever their scale
    torch.testing.assert_close(train.orthogonalize(g), torch.stack([newton_schulz(m) for m in g]), atol=1e-4, rtol=0)


def test_muon_steps_equal_shapes_at_once_as_it_would_one_by_one():
    shapes, lr, decay, momentum = [(32, 32), (64, 32), (32, 32), (32, 64), (64, 32)], 0.02, 0.1, 0.95
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected, momenta = [p.detach().clone() for p in params], [torch.zeros(shape) for shape in shapes]
    optimizer = train.Muon(params, lr=lr, weight_decay=decay)
    for _ in range(3):
        for p, e, m in zip(params, expected, momenta):
            p.grad = torch.randn(p.shape)
            m.mul_(momentum).add_(p.grad, alpha=1 - momentum)
            nesterov = p.grad * (1 - momentum) + m * momentum
            e.mul_(1 - lr * decay).sub_(newton_schulz(nesterov), alpha=lr * max(1, p.size(0) / p.size(1)) ** 0.5)
        optimizer.step()
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.detach(), e, atol=1e-5, rtol=0)


def test_momentum_rises_once_and_low_ones_hold():
    assert [train.momentum_at(step, 0.95) for step in (0, 150, 300, 10**6)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert {train.momentum_at(step, 0.7) for step in range(0, 1000, 10)} == {0.7}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("model", ["qwen3", "gpt2"])
def test_each_weight_has_one_optimizer_and_only_matrices_decay(monkeypatch, optimizer, model):
    for name, value in {"optimizer": optimizer, "learning_rate": 0.01, "weight_decay": 0.1}.items():
        monkeypatch.setattr(train, name, value)
    switches = {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True, "qk_norm": False, "tie_embeddings": True}
    gpt = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=16, **switches if model == "gpt2" else {}))
    optimizers = train.make_optimizers(gpt)
    groups = [group for o in optimizers for group in o.param_groups]
    held = [p for group in groups for p in group["params"]]
    names = {p: name for name, p in gpt.named_parameters()}
    assert len(held) == len({*held}) and {*held} == {*gpt.parameters()}
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.dim() == 2 and not (optimizer == "muon" and "embed" in names[p]) else 0)
    by_muon = {p for o in optimizers if isinstance(o, train.Muon) for group in o.param_groups for p in group["params"]}
    assert by_muon == ({p for block in gpt.model["layers"] for p in block.parameters() if p.dim() == 2} if optimizer == "muon" else set())


def test_adamw_is_that_of_torch_by_hand(run, data, tmp_path):
    result = good(run(tmp_path, **PLAIN | {"optimizer": "adamw", "max_steps": 5, "learning_rate": 0.003, "grad_clip": 0.5}))
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**{name: TINY[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}, vocab_size=257))
    groups = [([p for p in model.parameters() if p.dim() == 2], 0.1), ([p for p in model.parameters() if p.dim() == 1], 0.0)]
    adamw = torch.optim.AdamW([{"params": p, "weight_decay": wd} for p, wd in groups], betas=(0.9, 0.95))
    batches, norms, seen = tokens.Batches(data, 32, 1337), [], []
    for step in range(5):
        x, y = (torch.from_numpy(a) for a in batches.get(4 * step, 4))
        loss = model(x, y).sum() / 128
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for group in adamw.param_groups:
            group["lr"] = 0.003 * [1 / 4, 2 / 4, 3 / 4, 1, 0.1][step]  # three steps of warm-up, the peak, the floor
        adamw.step()
        adamw.zero_grad()
        seen.append(loss.item())
    assert values(result, "loss") == pytest.approx(seen, abs=1e-5)
    assert values(result, "grad_norm") == pytest.approx(norms, abs=1e-5)
    assert min(norms) > 0.5, "nothing was clipped"
    assert distance(weights(result, 5), {name: p.detach() for name, p in model.named_parameters()}) < 1e-6


# ---- However the batch is cut ----


def alike(run, other):
    assert metrics(run, "step", "tokens", "lr") == metrics(other, "step", "tokens", "lr")
    for column in ("loss", "val_loss"):
        assert values(run, column) == pytest.approx(values(other, column), abs=1e-5)
    assert values(run, "grad_norm") == pytest.approx(values(other, "grad_norm"), rel=1e-4)


def test_micro_batches_add_up_to_the_batch(run, plain, tmp_path):
    cut = good(run(tmp_path, **PLAIN | {"batch_size": 1}))
    assert "(1 sequences a micro-step)" in cut.stdout and "(4 sequences a micro-step)" in plain.stdout
    alike(cut, plain)
    assert distance(weights(cut, 20), weights(plain, 20)) < 1e-4


def test_micro_batches_of_unequal_size_add_up_to_the_batch(run, plain, tmp_path):
    alike(good(run(tmp_path, **PLAIN | {"batch_size": 3})), plain)


def test_two_processes_train_as_one_does(data, plain, tmp_path):
    settings = {"data": data, "out": tmp_path / "run"} | TINY | PLAIN
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    done = subprocess.run([*command, *(f"--{k}={v}" for k, v in settings.items())], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    both = SimpleNamespace(out=tmp_path / "run")
    assert "2 processes" in done.stdout and done.stdout.count("20/20") == 1
    alike(both, plain)


def test_a_signal_to_one_process_stops_all_and_saves(start, data, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    endless = {"data": data} | TINY | {"max_steps": 10**6, "eval_interval": 10**6}
    ranks = [start(tmp_path, env=where | {"RANK": str(r), "LOCAL_RANK": str(r)}, **endless) for r in range(2)]
    for _ in range(600):
        if (tmp_path / "run/step-000010").exists():
            break
        time.sleep(0.1)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [143, 143]
    said = (tmp_path / "stdout0").read_text().splitlines()[-1]
    newest = run_steps(str(tmp_path / "run"))[-1]
    assert said == f"told to stop: saved step {int(newest[-6:])}; go on with --resume"
    assert (tmp_path / "stdout1").read_text() == ""


# ---- Interruptions ----


@pytest.mark.parametrize(
    "optimizer, place, at",
    [
        ("muon", ("open", ".checkpoint.part/trainer.json.part", 4), 30),  # while the fourth is written
        ("adamw", ("os.rename", "step-000040", 1), 30),  # before it gets its name
        ("muon", ("shutil.rmtree", "step-000020", 2), 40),  # after it: when the second is dropped
    ],
)
def test_a_run_killed_and_resumed_is_the_uninterrupted_one_to_the_last_bit(run, straight, tmp_path, optimizer, place, at):
    killed = run(tmp_path, optimizer=optimizer, at=(*place, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    assert int(metrics(killed, "step")[-1][0]) >= at
    resumed = good(run(tmp_path, optimizer=optimizer, resume=True))
    assert f"resumed {resumed.out} at step {at}" in resumed.stdout
    equal(resumed, straight(optimizer))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_and_resume_goes_on(run, straight, tmp_path, number, code):
    told = run(tmp_path, at=("os.rename", "step-000020", 1, number))
    assert told.code == code and told.stderr == ""
    assert told.stdout.endswith("told to stop: saved step 21; go on with --resume\n") and trainer(told, 21)["step"] == 21
    resumed = good(run(tmp_path, resume=True))
    assert f"resumed {resumed.out} at step 21" in resumed.stdout
    equal(resumed, straight())


def test_a_run_killed_before_its_first_checkpoint_starts_anew(run, tmp_path):
    short = {"max_steps": 6, "checkpoint_interval": 3}
    killed = run(tmp_path, **short, at=("os.rename", "step-000003", 1, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL and not run_steps(str(killed.out))
    anew = good(run(tmp_path, **short, resume=True, json="figures.json"))
    assert [step for step, loss in metrics(anew, "step", "loss") if loss] == [str(n) for n in range(1, 7)]
    assert [step for step, loss in metrics(anew, "step", "val_loss") if loss] == ["6"]
    assert json.loads((tmp_path / "figures.json").read_text())["best"]["step"] == 6


def test_a_run_in_bfloat16_resumes_to_the_last_bit_and_says_when_it_changes(run, tmp_path):
    settings = {"dtype": "bfloat16", "dropout": 0.0}  # with dropout, attention goes another way
    for name in "abc":
        (tmp_path / name).mkdir()
    straight = good(run(tmp_path / "a", **settings))
    killed = run(tmp_path / "b", **settings, at=("os.rename", "step-000020", 1, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    resumed = good(run(tmp_path / "b", **settings, resume=True))
    assert f"resumed {resumed.out} at step 10\n" in resumed.stdout
    equal(resumed, straight)
    plain = good(run(tmp_path / "c", dropout=0.0))
    assert values(plain, "loss") != values(straight, "loss") and values(plain, "loss") == pytest.approx(values(straight, "loss"), abs=0.1)
    other = good(run(tmp_path / "b", **settings | {"dtype": "float32", "max_steps": 61}, resume=True))
    assert f"resumed {other.out} at step 60, until then in bfloat16" in other.stdout


@pytest.mark.parametrize("file, size", [("model.safetensors", 0.5), ("trainer.safetensors", 0), ("trainer.json", 0.5)])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(run, straight, tmp_path, file, size):
    shutil.copytree(straight().out, tmp_path / "run")
    path = tmp_path / "run/step-000060" / file
    os.truncate(path, int(size * path.stat().st_size))
    shutil.copytree(tmp_path / "run/step-000050", tmp_path / "run/.checkpoint.part")
    os.remove(tmp_path / "run/.checkpoint.part/trainer.json")
    resumed = good(run(tmp_path, resume=True))
    assert f"passing over the damaged checkpoint {resumed.out}/step-000060" in resumed.stderr and resumed.stderr.count("\n") == 1
    assert f"resumed {resumed.out} at step 50" in resumed.stdout
    equal(resumed, straight())
    assert not (tmp_path / "run/.checkpoint.part").exists()


def test_a_damaged_checkpoint_does_not_stand_in_for_those_after_it(run, straight, tmp_path):
    shutil.copytree(straight().out, tmp_path / "run")
    os.truncate(tmp_path / "run/step-000060/model.safetensors", 100)
    resumed = run(tmp_path, resume=True, checkpoint_interval=2, at=("os.rename", "step-000056", 1, signal.SIGKILL))
    assert resumed.code == -signal.SIGKILL
    assert {"step-000052", "step-000054"} <= {os.path.basename(f) for f in run_steps(str(resumed.out))}
    assert same(dict(GPT.from_pretrained(str(resumed.out)).state_dict()), weights(resumed, 54))


def test_where_all_checkpoints_are_damaged_nothing_is_overwritten(run, straight, tmp_path):
    shutil.copytree(straight().out, tmp_path / "run")
    for folder in run_steps(str(tmp_path / "run")):
        os.truncate(os.path.join(folder, "model.safetensors"), 100)
    before = contents(tmp_path / "run")
    refused = run(tmp_path, resume=True)
    assert refused.code == 2 and "none of its checkpoints is whole" in refused.stderr.splitlines()[-1] and "Traceback" not in refused.stderr
    assert contents(tmp_path / "run") == before


def test_resume_starts_an_absent_run(run, straight, tmp_path):
    begun = good(run(tmp_path, resume=True, max_steps=2))
    assert values(begun, "loss") == values(straight(), "loss")[:2] and run_steps(str(begun.out))


def test_resume_of_a_finished_run_says_so(run, straight, tmp_path):
    before = contents(straight().out)
    again = run(tmp_path, resume=True, out=straight().out)
    assert again.code == 0 and again.stdout.startswith(f"{straight().out} is finished") and again.stderr == ""
    assert again.stdout.splitlines()[-1] == straight().stdout.splitlines()[-1]
    assert contents(straight().out) == before


def test_a_finished_run_that_lost_its_metrics_ends_well(run, straight, tmp_path):
    shutil.copytree(straight().out, tmp_path / "run")
    os.remove(tmp_path / "run/metrics.csv")
    again = good(run(tmp_path, resume=True))
    assert f"val loss {figures_of(straight())['val_loss']:.4f}" in again.stdout
    assert same(weights(again, 60), weights(straight(), 60))


def test_an_existing_run_is_refused_without_resume(run, straight, tmp_path):
    before = contents(straight().out)
    one_line(run(tmp_path, out=straight().out), "--resume", "--out")
    assert contents(straight().out) == before


@pytest.mark.parametrize("name, value", [("batch_tokens", 256), ("seed", 1), ("optimizer", "adamw"), ("n_embd", 64), ("data", "OTHER")])
def test_what_would_make_another_run_is_refused_at_resume(run, straight, tmp_path, name, value):
    if name == "data":
        value = write_data(tmp_path / "other", sentences(4000, 2))
    before = contents(straight().out)
    one_line(run(tmp_path, out=straight().out, resume=True, **{name: value}), name)
    assert contents(straight().out) == before


def test_a_run_killed_in_its_last_evaluation_evaluates_when_resumed(run, straight, tmp_path):
    killed = run(tmp_path, at=("os.rename", "step-000060/trainer.json", 1, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    resumed = good(run(tmp_path, resume=True, json="figures.json"))
    equal(resumed, straight())
    assert json.loads((tmp_path / "figures.json").read_text())["val_loss"] == figures_of(straight())["val_loss"]


def test_a_run_told_to_stop_in_its_last_step_evaluates_when_resumed(run, straight, tmp_path):
    told = run(tmp_path, checkpoint_interval=59, at=("os.rename", "step-000059", 1, signal.SIGTERM))
    assert told.code == 143 and "saved step 60" in told.stdout
    equal(good(run(tmp_path, checkpoint_interval=59, resume=True)), straight())


# ---- Numbers that are not ----


def write_model(folder, change):
    """A model of TINY's sizes with changed weights, to start from."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


def grow_head(model):
    model.lm_head.weight *= 10_000  # its gradient overflows in float16 at the scaler's first scales


@pytest.fixture(scope="module")
def half(run, tmp_path_factory):
    """A float16 run that overflows at first."""
    folder = tmp_path_factory.mktemp("half")
    begin = write_model(folder / "model", grow_head)
    settings = {"dtype": "float16", "init_from": begin, "optimizer": "adamw", "learning_rate": 0.001, "max_steps": 25, "eval_interval": 25}
    return good(run(folder, **settings))


def test_float16_leaves_out_a_step_that_overflows_and_goes_on(half):
    norms, seen = values(half, "grad_norm"), values(half, "loss")
    overflows = sum(not math.isfinite(norm) for norm in norms)
    assert not math.isfinite(norms[0]) and overflows < 20 and math.isfinite(norms[-1])
    assert trainer(half, 25)["scaler"]["scale"] == 2 ** (16 - overflows)
    assert all(map(math.isfinite, seen)) and seen[-1] < seen[0]
    assert all(p.isfinite().all() for p in weights(half, 25).values())


def test_a_step_that_overflows_changes_no_weight(run, half, tmp_path):
    first = good(run(tmp_path, **half.settings | {"max_steps": 1}))
    assert same(weights(first, 1), load_file(half.out.parent / "model/model.safetensors"))


def test_a_resumed_float16_run_has_its_scale(run, half, tmp_path):
    shutil.copytree(half.out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/step-000025")
    resumed = good(run(tmp_path, **half.settings, resume=True))
    assert "at step 20" in resumed.stdout and same(weights(resumed, 25), weights(half, 25))
    assert trainer(resumed, 25)["scaler"] == trainer(half, 25)["scaler"]


def test_a_run_resumes_in_another_number_type(run, straight, tmp_path):
    shutil.copytree(straight().out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/step-000060")
    resumed = good(run(tmp_path, resume=True, dtype="float16"))
    assert values(resumed, "loss")[-10:] == pytest.approx(values(straight(), "loss")[-10:], rel=0.05)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights_and_thirty_end_the_run(run, tmp_path):
    result = run(tmp_path, optimizer="adamw", learning_rate=1e30, warmup_steps=0)  # the first step throws the weights out
    one_line(result, "30 steps in a row", "--learning_rate=1e+30")
    assert [os.path.basename(f) for f in run_steps(str(result.out))] == ["step-000020", "step-000030"]
    assert all(p.isfinite().all() for p in (*weights(result, 30).values(), *state(result, 30).values()))
    assert same(weights(result, 20), weights(result, 30)) and same(state(result, 20), state(result, 30))


@pytest.mark.parametrize("max_steps", [5, 40])
def test_a_model_that_is_never_finite_stays_as_it_is(run, tmp_path, max_steps):
    def burst(model):
        for block in model.model["layers"]:
            block.mlp.gate_proj.weight *= 1e30
            block.mlp.up_proj.weight *= 1e30

    begin = write_model(tmp_path / "model", burst)
    result = run(tmp_path, init_from=begin, max_steps=max_steps, checkpoint_interval=5)
    good(result) if max_steps < 30 else one_line(result, "30 steps in a row")
    assert result.stdout.count("step skipped") == min(max_steps, 30)
    assert same(weights(result, 5 if max_steps == 5 else 25), load_file(begin / "model.safetensors"))


@pytest.mark.parametrize("interval", ["m", "-5m", "0s", -1, 0, "10d"])
def test_a_checkpoint_interval_is_steps_or_a_time(run, tmp_path, interval):
    one_line(run(tmp_path, checkpoint_interval=interval), "checkpoint_interval")


def test_checkpoints_come_at_times(run, tmp_path):
    often = good(run(tmp_path, max_steps=5, checkpoint_interval="0.001s"))
    assert [int(f[-6:]) for f in run_steps(str(often.out))] == [4, 5]


# ---- Evaluation ----


@pytest.mark.parametrize("eval_interval, sample_tokens", [(6, 40), (20, 0)])
def test_evaluating_ten_times_as_often_changes_no_weight(run, straight, tmp_path, eval_interval, sample_tokens):
    often = good(run(tmp_path, eval_interval=eval_interval, sample_tokens=sample_tokens, sample_prompt="the cat"))
    assert len(values(often, "val_loss")) == 60 // eval_interval == (often.stdout.count("  | the cat") or 3)
    assert same(weights(often, 60), weights(straight(), 60)) and same(state(often, 60), state(straight(), 60))
    assert values(often, "loss") == values(straight(), "loss")


def test_a_target_ends_the_run_and_is_remembered(run, tmp_path):
    settings = {"max_steps": 500, "eval_interval": 5, "target_loss": 2.5, "json": "figures.json", "sample_tokens": 0}
    result = good(run(tmp_path, **settings))
    losses = [(int(step), float(loss)) for step, loss in metrics(result, "step", "val_loss") if loss]
    assert losses[-1][1] <= 2.5 < losses[-2][1] and losses[-1][0] < 500
    assert figures_of(result)["val_loss"] == losses[-1][1] and figures_of(result)["steps"] == losses[-1][0]
    again = good(run(tmp_path, **settings, resume=True))
    assert again.stdout.startswith(f"{result.out} is finished")


def test_the_parts_of_a_step_are_all_of_it(run, tmp_path):
    result = good(run(tmp_path, **PLAIN, time_parts=True, json="figures.json"))
    parts, figures_ = figures_of(result)["parts"], figures_of(result)
    assert list(parts) == ["load", "forward", "backward", "optimizer", "rest"] and sum(parts.values()) == pytest.approx(1)
    assert min(parts.values()) > 0 and parts["forward"] + parts["backward"] + parts["optimizer"] > 0.5
    assert 0 < figures_["trial_seconds"] < figures_["startup_seconds"] < figures_["seconds"]


def test_patience_stops_early_and_the_best_checkpoint_stays(run, tmp_path):
    little = write_data(tmp_path / "little", sentences(120, 1), validation=0.5)
    settings = {"data": little, "max_steps": 500, "eval_interval": 10, "patience": 3, "dropout": 0.0, "json": "figures.json", "schedule": "constant"}
    result = good(run(tmp_path, **settings))
    val = {int(step): float(loss) for step, loss in metrics(result, "step", "val_loss") if loss}
    best = min(val, key=val.get)
    last = max(val)
    assert 0 < best < last == best + 30 < 500
    assert [int(f[-6:]) for f in run_steps(str(result.out))] == [best, last - 10, last]
    assert same(dict(GPT.from_pretrained(str(result.out)).state_dict()), dict(GPT.from_pretrained(str(result.out / f"step-{best:06d}")).state_dict()))
    assert figures_of(result)["best"]["step"] == best and figures_of(result)["best"]["val_loss"] == val[best]
    assert f"the best is step {best}: val loss {val[best]:.4f}" in result.stdout
    rows = metrics(result, "step", "loss", "val_loss")
    again = good(run(tmp_path, **settings, resume=True))
    assert again.stdout.startswith(f"{result.out} is finished") and metrics(again, "step", "loss", "val_loss") == rows
    shutil.rmtree(result.out / f"step-{last:06d}")  # as if it had been killed before: it remembers how long it has waited
    again = good(run(tmp_path, **settings, resume=True))
    assert "resumed" in again.stdout and metrics(again, "step", "loss", "val_loss") == rows


def test_eval_tokens_scores_the_first_targets_only(run, data, tmp_path):
    result = good(run(tmp_path, max_steps=1, eval_tokens=64))
    model = GPT.from_pretrained(str(result.out))
    expected = figures(score(model, tokens.windows(tokens.Stream(data, "val"), 32, limit=64), tokens.byte_lengths(tokens.get_tokenizer("bytes"))))
    assert expected["targets"] == 64
    assert float(metrics(result, "val_loss")[-1][0]) == pytest.approx(expected["loss"], abs=1e-6)


# ---- What a run leaves ----


def test_the_figures_agree(straight, data):
    result = straight()
    figures_, rows = figures_of(result), metrics(result, "step", "tokens", "seconds", "loss", "tokens_per_second", "memory", "val_loss", "val_bpb")
    model = GPT.from_pretrained(str(result.out))
    assert figures_["parameters"] == model.count_parameters()
    assert figures_["tokens"] == 60 * 128 == int(rows[-1][1]) and figures_["steps"] == 60
    assert (figures_["val_loss"], figures_["val_bpb"]) == (float(rows[-1][6]), float(rows[-1][7]))
    assert figures_["tokens_per_second"] == pytest.approx(statistics.median([float(r[4]) for r in rows if r[4]][3:]))
    assert figures_["peak_memory_bytes"] >= max(int(r[5]) for r in rows if r[5]) > 2**20
    assert figures_["seconds"] >= float(rows[-1][2]) >= sorted(float(r[2]) for r in rows)[-1] > 0
    assert [int(r[0]) for r in rows if r[3]] == [*range(1, 61)] and [int(r[0]) for r in rows if r[6]] == [60]

    last = result.stdout.splitlines()[-1]
    words = [f"{figures_['parameters']:,} parameters", "7,680 tokens", f"val loss {figures_['val_loss']:.4f}", f"{figures_['val_bpb']:.4f} bits per byte"]
    for word in (*words, f"{figures_['tokens_per_second']:,.0f} tokens/s", str(result.out)):
        assert word in last

    scored = figures(score(model, tokens.windows(tokens.Stream(data, "val"), 32), tokens.byte_lengths(tokens.get_tokenizer("bytes"))))
    assert scored["loss"] == pytest.approx(figures_["val_loss"], abs=1e-6) and scored["bits_per_byte"] == pytest.approx(figures_["val_bpb"], abs=1e-6)
    assert scored["targets"] == len(tokens.Stream(data, "val")) - 1


def test_it_learns(straight):
    assert values(straight(), "loss")[0] == pytest.approx(math.log(257), abs=0.3)
    assert values(straight(), "loss")[-1] < 2


def test_the_curve_is_an_image(straight):
    assert (straight().out / "loss.png").read_bytes().startswith(b"\x89PNG")
    image = matplotlib.image.imread(straight().out / "loss.png")
    assert image.shape[0] > 300 and image.shape[1] > 600 and image.std() > 0.01


def test_only_the_last_two_checkpoints_and_no_temporary_files_stay(straight):
    assert sorted(os.listdir(straight().out)) == ["config.py", "loss.png", "metrics.csv", "step-000050", "step-000060"]


def test_its_config_runs_it_again(run, straight, tmp_path):
    again = good(run(tmp_path, tiny=False, arguments=[straight().out / "config.py"]))
    equal(again, straight())
    assert f"out = {str(tmp_path / 'run')!r}" in (again.out / "config.py").read_text()


def test_out_is_named_after_the_config_file(run, data, tmp_path):
    (tmp_path / "little.py").write_text("".join(f"{k} = {v!r}\n" for k, v in ({"data": data} | TINY | {"max_steps": 2}).items()))
    good(run(tmp_path, tiny=False, out=None, arguments=["little.py", "--max_steps=1"]))
    assert [os.path.basename(f) for f in run_steps(str(tmp_path / "out/little"))] == ["step-000001"]


# ---- Starting from a model, and data sets ----


def test_init_from_goes_on_from_the_weights_of_a_run(run, straight, data, tmp_path):
    few = {"data": data, "batch_tokens": 128, "max_steps": 2, "sample_tokens": 0, "device": "cpu", "dtype": "float32", "compile": False}
    tuned = good(run(tmp_path, tiny=False, init_from=straight().out, **few))
    assert float(metrics(tuned, "val_loss")[0][0]) == pytest.approx(figures_of(straight())["val_loss"], abs=1e-6)
    assert values(tuned, "loss")[0] < 1.6
    assert GPT.from_pretrained(str(tuned.out)).count_parameters() == figures_of(straight())["parameters"]


def test_init_from_takes_no_impossible_dropout(run, straight, tmp_path):
    nothing_written(one_line(run(tmp_path, init_from=straight().out, dropout=1.5), "dropout", "1.5"))


def test_init_from_refuses_data_of_another_vocabulary(run, straight, other_vocabulary, tmp_path):
    result = run(tmp_path, init_from=straight().out, data=other_vocabulary)
    nothing_written(one_line(result, "another vocabulary", f"--tokenizer={straight().out}"))


def test_a_mixture_of_data_sets_trains(run, data, tmp_path):
    other = write_data(tmp_path / "numbers", " ".join(map(str, range(3000))))
    mixed = good(run(tmp_path, data={data: 0.7, other: 0.3}, max_steps=40, eval_interval=40, dropout=0.0))
    assert f"epochs of {data}" in mixed.stdout and f"epochs of {other}" in mixed.stdout
    model, streams = GPT.from_pretrained(str(mixed.out)), [tokens.Stream(folder, "val") for folder in (data, other)]
    scored = [score(model, tokens.windows(stream, 32)) for stream in streams]
    assert all(figures(sums)["loss"] < 3.5 for sums in scored)  # it has learned both
    assert values(mixed, "val_loss")[-1] == pytest.approx(figures(sum(scored))["loss"], abs=1e-6)


def test_a_mixture_of_two_vocabularies_is_refused(run, data, other_vocabulary, tmp_path):
    nothing_written(one_line(run(tmp_path, data={data: 0.5, other_vocabulary: 0.5}), "different vocabularies", f"--tokenizer={data}"))


# ---- Mistakes ----


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"data": "data/absent"}, ["data/absent", "python prepare.py", "--out=data/absent"]),
        ({"data": "data/python"}, ["data/python", "python prepare.py"]),
        ({"data": {}}, ["data"]),
        ({"n_embd": 33}, ["n_embd=33", "n_head=2"]),
        ({"n_embd": 34}, ["head_dim=17", "odd"]),
        ({"n_kv_head": 3, "n_head": 4}, ["n_kv_head=3"]),
        ({"dropout": 1.5}, ["dropout", "1.5"]),
        ({"batch_tokens": 100}, ["batch_tokens=100", "try 96"]),
        ({"batch_tokens": 7}, ["batch_tokens=7", "try 32"]),
        ({"batch_size": -1}, ["batch_size"]),
        ({"max_steps": 0}, ["max_steps"]),
        ({"eval_interval": 0}, ["eval_interval"]),
        ({"checkpoint_interval": "10x"}, ["checkpoint_interval", "10x", "10m"]),
        ({"checkpoint_interval": 0}, ["checkpoint_interval"]),
        ({"schedule": "linear"}, ["schedule", "cosine", "trapezoid", "linear"]),
        ({"optimizer": "sgd"}, ["optimizer", "muon", "adamw", "sgd"]),
        ({"learning_rate": 0}, ["learning_rate"]),
        ({"grad_clip": -1}, ["grad_clip"]),
        ({"beta1": 2}, ["beta"]),
        ({"patience": -1}, ["patience"]),
        ({"device": "tpu"}, ["device", "tpu"]),
        ({"device": "cuda:99"}, ["device", "cuda:99"]),
        ({"dtype": "float8"}, ["dtype", "float8"]),
        ({"vocab_size": 100}, ["vocab_size=100", "257"]),
        ({"init_from": "out/absent"}, ["out/absent"]),
        ({"learnin_rate": 1}, ["learnin_rate", "did you mean learning_rate"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_mistake_ends_with_one_line_and_nothing_written(run, tmp_path, settings, words):
    nothing_written(one_line(run(tmp_path, **settings), *words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_missed_in_one_line(run, tmp_path):
    nothing_written(one_line(run(tmp_path, device="cuda"), "device=cuda", "--device=cpu"))


@pytest.mark.parametrize("words, validation, split", [(5, 0.1, "training"), (100, 0.01, "validation")])
def test_a_corpus_shorter_than_a_window_is_refused(run, tmp_path, words, validation, split):
    short = write_data(tmp_path / "short", sentences(words, 1), validation=validation)
    nothing_written(one_line(run(tmp_path, data=short), split, "33"), "short")


@pytest.mark.parametrize("damage", ["cut", "changed", "absent"])
def test_a_damaged_shard_is_refused(run, data, tmp_path, damage):
    shutil.copytree(data, tmp_path / "broken")
    path = tmp_path / "broken/train_00000.npy"
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 100)
    elif damage == "changed":
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    nothing_written(one_line(run(tmp_path, data=tmp_path / "broken"), "train_00000.npy"), "broken")


# ---- torch.compile ----


def compiled(tmp_path, data, **env):
    """A compiled run, started from nothing, for the compiler's settings are read at import."""
    settings = {"data": data, "out": tmp_path / "run"} | TINY | PLAIN | {"compile": True}
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")} | env
    done = subprocess.run([sys.executable, SCRIPT, *(f"--{k}={v}" for k, v in settings.items())], env=env, capture_output=True, text=True, timeout=600)
    return good(SimpleNamespace(code=done.returncode, stdout=done.stdout, stderr=done.stderr, out=tmp_path / "run"))


@pytest.mark.slow
def test_where_compiling_fails_it_says_so_and_goes_on(data, plain, tmp_path):
    result = compiled(tmp_path, data, CXX="/nonexistent/c++")
    assert result.stdout.count("WARNING: torch.compile failed here") == 1
    assert values(result, "loss") == values(plain, "loss")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_a_compiled_run_gives_the_losses_of_a_plain_one(data, plain, tmp_path):
    result = compiled(tmp_path, data)
    assert "WARNING" not in result.stdout
    assert values(result, "loss") == pytest.approx(values(plain, "loss"), abs=1e-3)
