"""tokens.py: tokenizers, the shards of a data set, batches and windows."""
import base64
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import tiktoken

import tokens
from tokens import END, IGNORE, Batches, ShardWriter, Stream, Text, get_tokenizer, load_tokenizer, save_tokenizer, shuffled, windows

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(REPO, "..", "shared", "data")
if os.path.isdir(SHARED):
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", os.path.abspath(os.path.join(SHARED, "tiktoken_cache")))
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # where tiktoken fetches gpt2; it caches by the address's hash
MERGES, VOCABULARY = (
    os.path.join(os.environ.get("TIKTOKEN_CACHE_DIR", ""), hashlib.sha1((URL + name).encode()).hexdigest()) for name in ("vocab.bpe", "encoder.json")
)
needs_gpt2 = pytest.mark.skipif(not os.path.exists(MERGES), reason="the gpt2 vocabulary is not in tiktoken's cache")
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is the reference")

SAMPLES = {
    "nothing": "",
    "words": "abc xabc abcabc abcd the, the theme",
    "English": "The quick brown fox's tail — \"don't,\" I'LL say; we'Ve 12345 and 67.89 in the U.S.A. naïve café",
    "code": "def f(x):\n    if x:\n\t\treturn [i**2 for i in range(10)]\n\n\n# a comment\nclass A_b: pass\r\n",
    "Chinese": "第一回　甄士隐梦幻识通灵，贾雨村风尘怀闺秀。\n\n　　列位看官：你道此书从何而来？",
    "scripts": "مرحبا हिन्दी ไทย 한국어 日本語 Ελληνικά עברית",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪👍🏽 ☃️🤖🤖 é \u200b\u200d\ufeff",
    "replacement characters": "a\ufffdb \ufffd\ufffd\ufffd c" + b"cut \xe4\xb8 \xff\xfe off".decode(errors="replace"),
    "blanks": " " * 500 + "x" + "\n" * 100 + "y" + "\t" * 77 + " \n \n\r\n" + "\u00a0\u3000 \u2028" + " " * 33,
    "controls": "\x00\x01\x1b[0m\x7f\x85",
    "long": "a" * 3000 + "ab" * 2000 + "1" * 500 + "!" * 500 + "中" * 500,
}


@pytest.fixture(scope="module")
def trained():
    """A small vocabulary, trained on this project's source and the samples."""
    texts = [open(path, encoding="utf-8").read() for path in sorted(glob.glob(os.path.join(REPO, "*.py")))]
    return tokens.train_tokenizer([*texts, *[SAMPLES[name] for name in SAMPLES if name != "long"] * 20], 1500)


@pytest.fixture(params=["bytes", "trained", "whole words", pytest.param("gpt2", marks=needs_gpt2)])
def encoding(request, trained):
    if request.param == "whole words":  # tokens that no merges lead to, as some vocabularies of tiktoken have them
        ranks = {**{bytes([i]): i for i in range(256)}, b"abc": 256, b" the": 257, b" th": 258, b"bcd": 259}
        return tiktoken.Encoding("words", pat_str=tokens.GPT2, mergeable_ranks=ranks, special_tokens={END: 260})
    return trained if request.param == "trained" else get_tokenizer(request.param)


def dataset(folder, train, val=(), vocab_size=257, shard_tokens=10**6, tokenizer="bytes"):
    """Write a data set of these ids; its folder."""
    os.makedirs(folder)
    dtype, shards = tokens.dtype_for(vocab_size), {}
    for split, ids in (("train", train), ("val", val)):
        writer = ShardWriter(str(folder), split, dtype, shard_tokens)
        writer.write(np.asarray(ids, dtype=dtype))
        writer.close()
        shards[split] = writer.shards
    meta = {"format_version": 1, "tokenizer": {"name": tokenizer, "kind": "bytes", "vocab_size": vocab_size}, "shards": shards}
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(meta, f)
    return str(folder)


# ---- Tokenizers ----


def test_any_text_comes_back(encoding):
    for content in SAMPLES.values():
        assert encoding.decode(encoding.encode_ordinary(content)) == content


def test_bytes_are_their_own_ids():
    encoding = get_tokenizer("bytes")
    assert encoding.n_vocab == 257 and encoding.eot_token == 256
    assert encoding.encode_ordinary("ä中\x00 " + "a" * 200) == list(("ä中\x00 " + "a" * 200).encode())


def test_a_special_string_in_a_document_stays_text(encoding):
    ids = encoding.encode_ordinary(f"a{END}b<|reserved_0|>")
    assert max(ids) < min(encoding._special_tokens.values()) and encoding.decode(ids) == f"a{END}b<|reserved_0|>"


