"""What the test files share: the scripts as commands, a tiny data set, and a tiny run that was trained on it."""
import io
import os
import pathlib
import random
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: to share out so small models takes longer than to compute them


@pytest.fixture(scope="session")
def process():
    """process("sample.py", "out/x", "--greedy"): the script as a process of its own; its CompletedProcess."""

    def run(name, *arguments, **options):
        return subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], capture_output=True, encoding="utf-8", **options)

    return run


@pytest.fixture
def command(monkeypatch, capsys):
    """The same inside this process, where torch is imported already. What the script raises, but for its exit, fails the test."""

    def run(name, *arguments, input=""):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as e:
            code = e.code
        return subprocess.CompletedProcess(name, code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory, process):
    """A data set of eight short texts in a vocabulary of 300 ids."""
    folder, chance = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = "the cat sat on a mat naïve café 日本 🎉 def return import (x): = 1 [0] 'said'".split()
    (folder / "texts").mkdir()
    for i in range(8):
        lines = [" ".join(chance.choices(words, k=9)) for _ in range(40)]
        (folder / "texts" / f"{i}.txt").write_text("\n".join(lines), encoding="utf-8")
    done = process("prepare.py", folder / "texts", f"--out={folder / 'tokens'}", "--tokenizer=train:300", "--workers=1")
    assert done.returncode == 0, done.stderr
    return str(folder / "tokens")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, process, data):
    """A run of six steps, with checkpoints and evaluations at 3 and 6, and more ids than its vocabulary has."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    sizes = ("--block_size=32", "--n_layer=2", "--n_head=4", "--n_kv_head=2", "--n_embd=32", "--vocab_size=384", "--batch_tokens=256")
    times = ("--max_steps=6", "--eval_interval=3", "--checkpoint_interval=3", "--sample_tokens=0", "--device=cpu", "--dtype=float32")
    done = process("train.py", f"--data={data}", f"--out={out}", *sizes, *times)
    assert done.returncode == 0, done.stderr
    return str(out)
