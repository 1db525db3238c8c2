"""The whole GPT: configuration, blocks, loss, KV cache, generation, and the checkpoint as a Hugging Face folder.

Two corners of GPTConfig are stock architectures, so that what is trained here runs everywhere:
  the default (RMSNorm, rotary, QK-norm, SwiGLU, grouped queries, no biases) is what transformers' Qwen3ForCausalLM computes;
  norm="layer", positions="learned", mlp="gelu", bias=True, qk_norm=False, tie_embeddings=True is GPT-2.
Modules bear Qwen3's names. Every switch in between trains as well; only stock loaders refuse it (model_type daygpt).
"""
import glob
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

IGNORE = -100  # a target that counts nowhere, such as padding


@dataclass
class GPTConfig:
    block_size: int = 1024  # tokens of context
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None  # heads of keys and values, shared by n_head / n_kv_head query heads each (arXiv:2305.13245); None: n_head
    n_embd: int = 768
    head_dim: int | None = None  # None: n_embd / n_head
    intermediate_size: int | None = None  # MLP width; None: 4 n_embd for gelu; for swiglu 8/3 n_embd (as many weights), up to a multiple of 64
    dropout: float = 0.0
    bias: bool = False  # in Linear and LayerNorm
    norm: str = "rms"  # rms (arXiv:1910.07467) or layer
    positions: str = "rotary"  # rotary (arXiv:2104.09864) or learned
    mlp: str = "swiglu"  # swiglu (arXiv:2002.05202) or gelu (tanh approximation, as in GPT-2)
    qk_norm: bool = True  # RMSNorm over each head's query and key, before the rotation (arXiv:2302.05442)
    tie_embeddings: bool = False  # one matrix for embedding and head
    rope_theta: float = 10000.0
    norm_eps: float | None = None  # None: 1e-6 for rms, 1e-5 for layer

    def __post_init__(self):
        """Fill in what is None. Raises ValueError for what cannot be."""
        for name, choices in (("norm", ("rms", "layer")), ("positions", ("rotary", "learned")), ("mlp", ("swiglu", "gelu"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, not {self.block_size}")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}; set n_kv_head to a divisor of n_head")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; change one of them or set head_dim")
            self.head_dim = self.n_embd // self.n_head
        if self.head_dim % 2 and self.positions == "rotary":
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs, so set n_embd, n_head or head_dim to make it even")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.n_embd if self.mlp == "gelu" else math.ceil(8 * self.n_embd / 3 / 64) * 64
        if self.norm_eps is None:
            self.norm_eps = 1e-6 if self.norm == "rms" else 1e-5

    def architecture(self):
        """The stock architecture that computes exactly this, 'qwen3' or 'gpt2'; 'daygpt' if there is none."""
        switches = (self.norm, self.positions, self.mlp, self.bias, self.qk_norm)
        if switches == ("rms", "rotary", "swiglu", False, True):
            return "qwen3"
        heads = self.n_kv_head == self.n_head and self.head_dim * self.n_head == self.n_embd
        if switches == ("layer", "learned", "gelu", True, False) and heads and self.tie_embeddings:
            return "gpt2"
        return "daygpt"


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)  # the fused kernel wants one dtype


class Linear(nn.Linear):
    def forward(self, x):
        rows = x.numel() // self.in_features
        plain = x.is_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if plain and 1 <= rows <= 32 and self.out_features % 2 == 0:
            # A step of decoding. On AMD's CPUs MKL multiplies a matrix by few vectors at a third of the speed that it has for a batch of two
            y = torch.bmm(self.weight.view(2, -1, self.in_features), x.reshape(rows, -1).t().expand(2, -1, -1))  # (2, out / 2, rows)
            y = y.view(-1, rows).t().reshape(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


def make_norm(config, size):
    return RMSNorm(size, eps=config.norm_eps) if config.norm == "rms" else nn.LayerNorm(size, config.norm_eps, bias=config.bias)


def rotate(x, cos, sin):
    """Turn the pairs (x[i], x[i + D/2]) by their position's angles. x (B, H, T, D); cos, sin (T, D) or (B, 1, T, D), the sines of the first
    half negative: x[i] cos - x[i + D/2] sin, and x[i + D/2] cos + x[i] sin."""
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def attend(q, k, v, mask, dropout, normed):
    """softmax(q k^T / sqrt(D)) v for q (B, H, T, D) and k, v (B, H_kv, L, D): causal, or where the mask (B or 1, 1, T, L) says."""
    T, D = q.shape[-2:]
    if q.is_cpu and q.dtype == torch.bfloat16 and normed and mask is None and 1 < T <= 512 and q.shape == k.shape and not dropout:
        # torch's kernel is slow here: 13 ms, forward and backward, for 8 × 4 × 256 × 64 on 2 cores of an EPYC, against 5 ms for this.
        # It rounds the scores to 8 bits, which is harmless where q and k are normed: they are sqrt(D) then at the most, but for the gains
        hidden = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
        shares = torch.baddbmm(hidden, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=D**-0.5).softmax(-1)  # (B H, T, T)
        return (shares @ v.flatten(0, 1)).view(q.shape)
    causal = mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=q.size(1) != k.size(1))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim, self.dropout = config.n_head, config.n_kv_head, config.head_dim, config.dropout
        self.q_proj = Linear(config.n_embd, config.n_head * config.head_dim, bias=config.bias)
        self.k_proj = Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.bias)
        self.v_proj = Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.bias)
        self.o_proj = Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x, rope, mask, cache, layer):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, D), (B, H_kv, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, H_kv, L, D): all positions so far
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0, hasattr(self, "q_norm"))
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.mlp == "swiglu":
            self.gate_proj = Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.up_proj = Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.down_proj = Linear(config.intermediate_size, config.n_embd, bias=config.bias)

    def forward(self, x):
        if hasattr(self, "gate_proj"):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = make_norm(config, config.n_embd)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, mask, cache, layer):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache, layer))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class KVCache:
    """Keys and values of B sequences, each of its own length: row b holds lengths[b] positions of `max_length`."""

    def __init__(self, config, batch, max_length, device, dtype):
        shape = (config.n_layer, batch, config.n_kv_head, max_length, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch  # on the host: to ask the GPU for them would stall it at every token

    def begin(self, T):
        """Prepare for T new tokens a row: their positions (T,) or (B, T), and the attention mask, None where causal or nothing says it."""
        self.even, start, device = len(set(self.lengths)) == 1, self.lengths[0], self.k.device
        self.end = max(self.lengths) + T
        if self.even:
            self.positions = torch.arange(start, start + T, device=device)
            if start == 0 or T == 1:
                return self.positions, None
        else:
            self.positions = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(T, device=device)
        return self.positions, torch.arange(self.end, device=device) <= self.positions.view(-1, 1, T, 1)  # (B or 1, 1, T, L)

    def update(self, layer, k, v):
        """Store the new k, v (B, H_kv, T, D) of one layer; returns all up to the longest row's end (B, H_kv, L, D)."""
        if self.even:
            self.k[layer, :, :, self.end - k.size(2) : self.end] = k
            self.v[layer, :, :, self.end - k.size(2) : self.end] = v
        else:
            rows = torch.arange(k.size(0), device=k.device)[:, None]
            self.k[layer, rows, :, self.positions] = k.transpose(1, 2).to(self.k.dtype)  # (B, T, H_kv, D)
            self.v[layer, rows, :, self.positions] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer, :, :, : self.end], self.v[layer, :, :, : self.end]