def test_the_bytes_of_ids_add_up_to_those_of_the_text(encoding):
    lengths, table = tokens.byte_lengths(encoding), tokens.token_bytes(encoding)
    assert lengths.shape == (encoding.n_vocab,) and lengths[encoding.eot_token] == 0
    for content in SAMPLES.values():
        ids = encoding.encode_ordinary(content)
        assert lengths[ids].sum() == len(content.encode()) and b"".join(table[i] for i in ids) == content.encode()


def test_a_trained_vocabulary_has_the_size_asked_for_and_ids_in_reserve(trained):
    special = trained._special_tokens
    assert trained.n_vocab == 1500 and list(special) == [END, *tokens.RESERVED] and sorted(special.values()) == list(range(1491, 1500))
    assert len(trained.encode_ordinary(SAMPLES["code"])) < 0.7 * len(SAMPLES["code"])


def test_training_twice_gives_one_vocabulary():
    texts = [SAMPLES["code"], SAMPLES["English"], SAMPLES["Chinese"]] * 3
    a, b = tokens.train_tokenizer(iter(texts), 400), tokens.train_tokenizer(texts, 400)
    assert tokens.fingerprint(a) == tokens.fingerprint(b) and a._mergeable_ranks == b._mergeable_ranks


def test_a_short_text_gives_a_smaller_vocabulary_and_a_small_size_is_refused():
    encoding = tokens.train_tokenizer(["abab"], 4096)
    assert 265 < encoding.n_vocab < 275 and encoding.decode(encoding.encode_ordinary("abab 中")) == "abab 中"
    with pytest.raises(ValueError, match="265"):
        tokens.train_tokenizer(["abab"], 264)


@pytest.mark.parametrize(
    "name, hint", [("gpt3", "did you mean gpt2?"), ("byte", "did you mean bytes?"), ("o200k", "did you mean o200k_base?"), ("qqqq", "train:4096")]
)
def test_an_unknown_tokenizer_is_refused_with_a_hint(name, hint):
    with pytest.raises(ValueError) as e:
        get_tokenizer(name)
    assert repr(name) in str(e.value) and hint in str(e.value)


def test_a_vocabulary_that_cannot_be_fetched_is_refused_with_what_to_do(tmp_path):
    code = "import tokens\ntry: tokens.get_tokenizer('gpt2')\nexcept ValueError as e: print(e)"
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "TIKTOKEN_CACHE_DIR" in done.stdout and "--tokenizer=bytes" in done.stdout


def test_fingerprints_tell_vocabularies_apart(trained):
    bytes_ = get_tokenizer("bytes")
    assert tokens.fingerprint(bytes_) == tokens.fingerprint(get_tokenizer("bytes")) != tokens.fingerprint(trained)

    def changed(ranks={}, special={}):
        return tiktoken.Encoding("x", pat_str=".", mergeable_ranks=bytes_._mergeable_ranks | ranks, special_tokens=special or {END: 256})

    others = [changed(ranks={b"a": 98, b"b": 97}), changed(ranks={b"ab": 257}), changed(special={END: 257}), changed(special={"<s>": 256})]
    assert len({tokens.fingerprint(e) for e in [bytes_, *others]}) == 5 and tokens.fingerprint(changed()) == tokens.fingerprint(bytes_)


# ---- Hugging Face's tokenizer.json ----


def test_a_saved_tokenizer_loads_as_the_same(encoding, tmp_path):
    save_tokenizer(encoding, str(tmp_path), 64)
    again = load_tokenizer(str(tmp_path))
    assert tokens.fingerprint(again) == tokens.fingerprint(encoding) and get_tokenizer(str(tmp_path)).n_vocab == encoding.n_vocab
    assert again.eot_token == encoding.eot_token and again._special_tokens == encoding._special_tokens
    for name, content in SAMPLES.items():
        assert again.encode_ordinary(content) == encoding.encode_ordinary(content), name


def test_a_data_sets_vocabulary_loads_as_the_same(trained, tmp_path):
    folder = dataset(tmp_path / "d", [1, 2, 3], vocab_size=trained.n_vocab, tokenizer="train:1500")
    tokens.write_tokenizer_file(trained, os.path.join(folder, "tokenizer.tiktoken"))
    path = os.path.join(folder, "meta.json")
    meta = json.load(open(path))
    meta["tokenizer"] |= {"pattern": trained._pat_str, "special_tokens": trained._special_tokens}
    json.dump(meta, open(path, "w"))
    again = get_tokenizer(folder)
    assert tokens.fingerprint(again) == tokens.fingerprint(trained)
    assert again.encode_ordinary(SAMPLES["code"]) == trained.encode_ordinary(SAMPLES["code"])
    meta["tokenizer"]["vocab_size"] -= 1
    json.dump(meta, open(path, "w"))
    with pytest.raises(ValueError, match="prepare the data anew"):
        get_tokenizer(folder)


