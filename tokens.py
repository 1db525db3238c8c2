"""Tokens on disk: tokenizers, the shards of a data set, and the batches and windows that are read from it.

A tokenizer is a tiktoken Encoding, always. A data set is a folder of 1-D .npy shards beside a meta.json; every document in it
begins with <|endoftext|>. A batch is a pure function of (seed, step): nothing about the loader needs saving.
"""
import base64
import bisect
import difflib
import functools
import glob
import hashlib
import json
import os
import re
import zipfile

import numpy as np
import tiktoken

END = "<|endoftext|>"
RESERVED = [f"<|reserved_{i}|>" for i in range(8)]  # ids that a trained vocabulary keeps free, for chat markers or a mask
IGNORE = -100  # a target that counts nowhere, as in model.py

# Qwen2's split pattern: one that llama.cpp knows by name, so that an exported vocabulary runs there
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what Hugging Face's ByteLevel splits by

# ---- Tokenizers ----


def get_tokenizer(name):
    """The Encoding of a tiktoken name (gpt2, o200k_base …), of `bytes` (256 + 1 ids), or of a folder: a data set, a run's step, a Hugging
    Face model with a tokenizer.json of byte-level BPE. Raises ValueError with what to do."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={END: 256})
    if os.path.isdir(name):
        return load_tokenizer(name)
    if name not in tiktoken.list_encoding_names():
        near = difflib.get_close_matches(name, [*tiktoken.list_encoding_names(), "bytes"], 1)
        hint = f"did you mean {near[0]}?" if near else "use bytes, train:4096, a folder, or one of " + ", ".join(tiktoken.list_encoding_names())
        raise ValueError(f"there is no tokenizer {name!r}; {hint}")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as e:  # requests' errors are OSErrors
        raise ValueError(
            f"tiktoken could not fetch the vocabulary {name!r} ({type(e).__name__}); offline, set TIKTOKEN_CACHE_DIR to a folder that "
            "holds it, or use --tokenizer=bytes or --tokenizer=train:4096, which need no download"
        ) from e
    if END not in encoding.special_tokens_set:
        raise ValueError(f"the vocabulary {name!r} has no {END} to separate documents with; use gpt2, cl100k_base or o200k_base")
    return encoding


def train_tokenizer(texts, vocab_size):
    """An Encoding of vocab_size ids (fewer where the text has not so many pairs), trained by byte-pair encoding on an iterable of strings."""
    import rustbpe

    special = [END, *RESERVED]
    if vocab_size < 256 + len(special):
        raise ValueError(f"tokenizer=train:{vocab_size} is too small: 256 bytes and {len(special)} special ids make {256 + len(special)} at least")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - len(special), pattern=QWEN2)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return tiktoken.Encoding("trained", pat_str=QWEN2, mergeable_ranks=ranks, special_tokens={s: len(ranks) + i for i, s in enumerate(special)})


def token_bytes(encoding):
    """What each id stands for: a list of bytes, b"" for special ids, None for ids that the vocabulary leaves out."""
    table = [None] * encoding.n_vocab
    for token, rank in encoding._mergeable_ranks.items():  # tiktoken's own accessor copies and sorts, and knows no gaps
        table[rank] = token
    for token in encoding._special_tokens.values():
        table[token] = b""
    return table


def byte_lengths(encoding):
    """Bytes that each id stands for, int64 (n_vocab,): what bits per byte divides by. Special ids stand for none."""
    return np.array([len(token or b"") for token in token_bytes(encoding)], dtype=np.int64)


@functools.lru_cache(maxsize=8)
def fingerprint(encoding):
    """A short hash of a vocabulary: equal for two Encodings that turn the same ids into the same bytes."""
    digest = hashlib.sha256(repr(sorted(encoding._special_tokens.items())).encode())
    for token in token_bytes(encoding):
        digest.update(b"%d:" % len(token or b"") + (token or b""))
    return digest.hexdigest()[:16]


def byte_symbols():
    """GPT-2's printable stand-in for each byte, as tokenizer.json spells tokens: printable Latin-1 stands for itself, others follow 255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {**{b: chr(b) for b in shown}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