class LossSum(torch.autograd.Function):
    """The sum of the cross-entropies, in nats, of targets (N,) after hidden states h (N, C) with head weights (V, C); IGNORE counts nothing.

    The gradient of a sum does not depend on what comes after it but for a factor, so it is made along with the loss, for some 2^23 logits
    at a time (32 MB in float32; 2^27 on CUDA, where each piece costs a pass over the gradient): N × V of them are never held, nor computed
    twice (the idea of Liger's kernel, arXiv:2410.10989). Backward works in place: once."""

    @staticmethod
    def forward(ctx, h, weight, targets):
        kind = h.device.type
        number = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        w, total, grad_h, grad_w = weight.to(number), h.new_zeros((), dtype=torch.float32), torch.empty_like(h), torch.zeros_like(weight)
        rows = max(1, (2**27 if h.is_cuda else 2**23) // len(w))
        for a, t, g in zip(h.to(number).split(rows), targets.split(rows), grad_h.split(rows)):
            counts = (t != IGNORE)[:, None]
            place = t.clamp(min=0)[:, None]
            log_p = (a @ w.t()).float().log_softmax(-1)  # (rows, V)
            total -= log_p.gather(1, place).where(counts, 0.0).sum()
            error = log_p.exp_().scatter_add_(1, place, -torch.ones_like(place, dtype=torch.float32)).to(number)  # dloss/dlogits
            g.copy_((error @ w).where(counts, 0.0))
            if number == grad_w.dtype:
                grad_w.addmm_(error.t(), a.where(counts, 0.0))  # without a pass of its own for the sum
            else:
                grad_w += error.t() @ a.where(counts, 0.0)
        ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h.mul_(grad), grad_w.mul_(grad), None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(config.vocab_size, config.n_embd)})
        if config.positions == "learned":
            self.model["embed_positions"] = nn.Embedding(config.block_size, config.n_embd)
        self.model["layers"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.model["norm"] = make_norm(config, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        self.make_angles()
        self.init_weights()

    def make_angles(self):
        """The cosine and sine of every position's rotations, (block_size, D) each, as `rotate` wants them: not saved, for they follow from
        the configuration."""
        c = self.config
        if c.positions == "rotary":
            frequencies = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim)  # (D/2,)
            angles = torch.arange(c.block_size).float()[:, None] * frequencies  # (block_size, D/2)
            self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
            self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), dim=-1), persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """All initialization: N(0, 0.02), what is added to the residual stream scaled by 1/sqrt(2 n_layer) (GPT-2, section 2.3)."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                p.normal_(0.0, 0.02 * scale)

    def hidden(self, idx, cache=None):
        """The last layer's normalized output for token ids idx (B, T), after those that `cache` holds: (B, T, n_embd)."""
        B, T = idx.shape
        positions, mask = (slice(T), None) if cache is None else cache.begin(T)
        x = self.model["embed_tokens"](idx)  # (B, T, C)
        rope = None
        if self.config.positions == "learned":
            x = x + self.model["embed_positions"].weight[positions]
        else:
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            rope = self.cos[positions].to(dtype), self.sin[positions].to(dtype)  # (T, D) or (B, T, D)
            if rope[0].dim() == 3:
                rope = rope[0][:, None], rope[1][:, None]  # (B, 1, T, D): the same for every head
        x = self.dropout(x)
        for layer, block in enumerate(self.model["layers"]):
            x = block(x, rope, mask, cache, layer)
        if cache is not None:
            cache.lengths = [n + T for n in cache.lengths]
        return self.model["norm"](x)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) for token ids idx (B, T), T <= block_size; with targets (B, T) the sum of their losses in nats instead."""
        h = self.hidden(idx)
        return self.lm_head(h) if targets is None else LossSum.apply(h.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def count_parameters(self):
        """All parameters, each once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating-point operations of forward and backward for one token, with a full window of attention.

        6 for each weight of a matrix product (2 forward, 4 backward; arXiv:2001.08361, section 2.1) and, for scores and weighted sums,
        12 n_head head_dim block_size a layer (PaLM, arXiv:2204.02311, appendix B). The embedding is a lookup and costs nothing."""
        c = self.config
        matrices = sum(p.numel() for n, p in self.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n)
        return 6 * (matrices + c.vocab_size * c.n_embd) + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, pick=lambda logits, sequences: logits.argmax(-1), use_cache=True):
        """Continue the prompts, lists of token ids of any lengths; yields the new ids of all rows, a tensor (B,), token by token.

        `pick(logits (B, V), sequences)` chooses them; the default is greedy. use_cache=False is the slow reference."""
        growing = Growing(self, prompts, max_new_tokens, use_cache)
        for _ in range(max_new_tokens):
            ids = pick(growing.logits(), growing.sequences)
            yield ids
            growing.append(ids.tolist())

    @classmethod
    def from_pretrained(cls, path, device="cpu"):
        """The model in a run, a step folder, a Hugging Face folder of Qwen3 or GPT-2, or of that name on the hub (float32).

        Raises ValueError or OSError with what is wrong: nothing there, damaged, or an architecture that this file does not compute."""
        folder = find_checkpoint(path)
        try:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
                config = read_hf_config(json.load(f))
            state = {}
            for file in sorted(glob.glob(os.path.join(folder, "model*.safetensors"))):  # one, or a big model's several
                state.update(load_file(file))
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, FileNotFoundError) as e:
            raise ValueError(f"{folder} is damaged or no model: {type(e).__name__} {e}") from e
        if config.architecture() == "gpt2":
            state = from_gpt2(state)
        if config.tie_embeddings:
            state["lm_head.weight"] = state.get("model.embed_tokens.weight")
        with torch.device("meta"):  # no memory and no time for weights that are replaced at once
            model = cls(config)
        wanted = {name: p.shape for name, p in model.state_dict().items()}
        found = {name: p.shape for name, p in state.items() if p is not None}
        if wanted != found:
            wrong = sorted(set(wanted.items()) ^ set(found.items()), key=str)[0]
            raise ValueError(f"{folder}: the weights do not fit its config.json, first {wrong[0]} {tuple(wrong[1])}")
        model.load_state_dict({name: p.to(torch.float32, copy=True) for name, p in state.items()}, assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.model["embed_tokens"].weight
        model.make_angles()
        return model.to(device)

    def save_pretrained(self, folder, eos_token_id=None):
        """Write config.json, generation_config.json and model.safetensors, as transformers writes and reads them."""
        os.makedirs(folder, exist_ok=True)
        state = {name: p.detach().float().cpu().contiguous() for name, p in self.state_dict().items()}
        if self.config.tie_embeddings:
            del state["lm_head.weight"]
        if self.config.architecture() == "gpt2":
            state = to_gpt2(state)
        save_file(state, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        ends = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
        for name, content in (("config.json", write_hf_config(self.config) | ends), ("generation_config.json", ends)):
            with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
                json.dump(content, f, indent=2)


def context_start(n, block_size):
    """Where the context of a sequence of n tokens begins: at 0 while all fit; when they no longer do, block_size // 2 are kept,
    which then grow to block_size again. A function of n alone, so a sequence goes on the same in any batch, cached or not."""
    jump = block_size + 1 - block_size // 2
    return 0 if n <= block_size else -(-(n - block_size) // jump) * jump


class Growing:
    """Sequences that grow by a token at a time, and the cache that serves them: for `generate` and for beam search."""

    def __init__(self, model, prompts, max_new_tokens, use_cache=True):
        if not all(prompts):
            raise ValueError("an empty prompt gives the model nothing to continue; begin with <|endoftext|>")
        self.model, self.sequences, self.use_cache = model, [list(p) for p in prompts], use_cache
        self.max_length = min(model.config.block_size, max(map(len, prompts)) + max_new_tokens)
        self.starts = self.cache = None

    def logits(self):
        """Logits (B, V), float32, of the token that follows each sequence."""
        starts = [context_start(len(s), self.model.config.block_size) for s in self.sequences]
        device = self.model.lm_head.weight.device
        if self.use_cache and starts == self.starts:  # all but the newest token are in the cache
            h = self.model.hidden(torch.tensor([s[-1:] for s in self.sequences], device=device), self.cache)[:, -1]
        else:
            windows = [s[start:] for s, start in zip(self.sequences, starts)]
            lengths = [len(w) for w in windows]
            idx = torch.zeros(len(windows), max(lengths), dtype=torch.long)  # padded on the right, where causal attention never looks
            for row, window in zip(idx, windows):
                row[: len(window)] = torch.tensor(window)
            if self.use_cache:
                dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.model.lm_head.weight.dtype
                self.cache = KVCache(self.model.config, len(windows), self.max_length, device, dtype)
            h = self.model.hidden(idx.to(device), self.cache)
            h = h[torch.arange(len(windows), device=device), torch.tensor(lengths, device=device) - 1]
            if self.use_cache:
                self.cache.lengths, self.starts = lengths, starts
        return self.model.lm_head(h).float()

    def append(self, ids, rows=None):
        """Append one id to each sequence; with `rows`, to those of these numbers, which take the places of all."""
        if rows is not None:
            self.sequences = [list(self.sequences[r]) for r in rows]
            if self.cache is not None:
                index = torch.tensor(rows, device=self.cache.k.device)
                self.cache.k, self.cache.v = self.cache.k.index_select(1, index), self.cache.v.index_select(1, index)
                self.cache.lengths, self.starts = [self.cache.lengths[r] for r in rows], [self.starts[r] for r in rows]
        for sequence, token in zip(self.sequences, ids):
            sequence.append(token)


@torch.inference_mode()
def score(model, windows, token_bytes=None, autocast=None):
    """The loss over fixed windows: train.py's validation and evaluate.py's figures.

    windows: pairs x, y of int64 arrays (B, T), y IGNORE where a target does not count; token_bytes: (V,) bytes that each id stands for.
    Returns float64 sums: nats and number of targets, how many were the likeliest token, and nats and bytes of those with bytes."""
    training, device, vocab_size = model.training, model.lm_head.weight.device, model.config.vocab_size
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device="cpu" if device.type == "mps" else device)  # MPS has no float64
    sizes = torch.zeros(vocab_size, device=device)
    if token_bytes is not None:
        sizes[: len(token_bytes)] = torch.as_tensor(token_bytes, dtype=torch.float32)[: vocab_size].to(device)
    rows = max(1, 2**25 // vocab_size)
    for x, y in windows:
        x, y = torch.as_tensor(x).to(device), torch.as_tensor(y).to(device)
        with autocast or torch.autocast(device.type, enabled=False):
            h = model.hidden(x).reshape(-1, model.config.n_embd)
            for a, t in zip(h.split(rows), y.reshape(-1).split(rows)):
                logits = model.lm_head(a).float()  # (rows, V)
                nats, counts = F.cross_entropy(logits, t, ignore_index=IGNORE, reduction="none"), t != IGNORE
                bytes_ = sizes[t.clamp(min=0)] * counts
                right = (logits.argmax(-1) == t) & counts
                sums += torch.stack([v.to(sums.device).double().sum() for v in (nats, counts, right, nats * (bytes_ > 0), bytes_)])
    model.train(training)
    return sums


def figures(sums):
    """What is reported of `score`'s sums: loss (nats a token), perplexity, accuracy, bits_per_byte, and the number of targets."""
    nats, targets, right, byte_nats, n_bytes = sums.tolist()
    if not targets:
        raise ValueError("there is nothing to score: not one target")
    loss = nats / targets
    bpb = byte_nats / math.log(2) / n_bytes if n_bytes else float("nan")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": right / targets, "bits_per_byte": bpb, "targets": int(targets)}


