"""What this machine does with a config, and what limits it: training, the batch loader, decoding, and how cost grows.

    python bench.py config/quickstart.py
    python bench.py config/gpt2_124m.py --json=h100.json           # where its data set is absent, random bytes stand in
    python bench.py config/shakespeare.py --to_loss=1.88           # time and tokens from process start to a validation loss
    python bench.py config/quickstart.py --grow                    # a table and bench.png over block_size, depth and micro-batch

Other arguments are train.py's: config files and --key=value. Training is measured in processes of train.py's own.
"""
import json as json_
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields

import numpy as np
import torch
from tqdm import tqdm

import config
import tokens
from budget import dial
from model import GPT, GPTConfig, pick_device, synchronize

to_loss = 0.0  # train until the validation loss is at most this, and measure nothing else; 0: off
grow = False  # measure how cost grows, and nothing else
repeats = 3  # processes of which the median counts
steps = 20  # of each; their median counts, without the first three
new_tokens = 128  # to decode
json = ""  # file for the figures

HERE = os.path.dirname(os.path.abspath(__file__))


def train(arguments, folder, **settings):
    """The figures that `train.py ARGUMENTS` ends with, run in a process of its own. Its mistake ends this program."""
    out = tempfile.mkdtemp(dir=folder)
    settings = {"sample_tokens": 0, "out": os.path.join(out, "run"), "json": os.path.join(out, "figures.json")} | settings
    command = [sys.executable, os.path.join(HERE, "train.py"), *arguments, *(f"--{name}={value}" for name, value in settings.items())]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:
        config.fail(f"train.py was killed by signal {-done.returncode}, for want of memory perhaps: {' '.join(command[2:])}")
    if done.returncode:
        sys.stderr.write(done.stderr)
        sys.exit(done.returncode)
    with open(settings["json"], encoding="utf-8") as f:
        figures = {name: math.nan if value is None else value for name, value in json_.load(f).items()}
    shutil.rmtree(out)  # its checkpoints
    return figures | {"process_seconds": time.monotonic() - begun}


def measure(arguments, folder, count, **settings):
    """The figures of `count` short runs, their numbers' medians."""
    short = {"max_steps": steps, "time_budget": "", "schedule": "cosine", "eval_tokens": 1, "checkpoint_interval": 10**9, "log_interval": 10**9} | settings
    runs = [train(arguments, folder, **short) for _ in tqdm(range(count), desc="training", leave=False, disable=None)]
    return {name: statistics.median_low([r[name] for r in runs]) if isinstance(value, (int, float)) else value for name, value in runs[-1].items()}


def random_data(folder, block_size):
    """A data set of random bytes: as good as text for a measurement of speed."""
    os.makedirs(folder)
    shards, numbers = {}, np.random.default_rng(0)
    for split, n in (("train", max(2**22, 4 * block_size)), ("val", 2 * block_size)):
        writer = tokens.ShardWriter(folder, split, np.uint16, 2**30)
        writer.write(numbers.integers(0, 256, n, dtype=np.uint16))
        writer.close()
        shards[split] = writer.shards
    tokenizer = {"kind": "bytes", "name": "bytes", "vocab_size": 257}
    config.write_json(os.path.join(folder, "meta.json"), {"format_version": 1, "tokenizer": tokenizer, "shards": shards})
    return folder


def clock(function, device, least=1.0):
    """The median of the seconds that a call takes, over at least three calls and `least` seconds, after one that does not count."""

    def once():
        begun = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - begun

    once()
    spans = []
    while len(spans) < 3 or sum(spans) < least:
        spans.append(once())
    return statistics.median(spans)


@torch.inference_mode()
def measure_machine(device, dtype):
    """FLOP/s of a matrix product in this number type, and bytes/s read from memory."""
    n = 8192 if device.type == "cuda" else 1024
    a, big = torch.randn(n, n, device=device, dtype=dtype), torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    return {"flops": 2 * n**3 / clock(lambda: a @ a, device), "bandwidth": big.nbytes / clock(big.sum, device)}