@needs_transformers
@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
def test_transformers_reads_what_tiktoken_writes(encoding, tmp_path, model_type):
    from transformers import AutoTokenizer

    save_tokenizer(encoding, str(tmp_path), 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(theirs) == encoding.n_vocab and theirs.eos_token_id == theirs.bos_token_id == encoding.eot_token and theirs.model_max_length == 64
    for name, content in SAMPLES.items():
        ids = encoding.encode_ordinary(content)
        assert theirs(content)["input_ids"] == ids, name
        assert theirs.decode(ids) == content, name
    assert theirs(f"a{END}b")["input_ids"] == [*encoding.encode_ordinary("a"), encoding.eot_token, *encoding.encode_ordinary("b")]
    chance = random.Random(0)
    for _ in range(200):
        ids = [chance.randrange(encoding.n_vocab) for _ in range(40)]
        assert theirs.decode(ids) == encoding.decode(ids)


@needs_transformers
def test_transformers_splits_random_text_as_tiktoken_does(encoding, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(encoding, str(tmp_path), 64)
    theirs, chance = AutoTokenizer.from_pretrained(str(tmp_path)), random.Random(1)
    letters = "  \n\t\r'sStTlLdDvVeEmM09.,;_-é中ß\u0301\u3000\u00a0٣²🤖ſK"
    for _ in range(500):
        content = "".join(chance.choices(letters, k=40))
        assert theirs(content)["input_ids"] == encoding.encode_ordinary(content), repr(content)


@needs_gpt2
def test_gpt2s_own_files_load_as_tiktokens_gpt2(tmp_path):
    lib = pytest.importorskip("tokenizers", reason="the tokenizers library makes the reference")
    with open(MERGES, encoding="utf-8") as f, open(VOCABULARY, encoding="utf-8") as g:
        theirs = lib.Tokenizer(lib.models.BPE(json.load(g), [tuple(line.split()) for line in f.read().split("\n")[1:-1]]))
    theirs.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens([END])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours, gpt2 = load_tokenizer(str(tmp_path)), get_tokenizer("gpt2")
    assert tokens.fingerprint(ours) == tokens.fingerprint(gpt2) and ours._mergeable_ranks == gpt2._mergeable_ranks
    for name, content in SAMPLES.items():
        assert ours.encode_ordinary(content) == gpt2.encode_ordinary(content) == theirs.encode(content).ids, name


@needs_gpt2
def test_the_merges_that_are_saved_are_those_of_gpt2():
    with open(MERGES, encoding="utf-8") as f:
        merges = [line.split() for line in f.read().split("\n")[1:-1]]
    assert json.loads(tokens.tokenizer_json(get_tokenizer("gpt2")))["model"]["merges"] == merges


def foreign(folder, model="BPE", pre=None, normalizer=None, special=(END,), text=(), **marks):
    """Train a tokenizer with Hugging Face's library and save it; it and its folder."""
    lib = pytest.importorskip("tokenizers", reason="the tokenizers library makes the reference")
    options = {"vocab_size": 700, "special_tokens": list(special), "show_progress": False} | marks
    if model != "WordPiece":
        options["initial_alphabet"] = lib.pre_tokenizers.ByteLevel.alphabet()
    theirs = lib.Tokenizer(getattr(lib.models, model)(**marks))
    theirs.pre_tokenizer = pre(lib) if pre else lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer:
        theirs.normalizer = normalizer(lib)
    trainer = getattr(lib.trainers, f"{model}Trainer".replace("BPE", "Bpe"))
    theirs.train_from_iterator([*list(SAMPLES.values())[1:6] * 5, *text], trainer(**options))
    theirs.save(str(folder / "tokenizer.json"))
    return theirs, str(folder)


def byte_level(lib, **options):
    return lib.pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | options)


def split(lib, behavior, **options):
    return lib.pre_tokenizers.Sequence([lib.pre_tokenizers.Split(lib.Regex(r"\p{N}|\s+|[^\s\p{N}]+"), behavior), byte_level(lib, **options)])


ALIKE = {
    "as GPT-2 splits": {},
    "by a pattern": {"pre": lambda lib: split(lib, "isolated", use_regex=False)},
    "after NFC": {"normalizer": lambda lib: lib.normalizers.NFC()},
    "several special tokens": {"special": ["<s>", END, "</s>"]},
}


@pytest.mark.parametrize("how", ALIKE)
def test_a_byte_level_bpe_of_another_library_gives_the_same_ids(tmp_path, how):
    theirs, folder = foreign(tmp_path, **ALIKE[how])
    ours = load_tokenizer(folder)
    assert ours.n_vocab == theirs.get_vocab_size() and ours.eot_token == theirs.token_to_id(END)
    for name, content in SAMPLES.items():
        content = content.replace("\u0301", "")
        assert ours.encode_ordinary(content) == theirs.encode(content).ids, name


STRANGE = {
    "no splitting": {"pre": lambda lib: byte_level(lib, use_regex=False)},
    "two patterns": {"pre": lambda lib: split(lib, "isolated", use_regex=True)},
    "a suffix": {"end_of_word_suffix": "</w>"},
}


@pytest.mark.parametrize("how", STRANGE)
def test_a_bpe_of_an_unusual_kind_is_refused_or_gives_the_same_ids(tmp_path, how):
    theirs, folder = foreign(tmp_path, **STRANGE[how], text=["hello the hello the  hello  the"] * 50)
    try:
        ours = load_tokenizer(folder)
    except ValueError:
        return
    for content in ("hello the hello  the don't", SAMPLES["English"], "abc123  def"):
        assert ours.encode_ordinary(content) == theirs.encode(content).ids


REFUSED = {
    "WordPiece": ({"model": "WordPiece", "pre": lambda lib: lib.pre_tokenizers.BertPreTokenizer()}, "WordPiece"),
    "Unigram": ({"model": "Unigram", "pre": lambda lib: lib.pre_tokenizers.Metaspace()}, "Unigram"),
    "Unigram over bytes": ({"model": "Unigram"}, "Unigram"),
    "words": ({"pre": lambda lib: lib.pre_tokenizers.Whitespace()}, "not byte-level BPE"),
    "SentencePiece's blanks": ({"pre": lambda lib: lib.pre_tokenizers.Metaspace()}, "not byte-level BPE"),
    "a prefix": ({"pre": lambda lib: byte_level(lib, add_prefix_space=True)}, "changes the text"),
    "lower case": ({"normalizer": lambda lib: lib.normalizers.Lowercase()}, "changes the text"),
    "pieces taken out": ({"pre": lambda lib: split(lib, "removed", use_regex=False)}, "unusual"),
    "another end of text": ({"special": ["</s>"]}, f"no {END}".replace("|", r"\|")),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_tiktoken_cannot_run_is_refused(tmp_path, how):
    options, message = REFUSED[how]
    with pytest.raises(ValueError, match=message):
        load_tokenizer(foreign(tmp_path, **options)[1])


def test_ids_that_do_not_follow_the_merges_are_refused(tmp_path, trained):
    save_tokenizer(trained, str(tmp_path), 64)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="do not follow the order of its merges"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"model": null, "added_tokens": [], "pre_tokenizer": null}', '{"model": {"type": "BPE"}}']
)
def test_a_damaged_tokenizer_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="damaged|not byte-level BPE"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither meta.json nor tokenizer.json"):
        load_tokenizer(str(tmp_path))