# ---- Which device, and which number type on it ----

DEVICES = {  # device: (number type of matrix products by default, compile by default)
    "cuda": (torch.bfloat16, True),  # float16 before Ampere, which has no bfloat16 units
    "mps": (torch.float32, False),
    "cpu": (torch.float32, False),  # compiling takes longer than it saves on small models; bfloat16 for training where the CPU has units for it
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device="auto", dtype="auto", training=False):
    """The torch.device, torch.dtype and compile default for settings `device` (auto, cpu, cuda, cuda:1, mps) and `dtype`. Raises ValueError.

    For training a CPU that has units for bfloat16 uses it by default; decoding one sequence in it would be slower than in float32."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in DEVICES if there[k]) if device == "auto" else "cuda" if re.fullmatch(r"cuda:\d+", device) else device
    if kind not in DEVICES:
        raise ValueError(f"device must be auto or one of {', '.join(DEVICES)}, not {device!r}")
    if not there[kind]:
        raise ValueError(f"device={device}, but this torch {torch.__version__} finds no such device here; use --device=cpu, or install a torch that does")
    if device.startswith("cuda:") and int(device[5:]) >= torch.cuda.device_count():
        raise ValueError(f"device={device}, but there are {torch.cuda.device_count()} GPUs, numbered from 0")
    number, compiled = DEVICES[kind]
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        number = torch.float16
    if kind == "cpu" and training:
        units = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not say
        number = torch.bfloat16 if units.get("avx512_bf16") or units.get("amx_bf16") else number  # 4 times float32's rate on an EPYC
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, not {dtype!r}")
        number = DTYPES[dtype]
    return torch.device(kind if device == "auto" else device), number, compiled


def synchronize(device):
    """Wait until a GPU has done what it was told; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# ---- Hugging Face folders ----