def measure_loader(data, block_size, seed):
    """Tokens/s of the batches alone."""
    batches, count = tokens.Batches(data, block_size, seed), max(1, 2**16 // block_size)
    numbers = iter(range(10**9))
    return count * block_size / clock(lambda: batches.get(next(numbers) * count, count), torch.device("cpu"))


@torch.inference_mode()
def measure_decode(model, rows, bandwidth):
    """Tokens/s of the prompt and of what follows it, for `rows` sequences at once, and the share of the memory's bandwidth that this needs."""
    c, weight = model.config, model.lm_head.weight
    new = max(2, min(new_tokens, c.block_size // 2))
    prompt = [[1] * max(1, c.block_size - new)] * rows

    def generate(n):
        for _ in model.generate(prompt, n):
            pass

    first = clock(lambda: generate(1), weight.device)
    each = (clock(lambda: generate(new), weight.device) - first) / (new - 1)
    read = sum(p.nbytes for n, p in model.named_parameters() if "embed" not in n or p is weight)  # of the other tables, a row
    read += 2 * c.n_layer * rows * c.n_kv_head * c.head_dim * (c.block_size - new / 2) * weight.itemsize  # the keys and values so far
    return {
        "rows": rows, "dtype": str(weight.dtype)[6:], "prefill_tokens_per_second": rows * len(prompt[0]) / first,
        "decode_tokens_per_second": rows / each, "bandwidth_share": read / each / bandwidth,
    }  # fmt: skip


def growth(arguments, settings, folder):
    """Rows of measured and predicted tokens/s and memory over block_size, depth and micro-batch: [(what, [row, …]), …]."""
    size, micro, table = settings["block_size"], max(1, 2048 // settings["block_size"]), []
    sweeps = (
        ("block_size", [{"block_size": t, "batch_size": max(1, 8192 // t), "batch_tokens": max(8192, t)} for t in (256, 512, 1024, 2048, 4096, 8192)]),
        ("n_layer", [{"n_layer": n, "batch_size": micro, "batch_tokens": micro * size} for n in (2, 4, 8, 16)]),
        ("batch_size", [{"batch_size": b, "batch_tokens": 32 * size} for b in (1, 2, 4, 8, 16, 32)]),
    )
    for what, points in sweeps:
        rows = []
        for point in points:
            r = measure(arguments, folder, 1, max_steps=8, **point)
            with torch.device("meta"):
                flops = GPT(GPTConfig(**{f.name: (settings | point)[f.name] for f in fields(GPTConfig)})).flops_per_token()
            row = {what: point[what], "tokens_per_second": r["tokens_per_second"], "memory": r["peak_memory_bytes"], "flops": flops}
            rows.append(row)
            # Speed: the first row's FLOP/s. Memory: the line through the first two rows, but that of one step's tokens does not grow with block_size
            row["predicted_tokens_per_second"] = rows[0]["tokens_per_second"] * rows[0]["flops"] / flops
            slope = (rows[1]["memory"] - rows[0]["memory"]) / (rows[1][what] - rows[0][what]) if len(rows) > 1 and what != "block_size" else 0
            row["predicted_memory"] = rows[0]["memory"] + slope * (row[what] - rows[0][what])
            if len(rows) == 1:
                print(f"\n{what:>10} {'tokens/s':>12} {'predicted':>12} {'MB':>8} {'predicted':>10}")
            print(
                f"{row[what]:>10,} {row['tokens_per_second']:>12,.0f} {row['predicted_tokens_per_second']:>12,.0f} {row['memory'] / 2**20:>8,.0f} "
                f"{row['predicted_memory'] / 2**20:>10,.0f}", flush=True,
            )  # fmt: skip
        table.append((what, rows))
    return table


def draw_growth(table):
    """Draw bench.png: measured points beside the predicted lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(table), figsize=(12, 6), layout="constrained")
    for column, (what, rows) in zip(grid.T, table):
        for axes, name, scale in ((column[0], "tokens_per_second", 1), (column[1], "memory", 2**20)):
            xs = [r[what] for r in rows]
            axes.plot(xs, [r[name] / scale for r in rows], "o-", label="measured")
            axes.plot(xs, [r["predicted_" + name] / scale for r in rows], "--", label="by arithmetic")
            axes.set(xlabel=what, ylabel="tokens/s" if scale == 1 else "memory in MB", xscale="log", ylim=(0, None))
            axes.set_xticks(xs, [str(x) for x in xs])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    grid[0, 0].legend()
    figure.savefig("bench.png.part", format="png", dpi=120)
    os.replace("bench.png.part", "bench.png")


def main():
    with open(__file__, encoding="utf-8") as f:
        mine = config.declared(f.read())
    own = [a for a in sys.argv[1:] if a in ("-h", "--help") or (a.startswith("--") and a[2:].partition("=")[0].replace("-", "_") in mine)]
    arguments = [a for a in sys.argv[1:] if a not in own]
    config.apply(globals(), own, files=False)
    settings, given = config.settings_of(os.path.join(HERE, "train.py"), arguments)
    for name, least in (("repeats", 1), ("steps", 5), ("new_tokens", 2)):
        if globals()[name] < least:
            config.fail(f"{name} must be at least {least}, not {globals()[name]}")
    if settings["init_from"]:
        config.fail(f"init_from={settings['init_from']}: the speed of a model does not depend on its weights; name its sizes instead")
    torch.set_float32_matmul_precision("high")  # as train.py does
    with config.user_errors(), tempfile.TemporaryDirectory() as folder:
        device, dtype, _ = pick_device(settings["device"], settings["dtype"], training=True)
        _, decode_dtype, _ = pick_device(settings["device"], settings["dtype"])
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads of a {device.type}"
        print(f"{name}, {str(dtype)[6:]}, torch {torch.__version__}")
        result = {"device": name, "dtype": str(dtype)[6:], "torch": torch.__version__}
        if to_loss:
            runs = []
            for i in range(repeats):
                r = train(arguments, folder, target_loss=to_loss)
                if not r["val_loss"] <= to_loss:
                    config.fail(f"the run ended at val loss {r['val_loss']:.4f}, before {to_loss}; raise --max_steps={r['steps']}")
                print(f"run {i + 1}: val loss {r['val_loss']:.4f} after {r['tokens']:,} tokens, {r['seconds']:.1f} s from process start; {r['process_seconds']:.1f} s in all")
                runs.append(r)
            result |= {k: statistics.median_low([r[k] for r in runs]) for k in ("val_loss", "tokens", "seconds", "process_seconds", "parameters")}
            print(f"median: {result['seconds']:.1f} s, {result['process_seconds']:.1f} s in all, {result['tokens']:,} tokens, {result['parameters']:,} parameters")
        else:
            data = settings["data"]
            if not isinstance(data, dict) and not os.path.exists(data):
                settings["vocab_size"] = settings["vocab_size"] or 4096
                print(f"there is no data set in {data!r}: random bytes stand in, in a vocabulary of {settings['vocab_size']:,}")
                data = random_data(os.path.join(folder, "data"), max(8192, settings["block_size"]))
                arguments += [f"--data={data}", f"--vocab_size={settings['vocab_size']}"]
            metas = [tokens.Meta(d) for d in (data if isinstance(data, dict) else [data])]
            settings["vocab_size"] = settings["vocab_size"] or metas[0].encoding().n_vocab
            if settings["depth"]:
                batch = settings["batch_tokens"] if "batch_tokens" in given else None
                sizes = dial(settings["depth"], settings["vocab_size"], settings["block_size"], batch=batch)
                sizes = {name: value for name, value in sizes.items() if name not in given} | {"depth": 0}
                settings |= sizes
                arguments += [f"--{name}={value}" for name, value in sizes.items()]
            if grow:
                result["growth"] = growth(arguments, settings, folder)
                draw_growth(result["growth"])
                print("drawn in bench.png")
            else:
                r = measure(arguments, folder, repeats)
                parts = measure(arguments, folder, 1, time_parts=True)["parts"]
                print(f"{'training':22} {r['tokens_per_second']:>14,.0f} tokens/s, {r['mfu']:.1%} MFU, peak memory {r['peak_memory_bytes'] / 2**20:,.0f} MB, {r['parameters']:,} parameters")
                print(f"{'  a step':22} {'':14} " + ", ".join(f"{part} {share:.1%}" for part, share in parts.items()))
                print(f"{'  until the first step':22} {r['startup_seconds']:>14,.1f} s, of which {r['trial_seconds']:,.1f} s the first micro-step, with any compilation")
                machine = measure_machine(device, dtype)  # now that no process of train.py needs the memory
                print(f"{'matrix products':22} {machine['flops'] / 1e9:>14,.0f} GFLOP/s\n{'memory read':22} {machine['bandwidth'] / 1e9:>14,.1f} GB/s")
                rate = measure_loader(data, settings["block_size"], settings["seed"])
                share = r["tokens_per_second"] / rate
                print(f"{'batches alone':22} {rate:>14,.0f} tokens/s: {share:.2%} of a step")
                model = GPT(GPTConfig(**{f.name: settings[f.name] for f in fields(GPTConfig)})).to(device, decode_dtype).eval()
                decodes = [measure_decode(model, rows, machine["bandwidth"]) for rows in (1, 32)]
                for d in decodes:
                    print(
                        f"{'decoding ' + str(d['rows']):22} {d['decode_tokens_per_second']:>14,.0f} tokens/s in {d['dtype']}, {d['bandwidth_share']:.0%} of what memory allows; "
                        f"the prompt {d['prefill_tokens_per_second']:,.0f} tokens/s"
                    )
                largest = max(parts, key=parts.get)
                limit = f"{r['mfu']:.0%} of its FLOP/s are reached, most of a step is {largest} ({parts[largest]:.0%})"
                print(f"what limits training here: {'the loader' if share > 0.1 else 'the matrix products' if r['mfu'] > 0.5 else 'what lies between the matrix products'}: {limit}")
                result |= machine | {k: r[k] for k in ("parameters", "tokens_per_second", "mfu", "peak_memory_bytes", "startup_seconds", "trial_seconds")}
                result |= {"batch_tokens": r["tokens"] // r["steps"], "parts": parts, "loader_tokens_per_second": rate, "decode": decodes}
        if json:
            config.write_json(json, result)


if __name__ == "__main__":
    main()
