"""Train a GPT in one loop.

    python train.py                                                # the quickstart's model on data/python
    python train.py config/shakespeare.py --learning_rate=0.01     # settings, left to right
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py       # one process for each GPU
    python train.py config/gpt2_124m.py --resume                   # go on with the run in `out`, or start it
    python train.py --depth=4 --time_budget=10m                    # a model of that depth, and ten minutes of wall clock
    python train.py --init_from=out/quickstart --data=data/mine --out=out/mine   # start from a model

Writes the folder `out`: config.py, which runs it again; metrics.csv; loss.png; and checkpoints step-NNNNNN, each a Hugging Face model.
"""
import time

STARTED = time.monotonic()  # before the slow imports: the run's clock counts from the start of the process
import contextlib
import csv
import itertools
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, fields, replace

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import config
import tokens
from budget import budget_factor, dial, duration, lr_factor, parse_time, peak_flops, peak_memory
from model import GPT, GPTConfig, figures, find_checkpoint, pick_device, read_json, run_steps, score, synchronize

# Data
data: str | dict = "data/python"  # a folder that prepare.py wrote, or several by weight: {'data/a': 0.7, 'data/b': 0.3}
out = "out/train"  # the run's folder; by default out/<name of the config file>
seed = 1337  # of weights, batches and dropout
# Model: as GPTConfig in model.py explains
block_size = 256  # tokens of context
vocab_size: int | None = None  # None: the data's; a multiple of 64 above it is faster on GPUs
n_layer = 4
n_head = 3
n_kv_head: int | None = None  # heads of keys and values; None: n_head
n_embd = 192
head_dim: int | None = None  # None: n_embd / n_head
intermediate_size: int | None = None  # width of the MLP; None: 8/3 n_embd for swiglu, 4 n_embd for gelu
dropout = 0.0  # 0 for pre-training on much data; 0.1 and more where epochs are many
bias = False
norm = "rms"  # rms or layer
positions = "rotary"  # rotary or learned
mlp = "swiglu"  # swiglu or gelu
qk_norm = True
tie_embeddings = False
rope_theta = 10000.0
norm_eps: float | None = None  # None: 1e-6 for rms, 1e-5 for layer
init_from = ""  # a run, a step folder, a Hugging Face folder or hub name (gpt2) to start from; its sizes then hold
# Length and batch
depth = 0  # the dial: layers, from which sizes, batch, rates and length follow as budget.py says; 0: off, the settings hold
time_budget = ""  # wall clock such as 600s, 90m, 24h, all included: the run's length instead of max_steps, and the schedule's; empty: off
max_steps = 480  # optimizer steps
batch_tokens = 2048  # tokens in a step, over all processes and micro-steps
batch_size = 0  # sequences of one process in a micro-step; 0: as many as memory bears
# Optimizer
optimizer = "muon"  # muon for the matrices with adamw for the rest, or adamw for all
learning_rate: float | None = None  # the peak; None: 0.02 for muon, 6e-4 for adamw
embed_lr = 0.2  # with muon: AdamW's for the embedding
head_lr = 0.01  # with muon: AdamW's for the output head, norms and biases
min_lr: float | None = None  # where the schedule ends, all rates in proportion; None: learning_rate / 10
momentum = 0.95  # Muon's: it rises from 0.85 over 300 steps; 0.85 itself, which suits short runs of small batches better, or less stays
schedule = "cosine"  # cosine, trapezoid (constant, then linear down over the last 40 %), constant; a run's metrics.csv: its rates again
warmup_steps = 10  # linear, from almost 0
weight_decay = 0.1  # on matrices only; with muon not on the embedding
beta1 = 0.9  # AdamW's
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: off
# Evaluation, logs and checkpoints
eval_interval = 120  # steps between evaluations
eval_tokens = 0  # targets of the validation split to score, from its start; 0: all
target_loss = 0.0  # stop at an evaluation whose val_loss is at most this; 0: off
patience = 0  # evaluations without a better val_loss after which to stop; 0: off
log_interval = 10  # steps between lines
checkpoint_interval: int | str = "10m"  # steps, or a time such as 30s, 10m, 2h; the last two and the best are kept
resume = False  # go on with the run in `out` from its newest whole checkpoint; start it where there is none
sample_prompt = ""  # what the sample at each evaluation continues; empty: the start of a document
sample_tokens = 64  # its length; 0: no samples
# Machine
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # of matrix products: float32, bfloat16, float16 (with a GradScaler); auto: bfloat16 where there are units for it
compile: bool | None = None  # torch.compile; None: on CUDA
json = ""  # file for the final figures
time_parts = False  # tell in them how a step's time is spent; on a GPU this waits for each part, which slows the whole

# ---- Optimizer ----