def find_checkpoint(path):
    """The folder with config.json that `path` means: itself, the best step of a run (else its newest), or a hub model's download."""
    if os.path.isfile(os.path.join(path, "config.json")):
        return path
    steps = run_steps(path)
    if steps:
        best = read_json(os.path.join(steps[-1], "trainer.json")).get("best") or {}
        folder = os.path.join(path, f"step-{best.get('step', -1):06d}")
        return folder if folder in steps else steps[-1]
    if os.path.exists(path):
        raise ValueError(f"{path} holds no model: neither config.json nor step-… folders")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith(("out/", "data/")):
        raise ValueError(f"there is no model at {path!r}; name a run (out/…), a step folder, a Hugging Face folder, or a hub name such as gpt2")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ImportError(f"there is no folder {path!r}; to fetch it from the hub: pip install huggingface_hub") from e
    try:
        return snapshot_download(path, allow_patterns=["*.json", "model*.safetensors"])
    except Exception as e:  # the hub's own errors, and those of whichever HTTP library it uses
        raise ValueError(f"there is no folder {path!r}, and the hub did not give a model of that name: {type(e).__name__}: {str(e)[:200]}") from e


def run_steps(run):
    """The checkpoints of a run, oldest first: folders step-NNNNNN that were written to the end."""
    steps = [f for f in glob.glob(os.path.join(glob.escape(run), "step-*")) if re.search(r"step-\d+$", f)]
    return sorted(steps, key=lambda f: int(f.rsplit("-", 1)[1]))


