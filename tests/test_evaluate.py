import csv
import json
import math
import pathlib

import numpy as np
import pytest
import torch

import tokens
from model import GPT, GPTConfig, find_checkpoint

CPU = "--device=cpu"


def direct(folder, ids, contexts):
    """Figures of the model in `folder` by a plain loop: target t is predicted from the ids contexts(t) … t - 1."""
    encoding, model = tokens.load_tokenizer(folder), GPT.from_pretrained(folder).eval()
    nats = right = byte_nats = n_bytes = 0
    windows = {}  # start: the targets that are predicted from there
    for t in range(1, len(ids)):
        windows.setdefault(contexts(t), []).append(t)
    for start, targets in windows.items():
        with torch.no_grad():
            logits = model(torch.tensor([ids[start : max(targets)]]))[0].double()
        for t in targets:
            row = logits[t - 1 - start].log_softmax(-1)
            size = 0 if ids[t] in encoding._special_tokens.values() else len(encoding.decode_single_token_bytes(ids[t]))
            nats, right = nats - row[ids[t]].item(), right + (row.argmax().item() == ids[t])
            byte_nats, n_bytes = byte_nats - row[ids[t]].item() * (size > 0), n_bytes + size
    n = len(ids) - 1
    figures = {"loss": nats / n, "perplexity": math.exp(nats / n), "accuracy": right / n, "targets": n}
    return figures | {"bits_per_byte": byte_nats / math.log(2) / n_bytes}


def side_by_side(size):
    return lambda t: (t - 1) // size * size


def validation_ids(data):
    return np.concatenate([np.load(f) for f in sorted(pathlib.Path(data).glob("val_*.npy"))]).astype(int).tolist()


@pytest.fixture
def measure(command, tmp_path):
    """The figures that evaluate.py writes, a list of dicts, and what it prints."""

    def run(*arguments):
        done = command("evaluate.py", *arguments, CPU, f"--json={tmp_path / 'figures.json'}")
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "figures.json").read_text()), done.stdout

    return run


