"""Text in, tokens out: read, decode, extract, clean, drop duplicates, tokenize, write.

    python prepare.py                                              # the Python standard library on this disk
    python prepare.py corpus/ more.jsonl.gz --out=data/mine        # folders, .txt .md .py .html .jsonl, each also .gz
    python prepare.py book.txt --tokenizer=bytes

Writes the folder `out`: shards train_*.npy and val_*.npy, and meta.json, which says what was kept and what was dropped.
"""
import collections
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import sysconfig

import numpy as np
from tqdm import tqdm

import config
import text
import tokens

# What to read and where to write
out = "data/python"  # folder to write; with inputs of your own and no --out, data/<name of the first>
text_key = "text"  # the key that holds a document's text in .jsonl
html = False  # take tags and entities out of every document, not of .html files alone
overwrite = False  # replace a data set that is there already
# Cleaning beyond the default, for classical recipes
lowercase = False
strip_punctuation = False  # Unicode's punctuation and symbols
drop_stopwords = False  # English function words
dedup = "exact"  # exact: drop documents whose cleaned text came before; none
# Tokens
tokenizer = "train:4096"  # bytes, train:N, a tiktoken name (gpt2, o200k_base), or a folder with a vocabulary
val_fraction = 0.05  # share of documents, picked by a hash of the content, that become the validation split
shard_tokens = 100_000_000  # tokens in a shard
# How
workers = 0  # processes; 0: one for each processor
strict = False  # end at the first bad document
max_bad = 0.1  # share of bad documents above which nothing is written
json = ""  # file for the figures: those of meta.json

SPLIT_BELOW = 100  # documents: with fewer, the last tenth of the stream is the validation split
VOCABULARY_BYTES = 100_000_000  # of text, that a vocabulary is trained on at most


def standard_library():
    """The modules of the Python standard library that runs this, tests and installed packages left out."""
    root, modules = sysconfig.get_paths()["stdlib"], []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))
        modules += [os.path.join(folder, f) for f in sorted(files) if f.endswith(".py")]
    return modules


def find_files(inputs):
    """[(path, kind)] of the files that the inputs name, folders searched, in order; and how many were passed over for their ending."""
    found, passed_over = [], 0
    for name in inputs:
        if os.path.isdir(name):
            for folder, folders, files in os.walk(name):
                folders[:] = sorted(f for f in folders if not f.startswith("."))
                for path in (os.path.join(folder, f) for f in sorted(files) if not f.startswith(".")):
                    if text.kind_of(path):
                        found.append((path, text.kind_of(path)))
                    else:
                        passed_over += 1
        elif os.path.exists(name):
            found.append((name, text.kind_of(name) or "text"))  # named by hand: text, whatever its ending
        else:
            config.fail(f"there is no file or folder {name!r}")
    return found, passed_over


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def bundles(files, bar):
    """The records of all files, in lists of about a megabyte: what a worker gets at once."""
    bundle, size = [], 0
    for path, kind in files:
        before = 0
        for where, kind_, data, position in text.records(path, kind):
            bundle.append((where, kind_, data))
            size += len(data) + 1000
            bar.update(max(0, position - before))
            before = max(before, position)
            if size > 1_000_000:
                yield bundle
                bundle, size = [], 0
        bar.update(size_of(path) - before)
    if bundle:
        yield bundle


def in_order(pool, function, items, ahead):
    """pool.imap, but reading no more than `ahead` items before their results are taken (memory stays bounded), and not waiting for the dead."""
    pending, workers_ = collections.deque(), {p.pid for p in multiprocessing.active_children()}

    def result():
        while True:
            try:
                return pending[0].get(timeout=1)
            except multiprocessing.TimeoutError:
                if not workers_ <= {p.pid for p in multiprocessing.active_children()}:
                    config.fail("a worker process was killed, perhaps for want of memory; try fewer --workers. Nothing was written")

    for item in items:
        pending.append(pool.apply_async(function, (item,)))
        if len(pending) >= ahead:
            yield result()
            pending.popleft()
    while pending:
        yield result()
        pending.popleft()


def start_worker(recipe_, encoding_):
    global recipe, encoding
    recipe, encoding = recipe_, encoding_
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer


def work(bundle):
    """In a worker: each record's (where, problem, digest, bytes before and after cleaning, product); the product is its text or, given an
    encoding, its token ids."""
    results = []
    for where, kind, data in bundle:
        try:
            content = text.extract(kind, data, **recipe["extract"])
        except text.BadDocument as e:
            results.append((where, str(e), None, (0, 0), None))
            continue
        before = len(content.encode("utf-8", "surrogatepass"))
        content = text.classical(text.clean(content), **recipe["classical"])
        raw = content.encode()
        product = content
        if encoding is not None and content.strip():
            ids = encoding.encode_ordinary(content)  # special tokens spelled out in a document stay text
            product = np.array([encoding.eot_token, *ids], dtype=tokens.dtype_for(encoding.n_vocab))
        results.append((where, None, hashlib.sha256(raw.rstrip(b"\n")).digest()[:16], (before, len(raw) if content.strip() else 0), product))
    return results