@functools.lru_cache(maxsize=2)
def tokenizer_json(encoding):
    """The text of a Hugging Face tokenizer.json that gives the ids that tiktoken gives."""
    symbols, ranks = byte_symbols(), encoding._mergeable_ranks

    def spell(token):
        return "".join(symbols[b] for b in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]  # merge it as far as the ranks before its own go: two parts remain
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:  # else only a piece that is this token as a whole can become it: ignore_merges
            merges.append([spell(part) for part in parts])
    added = [
        {"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for s, i in sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    ]
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    bpe |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": True, "vocab": {spell(t): r for t, r in ranks.items()}, "merges": merges}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None, "decoder": level, "model": bpe,
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False)


def save_tokenizer(encoding, folder, block_size):
    """Write tokenizer.json and tokenizer_config.json, for transformers' AutoTokenizer."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END,
        "model_max_length": block_size, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    for name, content in (("tokenizer.json", tokenizer_json(encoding)), ("tokenizer_config.json", json.dumps(settings, indent=2))):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write(content)


def load_tokenizer(folder):
    """The Encoding of a data set or of a Hugging Face folder. Raises ValueError where it is none that tiktoken can run."""
    try:
        if os.path.exists(os.path.join(folder, "meta.json")):
            return Meta(folder).encoding()
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as f:
            content = json.load(f)
        model, special = content["model"], {t["content"]: t["id"] for t in content["added_tokens"]}
        before = content["pre_tokenizer"] or {}
        steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
        kinds = [step.get("type") for step in steps]
        problem = None
        if model.get("type", "BPE") != "BPE" or not kinds or kinds[-1] != "ByteLevel" or kinds[:-1] not in ([], ["Split"]):
            problem = f"it is {model.get('type')} with {kinds}, not byte-level BPE"
        elif (content["normalizer"] or {}).get("type", "NFC") != "NFC" or steps[-1].get("add_prefix_space"):
            problem = "it changes the text before it splits it"  # NFC is what prepare.py's cleaning gives anyway
        elif kinds == ["ByteLevel"] and not steps[0].get("use_regex", True) or model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
            problem = "it splits or marks words in an unusual way"
        elif END not in special:
            problem = f"it has no {END}"
        if not problem:
            pattern = GPT2 if kinds == ["ByteLevel"] else steps[0]["pattern"].get("Regex")
            values = {symbol: byte for byte, symbol in byte_symbols().items()}
            ranks = {bytes(values[c] for c in token): i for token, i in model["vocab"].items() if token not in special}
            merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
            order = [model["vocab"]["".join(m)] for m in merges]
            if order != sorted(order) or (kinds[0] == "Split" and steps[0]["behavior"] != "Isolated") or not pattern:
                problem = "its ids do not follow the order of its merges, or it splits in an unusual way"
            elif missing := [b for b in range(256) if bytes([b]) not in ranks]:
                problem = f"{len(missing)} of the 256 bytes have no id"
    except FileNotFoundError as e:
        raise ValueError(f"{folder} holds no tokenizer: neither meta.json nor tokenizer.json") from e
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise ValueError(f"{folder}: its tokenizer file is damaged: {type(e).__name__} {e}") from e
    if problem:
        raise ValueError(f"{folder}: tiktoken cannot run its tokenizer: {problem}")
    return tiktoken.Encoding(os.path.basename(os.path.abspath(folder)), pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


# ---- Data sets ----


class Meta:
    """meta.json of a data set, checked; for llm.c's and modded-nanogpt's folders of .bin shards, what can be said of them."""

    def __init__(self, folder):
        self.folder = folder
        bins = sorted(glob.glob(os.path.join(glob.escape(folder), "*.bin")))
        path = os.path.join(folder, "meta.json")
        if os.path.exists(path):
            try:
                with open(path, encoding="utf-8") as f:
                    self.content = json.load(f)
                if self.content["format_version"] != 1:
                    raise ValueError(f"{path}: format version {self.content['format_version']}; this daygpt reads 1, so prepare the data anew")
                self.tokenizer, self.vocab_size = self.content["tokenizer"], self.content["tokenizer"]["vocab_size"]
                self.files = {split: [(s["file"], s["tokens"], s["sha256"]) for s in self.content["shards"][split]] for split in ("train", "val")}
            except (KeyError, TypeError, json.JSONDecodeError) as e:
                raise ValueError(f"{path} is damaged ({type(e).__name__} {e}): prepare the data anew") from e
        elif bins:
            self.tokenizer, self.vocab_size = {"kind": "tiktoken", "name": "gpt2"}, 50257
            self.files = {s: [(os.path.basename(b), None, None) for b in bins if re.search(f"(^|_){s}[_.]", os.path.basename(b))] for s in ("train", "val")}
        else:
            default = " " if folder == "data/python" else f" YOUR_TEXT --out={folder} "
            raise ValueError(f"there is no data set in {folder!r}; make it first: python prepare.py{default}".rstrip())

    def encoding(self):
        """The data set's tokenizer."""
        path = os.path.join(self.folder, "tokenizer.tiktoken")
        if not os.path.exists(path):
            return get_tokenizer(self.tokenizer["name"])
        with open(path, "rb") as f:
            ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in f)}
        encoding = tiktoken.Encoding(
            self.tokenizer["name"], pat_str=self.tokenizer["pattern"], mergeable_ranks=ranks, special_tokens=self.tokenizer["special_tokens"]
        )
        if encoding.n_vocab != self.vocab_size:
            raise ValueError(f"{path} has {encoding.n_vocab} ids, but meta.json says {self.vocab_size}: prepare the data anew")
        return encoding

    def fingerprint(self):
        """A hash that changes when the data do: of the shards' names, sizes and hashes (.bin shards have none)."""
        paths = [os.path.join(self.folder, name) for files in self.files.values() for name, _, _ in files]
        sizes = [os.path.getsize(path) for path in paths if os.path.exists(path)]
        return hashlib.sha256(json.dumps([self.files, sizes], sort_keys=True).encode()).hexdigest()[:16]