# ---- Shards ----


@pytest.mark.parametrize("vocab_size, dtype", [(257, "<u2"), (65535, "<u2"), (65536, "<u4"), (200_019, "<u4")])
def test_shards_are_plain_npy_files_of_the_smallest_fitting_type(tmp_path, vocab_size, dtype):
    ids = np.random.default_rng(0).integers(0, vocab_size, 1000)
    ids[:2] = 0, vocab_size - 1
    writer = ShardWriter(str(tmp_path), "train", tokens.dtype_for(vocab_size), 300)
    for start in range(0, 1000, 70):
        writer.write(ids[start : start + 70].astype(tokens.dtype_for(vocab_size)))
    writer.close()
    assert sorted(os.listdir(tmp_path)) == [s["file"] for s in writer.shards] == [f"train_0000{i}.npy" for i in range(4)]
    assert [s["tokens"] for s in writer.shards] == [300, 300, 300, 100]
    parts = []
    for shard in writer.shards:
        path = tmp_path / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        parts.append(np.load(path, mmap_mode="r", allow_pickle=False))
        assert parts[-1].dtype == np.dtype(dtype) and parts[-1].shape == (shard["tokens"],)
    assert np.array_equal(np.concatenate(parts), ids)


@pytest.mark.parametrize("n, lengths", [(0, []), (299, [299]), (300, [300]), (301, [300, 1]), (600, [300, 300]), (5000, [300] * 16 + [200])])
def test_a_full_shard_is_closed_and_the_next_begun_only_when_needed(tmp_path, n, lengths):
    writer = ShardWriter(str(tmp_path), "val", np.uint16, 300)
    writer.write(np.arange(n, dtype=np.uint16))
    writer.close()
    assert [s["tokens"] for s in writer.shards] == lengths and len(os.listdir(tmp_path)) == len(lengths)


