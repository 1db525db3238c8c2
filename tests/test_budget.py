import csv
import json
import math
import os
import signal
import time

import pytest

from budget import budget_factor, dial, duration, lr_factor, parse_time
from model import GPT, run_steps
from test_train import data as data  # bytes, not the shared vocabulary
from test_train import good, one_line, run, same, start, values, weights  # noqa: F401

TIMED = {"max_steps": None, "eval_interval": None, "checkpoint_interval": "10m", "dropout": 0.0}


def test_times_have_units():
    assert [parse_time("x", t) for t in ("40s", "90m", "24h", "1.5h")] == [40, 5400, 86400, 5400]
    for wrong in ("0s", "24", "h", "", "-3s", "1d", 24, "1.2.3s", "nans", "0.0h"):
        with pytest.raises(ValueError, match="time_budget must be a time above zero with its unit"):
            parse_time("time_budget", wrong)
    assert [duration(s) for s in (12.9, 185, 7620)] == ["12s", "3m05s", "2h07m"]


def test_the_budgets_schedule_is_the_steps_by_thousandths():
    for schedule in ("cosine", "trapezoid", "constant"):
        for share in (0.0, 0.01, 0.02, 0.3, 0.999):
            assert budget_factor(share, schedule, 0.1) == pytest.approx(lr_factor(share * 1000, schedule, 20, 1001, 0.1))
    assert budget_factor(0.02, "cosine", 0.1) == 1 and budget_factor(0.0, "cosine", 0.1) < 0.05
    assert budget_factor(1.0, "cosine", 0.1) == budget_factor(7.0, "cosine", 0.1) == pytest.approx(0.1)


def test_the_dial_by_hand():
    twelve, twenty = (dial(depth, 32768, 2048) for depth in (12, 20))
    assert (twelve["n_layer"], twelve["n_embd"], twelve["n_head"], twelve["batch_tokens"]) == (12, 768, 6, 2**19)
    n = 12 * 12 * 768**2 + 32768 * 768  # the MLP's 2,048 is 8/3 of 768 exactly
    assert twelve["max_steps"] == 12 * n // 2**19
    m = 20 * (4 * 1280**2 + 3 * 1280 * 3456) + 32768 * 1280  # 8/3 of 1,280 up to a multiple of 64
    assert (twenty["n_embd"], twenty["n_head"]) == (1280, 10)
    assert twenty["batch_tokens"] == 2 ** round(math.log2(2**19 * (m / n) ** 0.383)) == 2**20
    assert twelve["learning_rate"] == pytest.approx(0.02) and twelve["momentum"] == 0.95 and twelve["head_lr"] == pytest.approx(0.006)
    assert twenty["weight_decay"] / 0.28 == pytest.approx(2**0.5 * n / m, rel=1e-6) if twenty["weight_decay"] < 0.1 else twenty["weight_decay"] == 0.1
    small = dial(1, 257, 64, processes=3)
    assert small["n_embd"] == 128 and small["n_head"] == 2 and small["batch_tokens"] % (64 * 3) == 0 and small["momentum"] == 0.95
    little = dial(12, 32768, 2048, batch=2**12)
    assert little["learning_rate"] == pytest.approx(0.02 * 2 ** (7 / 12)) and little["momentum"] == 0.85 and little["max_steps"] == 12 * n // 2**12
    with pytest.raises(ValueError, match="depth"):
        dial(-1, 257, 64)


def row(result, n):
    with open(result.out / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))[n]


def test_a_budget_ends_on_time_at_the_floor_and_is_replayed(run, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    begun = time.monotonic()
    timed = good(run(tmp_path / "a", **TIMED, time_budget="6s"))
    assert 3 < time.monotonic() - begun < 9  # the process starts from one that has torch already
    assert abs(float(row(timed, -1)["seconds"]) - 6) < 2
    rates = values(timed, "lr")
    assert rates[-1] == pytest.approx(0.002, rel=0.2) and max(rates) == pytest.approx(0.02, rel=0.05) and rates[0] < 0.01
    replay = good(run(tmp_path / "b", **TIMED, schedule=str(timed.out / "metrics.csv"), sample_tokens=0))
    assert values(replay, "lr") == rates and values(replay, "loss") == values(timed, "loss")
    last = len(rates)
    assert same(weights(timed, last), weights(replay, last))


def test_a_budget_goes_on_where_its_checkpoint_was(run, tmp_path):
    settings = TIMED | {"time_budget": "7s", "checkpoint_interval": "1s"}
    killed = run(tmp_path, **settings, at=("os.rename", "trainer.json", 3, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    newest = run_steps(str(killed.out))[-1]
    with open(os.path.join(newest, "trainer.json")) as f:
        clock = json.load(f)["seconds"]
    time.sleep(3)  # what it was down does not count
    begun = time.monotonic()
    resumed = good(run(tmp_path, **settings, resume=True))
    assert abs(float(row(resumed, -1)["seconds"]) - 7) < 2
    assert time.monotonic() - begun == pytest.approx(7 - clock, abs=3)
    assert values(resumed, "lr")[-1] == pytest.approx(0.002, rel=0.2)
    again = good(run(tmp_path, **settings, resume=True))
    assert "its time is up" in again.stdout


def test_depth_sets_what_was_not_set(run, tmp_path):
    sizes = {"n_layer": None, "n_head": None, "n_embd": None, "batch_tokens": None, "learning_rate": None}
    result = good(run(tmp_path, **TIMED | sizes | {"depth": 2, "time_budget": "6s", "weight_decay": 0.03}))
    model = GPT.from_pretrained(str(result.out))
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head) == (2, 128, 2)
    text = (result.out / "config.py").read_text()
    assert "weight_decay = 0.03\n" in text and "n_layer = 2\n" in text and "depth = 0\n" in text
    batch = int(next(line for line in text.splitlines() if line.startswith("batch_tokens")).split("=")[1])
    assert batch < dial(2, 257, 32)["batch_tokens"]  # 0.5 % of 6 s are 30 ms
    again = good(run(tmp_path, **TIMED | sizes | {"depth": 2, "time_budget": "6s", "weight_decay": 0.03, "resume": True}))
    assert "its time is up" in again.stdout


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"time_budget": "0s"}, ["time_budget", "'0s'"]),
        ({"time_budget": "24"}, ["time_budget", "24"]),
        ({"depth": 2, "n_layer": 3}, ["depth=2", "n_layer"]),
        ({"depth": -1}, ["depth=-1"]),
        ({"time_budget": "1s"}, ["time_budget=1s is too short", "--eval_tokens"]),
        ({"schedule": "nowhere.csv"}, ["nowhere.csv"]),
        ({"schedule": "other.csv"}, ["other.csv", "own config.py"]),
        ({"schedule": "sine"}, ["schedule must be one of"]),
    ],
)
def test_bad_budgets_are_refused(run, tmp_path, settings, words):
    (tmp_path / "other.csv").write_text("step,tokens,lr\n1,999,0.01\n")  # of another batch
    one_line(run(tmp_path, **settings), *words)
    assert not (tmp_path / "run").exists()