def write_tokenizer_file(encoding, path):
    """The vocabulary as lines of base64 token and rank, as tiktoken's own files have them."""
    with open(path, "wb") as f:
        for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(token) + b" %d\n" % rank)


def dtype_for(vocab_size):
    return np.uint16 if vocab_size < 65536 else np.uint32


class ShardWriter:
    """Writes one split's shards: raw tokens behind a .npy header whose length is filled in at the end."""

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self.shards, self.file, self.tokens = [], None, 0

    def header(self):
        self.file.seek(0)  # numpy pads the header so that its size does not change with the number in it
        np.lib.format.write_array_header_1_0(self.file, {"descr": self.dtype.str, "fortran_order": False, "shape": (self.tokens,)})

    def write(self, ids):
        """Append ids (1-D array of this dtype), going on in a new shard where one is full."""
        while len(ids):
            if self.file is None:
                self.name = f"{self.split}_{len(self.shards):05d}.npy"
                self.file, self.tokens = open(os.path.join(self.folder, self.name), "w+b"), 0
                self.header()
            taken = ids[: self.shard_tokens - self.tokens]
            self.file.write(taken.tobytes())
            self.tokens += len(taken)
            ids = ids[len(taken) :]
            if self.tokens == self.shard_tokens:
                self.close()

    def close(self):
        """Finish the open shard and note its length and hash."""
        if self.file is not None:
            self.header()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.seek(0)
            self.shards.append({"file": self.name, "tokens": self.tokens, "sha256": hashlib.file_digest(self.file, "sha256").hexdigest()})
            self.file.close()
            self.file = None