@pytest.mark.parametrize("shard_tokens", [1000, 100, 37, 7, 1])
def test_a_stream_reads_across_shards_and_wraps(tmp_path, shard_tokens):
    ids = np.arange(100)
    stream = Stream(dataset(tmp_path / "d", ids, shard_tokens=shard_tokens), "train")
    assert len(stream) == 100 and stream.vocab_size == 257
    for start, n in itertools.product([0, 1, 6, 7, 36, 37, 50, 98, 99, 100, 101, 250], [0, 1, 2, 7, 38, 99, 100, 101, 350]):
        out = np.full(n, -1, dtype=np.int64)
        stream.read(start, out)
        assert np.array_equal(out, ids[np.arange(start, start + n) % 100])


def test_each_split_is_a_stream_of_its_own(tmp_path):
    folder = dataset(tmp_path / "d", [1, 2, 3], [4, 5])
    assert [len(Stream(folder, split)) for split in ("train", "val")] == [3, 2]
    assert len(Stream(dataset(tmp_path / "e", [1, 2, 3]), "val")) == 0


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


HARM = {
    "changed": flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "cut to its header": lambda path: path.write_bytes(path.read_bytes()[:128]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": os.remove,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0\0"),
    "shorter": lambda path: np.save(path, np.arange(9, dtype=np.uint16)),
    "another type": lambda path: np.save(path, np.arange(10, dtype=np.uint32)),
    "another shape": lambda path: np.save(path, np.zeros((10, 1), dtype=np.uint16)),
    "a pickle": lambda path: np.save(path, np.array([{}] * 10), allow_pickle=True),
    "not an array": lambda path: path.write_bytes(b"PK\x03\x04" + b"x" * 100),
    "a zip": lambda path: np.savez(open(path, "wb"), np.arange(10)),
    "a folder": lambda path: (os.remove(path), os.mkdir(path)),
}


@pytest.mark.parametrize("how", HARM)
def test_a_shard_that_is_not_what_was_written_is_refused(tmp_path, how):
    folder = dataset(tmp_path / "d", np.arange(30), shard_tokens=10)
    HARM[how](tmp_path / "d" / "train_00001.npy")
    with pytest.raises(ValueError, match=r"train_00001\.npy.*(prepare the data anew|copy the file again)"):
        Stream(folder, "train")
    assert len(Stream(folder, "val")) == 0


@pytest.mark.parametrize("how", ["cut off", "cut to its header", "empty", "missing", "shorter", "another type"])
def test_of_a_large_data_set_the_lengths_are_checked(tmp_path, how, monkeypatch):
    monkeypatch.setattr(Stream, "CHECKED", 0)  # bytes above which a set is large
    folder = dataset(tmp_path / "d", np.arange(30), shard_tokens=10)
    assert len(Stream(folder, "train")) == 30
    HARM[how](tmp_path / "d" / "train_00001.npy")
    with pytest.raises(ValueError, match="damaged or cut off"):
        Stream(folder, "train")


def test_a_missing_data_set_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"python prepare\.py$"):
        Stream("data/python", "train")
    with pytest.raises(ValueError, match=r"python prepare\.py YOUR_TEXT --out=data/mine$"):
        Stream("data/mine", "train")


@pytest.mark.parametrize(
    "content, message",
    [*((c, "damaged") for c in ("", "{", "[]", "3", "{}", '{"format_version": 1}')), ('{"format_version": 2}', "format version 2")],
)
def test_a_damaged_meta_json_is_refused(tmp_path, content, message):
    folder = dataset(tmp_path / "d", [1, 2, 3])
    (tmp_path / "d" / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Stream(folder, "train")


def test_a_data_sets_fingerprint_follows_its_content(tmp_path):
    same = [tokens.Meta(dataset(tmp_path / name, [1, 2, 3])).fingerprint() for name in "ab"]
    assert same[0] == same[1] != tokens.Meta(dataset(tmp_path / "c", [1, 2, 4])).fingerprint()


# ---- Shards of llm.c ----


def bin_shard(path, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype=np.uint16).tobytes())