def read_json(path):
    """The object in a JSON file; {} where there is no file, or none that can be read."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def write_hf_config(c):
    """config.json of the stock class that computes this configuration, or of model_type daygpt."""
    common = {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_embeddings, "torch_dtype": "float32"}
    if c.architecture() == "qwen3":
        return common | {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer,
            "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "hidden_act": "silu",
            "intermediate_size": c.intermediate_size, "max_position_embeddings": c.block_size, "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_theta, "attention_bias": False, "attention_dropout": c.dropout, "use_sliding_window": False,
        }  # fmt: skip
    if c.architecture() == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
            "n_positions": c.block_size, "n_inner": c.intermediate_size, "layer_norm_epsilon": c.norm_eps, "activation_function": "gelu_new",
            "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
        }  # fmt: skip
    return common | {"model_type": "daygpt"} | asdict(c)


def read_hf_config(d):
    """The GPTConfig of a config.json's content. Raises ValueError for an architecture or option that model.py does not compute."""
    if not isinstance(d, dict):
        raise ValueError(f"config.json is damaged: it holds {d!r}, no settings of a model")
    kind = d.get("model_type")
    if kind == "daygpt":
        return GPTConfig(**{f.name: d[f.name] for f in fields(GPTConfig)})
    if kind == "qwen3":
        rope = d.get("rope_parameters") or d.get("rope_scaling") or {}  # transformers 5; 4 has rope_theta at the top
        odd = {"attention_bias": d.get("attention_bias"), "use_sliding_window": d.get("use_sliding_window")}
        odd["rope_type"] = rope.get("rope_type", rope.get("type", "default")) != "default"
        odd["hidden_act"] = d.get("hidden_act", "silu") != "silu"
        config = GPTConfig(
            block_size=d["max_position_embeddings"], vocab_size=d["vocab_size"], n_layer=d["num_hidden_layers"], n_head=d["num_attention_heads"],
            n_kv_head=d.get("num_key_value_heads") or d["num_attention_heads"], n_embd=d["hidden_size"], head_dim=d.get("head_dim", 128),
            intermediate_size=d["intermediate_size"], dropout=d.get("attention_dropout", 0.0), tie_embeddings=d.get("tie_word_embeddings", False),
            rope_theta=float(rope.get("rope_theta", d.get("rope_theta", 10000.0))), norm_eps=d.get("rms_norm_eps", 1e-6),
        )  # fmt: skip
    elif kind == "gpt2":
        odd = {name: d.get(name) for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")}
        odd["activation_function"] = d.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh")
        odd["tie_word_embeddings"] = not d.get("tie_word_embeddings", True)
        config = GPTConfig(
            block_size=d.get("n_positions", 1024), vocab_size=d["vocab_size"], n_layer=d["n_layer"], n_head=d["n_head"], n_embd=d["n_embd"],
            intermediate_size=d.get("n_inner") or 4 * d["n_embd"], dropout=d.get("resid_pdrop", 0.1), norm_eps=d.get("layer_norm_epsilon", 1e-5),
            bias=True, norm="layer", positions="learned", mlp="gelu", qk_norm=False, tie_embeddings=True,
        )  # fmt: skip
    else:
        raise ValueError(f"model_type {kind!r} is none that daygpt computes; it reads qwen3, gpt2 and its own")
    unread = [name for name, present in odd.items() if present]
    if unread:
        raise ValueError(f"this {kind} model uses {unread[0]}={d.get(unread[0], rope if kind == 'qwen3' else None)!r}, which daygpt does not compute")
    return config


GPT2_NAMES = (  # ours, theirs
    ("model.embed_tokens.", "wte."), ("model.embed_positions.", "wpe."), ("model.norm.", "ln_f."), ("model.layers.", "h."),
    (".input_layernorm.", ".ln_1."), (".self_attn.o_proj.", ".attn.c_proj."), (".post_attention_layernorm.", ".ln_2."),
    (".mlp.up_proj.", ".mlp.c_fc."), (".mlp.down_proj.", ".mlp.c_proj."), (".self_attn.qkv.", ".attn.c_attn."),
)  # fmt: skip


def rename(name, pairs):
    for old, new in pairs:
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def to_gpt2(state):
    """Our weights under GPT-2's names: q, k and v in one c_attn; its Conv1D holds matrices as (in, out)."""
    state, out = dict(state), {}
    for name in [n for n in state if ".q_proj." in n]:
        state[name.replace("q_proj", "qkv")] = torch.cat([state.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"])
    for name, p in state.items():
        name = rename(name, GPT2_NAMES)
        out["transformer." + name] = p.t().contiguous() if p.dim() == 2 and ".c_" in name else p
    return out


def from_gpt2(state):
    """The inverse of to_gpt2. OpenAI's first files on the hub lack the prefix and hold the causal mask as buffers."""
    out = {}
    for name, p in state.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue
        p = p.t().contiguous() if p.dim() == 2 and ".c_" in name else p
        name = rename(name, [(theirs, ours) for ours, theirs in GPT2_NAMES])
        if ".qkv." in name:
            out |= {name.replace("qkv", f"{x}_proj"): part.clone() for x, part in zip("qkv", p.chunk(3))}
        else:
            out[name] = p
    return out