def in_validation(digest):
    return int.from_bytes(digest[:8], "little") < val_fraction * 2**64


def documents(files, encoding, label, counts, loud=True):
    """Run every document through the workers: (digest, sizes, product) of those kept, in order of the input; counts what was dropped."""
    total = sum(size_of(path) for path, _ in files)
    recipe = {"extract": {"text_key": text_key, "html": html}}
    recipe["classical"] = {"lowercase": lowercase, "strip_punctuation": strip_punctuation, "drop_stopwords": drop_stopwords}
    n, seen, shown = workers or os.cpu_count(), set(), 0
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc=label, mininterval=0.5, disable=None) as bar,
        multiprocessing.Pool(n, start_worker, (recipe, encoding)) as pool,
    ):
        for results in in_order(pool, work, bundles(files, bar), 4 * n):
            for where, problem, digest, sizes, product in results:
                counts["read"] += 1
                if problem:
                    counts[problem] += 1
                    if strict and loud:
                        config.fail(f"{where}: {problem}; without --strict such documents are skipped")
                    if loud and shown < 10:  # name the first of them; meta.json has the counts
                        shown += 1
                        bar.write(f"skipped {where}: {problem}", file=sys.stderr)
                elif not sizes[1]:
                    counts["empty"] += 1
                elif dedup == "exact" and digest in seen:
                    counts["duplicate"] += 1
                else:
                    seen.add(digest)
                    yield digest, sizes, product


def sample(files):
    """Texts to train a vocabulary on: those of the training split, up to VOCABULARY_BYTES."""
    size, held = 0, []  # too few documents for a split by hash: all of them
    for document in documents(files, None, "vocabulary", collections.Counter(), loud=False):
        held.append(document)
        if len(held) == SPLIT_BELOW or size:
            for digest, (_, n), content in held:
                if not in_validation(digest):
                    size += n
                    yield content
            held = []
        if size > VOCABULARY_BYTES:
            return
    yield from (content for _, _, content in held)


