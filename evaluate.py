"""How good is a model? Perplexity, bits per byte and next-token accuracy, over a validation split or any text.

    python evaluate.py out/quickstart                              # the whole validation split of the data it was trained on
    python evaluate.py out/quickstart out/other gpt2 --text=book.txt
    python evaluate.py out/quickstart --stride=64                  # every window scores its last 64 tokens: each has more context

Loss and perplexity are per token, so they compare only models of one vocabulary; bits per byte compares any two.
"""
import math
import os
import time

import torch
from tqdm import tqdm

import config
import tokens
from model import GPT, figures, find_checkpoint, pick_device, read_json, score
from text import read_text

# What to score
text = ""  # a UTF-8 text file; empty: a validation split
data: str | dict = ""  # a data set, or several, whose validation splits to score; empty: what the model was trained on
eval_tokens = 0  # targets to score, from the start; 0: all
stride = 0  # tokens that each window scores, the others being its context; 0: block_size, windows side by side
block_size = 0  # window in tokens; 0: the model's
# How
batch_size = 0  # windows at a time; 0: as many as make 8,192 tokens. The figures do not depend on it
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "float32"  # of matrix products: float32, bfloat16, float16, auto
json = ""  # file for the figures


def streams_for(run, folder, encoding):
    """The token streams to score a model on, and what to call them. Raises ValueError where vocabularies differ or nothing is there."""
    if text:
        content = read_text(text)
        if not content.strip():
            raise ValueError(f"{text} is empty: there is nothing to score")
        return [tokens.Text([encoding.eot_token, *encoding.encode_ordinary(content)])], text
    chosen = data or read_json(os.path.join(folder, "trainer.json")).get("data")
    if not chosen:
        raise ValueError(f"{run} does not say what it was trained on; name --data=FOLDER or --text=FILE")
    folders = list(chosen) if isinstance(chosen, dict) else [chosen]
    for name in folders:
        if tokens.fingerprint(tokens.Meta(name).encoding()) != tokens.fingerprint(encoding):
            raise ValueError(f"{name} was made with another vocabulary than {run}; use --text=FILE, or prepare it with --tokenizer={run}")
    return [tokens.Stream(name, "val") for name in folders], ", ".join(folders)


def evaluate(run, where, autocast):
    """The figures of one model, a dict."""
    with config.user_errors():
        folder = find_checkpoint(run)
        encoding = tokens.load_tokenizer(folder)
        model = GPT.from_pretrained(folder, where)
        if encoding.n_vocab > model.config.vocab_size:
            raise ValueError(f"{folder}: its tokenizer has {encoding.n_vocab} ids, more than the {model.config.vocab_size} of its model's vocabulary")
        streams, name = streams_for(run, folder, encoding)
        size = block_size or model.config.block_size
        if size > model.config.block_size:
            raise ValueError(f"block_size={size} is more than the {model.config.block_size} that {run} was made for")
        if stride > size:
            raise ValueError(f"stride={stride} must lie between 1 and block_size={size}, or tokens would go unscored")
        if min(len(s) for s in streams) < 2:
            raise ValueError(f"{name} is too short: there is nothing to score")
    batch = batch_size or max(1, 8192 // size)
    total = sum(math.ceil(min(len(s) - 1, eval_tokens or len(s)) / (stride or size) / batch) for s in streams)
    begun = time.monotonic()
    windows = (w for s in streams for w in tokens.windows(s, size, stride, eval_tokens, batch))
    sums = score(model, tqdm(windows, total=total, desc=run, unit="batch", leave=False, disable=None), tokens.byte_lengths(encoding), autocast)
    seconds = time.monotonic() - begun
    return {"run": run, "checkpoint": folder, "scored": name, "parameters": model.count_parameters(), **figures(sums), "seconds": seconds}


def main():
    runs, _ = config.apply(globals(), files=False)
    if not runs:
        config.fail("name at least one model: a run (out/…), a step folder, a Hugging Face folder or hub name")
    for name in ("batch_size", "eval_tokens", "block_size", "stride"):
        if globals()[name] < 0:
            config.fail(f"{name} must be 0 or more, not {globals()[name]}")
    with config.user_errors():
        where, number_type, _ = pick_device(device, dtype)
        for run in runs:  # a slip in the last name must not cost the figures of the first
            find_checkpoint(run)
    autocast = torch.autocast(where.type, dtype=number_type, enabled=number_type != torch.float32)
    width, results = max(10, *map(len, runs)), []
    for run in runs:
        r = evaluate(run, where, autocast)
        if not results:
            print(f"{'model':{width}} {'parameters':>13} {'targets':>11} {'loss':>8} {'perplexity':>11} {'bits/byte':>10} {'accuracy':>9} {'seconds':>8}")
        print(
            f"{r['run']:{width}} {r['parameters']:>13,} {r['targets']:>11,} {r['loss']:>8.4f} {r['perplexity']:>11.3f} "
            f"{r['bits_per_byte']:>10.4f} {r['accuracy']:>9.4f} {r['seconds']:>8.1f}"
        )
        results.append(r)
    print(f"scored on {', '.join(dict.fromkeys(r['scored'] for r in results))}")
    if json:
        with config.user_errors():
            config.write_json(json, results)


if __name__ == "__main__":
    main()