def agrees(result, expected):
    return {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_process_prints_what_a_plain_loop_computes(trained, data, process):
    done = process("evaluate.py", trained, CPU)
    expected = direct(find_checkpoint(trained), validation_ids(data), side_by_side(32))
    head, row, scored = done.stdout.splitlines()
    shown = dict(zip(head.split(), row.split()))
    assert done.returncode == 0 and "Traceback" not in done.stderr and scored == f"scored on {data}"
    assert shown["model"] == trained and float(shown["loss"]) == pytest.approx(expected["loss"], abs=1e-4)
    assert float(shown["perplexity"]) == pytest.approx(expected["perplexity"], abs=1e-3)
    assert float(shown["bits/byte"]) == pytest.approx(expected["bits_per_byte"], abs=1e-4)
    assert float(shown["accuracy"]) == pytest.approx(expected["accuracy"], abs=1e-4)
    assert int(shown["targets"].replace(",", "")) == expected["targets"]


@pytest.mark.parametrize("step", [3, 6])
def test_figures_are_those_of_training(step, trained, data, measure):
    folder = f"{trained}/step-{step:06d}"
    with open(f"{trained}/metrics.csv", newline="") as f:
        row = next(row for row in csv.DictReader(f) if row["val_loss"] and int(row["step"]) == step)
    (result,), _ = measure(folder)
    assert result["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(float(row["val_bpb"]), rel=1e-5)
    assert agrees(result, direct(folder, validation_ids(data), side_by_side(32)))


def test_figures_do_not_depend_on_the_batch_size(trained, measure):
    results = [measure(trained, f"--batch_size={n}")[0][0] for n in (1, 3, 8)]
    for name in ("loss", "perplexity", "accuracy", "bits_per_byte", "targets"):
        assert [r[name] for r in results] == pytest.approx([results[0][name]] * 3, rel=1e-6), name


@pytest.mark.parametrize("stride, block_size", [(8, 32), (1, 32), (5, 32), (32, 32), (7, 16)])
def test_a_stride_gives_every_target_the_context_that_its_window_has(stride, block_size, trained, measure, tmp_path):
    """A target belongs to the first of the windows, one every `stride` tokens, that reaches it."""
    (tmp_path / "text.txt").write_text("the cat sat on a naïve mat — def return" * 6, encoding="utf-8")
    encoding = tokens.load_tokenizer(find_checkpoint(trained))
    ids = [encoding.eot_token, *encoding.encode_ordinary((tmp_path / "text.txt").read_text(encoding="utf-8"))]
    expected = direct(find_checkpoint(trained), ids, lambda t: math.ceil(max(0, t - block_size) / stride) * stride)
    (result,), _ = measure(trained, f"--text={tmp_path / 'text.txt'}", f"--stride={stride}", f"--block_size={block_size}", "--batch_size=3")
    assert agrees(result, expected)


def test_a_text_is_scored_from_its_first_byte(trained, measure, tmp_path):
    text = "naïve café 🎉 <|endoftext|> def\n" * 9  # the special string is text like any other
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    encoding = tokens.load_tokenizer(find_checkpoint(trained))
    ids = [encoding.eot_token, *encoding.encode_ordinary(text)]
    (result,), out = measure(trained, f"--text={tmp_path / 'text.txt'}")
    assert agrees(result, direct(find_checkpoint(trained), ids, side_by_side(32)))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * (len(ids) - 1) / math.log(2) / len(text.encode()), rel=1e-9)  # every byte counts
    assert out.splitlines()[-1] == f"scored on {tmp_path / 'text.txt'}"


def test_the_first_targets_alone_may_be_scored(trained, data, measure):
    expected = direct(find_checkpoint(trained), validation_ids(data)[:129], side_by_side(32))
    (result,), _ = measure(trained, "--eval_tokens=128")
    assert agrees(result, expected)
    (result,), _ = measure(trained, "--eval_tokens=128", "--stride=8")
    assert result["targets"] == 128 and result["loss"] != pytest.approx(expected["loss"], rel=1e-7)


def test_several_data_sets_are_scored_together(trained, data, measure):
    (once,), _ = measure(trained, f"--data={data}")
    (twice,), out = measure(trained, f"--data={{'{data}': 0.3, '{data}/': 0.7}}")
    assert twice["targets"] == 2 * once["targets"] and twice["loss"] == pytest.approx(once["loss"], rel=1e-9)
    assert f"scored on {data}, {data}/" in out


def test_models_stand_side_by_side(trained, measure, tmp_path):
    """Of different vocabularies too: a model of bytes that knows nothing spends 8 bits on each, and a little for the end of text."""
    foreign = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=8))
    torch.nn.init.zeros_(foreign.lm_head.weight)
    foreign.save_pretrained(tmp_path / "foreign")
    tokens.save_tokenizer(tokens.get_tokenizer("bytes"), tmp_path / "foreign", 16)
    (tmp_path / "text.txt").write_text("the café\n" * 20, encoding="utf-8")
    runs = [trained, f"{trained}/step-000003", f"{trained}/step-000006", str(tmp_path / "foreign")]
    results, out = measure(*runs, f"--text={tmp_path / 'text.txt'}")
    assert [r["run"] for r in results] == runs and len(out.splitlines()) == 6
    for result, line in zip(results, out.splitlines()[1:]):
        assert line.split()[0] == result["run"] and f"{result['loss']:.4f}" in line.split() and f"{result['bits_per_byte']:.4f}" in line.split()
    assert results[0]["checkpoint"] == find_checkpoint(trained) and results[1]["loss"] != results[2]["loss"]
    assert {name: results[0][name] for name in ("loss", "targets")} in [{name: r[name] for name in ("loss", "targets")} for r in results[1:3]]
    assert results[3]["perplexity"] == pytest.approx(257, rel=1e-6) and results[3]["bits_per_byte"] == pytest.approx(math.log2(257))
    assert results[3]["targets"] == 200  # bytes
    names = {"run", "checkpoint", "scored", "parameters", "loss", "perplexity", "accuracy", "bits_per_byte", "targets", "seconds"}
    assert all(set(r) == names for r in results) and results[3]["parameters"] == foreign.count_parameters()


