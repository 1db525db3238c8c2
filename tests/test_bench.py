"""bench.py as a user runs it: real processes that train tiny models. Speeds themselves are not tested."""
import json
import pathlib

import matplotlib.image
import pytest
import torch

import bench
import config
import train
from model import GPT, GPTConfig

TINY = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "batch_tokens": 256, "device": "cpu", "dtype": "float32", "warmup_steps": 2}


def arguments(**settings):
    return [f"--{name}={value}" for name, value in (TINY | settings).items()]


@pytest.fixture(scope="module")
def measured(process, data, tmp_path_factory):
    """The output of one measurement, and its figures."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    done = process("bench.py", *arguments(data=data), "--repeats=1", "--steps=6", "--new_tokens=8", f"--json={path}")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def test_every_figure_is_printed_and_written(measured):
    text, figures = measured
    for words in ("matrix products", "memory read", "training", "a step", "until the first step", "batches alone", "decoding 1 ", "decoding 32", "what limits"):
        assert words in text
    assert f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['mfu']:.1%} MFU" in text
    assert figures["parameters"] == GPT(GPTConfig(vocab_size=300, **{k: TINY[k] for k in ("block_size", "n_layer", "n_head", "n_embd")})).count_parameters()
    assert sum(figures["parts"].values()) == pytest.approx(1)
    assert min(figures[k] for k in ("flops", "bandwidth", "loader_tokens_per_second", "peak_memory_bytes", "startup_seconds")) > 0
    assert [d["rows"] for d in figures["decode"]] == [1, 32] and all(d["bandwidth_share"] > 0 for d in figures["decode"])


def test_the_share_of_bandwidth_by_hand(monkeypatch):
    model = GPT(GPTConfig(vocab_size=96, **{k: TINY[k] for k in ("block_size", "n_layer", "n_head", "n_embd")})).eval()
    spans = iter([0.5, 0.5 + 7 * 0.25])  # a first token, then eight
    monkeypatch.setattr(bench, "clock", lambda *_: next(spans))
    monkeypatch.setattr(bench, "new_tokens", 8)
    result = bench.measure_decode(model, 4, 1e6)
    assert result["decode_tokens_per_second"] == 4 / 0.25 and result["prefill_tokens_per_second"] == 4 * 24 / 0.5
    weights = 4 * (model.count_parameters() - 96 * 32)  # all but the embedding, of which a row is read
    cache = 4 * (2 * 2 * 32) * 4 * (32 - 8 / 2)  # float32 keys and values of 2 layers, 4 rows, 28 positions in the mean
    assert result["bandwidth_share"] == pytest.approx((weights + cache) / 0.25 / 1e6)


def test_the_clock_takes_the_median_of_a_second(monkeypatch):
    now, spans = [0.0], iter([9, 0.1, 0.1, 0.7, 0.3, 99])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += next(spans)

    assert bench.clock(work, torch.device("cpu")) == pytest.approx(0.2)  # the first is warm-up, the next four last a second


@pytest.mark.slow
def test_random_bytes_stand_in_for_data_that_are_not_there(process, tmp_path):
    done = process("bench.py", *arguments(data=tmp_path / "nowhere", vocab_size=512), "--repeats=1", "--steps=5", "--new_tokens=4")
    assert done.returncode == 0 and "random bytes stand in" in done.stdout and not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_a_depth_is_measured_without_its_budget(process, tmp_path):
    (tmp_path / "c.py").write_text("depth, batch_tokens, time_budget = 1, 2048, '24h'\n")  # the dial's batch is 2^16
    small = [tmp_path / "c.py", "--block_size=32", "--device=cpu", f"--data={tmp_path / 'nowhere'}", "--vocab_size=512"]
    done = process("bench.py", *small, "--repeats=1", "--steps=5", "--new_tokens=4", f"--json={tmp_path / 'figures.json'}", timeout=100)
    assert done.returncode == 0, done.stderr
    model = GPT(GPTConfig(block_size=32, vocab_size=512, n_layer=1, n_head=2, n_embd=128))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["parameters"], figures["batch_tokens"]) == (model.count_parameters(), 2048)


def test_to_loss_trains_until_the_loss_is_reached(process, data, tmp_path):
    path = tmp_path / "figures.json"
    trained = arguments(data=data, learning_rate=0.02, max_steps=200, eval_interval=5)
    done = process("bench.py", *trained, "--to_loss=4.5", "--repeats=1", f"--json={path}")
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert figures["val_loss"] <= 4.5 and 0 < figures["tokens"] < 200 * 256 and figures["tokens"] % (5 * 256) == 0
    assert figures["process_seconds"] > figures["seconds"] > 0 and "s from process start" in done.stdout


def test_a_loss_that_is_not_reached_is_an_error(process, data):
    done = process("bench.py", *arguments(data=data, max_steps=5, eval_interval=5), "--to_loss=0.5", "--repeats=1")
    assert done.returncode == 2 and "raise --max_steps=5" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "given, words",
    [(["--n_layers=3"], "did you mean n_layer?"), (["--steps=2"], "steps must be at least 5"), (["config/none.py"], "no config file"), (["--n_head=3"], "n_head=3"), (["--init_from=gpt2"], "init_from=gpt2")],
)
def test_mistakes_end_with_one_line(process, data, given, words):
    done = process("bench.py", *arguments(data=data), *given)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_help_lists_its_own_settings(process):
    done = process("bench.py", "--help")
    assert done.returncode == 0 and "--to_loss=0.0" in done.stdout and "--n_layer" not in done.stdout


def test_the_settings_of_a_script_are_those_it_would_run_with(tmp_path):
    (tmp_path / "c.py").write_text("n_layer = 2 * n_layer\n")
    script = str(pathlib.Path(train.__file__))
    settings, given = config.settings_of(script, [str(tmp_path / "c.py"), "--n_embd=128"])
    assert given == {"n_layer", "n_embd"}
    assert list(settings) == list(config.declared(pathlib.Path(script).read_text(encoding="utf-8")))
    assert (settings["n_layer"], settings["n_embd"], settings["block_size"]) == (8, 128, 256)
    assert all(settings[name] == getattr(train, name) for name in settings if name not in ("n_layer", "n_embd", "out"))


def test_bench_has_no_setting_that_train_has_too():
    names = set(config.declared(pathlib.Path(bench.__file__).read_text(encoding="utf-8")))
    assert names & set(config.declared(pathlib.Path(train.__file__).read_text(encoding="utf-8"))) == {"json"}


@pytest.mark.slow
def test_growth_is_measured_beside_its_prediction(process, tmp_path):
    done = process("bench.py", *arguments(data=tmp_path / "nowhere", vocab_size=512), "--grow", f"--json={tmp_path / 'figures.json'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    growth = dict(json.loads((tmp_path / "figures.json").read_text())["growth"])
    assert {what: [r[what] for r in rows] for what, rows in growth.items()} == {
        "block_size": [256, 512, 1024, 2048, 4096, 8192], "n_layer": [2, 4, 8, 16], "batch_size": [1, 2, 4, 8, 16, 32],
    }  # fmt: skip
    for rows in growth.values():
        assert rows[0]["predicted_tokens_per_second"] == rows[0]["tokens_per_second"] and all(r["memory"] > 0 for r in rows)
        assert all(a["predicted_tokens_per_second"] * a["flops"] == pytest.approx(b["predicted_tokens_per_second"] * b["flops"]) for a, b in zip(rows, rows[1:]))
    assert matplotlib.image.imread(tmp_path / "bench.png").std() > 0.01