class Stream:
    """One split of a data set as one long array of tokens, which lies in memory-mapped shards."""

    CHECKED = 2**28  # bytes of a data set up to which hashes are checked at every start (0.3 s); longer ones by length alone

    def __init__(self, folder, split):
        meta = Meta(folder)
        self.folder, self.split, self.vocab_size, self.shards = folder, split, meta.vocab_size, []
        total = sum(os.path.getsize(os.path.join(folder, name)) for name, _, _ in meta.files[split] if os.path.exists(os.path.join(folder, name)))
        for name, tokens, sha256 in meta.files[split]:
            path = os.path.join(folder, name)
            try:
                shard = read_bin(path) if name.endswith(".bin") else np.load(path, mmap_mode="r", allow_pickle=False)
                if not isinstance(shard, np.ndarray):
                    raise ValueError("it is no array")
                if tokens is not None and (shard.shape != (tokens,) or shard.dtype != dtype_for(meta.vocab_size)):
                    raise ValueError(f"{shard.dtype} of shape {shard.shape}, where meta.json says {tokens} tokens")
                if sha256 and total <= self.CHECKED:
                    with open(path, "rb") as f:
                        if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                            raise ValueError("its bytes are not those that were written")
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
                raise ValueError(f"{path} is damaged or cut off ({e}); prepare the data anew, or copy the file again") from e
            self.shards.append(shard.view(np.ndarray))  # a plain view: slicing a memmap object costs ten times as much
        self.ends = np.cumsum([len(s) for s in self.shards], dtype=np.int64)

    def __len__(self):
        return int(self.ends[-1]) if self.shards else 0

    def read(self, start, out):
        """Fill `out` (1-D) with the tokens from `start` on; after the last comes the first, so every window is whole."""
        start %= len(self)
        n = bisect.bisect_right(self.ends, start)
        offset = start - (int(self.ends[n - 1]) if n else 0)
        done = 0
        while done < len(out):
            piece = self.shards[n][offset : offset + len(out) - done]
            out[done : done + len(piece)] = piece
            done, offset, n = done + len(piece), 0, (n + 1) % len(self.shards)


def read_bin(path):
    """A shard of llm.c or modded-nanogpt: 256 int32 (magic 20240520, version 1, number of tokens), then uint16 tokens."""
    header = np.fromfile(path, dtype=np.int32, count=256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ValueError("its header is not that of llm.c's GPT-2 shards")
    return np.memmap(path, dtype=np.uint16, mode="r", offset=1024, shape=(int(header[2]),))


# ---- Batches ----


def shuffled(i, n, key):
    """The places of i (uint64 array, < n) in a pseudo-random order of range(n) that is computed, not stored.

    A Feistel network of four rounds permutes the next power of four; what falls outside range(n) is permuted again (Black and
    Rogaway 2002, cycle walking)."""
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=32).digest(), dtype=np.uint64)
    out, todo = i.astype(np.uint64), np.arange(len(i))
    with np.errstate(over="ignore"):
        while len(todo):
            left, right = out[todo] >> half, out[todo] & mask
            for k in keys:
                mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)
                mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
                left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
            out[todo] = (left << half) | right
            todo = todo[out[todo] >= n]
    return out.astype(np.int64)


