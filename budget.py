"""What a depth means, what this machine can do, and how a time becomes a schedule.

    python train.py --depth=4 --time_budget=10m      # the model of that depth, and its learning rates, for ten minutes
"""
import math
import re
import sys
import time

import torch

from model import GPTConfig

# ---- Time ----


def duration(seconds):
    """12s, 3m05s, 2h07m."""
    minutes, s = divmod(int(seconds), 60)
    return f"{s}s" if not minutes else f"{minutes}m{s:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def parse_time(name, text):
    """The seconds in "40s", "90m" or "24h". Raises ValueError for zero, for a number without a unit, for anything else."""
    units = {"s": 1, "m": 60, "h": 3600}
    if isinstance(text, str) and text[-1:] in units and text[:-1].replace(".", "", 1).isdigit() and float(text[:-1]) > 0:
        return float(text[:-1]) * units[text[-1]]
    raise ValueError(f"{name} must be a time above zero with its unit, such as 30s, 10m or 24h, not {text!r}")


def lr_factor(step, schedule, warmup_steps, max_steps, floor):
    """The share of the peak learning rate at a step (from 0): linear warm-up, then from 1 down to `floor` at the last step, max_steps - 1."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    spent = min(1.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))  # 0 … 1
    if schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * spent))
    if schedule == "trapezoid":
        return floor + (1 - floor) * min(1.0, (1 - spent) / 0.4)
    return 1.0


def budget_factor(share, schedule, floor):
    """The same where the clock is the schedule: at a share (0 … 1) of the time for steps, of which the warm-up takes 2 %."""
    return lr_factor(min(share, 1.0) * 1000, schedule, 20, 1001, floor)


# ---- The dial ----


def dial(depth, vocab_size, block_size, processes=1, batch=None):
    """The settings that a depth stands for, {name: value}, with its own batch or the given one. Raises ValueError for a depth that is none.

    Sizes, batch, length and weight decay as nanochat has them (karpathy/nanochat at 92d63d4, scripts/base_train.py): with N the weights of
    matrix products, the head's among them, D = 12 N tokens; the batch grows as D^0.383 from half a million tokens at depth 12
    (arXiv:2505.13738); weight decay goes as sqrt(batch) / D (arXiv:2405.13698). Heads are 128 wide, below a width of 512 half of that.
    Not so the learning rates: AdamW's fall with the square root of the width as there, but Muon's, which nanochat takes as sqrt(batch), was
    found near 0.03 for batches of 2^11 and 2^12 (RESULTS.md) and nanochat's own at 2^19 is 0.02, so between them it falls by a third."""

    def shape(depth):
        n_embd = math.ceil(64 * depth / 128) * 128
        c = GPTConfig(block_size, vocab_size, depth, n_head=n_embd // (128 if n_embd >= 512 else 64), n_embd=n_embd)
        return c, 12 * (depth * (4 * n_embd**2 + 3 * n_embd * c.intermediate_size) + vocab_size * n_embd)

    if depth < 1:
        raise ValueError(f"depth must be a number of layers of at least 1, not {depth}")
    (c, tokens), (_, reference) = shape(depth), shape(12)
    whole = block_size * processes  # what a step's tokens must be a multiple of
    batch = batch or max(1, 2 ** round(math.log2(2**19 * (tokens / reference) ** 0.383)) // whole) * whole
    width = math.sqrt(768 / c.n_embd)
    return {
        "n_layer": depth, "n_embd": c.n_embd, "n_head": c.n_head, "batch_tokens": batch, "max_steps": max(1, tokens // batch),
        "learning_rate": 0.02 * (2**19 / batch) ** (1 / 12), "embed_lr": 0.12 * width, "head_lr": 0.006 * width,
        "momentum": 0.95 if batch > 2**14 else 0.85, "weight_decay": min(0.1, 0.28 * math.sqrt(batch / 2**19) * reference / tokens),
    }  # fmt: skip


# ---- What this machine can do ----

PEAKS = {  # dense peak of a GPU's matrix products in TFLOP/s, bfloat16 or float16, as commonly quoted; longer names first
    "B200": 2250, "B100": 1750, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312,
    "A40": 149.7, "A30": 165, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "RTX 5090": 209.5, "RTX 5080": 112.6, "RTX 4090": 165.2,
    "RTX 4080": 97.5, "RTX 4070": 58.3, "RTX 3090": 71, "RTX 3080": 59.5, "RTX 3060": 25.6, "V100": 125, "T4": 65,
}  # fmt: skip


def peak_flops(device, dtype):
    """What this device could do a second at best: from the table for a GPU, measured on a CPU, nan where neither says."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((t * 1e12 for key, t in PEAKS.items() if re.search(rf"\b{key}\b", name)), math.nan)
        return peak if dtype != torch.float32 else peak / 2  # TF32 runs at half of bfloat16's rate
    if device.type == "cpu":
        a, best = torch.randn(1024, 1024, dtype=dtype), math.inf
        for _ in range(4):
            begun = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - begun)
        return 2 * 1024**3 / best
    return math.nan


def peak_memory(device):
    """Bytes at the most so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