def orthogonalize(g, dtype=torch.float32):
    """The nearest (semi-)orthogonal matrices to a batch of matrices g (K, rows, columns), nearly: singular values end within about 0.7 … 1.2.

    Newton-Schulz with the quintic of Jordan et al. (kellerjordan.github.io/posts/muon): five products instead of an SVD. bfloat16 is
    precise enough, but slow where it is emulated: seconds a step."""
    x = g.to(dtype)
    if g.size(-2) > g.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if g.size(-2) > g.size(-1) else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024): every direction of a weight matrix moves equally far. Equal shapes go as one batch."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype  # of the orthogonalization's products

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                grads = [p.grad for p in params]
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov
                update = orthogonalize(torch.stack(ahead), self.dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(model, dtype=torch.float32):
    """The optimizers of the settings, Muon's products in `dtype`; each group remembers its peak learning rate. Weights of two dimensions decay, others do not."""
    fused = {"fused": model.lm_head.weight.device.type in ("cuda", "cpu"), "betas": (beta1, beta2)}
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("model.layers.")]
    rest = [(n, p) for n, p in model.named_parameters() if not (p.dim() == 2 and n.startswith("model.layers."))]
    if optimizer == "muon":
        embeddings, heads, vectors = (
            [p for n, p in rest if p.dim() == 2 and "embed" in n], [p for n, p in rest if "lm_head" in n], [p for _, p in rest if p.dim() == 1]
        )  # fmt: skip
        # At such a rate decay would shrink the rows of tokens not seen for a while to nothing; RMSNorm's gradient is one over their size
        groups = [(embeddings, embed_lr, 0.0), (heads, head_lr, weight_decay), (vectors, head_lr, 0.0)]
        made = [Muon(matrices, learning_rate, momentum, weight_decay, dtype)]
    else:
        decayed = matrices + [p for _, p in rest if p.dim() == 2]
        groups = [(decayed, learning_rate, weight_decay), ([p for _, p in rest if p.dim() == 1], learning_rate, 0.0)]
        made = []
    groups = [{"params": p, "lr": lr, "weight_decay": wd} for p, lr, wd in groups if p]
    made.append(torch.optim.AdamW(groups, **fused))
    for group in (g for o in made for g in o.param_groups):
        group["peak"] = group["lr"]
    return made


def momentum_at(step, momentum):
    """Muon's momentum at a step: from 0.85, where the gradients still turn fast, up to `momentum` over 300 steps (modded-nanogpt)."""
    return momentum - max(0.0, momentum - 0.85) * max(0.0, 1 - step / 300)


# ---- The run's folder ----