def write(files, encoding, folder, counts):
    """Tokenize everything into shards in `folder`; returns the facts for meta.json."""
    dtype, sizes = tokens.dtype_for(encoding.n_vocab), tokens.byte_lengths(encoding)
    writers = {split: tokens.ShardWriter(folder, split, dtype, shard_tokens) for split in ("train", "val")}
    facts = {split: collections.Counter(documents=0, tokens=0, bytes=0) for split in writers}

    def put(split, ids, n_bytes):
        writers[split].write(ids)
        facts[split].update(documents=1, tokens=len(ids), bytes=n_bytes)

    held = []  # the first documents wait until it is known how many there are
    for document in documents(files, encoding, "tokens", counts):
        held.append(document)
        if len(held) == SPLIT_BELOW or facts["train"]["documents"] + facts["val"]["documents"]:
            for digest, (_, after), ids in held:
                put("val" if in_validation(digest) else "train", ids, after)
            held = []
    if held:
        ids = np.concatenate([ids for _, _, ids in held])
        before = sum(before for _, (before, _), _ in held)
        starts = np.cumsum([0] + [len(i) for _, _, i in held])
        ends, table = np.cumsum(sizes[ids]), tokens.token_bytes(encoding)
        tail = min(before - int(0.9 * before), ends[-1] // 2)  # a tenth of the text as it came: to the byte the split of nanoGPT
        cut = int(np.searchsorted(ends, ends[-1] - tail, side="right"))
        while cut < len(ids) - 1 and table[ids[cut]] and table[ids[cut]][0] & 0xC0 == 0x80:  # never inside a character
            cut += 1
        cut -= int(ids[cut - 1] == encoding.eot_token)
        end = np.array([encoding.eot_token], dtype=dtype)
        rest = ids[cut:] if ids[cut] == encoding.eot_token else np.concatenate([end, ids[cut:]])
        for split, part, n in (("train", ids[:cut], (starts[:-1] < cut).sum()), ("val", rest, (starts[1:] > cut).sum())):
            writers[split].write(part)
            facts[split].update(documents=int(n), tokens=len(part), bytes=int(sizes[part].sum()))
    for writer in writers.values():
        writer.close()
    return {split: dict(f) for split, f in facts.items()}, {split: w.shards for split, w in writers.items()}


def main():
    global out
    inputs, given = config.apply(globals(), files=False)
    if inputs and "out" not in given:
        out = os.path.join("data", os.path.basename(os.path.abspath(inputs[0])).split(".")[0])
    if dedup not in ("exact", "none"):
        config.fail(f"dedup must be exact or none, not {dedup!r}")
    if not 0 < val_fraction < 1:
        config.fail(f"val_fraction must lie between 0 and 1, not {val_fraction}")
    for name, least in (("workers", 0), ("shard_tokens", 1)):
        if globals()[name] < least:
            config.fail(f"{name} must be at least {least}, not {globals()[name]}")
    if os.path.exists(out) and not overwrite:
        config.fail(f"{out} is there already; name another --out, or replace it with --overwrite")
    if os.path.exists(out) and not (os.path.isdir(out) and (os.path.exists(os.path.join(out, "meta.json")) or not os.listdir(out))):
        config.fail(f"{out} is no data set, so --overwrite does not touch it; name another --out")
    here = os.path.realpath(out)
    for name in inputs:
        if os.path.exists(out) and (os.path.realpath(name) + os.sep).startswith(here + os.sep):
            config.fail(f"the input {name} lies in {out}, which --overwrite replaces; name another --out")
    files, passed_over = find_files(inputs) if inputs else ([(path, "text") for path in standard_library()], 0)
    if not files:
        config.fail(f"there is nothing to read in {' '.join(inputs)}: no file that ends in {' '.join(text.KINDS)} (.gz)")
    counts = collections.Counter()
    with config.user_errors():
        if html or any(kind == "html" for _, kind in files):
            text.strip_html("")  # say now, not in a worker, that the library is absent
        if tokenizer.startswith("train:"):
            if not tokenizer[6:].isdigit():
                config.fail(f"tokenizer={tokenizer}: train:N takes a number of ids, such as train:4096")
            encoding = tokens.train_tokenizer(sample(files), int(tokenizer[6:]))
            kind = "trained"
        else:
            encoding = tokens.get_tokenizer(tokenizer)
            kind = "bytes" if tokenizer == "bytes" else "folder" if os.path.isdir(tokenizer) else "tiktoken"
    part, old = out.rstrip("/") + ".part", out.rstrip("/") + ".old"
    shutil.rmtree(part, ignore_errors=True)
    try:
        os.makedirs(part)
        splits, shards = write(files, encoding, part, counts)
        dropped = {reason: n for reason, n in sorted(counts.items()) if reason != "read"}
        kept = counts["read"] - sum(dropped.values())
        bad = sum(dropped.values()) - counts["empty"] - counts["duplicate"]
        if bad > max_bad * counts["read"]:
            config.fail(f"{bad} of {counts['read']} documents are bad, more than max_bad={max_bad:g}; mend them or raise --max_bad. Nothing was written")
        if not kept:
            config.fail(f"the corpus is empty: {counts['read']} documents read, none with text")
        if not splits["train"]["tokens"] or not splits["val"]["tokens"]:
            config.fail(f"one split is empty at val_fraction={val_fraction:g}; try another --val_fraction")
        names = {"name": tokenizer, "kind": kind, "vocab_size": encoding.n_vocab}
        if kind in ("trained", "folder"):
            names |= {"pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
            tokens.write_tokenizer_file(encoding, os.path.join(part, "tokenizer.tiktoken"))
        meta = {"format_version": 1, "tokenizer": names, "splits": splits, "shards": shards}
        meta["cleaning"] = {"read": counts["read"], "kept": kept, "dropped": dropped, "passed_over_files": passed_over}
        config.write_json(os.path.join(part, "meta.json"), meta)
        if json:
            with config.user_errors():
                config.write_json(json, meta)
        if os.path.exists(out):  # --overwrite: the old goes when the new is there
            shutil.rmtree(old, ignore_errors=True)
            os.rename(out, old)
        try:
            os.rename(part, out)
        except OSError:
            if os.path.exists(old):
                os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        config.fail(f"could not write {out}: {e.strerror or e}; nothing was kept")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    report = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()) or "none"
    print(f"{counts['read']:,} documents read, {kept:,} kept; dropped: {report}" + (f"; {passed_over:,} files of other kinds" if passed_over else ""))
    for split, f in splits.items():
        print(f"{split:5} {f['documents']:>9,} documents {f['bytes']:>13,} bytes {f['tokens']:>12,} tokens ({f['bytes'] / f['tokens']:.2f} bytes each)")
    print(f"{out}: vocabulary {tokenizer}, {encoding.n_vocab:,} ids; next: python train.py --data={out}")


if __name__ == "__main__":
    main()