def test_half_precision_comes_near(trained, measure):
    (exact,), _ = measure(trained)
    (rough,), _ = measure(trained, "--dtype=bfloat16")
    assert exact["loss"] != rough["loss"] == pytest.approx(exact["loss"], rel=0.01)


@pytest.fixture(scope="session")
def other_data(tmp_path_factory, process):
    """A data set in another vocabulary."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "text.txt").write_text("one two three\n" * 30)
    done = process("prepare.py", folder / "text.txt", f"--out={folder / 'tokens'}", "--tokenizer=bytes", "--workers=1")
    assert done.returncode == 0, done.stderr
    return str(folder / "tokens")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name at least one model"),
        (["out/no-such-run"], "there is no model at 'out/no-such-run'"),
        (["RUN", "--data=OTHER"], "OTHER was made with another vocabulary than RUN; use --text=FILE"),
        (["RUN", "--data=out/no-such-data"], "there is no data set in 'out/no-such-data'"),
        (["RUN", "--text=/no/such/file"], "/no/such/file"),
        (["RUN", "--text=TMP"], "TMP"),  # a folder
        (["RUN", "--text=TMP/empty.txt"], "TMP/empty.txt is empty"),
        (["RUN", "--text=TMP/blank.txt"], "TMP/blank.txt is empty"),
        (["RUN", "--text=TMP/latin.txt"], "UTF-8"),
        (["RUN", "--stride=33"], "stride=33 must lie between 1 and block_size=32"),
        (["RUN", "--stride=20", "--block_size=16"], "stride=20 must lie between 1 and block_size=16"),
        (["RUN", "--stride=-1"], "stride must be 0 or more, not -1"),
        (["RUN", "--block_size=33"], "block_size=33 is more than the 32"),
        (["RUN", "--block_size=-4"], "block_size"),
        (["RUN", "--batch_size=-1"], "batch_size"),
        (["RUN", "--eval_tokens=-1"], "eval_tokens"),
        (["TMP/bare"], "TMP/bare does not say what it was trained on; name --data=FOLDER or --text=FILE"),
        (["TMP/mute", "--text=TMP/text.txt"], "holds no tokenizer"),
        (["TMP/small", "--text=TMP/text.txt"], "vocabulary"),  # its tokenizer has 257 ids, the model 100
        (["RUN", "--device=gpu"], "device must be"),
        (["RUN", "--tekst=x"], "did you mean text?"),
    ],
)
def test_mistakes_end_with_one_line(arguments, words, trained, other_data, command, tmp_path):
    for name, content in (("empty", b""), ("blank", b" \n\n"), ("latin", "café".encode("latin-1")), ("text", b"text")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    for name, vocab_size in (("bare", 257), ("mute", 257), ("small", 100)):
        GPT(GPTConfig(block_size=16, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=8)).save_pretrained(tmp_path / name)
        if name != "mute":
            tokens.save_tokenizer(tokens.get_tokenizer("bytes"), tmp_path / name, 16)

    def fill(words):
        return words.replace("RUN", trained).replace("OTHER", other_data).replace("TMP", str(tmp_path))

    done = command("evaluate.py", CPU, *map(fill, arguments))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("evaluate.py: ") and fill(words) in done.stderr


def test_a_mistake_about_the_last_model_does_not_cost_the_figures_of_the_first(trained, command):
    computed = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: computed.append(1))
    done = command("evaluate.py", CPU, trained, "out/no-such-run")
    hook.remove()
    assert done.returncode == 2 and "no-such-run" in done.stderr
    assert not computed or trained in done.stdout  # found before anything is scored, or told after what was