class Batches:
    """Training windows by their number. Sequence g of the run is the same whoever asks for it and however the batch is cut.

    An epoch of a data set is every disjoint window of block_size once, in shuffled order, from an offset of its own. Several data sets
    mix by weight, in thousandths: {folder: weight}. Raises ValueError where a data set is absent, damaged or shorter than a window."""

    CYCLE = 1000  # sequences after which the shares of a mixture are exact
    BLOCK = 4096  # sequences whose places are computed at once

    def __init__(self, data, block_size, seed):
        weights = data if isinstance(data, dict) else {data: 1.0}
        self.block_size, self.seed, self.streams = block_size, seed, [Stream(folder, "train") for folder in weights]
        if not weights or not all(isinstance(w, (int, float)) and 0 < w < float("inf") for w in weights.values()):
            raise ValueError(f"data={data!r}: every data set needs a weight above 0")
        for stream in self.streams:
            if len(stream) <= block_size:
                raise ValueError(
                    f"{stream.folder}: its training split has {len(stream)} tokens, but a window takes block_size + 1 = {block_size + 1}; "
                    "prepare more text or set a smaller --block_size"
                )
        exact = np.array(list(weights.values())) / sum(weights.values()) * self.CYCLE
        shares = np.maximum(exact.astype(np.int64), 1)
        for k in np.argsort(shares - exact)[: max(0, self.CYCLE - shares.sum())]:  # what rounding down left goes to those it cost most
            shares[k] += 1
        shares[np.argmax(shares)] += self.CYCLE - shares.sum()
        self.shares, order = shares, np.repeat(np.arange(len(shares)), shares)
        self.pattern = order[shuffled(np.arange(self.CYCLE), self.CYCLE, (seed, "mix"))]  # which data set each place of a cycle reads
        self.earlier = np.zeros(self.CYCLE, dtype=np.int64)  # and how many of the same set stand before it
        for k in range(len(shares)):
            self.earlier[self.pattern == k] = np.arange(shares[k])
        self.places = functools.lru_cache(maxsize=2)(self._places)

    def _places(self, block):
        """For BLOCK sequences: which stream, and where in it each window starts."""
        g = np.arange(block * self.BLOCK, (block + 1) * self.BLOCK)
        which = self.pattern[g % self.CYCLE]
        number = g // self.CYCLE * self.shares[which] + self.earlier[g % self.CYCLE]  # how many windows of this stream came before
        start = np.empty(len(g), dtype=np.int64)
        for k, stream in enumerate(self.streams):
            windows = len(stream) // self.block_size
            for epoch in np.unique(number[which == k] // windows):
                mine = (which == k) & (number // windows == epoch)
                key = (self.seed, k, int(epoch))
                shift = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") % len(stream)
                start[mine] = shuffled(number[mine] % windows, windows, key) * self.block_size + shift
        return which.tolist(), start.tolist()

    def get(self, first, count):
        """Sequences first … first + count - 1 of the run: inputs and targets, int64 arrays (count, block_size)."""
        out = np.empty((count, self.block_size + 1), dtype=np.int64)
        for row, g in zip(out, range(first, first + count)):
            which, start = self.places(g // self.BLOCK)
            self.streams[which[g % self.BLOCK]].read(start[g % self.BLOCK], row)
        return out[:, :-1], out[:, 1:]

    def epochs(self, sequences):
        """How often each data set has been gone through after so many sequences: {folder: epochs}."""
        shares = self.shares / self.CYCLE
        return {s.folder: sequences * share / (len(s) // self.block_size) for s, share in zip(self.streams, shares)}


def windows(stream, block_size, stride=None, limit=None, batch_size=8):
    """Batches x, y (b, block_size) that score every token of `stream` but the first once; with a limit, those of as many whole windows as
    fit into so many targets, one at the least.

    A window begins every `stride` tokens (None: block_size, disjoint) and scores those that no earlier one did; padding is IGNORE."""
    stride = stride or block_size
    end, tokens = len(stream) - 1, np.empty(block_size + 1, dtype=np.int64)
    if limit:
        end = min(end, max(limit // block_size, 1) * block_size)
    xs, ys, scored = [], [], 0
    for start in range(0, end, stride):
        if scored >= end:
            break
        n = min(block_size, end - start)
        stream.read(start, tokens[: n + 1])
        x, y = np.zeros(block_size, dtype=np.int64), np.full(block_size, IGNORE, dtype=np.int64)
        x[:n], y[scored - start : n] = tokens[:n], tokens[scored - start + 1 : n + 1]
        scored = start + n
        xs.append(x)
        ys.append(y)
        if len(xs) == batch_size:
            yield np.stack(xs), np.stack(ys)
            xs, ys = [], []
    if xs:
        yield np.stack(xs), np.stack(ys)


class Text:
    """Token ids in memory, read as a Stream is."""

    def __init__(self, ids):
        self.ids = np.asarray(ids)

    def __len__(self):
        return len(self.ids)

    def read(self, start, out):
        out[:] = self.ids[start : start + len(out)]