def test_shards_of_llm_c_are_read(tmp_path):
    bin_shard(tmp_path / "fineweb_val_000000.bin", [50256, 7])
    bin_shard(tmp_path / "fineweb_train_000002.bin", range(100, 150))
    bin_shard(tmp_path / "fineweb_train_000001.bin", range(100))
    train, val = Stream(str(tmp_path), "train"), Stream(str(tmp_path), "val")
    out = np.empty(151, dtype=np.int64)
    train.read(0, out)
    assert len(train) == 150 and len(val) == 2 and train.vocab_size == 50257 and np.array_equal(out, np.arange(151) % 150)
    x, y = Batches(str(tmp_path), 10, 0).get(0, 3)
    assert np.array_equal((x + 1) % 150, y)


def test_llm_cs_folders_of_one_shard_a_split_are_read(tmp_path):
    bin_shard(tmp_path / "tiny_shakespeare_train.bin", range(50))
    bin_shard(tmp_path / "tiny_shakespeare_val.bin", range(9))
    assert [len(Stream(str(tmp_path), split)) for split in ("train", "val")] == [50, 9]


@needs_gpt2
def test_shards_of_llm_c_are_gpt2s_tokens(tmp_path):
    bin_shard(tmp_path / "fineweb_train_000001.bin", range(100))
    assert tokens.fingerprint(tokens.Meta(str(tmp_path)).encoding()) == tokens.fingerprint(get_tokenizer("gpt2"))


@pytest.mark.parametrize("wrong", [{"magic": 20240801}, {"magic": 0}, {"version": 7}, {"count": 101}, {"count": 2**31 - 1}, {"count": -1}])
def test_other_bin_files_are_refused(tmp_path, wrong):
    bin_shard(tmp_path / "a_train_0.bin", range(100), **wrong)
    with pytest.raises(ValueError, match="a_train_0.bin"):
        Stream(str(tmp_path), "train")


def test_a_bin_file_without_a_whole_header_is_refused(tmp_path):
    (tmp_path / "a_train_0.bin").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="a_train_0.bin"):
        Stream(str(tmp_path), "train")


# ---- Order ----


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 1023, 1024, 1025, 4095, 4097, 65535, 65537, 100_003])
def test_shuffled_is_a_permutation(n):
    assert np.array_equal(np.sort(shuffled(np.arange(n), n, ("key", n))), np.arange(n))


def test_shuffled_gives_each_place_whatever_is_asked_beside_it():
    n, key = 1000, (1337, 0, 2)
    whole = shuffled(np.arange(n), n, key)
    assert [int(shuffled(np.array([i]), n, key)[0]) for i in range(0, n, 97)] == whole[::97].tolist()
    assert np.array_equal(shuffled(np.arange(n)[::-1], n, key), whole[::-1])
    assert not np.array_equal(shuffled(np.arange(n), n, (1337, 0, 3)), whole)


def test_shuffled_mixes_well_and_far():
    n = 10_000
    orders = np.stack([shuffled(np.arange(n), n, key) for key in range(20)])
    assert abs(np.corrcoef(np.arange(n), orders)[0, 1:]).max() < 0.05
    assert (np.diff(orders) == 1).mean() < 0.001 and (orders == np.arange(n)).mean() < 0.001
    places = shuffled(np.arange(1000), 2**45 + 7, "large")
    assert len(set(places.tolist())) == 1000 and 0 <= places.min() and places.max() < 2**45 + 7 and places.max() > 2**44


# ---- Batches ----


def starts(batches, first, count):
    """Where each window begins, in a data set of ids 0, 1, 2 …"""
    x, y = batches.get(first, count)
    return x[:, 0]