def save_checkpoint(model, optimizers, encoding, trainer):
    """Write out/step-NNNNNN under another name, make it durable, rename it: a checkpoint is complete or absent. Then drop what is old."""
    part, final = os.path.join(out, ".checkpoint.part"), os.path.join(out, f"step-{trainer['step']:06d}")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, encoding.eot_token)
    tokens.save_tokenizer(encoding, part, model.config.block_size)
    names = {p: name for name, p in model.named_parameters()}
    state = {f"{names[p]}|{key}": t.detach().cpu() for o in optimizers for p, values in o.state.items() for key, t in values.items()}
    save_file(state, os.path.join(part, "trainer.safetensors"))
    config.write_json(os.path.join(part, "trainer.json"), trainer)
    for path in [*(os.path.join(part, name) for name in os.listdir(part)), part]:
        if os.path.isdir(path) and os.name == "nt":
            continue  # Windows cannot sync a folder
        handle = os.open(path, os.O_RDWR if os.path.isfile(path) else os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(part, final)
    prune(trainer["best"])


def prune(best):
    for folder in run_steps(out)[:-2]:
        if not folder.endswith(f"step-{best.get('step', -1):06d}"):
            shutil.rmtree(folder, ignore_errors=True)


def read_schedule(path):
    """The learning rate of each step of a run, from its metrics.csv, and the tokens of a step. Raises ValueError or OSError where it is none."""
    with open(path, newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row.get("lr") and None not in row.values()]
    if not rows or [row["step"] for row in rows] != [str(n) for n in range(1, len(rows) + 1)]:
        raise ValueError(f"{path} does not hold a learning rate for every step from 1 on: name a run's whole metrics.csv")
    return [float(row["lr"]) for row in rows], int(rows[0]["tokens"])


def load_checkpoint():
    """Model, optimizer tensors and trainer.json of the newest whole checkpoint in `out`; None where there is none."""
    for folder in reversed(run_steps(out)):
        try:
            trainer = read_json(os.path.join(folder, "trainer.json"))
            if not trainer:
                raise ValueError("no trainer.json")
            return GPT.from_pretrained(folder), load_file(os.path.join(folder, "trainer.safetensors")), trainer
        except (ValueError, OSError, SafetensorError) as e:
            print(f"passing over the damaged checkpoint {folder}: {e}", file=sys.stderr)
    return None


def restore(optimizers, model, state):
    """Give the optimizers back the tensors that save_checkpoint took from them."""
    params = dict(model.named_parameters())
    owner = {p: o for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, tensor in state.items():
        p_name, key = name.split("|")
        owner[params[p_name]].state[params[p_name]][key] = tensor.to(params[p_name].device)


COLUMNS = "step,tokens,seconds,loss,lr,grad_norm,tokens_per_second,mfu,memory,val_loss,val_bpb".split(",")


def read_metrics(step):
    """The rows of metrics.csv up to a checkpoint's step: a resumed run writes the later ones again."""
    path = os.path.join(out, "metrics.csv")
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return [row for row in csv.DictReader(f) if None not in row.values() and row["step"].isdigit() and int(row["step"]) <= step]


def summary(model, rows, best, peak):
    """The run's final figures, for --json, and their one line."""
    done = [r for r in rows if r["val_loss"]][-1]
    rates = [float(r["tokens_per_second"]) for r in rows if r["tokens_per_second"]] or [math.nan]
    rate = statistics.median(rates[3:] or rates)  # the first steps warm up
    memory = max((int(r["memory"]) for r in rows if r["memory"]), default=0)
    result = {
        "parameters": model.count_parameters(), "steps": int(done["step"]), "tokens": int(done["tokens"]), "seconds": float(done["seconds"]),
        "val_loss": float(done["val_loss"]), "val_bpb": float(done["val_bpb"]), "best": best, "tokens_per_second": rate,
        "mfu": model.flops_per_token() * rate / peak, "peak_memory_bytes": memory, "out": out,
    }  # fmt: skip
    line = (
        f"{result['parameters']:,} parameters, {result['tokens']:,} tokens seen, val loss {result['val_loss']:.4f}, {result['val_bpb']:.4f} bits per byte, "
        f"{rate:,.0f} tokens/s, {duration(result['seconds'])}: {out}"
    )
    return result, line


def draw_curve(rows):
    """Draw loss.png from metrics.csv's rows: the loss of each step, smoothed, and of each evaluation, over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [(int(r["tokens"]), float(r["loss"])) for r in rows if r["loss"] not in ("", None)]
    evaluations = [(int(r["tokens"]), float(r["val_loss"])) for r in rows if r["val_loss"] not in ("", None)]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if steps:
        xs, ys = zip(*steps)
        average, smooth = ys[0], []
        for i, y in enumerate(ys):  # the mean of all at first, then of the last twenty or so
            average = average + (y - average) * max(0.05, 1 / (i + 1)) if math.isfinite(average) else y
            smooth.append(average)
        axes.plot(xs, ys, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(xs, smooth, color="tab:blue", label="training, running mean")
    if evaluations:
        axes.plot(*zip(*evaluations), "o-", color="tab:orange", label=f"validation, last {evaluations[-1][1]:.3f}")
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title=out)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(os.path.join(out, ".loss.part"), format="png", dpi=120)
    plt.close(figure)
    os.replace(os.path.join(out, ".loss.part"), os.path.join(out, "loss.png"))


def provenance(command_device):
    """What config.py says of where it ran, as comments: commit, versions, device."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True) if shutil.which("git") else None
    commit = git.stdout.strip() if git and git.returncode == 0 else "unknown"
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    return ["Runs this again: python train.py THIS_FILE --out=ANOTHER_FOLDER", f"commit {commit}, {versions}, {command_device}"]


# ---- The run ----


def main():
    global learning_rate, min_lr, vocab_size, block_size, batch_size, compile, max_steps, depth, batch_tokens
    _, given = config.apply(globals())
    ddp = "RANK" in os.environ  # torchrun says so
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first = rank == 0

    def say(*line):
        if first:
            print(*line, flush=True)

    # Look at everything that the user named before anything is written
    with config.user_errors():
        where, number_type, compile_default = pick_device(device, dtype, training=True)
        if ddp and where.type == "mps":
            raise ValueError("torch's processes cannot meet on MPS; under torchrun use --device=cpu")
        if ddp and where.type == "cuda":
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise ValueError(f"there are {torch.cuda.device_count()} GPUs here; start torchrun with --nproc_per_node={torch.cuda.device_count()}")
            where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(where)
        budget = parse_time("time_budget", time_budget) if time_budget else math.inf
        every_kind, every = "steps", checkpoint_interval
        if not isinstance(every, int):
            every_kind, every = "seconds", parse_time("checkpoint_interval", every)
        replayed, replayed_batch = read_schedule(schedule) if schedule.endswith(".csv") else ([], 0)
        if replayed:
            budget = math.inf
        for name, choices in (("optimizer", ("muon", "adamw")), ("schedule", ("cosine", "trapezoid", "constant"))):
            if globals()[name] not in choices and not (replayed and name == "schedule"):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {globals()[name]!r}")
        at_least = dict.fromkeys(("max_steps", "batch_tokens", "eval_interval", "log_interval", "checkpoint_interval"), 1)
        at_least |= dict.fromkeys(("batch_size", "eval_tokens", "patience", "sample_tokens", "warmup_steps", "depth", "weight_decay", "grad_clip"), 0)
        at_least |= dict.fromkeys(("min_lr", "beta1", "beta2", "learning_rate", "embed_lr", "head_lr", "momentum", "target_loss"), 0)
        for name, least in at_least.items():
            value = globals()[name]
            if value is not None and not isinstance(value, str) and not (value >= least and (value < 1 or name not in ("beta1", "beta2", "momentum")) and (value > 0 or name not in ("learning_rate", "embed_lr", "head_lr"))):
                raise ValueError(f"{name}={value} makes no sense; see --help")
        if not data:
            raise ValueError("data names no data set; see --help")
        begun = os.path.exists(os.path.join(out, "config.py")) or bool(run_steps(out))
        if begun and first and not resume:
            raise ValueError(f"{out} holds a run already; go on with it by --resume, or write to another --out")
        folders = list(data) if isinstance(data, dict) else [data]
        metas = [tokens.Meta(folder) for folder in folders]
        encoding = metas[0].encoding()
        for meta in metas[1:]:
            if tokens.fingerprint(meta.encoding()) != tokens.fingerprint(encoding):
                raise ValueError(f"{meta.folder} and {folders[0]} have different vocabularies; prepare one with --tokenizer={folders[0]}")
        data_fingerprint = " ".join(meta.fingerprint() for meta in metas)
        if isinstance(data, dict):
            data_fingerprint += f" by {list(data.values())}"
        torch.manual_seed(seed)
        loaded = load_checkpoint() if begun else None
        if begun and resume and not loaded and run_steps(out):
            raise ValueError(f"{out}: none of its checkpoints is whole; start anew in another --out")
        dialed = {}
        if depth:
            sizes = given & {"n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "intermediate_size", "init_from"}
            if sizes:
                raise ValueError(f"depth={depth} sets the model's sizes; leave out either it or {', '.join(sorted(sizes))}")
            if loaded:
                dialed = loaded[2].get("dialed") or {}
                if dialed.get("n_layer") != depth:
                    raise ValueError(f"the run in {out} was not started with depth={depth}; leave depth out, or start one in another --out")
            else:
                dialed = dial(depth, vocab_size or encoding.n_vocab, block_size, world, batch_tokens if "batch_tokens" in given else None)
                if optimizer != "muon":
                    del dialed["learning_rate"]  # it is Muon's
            globals().update({name: value for name, value in dialed.items() if name not in given})
        elif loaded:
            dialed = loaded[2].get("dialed") or {}
        if replayed:
            max_steps = len(replayed)
            if replayed_batch != batch_tokens:
                raise ValueError(f"{schedule} is of steps of {replayed_batch} tokens, not {batch_tokens}: replay it with the run's own config.py")
        source = GPT.from_pretrained(init_from) if init_from and not loaded else loaded[0] if loaded else None
        if source is not None:
            mine = asdict(source.config)
            for name in mine:
                wanted = globals()[name]
                if name in given and wanted not in (None, mine[name]) and name != "dropout" and not (name == "block_size" and wanted < mine[name]):
                    raise ValueError(f"{name}={wanted}, but the model in {init_from if not loaded else out} has {mine[name]}; leave {name} out")
                if name != "dropout" and not (name == "block_size" and name in given):
                    globals()[name] = mine[name]
            model = source
            model.config = replace(model.config, dropout=dropout)
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = dropout
                elif hasattr(module, "q_proj"):
                    module.dropout = dropout
            if init_from and not loaded:
                with contextlib.suppress(ValueError):  # a folder without a tokenizer: the number of ids has to do
                    theirs = tokens.load_tokenizer(find_checkpoint(init_from))
                    if tokens.fingerprint(theirs) != tokens.fingerprint(encoding):
                        config.fail(f"{data} was made with another vocabulary than {init_from}; prepare it with --tokenizer={init_from}")
        else:
            vocab_size = vocab_size or encoding.n_vocab
            model = GPT(GPTConfig(**{f.name: globals()[f.name] for f in fields(GPTConfig)}))
        if encoding.n_vocab > model.config.vocab_size:
            raise ValueError(f"{data} has a vocabulary of {encoding.n_vocab} ids, more than the model's vocab_size={model.config.vocab_size}")
        batches = tokens.Batches(data, block_size, seed)
        validation = [tokens.Stream(folder, "val") for folder in folders]
        if min(len(s) for s in validation) <= block_size:
            raise ValueError(
                f"a validation split has {min(len(s) for s in validation)} tokens, less than a window of block_size + 1 = {block_size + 1}; "
                "prepare more text, or with a larger --val_fraction"
            )
        if batch_tokens % (block_size * world):
            near = max(1, round(batch_tokens / (block_size * world))) * block_size * world
            raise ValueError(f"batch_tokens={batch_tokens} is no multiple of block_size × processes = {block_size} × {world}; try {near}")
    if compile is None:
        compile = compile_default
    sequences = batch_tokens // block_size  # in a step, over all processes
    mine = sequences // world

    torch.set_float32_matmul_precision("high")  # TF32 for what float32 matrix products there are on CUDA
    model.to(where).train()
    flops, peak = model.flops_per_token(), peak_flops(where, number_type) * world
    step, clock, best, rows = 0, 0.0, {}, []  # clock: seconds of earlier processes of this run
    if loaded:
        _, state, trainer = loaded
        for name, now in (("data_fingerprint", data_fingerprint), ("batch_tokens", batch_tokens), ("block_size", block_size), ("seed", seed), ("optimizer", optimizer)):
            if trainer[name] != now:
                config.fail(f"the run in {out} has {name}={trainer[name]}, not {now}: resumed so, it would be another run; start one in another --out")
        step, clock, best = trainer["step"], trainer["seconds"], trainer["best"]
        rows = read_metrics(step)
        done = trainer.get("time_up", 0) >= budget if budget < math.inf else step >= max_steps
        done = done or patience and best.get("worse", 0) >= patience or best.get("val_loss", math.inf) <= target_loss
        if done and any(r["val_loss"] and int(r["step"]) == step for r in rows):
            result, line = summary(model, rows, best, peak)
            if json and first:
                config.write_json(json, result)
            more = "its time is up" if trainer.get("time_up", 0) >= budget else "to train longer, raise --max_steps" if step >= max_steps else "its target_loss or patience ended it"
            say(f"{out} is finished; {more}\n{line}")
            return
    if ddp:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        ends = torch.tensor([step, -step], device=where)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            config.fail(f"the processes found different checkpoints in {out}: steps {-ends[1]} and {ends[0]}; it must be one shared folder")
    autocast = torch.autocast(where.type, dtype=number_type, enabled=number_type != torch.float32)
    scaler = torch.amp.GradScaler(where.type, enabled=number_type == torch.float16)
    if loaded and scaler.is_enabled() and trainer["scaler"]:
        scaler.load_state_dict(trainer["scaler"])

    def get_batch(micro_first, count):
        x, y = (torch.from_numpy(a) for a in batches.get(micro_first, count))
        if where.type == "cuda":
            return x.pin_memory().to(where, non_blocking=True), y.pin_memory().to(where, non_blocking=True)
        return x.to(where), y.to(where)

    # One micro-step for nothing: does it compile, and does it fit?
    begun = time.monotonic()
    run = torch.compile(model) if compile else model
    reserve = [torch.empty_like(p) for p in model.parameters() for _ in range(3 + ddp)]  # what the optimizer and DDP will take
    micro = min(mine, batch_size or max(1, (2**16 if where.type == "cuda" else 2**12) // block_size))
    while True:
        try:
            with autocast:
                loss = run(*get_batch(0, micro))
            scaler.scale(loss / batch_tokens).backward()
            break
        except torch.OutOfMemoryError:
            if micro == 1:
                config.fail(f"one sequence of {block_size} tokens does not fit into this device's memory; choose a smaller model or block_size")
            micro = (micro + 1) // 2
            say(f"out of memory: micro-batch halved to {micro}")
        except Exception as e:  # whatever a compiler may raise
            if run is model:
                raise
            say(f"WARNING: torch.compile failed here, going on without, which is slower: {type(e).__name__}: {' '.join(str(e).split())[:200]}")
            run = model
        model.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    del reserve
    if ddp:
        smallest = torch.tensor(micro, device=where)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        micro = int(smallest)
        run = torch.nn.parallel.DistributedDataParallel(run, device_ids=[where] if where.type == "cuda" else None, broadcast_buffers=False)
    batch_size = micro
    if budget < math.inf and dialed and "batch_tokens" not in given and not loaded:
        # A step is at most 0.5 % of the budget: the schedule follows the clock in steps of that size
        for _ in range(2):  # the first warms up
            synchronize(where)
            timed = time.perf_counter()
            with autocast:
                loss = run(*get_batch(0, micro))
            (loss / batch_tokens).backward()
            synchronize(where)
            each = torch.tensor((time.perf_counter() - timed) / micro, device=where)  # seconds a sequence
            model.zero_grad(set_to_none=True)
        if ddp:
            dist.broadcast(each, 0)
        while mine > 1 and float(each) * mine > 0.005 * budget:
            mine //= 2
        batch_size = micro = min(micro, mine)
        sequences, batch_tokens = mine * world, mine * world * block_size
        smaller = dial(depth, model.config.vocab_size, block_size, world, batch_tokens)
        dialed = {name: smaller[name] for name in dialed}
        globals().update({name: value for name, value in dialed.items() if name not in given})
    if learning_rate is None:
        learning_rate = 0.02 if optimizer == "muon" else 6e-4
    if min_lr is None:
        min_lr = learning_rate / 10
    depth = 0  # config.py holds what it stands for
    optimizers = make_optimizers(model, torch.bfloat16 if number_type == torch.bfloat16 else torch.float32)  # float16 has too small a range
    if loaded:
        restore(optimizers, model, state)
    trial_seconds = time.monotonic() - begun

    # What the end of a budget will cost, until it is measured: the last checkpoint and, from one of its batches, the last evaluation
    costs = {"save": 12 * model.count_parameters() / 2e8, "evaluate": 1.0}
    if budget < math.inf:
        for _ in range(2):
            begun = time.monotonic()
            score(model, itertools.islice(tokens.windows(validation[0], block_size, batch_size=micro), 1), autocast=autocast)
            synchronize(where)
        scored = sum(min(len(s) - 1, eval_tokens or len(s)) for s in validation) / block_size / micro / world  # batches
        costs["evaluate"] += (time.monotonic() - begun) * scored
        ends, started = sum(costs.values()), time.monotonic() - STARTED
        short = torch.tensor(float(not loaded and (ends > budget / 3 or ends + started > 0.7 * budget)), device=where)
        if ddp:
            dist.broadcast(short, 0)  # rank 0's clock decides
        if short:
            config.fail(
                f"time_budget={time_budget} is too short: the start took {started:.0f} s, the last checkpoint and evaluation would take some {ends:.0f}; "
                "give it more time, or lower --eval_tokens"
            )

    lengths = tokens.byte_lengths(encoding)
    table = tokens.token_bytes(encoding)
    known = torch.tensor([t is not None for t in table], device=where)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    if first:
        with config.user_errors():
            os.makedirs(out, exist_ok=True)
            for folder in run_steps(out):  # what is later than the checkpoint resumed from is damaged, and will be made again
                if int(folder.rsplit("-", 1)[1]) > step:
                    shutil.rmtree(folder)
            path = os.path.join(out, "metrics.csv")
            with open(path + ".part", "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            os.replace(path + ".part", path)
            metrics = open(path, "a", newline="", encoding="utf-8")
            writer = csv.DictWriter(metrics, COLUMNS, lineterminator="\n")
            with open(os.path.join(out, "config.py"), "w", encoding="utf-8") as f:
                f.write(config.dump(globals(), provenance(f"{world} × {name} ({where.type}), {number_type}")))
    say(f"{model.count_parameters():,} parameters ({model.config.architecture()}), {where.type} {str(number_type)[6:]}, {world} process{'es' * (world > 1)}")
    if model.config.architecture() == "daygpt":
        say("note: no stock architecture computes these settings; stock loaders will refuse the checkpoints (model_type daygpt)")
    length = f"{max_steps:,} steps" if budget == math.inf else f"{duration(budget)} of steps"
    epochs = "" if budget < math.inf else ": " + ", ".join(f"{n:.2f} epochs of {folder}" for folder, n in batches.epochs(max_steps * sequences).items())
    say(f"{length} of {sequences} × {block_size} = {batch_tokens:,} tokens ({micro} sequences a micro-step){epochs}")
    if loaded:
        say(f"resumed {out} at step {step}" + f", until then in {trainer.get('dtype')}" * (trainer.get("dtype") != str(number_type)[6:]))

    def seconds():
        return clock + time.monotonic() - STARTED

    def write_row(**values):
        row = dict.fromkeys(COLUMNS, "") | values
        rows.append(row)
        writer.writerow(row)

    def facts():
        return {
            "step": step, "tokens": step * batch_tokens, "seconds": seconds(), "best": best, "batch_size": batch_size,
            "data": data, "data_fingerprint": data_fingerprint, "batch_tokens": batch_tokens, "block_size": block_size, "seed": seed,
            "optimizer": optimizer, "dtype": str(number_type)[6:], "scaler": scaler.state_dict(), "dialed": dialed,
            "time_up": budget if share >= 1 and budget < math.inf else 0, "steps_begun": steps_begun,
        }  # fmt: skip

    def save():
        begun = time.monotonic()
        metrics.flush()
        with config.user_errors():  # a full disk
            save_checkpoint(model, optimizers, encoding, facts())
        costs["save"] = time.monotonic() - begun

    def validate():
        batches_ = itertools.chain.from_iterable(tokens.windows(s, block_size, limit=eval_tokens, batch_size=micro) for s in validation)
        sums = score(model, itertools.islice(batches_, rank, None, world), lengths, autocast)
        if ddp:
            dist.all_reduce(sums)
        with config.user_errors():
            return figures(sums)

    def sample():
        """A sample of text, from a generator of its own: evaluating more often must not change training."""
        generator = torch.Generator().manual_seed(seed)

        def pick(logits, _):
            logits = logits[:, : len(known)].masked_fill(~known, -math.inf)
            return torch.multinomial((logits / 0.8).softmax(-1).cpu(), 1, generator=generator)[:, 0]

        model.eval()
        ids = [encoding.eot_token, *encoding.encode_ordinary(sample_prompt)]
        with autocast:
            ids += [int(i) for i in model.generate([ids], sample_tokens, pick)]
        model.train()
        return b"".join(table[i] for i in ids).decode(errors="replace")

    stopped = []

    def on_signal(number, _):
        if stopped and number == signal.SIGINT and not ddp:  # torchrun passes on what its processes may have had already
            raise KeyboardInterrupt  # Ctrl-C twice: at once
        stopped.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)

    evaluated = {int(r["step"]) for r in rows if r["val_loss"]}  # on rank 0; the others learn it below
    if ddp:
        shared = torch.tensor([step in evaluated], dtype=torch.float32, device=where)
        dist.broadcast(shared, 0)
        evaluated = {step} if shared.item() else set()
    if not init_from:
        evaluated.add(0)  # random weights need no evaluation
    worse = best.get("worse", 0)
    steps_begun = trainer.get("steps_begun", 0.0) if loaded else seconds()
    share, spacing = 0.0, 1.0  # of the time for steps: what is spent, and between evaluations, which take 5 % in all

    def spent_share(ahead):
        """The share that is spent some seconds from now: of what lies between the first step and the last checkpoint and evaluation."""
        return (seconds() + ahead - steps_begun) / max(budget - sum(costs.values()) - 0.5 - steps_begun, 1e-9)

    if budget < math.inf:
        shared = torch.tensor([spent_share(0.0), 1 / min(8, max(1, int(0.05 * budget / costs["evaluate"])))], device=where)
        if ddp:
            dist.broadcast(shared, 0)
        share, spacing = shared.tolist()
    next_eval = (share // spacing + 1) * spacing
    parts, lapped = dict.fromkeys(("load", "forward", "backward", "optimizer", "rest"), 0.0), 0.0

    def lap(part):
        """Add the time since the last call to this part of a step, the first three steps left out."""
        nonlocal lapped
        if time_parts:
            synchronize(where)
            now = time.perf_counter()
            parts[part] += (now - lapped) * (len(spans) >= 3)
            lapped = now

    startup_seconds = time.monotonic() - STARTED
    saved_at, saved_step, skipped, spans, finished, val = time.monotonic(), step if loaded else -1, 0, [], False, None
    while True:
        # Save before evaluating: what fails in an evaluation must not cost the run
        finished = share >= 1 if budget < math.inf else step >= max_steps
        finished = finished or not replayed and (bool(patience and worse >= patience) or best.get("val_loss", math.inf) <= target_loss)
        if first and step > saved_step and step > 0:
            due = time.monotonic() - saved_at >= every if every_kind == "seconds" else step % every == 0
            if due or finished:
                save()
                saved_at, saved_step = time.monotonic(), step
        due = share >= next_eval if budget < math.inf else step % eval_interval == 0
        if (due or finished) and step not in evaluated:
            begun = time.monotonic()
            val = validate()
            evaluated.add(step)
            next_eval = (share // spacing + 1) * spacing
            better = val["loss"] < best.get("val_loss", math.inf)
            worse = 0 if better else worse + 1
            best = {"step": step, "val_loss": val["loss"], "val_bpb": val["bits_per_byte"]} if better else best
            best["worse"] = worse
            if first:
                write_row(step=step, tokens=step * batch_tokens, seconds=round(seconds(), 3), val_loss=val["loss"], val_bpb=val["bits_per_byte"])
                if saved_step == step:
                    config.write_json(os.path.join(out, f"step-{step:06d}", "trainer.json"), facts())  # it may be the best now
                    prune(best)
                elif better and step > 0:
                    save()
                    saved_at, saved_step = time.monotonic(), step
                metrics.flush()
                draw_curve(rows)
                say(f"step {step:>6}  val loss {val['loss']:.4f}  {val['bits_per_byte']:.4f} bits per byte  accuracy {val['accuracy']:.3f}" + "  best" * better)
                if sample_tokens and math.isfinite(val["loss"]):
                    say("  | " + sample().strip("\n").replace("\n", "\n  | "))
            costs["evaluate"] = time.monotonic() - begun
            continue  # patience may have run out: look again
        if finished:
            break

        begun = lapped = time.perf_counter()
        floor = min_lr / learning_rate
        if replayed:
            lr = replayed[step]
        else:
            lr = learning_rate * (budget_factor(share, schedule, floor) if budget < math.inf else lr_factor(step, schedule, warmup_steps, max_steps, floor))
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * (lr / learning_rate)
            if "momentum" in group:
                group["momentum"] = momentum_at(step, momentum)
        # Dropout is a function of (seed, step, rank), like the batch: no random state outlives a step, so none needs saving
        torch.manual_seed(hash((seed, step, rank)) % 2**63)
        start = step * sequences + rank * mine
        nats = torch.zeros((), device=where)
        for offset in range(0, mine, micro):
            last = offset + micro >= mine
            x, y = get_batch(start + offset, min(micro, mine - offset))  # (b, T), (b, T)
            lap("load")
            with contextlib.nullcontext() if last or not ddp else run.no_sync():  # gradients meet on the last micro-step only
                with autocast:
                    loss = run(x, y)  # nats of this micro-batch
                lap("forward")
                # Divided by the targets of the whole step, so that it does not matter how the step is cut. DDP takes the mean over
                # processes where the sum is meant, hence the factor.
                scaler.scale(loss * (world / batch_tokens)).backward()
            lap("backward")
            nats += loss.detach()
        if scaler.is_enabled():
            for o in optimizers:
                scaler.unscale_(o)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        # Was any process told to stop? And rank 0's clock, as it will be when the next step ends
        now = 0.0
        if first and budget < math.inf:
            synchronize(where)
            now = spent_share(statistics.median(spans[1:][-3:] or spans or [0.0]))
        told = torch.cat((nats.double()[None] if where.type != "mps" else nats[None], torch.tensor([float(bool(stopped)), now], device=where)))
        if ddp:
            dist.all_reduce(told)
        lap("rest")
        (loss, stop, share), norm = told.tolist(), norm.item()  # here the CPU waits for the GPU
        loss /= batch_tokens
        if math.isfinite(loss) and math.isfinite(norm):
            for o in optimizers:
                o.step()
            skipped = 0
            lap("optimizer")
        else:  # a non-finite gradient never reaches the weights
            skipped += 1
            say(f"step {step + 1:>6}  loss {loss:.4f}, gradient norm {norm:.4f}: step skipped" + ", loss scale lowered" * scaler.is_enabled())
            if skipped == 30:
                config.fail(f"the loss or gradient was not finite 30 steps in a row; lower --learning_rate={learning_rate:g}. The last checkpoint is whole")
        if scaler.is_enabled():
            scaler.update()
        model.zero_grad(set_to_none=True)
        step += 1
        synchronize(where)
        lap("rest")
        spent = time.perf_counter() - begun
        if first:
            rate = batch_tokens / spent
            mfu = flops * rate / peak
            memory = peak_memory(where)
            write_row(
                step=step, tokens=step * batch_tokens, seconds=round(seconds(), 3), loss=loss, lr=lr, grad_norm=norm,
                tokens_per_second=round(rate, 1), mfu=round(mfu, 5), memory=memory,
            )  # fmt: skip
            spans.append(spent)
            if step % log_interval == 0 or step == 1:
                recent = sum(spans[-log_interval:]) / len(spans[-log_interval:])
                metrics.flush()
                say(
                    f"step {step:>6}{f'/{max_steps}' if budget == math.inf else f' {share:4.0%}'}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  {batch_tokens / recent:,.0f} tokens/s  "
                    f"MFU {flops * batch_tokens / recent / peak:.1%}  {memory / 2**20:,.0f} MB  left {duration((max_steps - step) * recent if budget == math.inf else budget - seconds())}"
                )
        if stop:
            if first:
                save()
                say(f"told to stop: saved step {step}; go on with --resume")
            if ddp:
                dist.barrier()  # who leaves before rank 0 has saved would have torchrun kill it
                del run  # before its process group: gloo's threads and the interpreter's lock would wait for each other
                dist.destroy_process_group()
            sys.exit(128 + (stopped[0] if stopped else signal.SIGTERM))

    if first:
        result, line = summary(model, rows, best, peak)
        result |= {"trial_seconds": trial_seconds, "startup_seconds": startup_seconds}
        if time_parts:
            result["parts"] = {part: t / (sum(parts.values()) or math.nan) for part, t in parts.items()}
        if json:
            config.write_json(json, result)
        if best.get("step", step) != step:
            say(f"the best is step {best['step']}: val loss {best['val_loss']:.4f}")
        say(line)
    if ddp:
        del run
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