@pytest.mark.parametrize("length, block", [(64, 8), (65, 8), (71, 8), (1000, 7), (999, 16), (50_000, 5), (9, 8), (30, 1), (17, 8)])
def test_an_epoch_goes_through_every_window_once(tmp_path, length, block):
    batches = Batches(dataset(tmp_path / "d", np.arange(length), vocab_size=60_000, shard_tokens=length // 3 + 1), block, 0)
    n = length // block
    for epoch in range(3):
        x, y = batches.get(epoch * n, n)
        assert x.shape == y.shape == (n, block) and x.dtype == y.dtype == np.int64
        assert len(np.unique(x)) == n * block  # disjoint, none twice
        assert np.array_equal(y, (x + 1) % length) and np.array_equal(x[:, 1:], y[:, :-1])


def test_epochs_differ_in_order_and_in_where_windows_begin(tmp_path):
    batches = Batches(dataset(tmp_path / "d", np.arange(1000), vocab_size=2000), 8, 0)
    epochs = [starts(batches, 125 * e, 125) for e in range(5)]
    assert len({tuple(e) for e in epochs}) == 5 and len({int(e[0]) % 8 for e in epochs}) > 1
    assert not any(np.array_equal(e, np.sort(e)) for e in epochs)


def test_a_batch_is_a_function_of_seed_and_place(tmp_path):
    folder = dataset(tmp_path / "d", np.arange(5000), vocab_size=6000, shard_tokens=700)
    whole = Batches(folder, 8, 7).get(0, 1000)
    again = Batches(folder, 8, 7)
    for first, count in ((990, 10), (0, 1), (333, 64), (5, 3)):
        for a, b in zip(again.get(first, count), whole):
            assert np.array_equal(a, b[first : first + count])
    assert not np.array_equal(Batches(folder, 8, 8).get(0, 1000)[0], whole[0])


def test_a_batch_is_the_same_however_it_is_cut(tmp_path):
    a, b = dataset(tmp_path / "a", np.arange(1000), vocab_size=6000), dataset(tmp_path / "b", np.arange(2000, 5000), vocab_size=6000)
    for data in (a, {a: 1, b: 3}):
        whole, other = Batches(data, 8, 7), Batches(data, 8, 7)
        for first in (8190, 0, 995, 4090):  # across blocks and cycles too
            x, y = whole.get(first, 24)
            for processes, micro in ((8, 3), (3, 8), (1, 24), (24, 1), (2, 12)):
                parts = [other.get(first + i * micro, micro) for i in reversed(range(processes))][::-1]
                assert np.array_equal(np.concatenate([p[0] for p in parts]), x) and np.array_equal(np.concatenate([p[1] for p in parts]), y)


def test_how_often_a_data_set_was_gone_through(tmp_path):
    a, b = dataset(tmp_path / "a", np.arange(803), vocab_size=6000), dataset(tmp_path / "b", np.arange(80), vocab_size=6000)
    assert Batches(a, 8, 0).epochs(250) == {a: 2.5}
    assert Batches({a: 3, b: 1}, 8, 0).epochs(1000) == pytest.approx({a: 7.5, b: 25.0})


@pytest.mark.parametrize(
    "weights, shares",
    [
        ([1, 1], [500, 500]),
        ([3, 1], [750, 250]),
        ([0.7, 0.3], [700, 300]),
        ([0.1, 0.2, 0.7], [100, 200, 700]),
        ([0.9999, 0.0001], [999, 1]),
        ([1, 1, 1], None),
        ([1, 2, 4, 9], None),
    ],
)
def test_a_mixture_has_its_shares_exactly_in_every_cycle(tmp_path, weights, shares):
    folders = [dataset(tmp_path / str(i), np.arange(i * 5000, i * 5000 + 4000), vocab_size=60_000) for i in range(len(weights))]
    batches = Batches(dict(zip(folders, weights)), 8, 3)
    for cycle in range(5):
        counts = np.bincount(starts(batches, cycle * 1000, 1000) // 5000, minlength=len(weights))
        assert counts.sum() == 1000 and abs(counts - 1000 * np.array(weights) / sum(weights)).max() < 1
        assert shares is None or counts.tolist() == shares
    halves = starts(batches, 0, 1000)[:500] // 5000
    assert abs((halves == 0).mean() - weights[0] / sum(weights)) < 0.08  # mixed, not one after the other


def test_a_mixture_reads_each_set_without_replacement(tmp_path):
    sizes = [1000, 3000]  # 125 and 375 windows
    folders = [dataset(tmp_path / str(i), np.arange(i * 5000, i * 5000 + n), vocab_size=60_000) for i, n in enumerate(sizes)]
    x, y = Batches({folders[0]: 0.3, folders[1]: 0.7}, 8, 3).get(0, 9000)  # across the borders of cycles, blocks and epochs
    for i, n in enumerate(sizes):
        mine = x[x[:, 0] // 5000 == i] - 5000 * i
        assert np.array_equal((mine + 1) % n, y[x[:, 0] // 5000 == i] - 5000 * i)
        for epoch in range(len(mine) // (n // 8)):
            assert len(np.unique(mine[epoch * (n // 8) : (epoch + 1) * (n // 8)])) == n
        assert len(mine) // (n // 8) > 10


@pytest.mark.parametrize("weights", [{}, {"d": 0}, {"d": -1}, {"d": "much"}, {"d": None}])
def test_weights_that_make_no_sense_are_refused(tmp_path, weights):
    folder = dataset(tmp_path / "d", np.arange(100))
    with pytest.raises(ValueError):
        Batches({folder: w for w in weights.values()}, 8, 0)


def test_a_data_set_shorter_than_a_window_is_refused(tmp_path):
    folder = dataset(tmp_path / "d", np.arange(8))
    with pytest.raises(ValueError, match=r"8 tokens.*block_size \+ 1 = 9.*--block_size"):
        Batches(folder, 8, 0)
    assert Batches(folder, 7, 0).get(0, 1)[0].shape == (1, 7)


def test_weights_of_any_scale_mix_alike(tmp_path):
    a, b = dataset(tmp_path / "a", np.arange(100)), dataset(tmp_path / "b", np.arange(100, 200))
    assert np.array_equal(Batches({a: 2, b: 6}, 8, 0).get(0, 50)[0], Batches({a: 0.25, b: 0.75}, 8, 0).get(0, 50)[0])


# ---- Windows ----

LENGTHS = [2, 3, 8, 9, 10, 16, 17, 18, 63, 64, 65, 100]


@pytest.mark.parametrize("block, stride", [(8, None), (8, 8), (8, 1), (8, 3), (8, 4), (8, 7), (1, None), (1, 1), (100, 50), (5, 2)])
@pytest.mark.parametrize("limit", [None, 0, 8, 9, 16, 40, 1000])
def test_every_target_is_scored_once_with_its_context(block, stride, limit):
    for length in LENGTHS:
        scored = []
        for x, y in windows(Text(range(length)), block, stride, limit, 3):
            assert x.shape == y.shape and x.shape[1] == block and len(x) <= 3 and x.dtype == y.dtype == np.int64
            for xs, ys in zip(x, y):
                (at,) = np.nonzero(ys != IGNORE)
                n = at[-1] + 1
                assert np.array_equal(at, np.arange(at[0], n))  # what this window adds, at its end
                assert np.array_equal(xs[:n], np.arange(xs[0], xs[0] + n)) and np.array_equal(ys[at], xs[at] + 1)
                assert at[0] + 1 >= min(block - (stride or block) + 1, ys[at[0]])  # tokens of context, itself included
                scored += ys[at].tolist()
        end = length - 1
        if limit:
            end = min(end, max(limit // block, 1) * block)
        assert scored == list(range(1, end + 1))


def test_windows_come_in_full_batches():
    assert [len(x) for x, _ in windows(Text(range(81)), 8, batch_size=4)] == [4, 4, 2]
    assert list(windows(Text([5]), 8)) == [] and list(windows(Text([]), 8)) == []


def test_windows_read_a_stream_as_they_read_text(tmp_path):
    ids = np.random.default_rng(0).integers(0, 257, 500)
    stream = Stream(dataset(tmp_path / "d", ids, shard_tokens=77), "train")
    for a, b in zip(windows(stream, 16, 5), windows(Text(ids), 16, 5), strict=True):
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


# ---- Memory ----

READ_ALL = """
import sys
import numpy as np
import tokens

def own():  # bytes that belong to this process alone
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

folder, block, before = sys.argv[1], 16384, own()
batches, most, total = tokens.Batches(folder, block, 0), 0, 0
stream = tokens.Stream(folder, "train")
for i in range(0, len(stream) // block, 4):
    total += batches.get(i, min(4, len(stream) // block - i))[0].size
    most = max(most, own())
for x, y in tokens.windows(stream, block, batch_size=4):
    total += (y != tokens.IGNORE).sum()
    most = max(most, own())
print(total, len(stream), most - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("shard_tokens", [2**25, pytest.param(2**27, marks=pytest.mark.slow)])
def test_reading_far_more_than_stays_in_memory(tmp_path, shard_tokens):
    shards = [{"file": f"train_{i:05d}.npy", "tokens": shard_tokens, "sha256": "of a large set not checked"} for i in range(4)]
    for i, shard in enumerate(shards):
        file = np.lib.format.open_memmap(tmp_path / shard["file"], "w+", np.uint16, (shard_tokens,))
        file[:: 2**20] = i  # the rest is a hole in the file
    del file
    meta = {"format_version": 1, "tokenizer": {"name": "bytes", "kind": "bytes", "vocab_size": 257}, "shards": {"train": shards, "val": []}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    try:
        done = subprocess.run([sys.executable, "-c", READ_ALL, str(tmp_path)], cwd=REPO, capture_output=True, text=True)
        total, length, grown = map(int, done.stdout.split())
    finally:
        for shard in shards:
            os.remove(tmp_path / shard["file"])
    assert length == 4 * shard_tokens and total == 2 * length - 1  # every token by the batches, every target by the windows
    assert grown < 2**24  # of 2**28 bytes and more


def test_the_tokenizer_file_is_as_tiktokens_own(trained, tmp_path):
    tokens.write_tokenizer_file(trained, tmp_path / "a.tiktoken")
    lines = (tmp_path / "a.tiktoken").read_bytes().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(1491)) and base64.b64decode(lines[65].split()[0]) == tokens.token_bytes(trained)[65]
    assert tiktoken.load.load_tiktoken_bpe(str(tmp_path / "a.tiktoken")) == trained._mergeable_ranks
