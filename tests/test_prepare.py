"""prepare.py, run as a user runs it: text in, tokens out."""
import contextlib
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import text
import tokens

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(REPO, "..", "shared", "data")
if os.path.isdir(SHARED):
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", os.path.abspath(os.path.join(SHARED, "tiktoken_cache")))
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason="needs the shared test data")
needs_html = pytest.mark.skipif(importlib.util.find_spec("resiliparse") is None, reason="resiliparse reads HTML")


def start(*argv, **options):
    return subprocess.Popen(
        [sys.executable, os.path.join(REPO, "prepare.py"), *map(str, argv)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True, **options,
    )  # fmt: skip


def prepare(*argv, timeout=60, **options):
    """Run prepare.py to its end, with the byte tokenizer and one worker unless argv says otherwise."""
    process = start("--tokenizer=bytes", "--workers=1", *argv, **options)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too, where it hangs
    return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)


def prepared(*argv, **options):
    done = prepare(*argv, **options)
    assert done.returncode == 0, done.stderr
    return done


def refused(*argv, **options):
    """The one line with which prepare.py ends with exit status 2. Documents that it skipped before stand on lines of their own."""
    done = prepare(*argv, **options)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    *before, line = done.stderr.splitlines()
    assert line.startswith("prepare.py: ") and all(other.startswith("skipped ") for other in before), done.stderr
    return line


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def meta(folder):
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
        return json.load(f)


def ids(folder, split):
    parts = [np.load(os.path.join(folder, s["file"]), mmap_mode="r", allow_pickle=False) for s in meta(folder)["shards"][split]]
    return np.concatenate(parts) if parts else np.array([], dtype=np.uint16)


def documents(folder, split):
    """The documents of a split, decoded; each must begin with the end-of-text token."""
    encoding, all_ids = tokens.load_tokenizer(folder), ids(folder, split)
    if not len(all_ids):
        return []
    assert all_ids[0] == encoding.eot_token
    begins = [*np.flatnonzero(all_ids == encoding.eot_token), len(all_ids)]
    return [encoding.decode_bytes(all_ids[a + 1 : b].tolist()).decode() for a, b in zip(begins, begins[1:])]


def content_of(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}


def story(i, sentences=8):
    chance = random.Random(i)
    words = "the cat sat on a mat and saw it all again. naïve café, 中文 🤖 def return (x): 'quoted' 12 345".split(" ")
    return f"Document {i}.\n" + "\n".join(" ".join(chance.choices(words, k=9)) for _ in range(sentences)).strip()


def write_jsonl(path, texts):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts))
    return path


# ---- What comes out ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of every kind of file; and its documents as they should come out, in order."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "sub" / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    write = {
        "a.txt": "\ufeffFirst, with a mark.\r\n\r\n\r\n\r\n\r\n  Indented  \r\nend\r\n".encode(),
        "b.md": "# Häading\n\n* item \x07\n".encode(),
        "c.py": b"def f():\n\treturn 1\n",
        "d.txt.gz": gzip.compress("zipped cafe\u0301".encode()),
        "e.jsonl": b'\xef\xbb\xbf{"text": "line one"}\r\n\n{"text": "line \\u4e8c \\ud83e\\udd16", "id": 2}\n{"text": "  "}\n{"text": "line one "}',
        "empty.txt": b"",
        "same.md": b"def f():\n\treturn 1\n\n",
        "unknown.bin": b"\xff\xfe\x00",
        ".hidden.txt": b"hidden",
        ".git/config.txt": b"hidden too",
        "sub/f.jsonl.gz": gzip.compress(b'{"text": "<|endoftext|> is <b>text</b> &amp; stays"}\n'),
        "sub/deep/g.TXT": b"deepest",
    }
    for name, data in write.items():
        (root / name).write_bytes(data)
    texts = ["First, with a mark.\n\n\n  Indented\nend\n", "# Häading\n\n* item\n", "def f():\n\treturn 1\n", "zipped café", "line one"]
    return str(root), [*texts, "line 二 🤖", "<|endoftext|> is <b>text</b> &amp; stays", "deepest"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """150 documents, a few of them twice, prepared into several shards with a vocabulary that was trained on them."""
    root = tmp_path_factory.mktemp("many")
    texts = [story(i) for i in range(150)]
    write_jsonl(root / "many.jsonl", [*texts, texts[3].replace("\n", " \t\n") + "  ", texts[77].replace("\n", "\r\n")])
    settings = ("--tokenizer=train:300", "--val_fraction=0.2", "--shard_tokens=5000", f"--json={root / 'figures' / 'f.json'}")
    done = prepared(root / "many.jsonl", f"--out={root / 'out'}", *settings)
    return root, texts, done


def test_every_kind_of_file_is_read_cleaned_and_written_in_order(corpus):
    folder, texts = corpus
    prepared(folder, "--out=out", "--workers=2")
    stream = np.concatenate([ids("out", "train"), ids("out", "val")])
    assert bytes(stream[stream != 256].astype(np.uint8)).decode() == "".join(texts)
    m = meta("out")
    assert m["cleaning"]["read"] == 12 and m["cleaning"]["dropped"] == {"duplicate": 2, "empty": 2} and m["cleaning"]["passed_over_files"] == 1
    assert sum(m["splits"][s]["bytes"] for s in ("train", "val")) == len("".join(texts).encode())


def test_every_document_begins_with_end_of_text_and_decodes_to_its_cleaned_text(many):
    root, texts, _ = many
    out = root / "out"
    train, val = documents(out, "train"), documents(out, "val")
    assert train == [t for t in texts if t in set(train)] and val == [t for t in texts if t in set(val)]
    assert sorted(train + val) == sorted(texts) and len(meta(out)["shards"]["train"]) > 2
    assert all(text.clean(t) == t for t in train)


def test_meta_json_has_the_figures(many):
    root, texts, done = many
    m = meta(root / "out")
    assert m["format_version"] == 1 and m["cleaning"] == {"read": 152, "kept": 150, "dropped": {"duplicate": 2}, "passed_over_files": 0}
    assert m["tokenizer"]["kind"] == "trained" and m["tokenizer"]["name"] == "train:300" and m["tokenizer"]["vocab_size"] == 300
    for split in ("train", "val"):
        docs = documents(root / "out", split)
        figures = {"documents": len(docs), "tokens": len(ids(root / "out", split)), "bytes": sum(len(d.encode()) for d in docs)}
        assert m["splits"][split] == figures and f"{split:5} {len(docs):>9,} documents" in done.stdout
        for shard in m["shards"][split]:
            path = root / "out" / shard["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"] and len(np.load(path)) == shard["tokens"] <= 5000
    files = [shard["file"] for shards in m["shards"].values() for shard in shards]
    assert sorted(os.listdir(root / "out")) == sorted(["meta.json", "tokenizer.tiktoken", *files])
    assert json.load(open(root / "figures" / "f.json")) == m and "152 documents read, 150 kept; dropped: 2 duplicate" in done.stdout
    lengths = tokens.byte_lengths(tokens.load_tokenizer(str(root / "out")))
    assert lengths[ids(root / "out", "val")].sum() == m["splits"]["val"]["bytes"]


def test_the_data_set_can_be_read_as_batches(many):
    out = str(many[0] / "out")
    x, y = tokens.Batches(out, 32, 0).get(0, 10)
    assert np.array_equal(x[:, 1:], y[:, :-1]) and len(tokens.Stream(out, "val")) == meta(out)["splits"]["val"]["tokens"]


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_the_number_of_workers_does_not_change_a_byte(many, corpus, tokenizer):
    numbers = write_jsonl("numbers.jsonl", [f"number {i}" for i in range(6000)])  # more than the workers take at once
    inputs = (numbers, many[0] / "many.jsonl", corpus[0], f"--tokenizer={tokenizer}", "--val_fraction=0.3")
    prepared(*inputs, "--out=one", "--workers=1")
    prepared(*inputs, "--out=two", "--workers=2")
    assert content_of("one") == content_of("two")
    found = [int(d[7:]) for d in documents("one", "train") if d.startswith("number ")]
    assert found == sorted(found) and len(found) > 4000


def test_duplicates_stay_where_asked(many):
    prepared(many[0] / "many.jsonl", "--dedup=none", "--out=out", "--val_fraction=0.2")
    assert meta("out")["cleaning"] == {"read": 152, "kept": 152, "dropped": {}, "passed_over_files": 0}
    assert not set(documents("out", "train")) & set(documents("out", "val"))


def test_a_text_key_names_where_the_text_stands():
    with open("a.jsonl", "w") as f:
        f.writelines(json.dumps({"id": "x", "body": story(i)}) + "\n" for i in range(20))
    prepared("a.jsonl", "--text_key=body", "--out=out")
    assert meta("out")["cleaning"]["dropped"] == {} and documents("out", "train")[0] == story(0)


@needs_html
def test_html_is_read():
    os.mkdir("pages")
    page = "<html><head><style>x</style></head><body><h1>Title {}</h1><p>one &amp; two</p></body></html>"
    open("pages/a.html", "w").write(page.format(1))
    gzip.open("pages/b.htm.gz", "wt").write(page.format(2))
    open("pages/c.txt", "w").write(page.format(3))
    for more, third in (((), page.format(3)), (("--html",), "Title 3\n\none & two")):
        prepared("pages", "--out=out", "--overwrite", *more)
        stream = np.concatenate([ids("out", "train"), ids("out", "val")])
        found = bytes(stream[stream != 256].astype(np.uint8)).decode()
        assert found == "Title 1\n\none & twoTitle 2\n\none & two" + third


@needs_html
def test_half_a_surrogate_pair_does_not_end_html():
    open("a.jsonl", "w").write('{"text": "<b>a</b> \\ud800 good"}\n{"text": "another"}\n')
    prepared("a.jsonl", "--html", "--out=out")


def test_html_without_its_library_ends_with_the_line_that_names_the_install():
    open("a.html", "w").write("<p>x")
    os.mkdir("absent")
    open("absent/resiliparse.py", "w").write("raise ImportError")
    path = os.path.abspath("absent") + os.pathsep + os.environ.get("PYTHONPATH", "")
    line = refused("a.html", "--out=out", env={**os.environ, "PYTHONPATH": path})
    assert "pip install resiliparse" in line and not os.path.exists("out")


def test_the_classical_options_are_applied():
    write_jsonl("a.jsonl", [f"The {i}. CAT, sat on it!" for i in range(150)])
    prepared("a.jsonl", "--lowercase", "--strip_punctuation", "--drop_stopwords", "--out=out")
    assert documents("out", "train")[0].split() in (["0", "cat", "sat"], ["1", "cat", "sat"])


def test_special_strings_in_documents_stay_text():
    write_jsonl("a.jsonl", [f"<|endoftext|> {i} <|reserved_0|>" for i in range(150)])
    for tokenizer in ("bytes", "train:300"):
        prepared("a.jsonl", f"--tokenizer={tokenizer}", "--out=out", "--overwrite")
        docs = documents("out", "train") + documents("out", "val")
        assert len(docs) == 150 and all(d.startswith("<|endoftext|> ") for d in docs)


# ---- Splits ----


def test_a_document_never_moves_when_others_are_added():
    texts = [story(i, 1) for i in range(600)]
    splits = []
    for name, some in (("few", texts[100:300]), ("more", texts), ("turned", texts[::-1])):
        prepared(write_jsonl(f"{name}.jsonl", some), f"--out={name}", "--val_fraction=0.3")
        train, val = set(documents(name, "train")), set(documents(name, "val"))
        assert not train & val and train | val == set(some) and 0.2 < len(val) / len(some) < 0.4
        splits.append((train, val))
    (few_train, few_val), (train, val), turned = splits
    assert few_train < train and few_val < val and (train, val) == turned


def test_a_hash_of_the_content_picks_the_validation_split(many):
    root, texts, _ = many
    picked = [t for t in texts if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "little") < 0.2 * 2**64]
    assert documents(root / "out", "val") == picked


def test_with_fewer_than_100_documents_the_last_tenth_of_the_stream_is_validation():
    texts = [story(i, 1) for i in range(99)]
    prepared(write_jsonl("a.jsonl", [*texts, texts[0]]), "--out=out", "--val_fraction=0.3")
    stream, train, val = "".join(texts).encode(), ids("out", "train"), ids("out", "val")
    cut = len(stream) - meta("out")["splits"]["val"]["bytes"]
    assert abs(cut - 0.9 * len(stream)) < 4  # whole characters
    assert bytes(train[train != 256].astype(np.uint8)) == stream[:cut] and bytes(val[val != 256].astype(np.uint8)) == stream[cut:]
    assert val[0] == 256 and meta("out")["splits"]["train"]["bytes"] == cut


def test_from_100_documents_on_their_hashes_pick_validation():
    texts = [story(i, 1) for i in range(100)]
    prepared(write_jsonl("a.jsonl", texts), "--out=out", "--val_fraction=0.3")
    train, val = documents("out", "train"), documents("out", "val")
    assert len(train) + len(val) == 100 and 15 < len(val) < 45 and val != texts[-len(val) :]


@pytest.mark.parametrize("more", [2, 5, 9])
def test_the_cut_does_not_break_a_character(more):
    open("a.txt", "w", encoding="utf-8").write("中🤖é" * 300 + "x" * more)
    prepared("a.txt", "--out=out")
    assert [len(documents("out", split)) for split in ("train", "val")] == [1, 1]  # which decode


def test_documents_that_end_at_the_cut_stay_whole():
    write_jsonl("a.jsonl", [f"document {i}" for i in range(10)])
    prepared("a.jsonl", "--out=out")
    assert documents("out", "train") == [f"document {i}" for i in range(9)] and documents("out", "val") == ["document 9"]
    assert [meta("out")["splits"][s]["documents"] for s in ("train", "val")] == [9, 1]


@pytest.mark.parametrize("n", [1, 2, 10, 99])
def test_a_document_that_is_cut_in_two_counts_as_one_kept(n):
    prepared(write_jsonl("a.jsonl", [story(i) for i in range(n)]), "--out=out")
    cleaning = meta("out")["cleaning"]
    assert (cleaning["read"], cleaning["kept"], cleaning["dropped"]) == (n, n, {})


@needs_shared
def test_of_tinyshakespeare_the_last_111540_bytes_are_validation():
    path = os.path.join(SHARED, "tinyshakespeare.txt")
    prepared(path, "--out=out")
    stream = text.clean(open(path, encoding="utf-8").read()).encode()
    val = ids("out", "val")
    assert val[0] == 256 and bytes(val[1:].astype(np.uint8)) == stream[-len(val[1:]) :]
    assert bytes(ids("out", "train")[1:].astype(np.uint8)) + bytes(val[1:].astype(np.uint8)) == stream
    assert meta("out")["splits"]["val"]["bytes"] == len(val) - 1 == 111_540


# ---- Vocabularies ----


def test_a_vocabulary_is_learned_from_one_document_whatever_its_hash():
    for i in range(1000):
        content = story(i, 40)
        if int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "little") < 0.05 * 2**64:
            break
    open("a.txt", "w", encoding="utf-8").write(content)
    prepared("a.txt", "--tokenizer=train:300", "--out=out")
    assert meta("out")["tokenizer"]["vocab_size"] == 300  # 265 would be the bytes alone


def test_a_data_sets_vocabulary_serves_another(many):
    root, texts, _ = many
    prepared(write_jsonl("a.jsonl", texts[:120]), f"--tokenizer={root / 'out'}", "--out=out")
    assert tokens.fingerprint(tokens.load_tokenizer("out")) == tokens.fingerprint(tokens.load_tokenizer(str(root / "out")))
    assert meta("out")["tokenizer"]["kind"] == "folder" and set(documents("out", "train")) < set(texts)


@pytest.mark.skipif(not os.path.isdir(SHARED), reason="needs the gpt2 vocabulary")
def test_gpt2s_vocabulary_serves():
    prepared(write_jsonl("a.jsonl", [story(i) for i in range(120)]), "--tokenizer=gpt2", "--out=out")
    m = meta("out")
    assert m["tokenizer"] == {"name": "gpt2", "kind": "tiktoken", "vocab_size": 50257} and ids("out", "train")[0] == 50256
    assert sorted(documents("out", "train") + documents("out", "val")) == sorted(story(i) for i in range(120))


@pytest.mark.parametrize("blanks", [" ", "\n \t"])
def test_a_very_long_run_of_blanks_ends_nothing(blanks):
    write_jsonl("a.jsonl", [*(story(i, 1) for i in range(20)), "x\n" + blanks * 1_000_000 + "y"])
    prepared("a.jsonl", "--tokenizer=train:300", "--out=out", timeout=15)
    assert meta("out")["cleaning"]["kept"] >= 20


# ---- Bad documents ----


def with_bad(good, bad):
    lines = [json.dumps({"text": story(i)}) for i in range(good)]
    for k, line in enumerate(bad):
        lines.insert(3 * k + 2, line)
    with open("a.jsonl", "w") as f:
        f.write("\n".join(lines))


BAD = ["{not json", '{"other": "key"}', "17"]


def test_bad_documents_are_skipped_counted_and_named_by_file_and_line():
    with_bad(197, BAD)
    open("b.txt", "wb").write("naïve".encode("latin-1"))
    done = prepared("a.jsonl", "b.txt", "--out=out")
    assert meta("out")["cleaning"] == {
        "read": 201, "kept": 197, "dropped": {"no text under the key 'text'": 2, "not JSON": 1, "not UTF-8": 1}, "passed_over_files": 0,
    }  # fmt: skip
    for named in ("a.jsonl:3: not JSON", "a.jsonl:6: no text under the key 'text'", "a.jsonl:9: no text", "b.txt: not UTF-8"):
        assert done.stderr.count(f"skipped {named}") == 1
    assert sorted(documents("out", "train") + documents("out", "val")) == sorted(story(i) for i in range(197))


def test_a_bad_document_is_named_once_where_a_vocabulary_is_trained():
    with_bad(120, BAD)
    assert prepared("a.jsonl", "--tokenizer=train:300", "--out=out").stderr.count("skipped a.jsonl:3: not JSON") == 1


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_strict_ends_at_the_first_bad_document(tokenizer):
    with_bad(100, BAD)
    line = refused("a.jsonl", "--strict", f"--tokenizer={tokenizer}", "--out=out")
    assert line.startswith("prepare.py: a.jsonl:3: not JSON") and os.listdir() == ["a.jsonl"]


@pytest.mark.parametrize("good, bad", [(8, 2), (17, 3), (88, 12), (150, 20)])
def test_more_than_a_tenth_of_bad_documents_leaves_nothing(good, bad):
    with_bad(good, BAD[:1] * bad)
    line = refused("a.jsonl", "--out=out")
    assert f"{bad} of {good + bad} documents are bad, more than max_bad=0.1" in line and os.listdir() == ["a.jsonl"]


def test_a_tenth_of_bad_documents_is_borne_and_more_where_asked():
    with_bad(18, BAD[:1] * 2)
    prepared("a.jsonl", "--out=out")
    with_bad(10, BAD[:1] * 10)
    prepared("a.jsonl", "--out=half", "--max_bad=0.5")
    assert meta("half")["cleaning"]["read"] == 20 and meta("half")["cleaning"]["dropped"] == {"not JSON": 10}


@pytest.mark.parametrize("how", ["cut", "block"])
def test_a_damaged_gzip_is_counted_as_bad(how):
    lines = "".join(json.dumps({"text": story(i)}) + "\n" for i in range(300)).encode()
    whole = gzip.compress(lines)
    open("a.jsonl.gz", "wb").write(whole[: len(whole) // 2] if how == "cut" else whole)
    open("b.txt.gz", "wb").write(whole if how == "cut" else whole[:10] + b"\x07" + whole[11:])  # a deflate block of a type that there is not
    done = prepared("a.jsonl.gz", "b.txt.gz", "--out=out")
    dropped = meta("out")["cleaning"]["dropped"]
    assert [n for reason, n in dropped.items() if reason.startswith("unreadable file")] == [1]
    assert f"skipped {'a.jsonl' if how == 'cut' else 'b.txt'}.gz: unreadable file" in done.stderr


def test_a_file_that_cannot_be_read_is_named():
    os.mkdir("folder")
    write_jsonl("folder/a.jsonl", [story(i) for i in range(30)])
    os.symlink("nowhere", "folder/b.txt")
    done = prepare("folder", "--out=out")
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr and "folder/b.txt" in done.stderr


# ---- Mistakes ----


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_a_file_that_is_not_there_is_named(tokenizer):
    assert refused("absent.txt", f"--tokenizer={tokenizer}", "--out=out") == "prepare.py: there is no file or folder 'absent.txt'"
    assert os.listdir() == []


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_an_empty_corpus_is_refused(content, tokenizer):
    open("a.txt", "wb").write(content)
    assert "the corpus is empty: 1 documents read" in refused("a.txt", f"--tokenizer={tokenizer}", "--out=out")
    assert os.listdir() == ["a.txt"]


def test_a_folder_without_text_is_refused():
    os.mkdir("folder")
    open("folder/a.bin", "w").write("x")
    assert "there is nothing to read in folder" in refused("folder", "--out=out") and os.listdir() == ["folder"]


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--tokenizer=gpt3", "did you mean gpt2?"),
        ("--tokenizer=train:", "train:N takes a number"),
        ("--tokenizer=train:many", "train:N takes a number"),
        ("--tokenizer=train:10", "too small"),
        ("--tokenizer=.", "neither meta.json nor tokenizer.json"),
        ("--val_fraction=0", "between 0 and 1"),
        ("--val_fraction=1", "between 0 and 1"),
        ("--dedup=fuzzy", "dedup must be exact or none"),
        ("--workers=-1", "workers"),
        ("--shard_tokens=0", "shard_tokens"),
        ("--shard_tokens=-5", "shard_tokens"),
        ("--max_bad=much", "max_bad must be float"),
        ("--tokeniser=gpt2", "did you mean tokenizer?"),
    ],
)
def test_a_senseless_setting_is_refused(argument, message):
    open("a.txt", "w").write(story(0))
    try:
        line = refused("a.txt", "--out=out", argument, timeout=6)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{argument} never ends")
    assert message in line and os.listdir() == ["a.txt"]


# ---- The folder ----


def test_an_existing_data_set_is_refused_and_overwrite_replaces_it(many):
    root, texts, _ = many
    open("a.txt", "w").write(story(1))
    prepared(write_jsonl("b.jsonl", texts), "--out=out", "--shard_tokens=1000")
    before = content_of("out")
    assert "out is there already" in refused("a.txt", "--out=out") and content_of("out") == before
    prepared("a.txt", "--out=out/", "--overwrite")
    assert sorted(os.listdir("out")) == ["meta.json", "train_00000.npy", "val_00000.npy"] and sorted(os.listdir()) == ["a.txt", "b.jsonl", "out"]
    refused("absent.txt", "--out=out", "--overwrite")
    assert meta("out")["cleaning"]["read"] == 1


def test_overwrite_never_takes_away_what_is_no_data_set():
    os.makedirs("data/mine/sub")
    for name in ("a.txt", "sub/b.txt"):
        open(f"data/mine/{name}", "w").write(story(len(name)))
    done = prepare("data/mine", "--overwrite")  # whose default for out is data/mine
    assert os.path.exists("data/mine/a.txt") and os.path.exists("data/mine/sub/b.txt"), "the corpus is gone"
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_overwrite_never_takes_away_its_own_inputs():
    open("a.txt", "w").write(story(1))
    prepared("a.txt", "--out=out")
    os.rename("a.txt", "out/a.txt")
    done = prepare("out/a.txt", "--out=out", "--overwrite")
    assert os.path.exists("out/a.txt") and done.returncode == 2 and "Traceback" not in done.stderr


def test_a_failed_overwrite_leaves_the_old_data_set():
    open("a.txt", "w").write(story(1))
    prepared("a.txt", "--out=out")
    before = content_of("out")
    with_bad(1, BAD)
    refused("a.jsonl", "--out=out", "--overwrite")
    assert content_of("out") == before and sorted(os.listdir()) == ["a.jsonl", "a.txt", "out"]


@pytest.mark.parametrize(
    "name, folder",
    [("my book.part1.txt", "data/my book"), ("wiki.jsonl.gz", "data/wiki"), ("corpus/", "data/corpus"), ("sub/../corpus", "data/corpus")],
)
def test_the_first_input_names_the_folder(name, folder):
    os.makedirs("corpus")
    os.makedirs("sub")
    open("corpus/a.txt", "w").write(story(1))
    open("my book.part1.txt", "w").write(story(1))
    gzip.open("wiki.jsonl.gz", "wt").write(json.dumps({"text": story(1)}))
    prepared(name, "corpus/a.txt")
    assert meta(folder)["cleaning"]["read"] == 2 and os.listdir("data") == [os.path.basename(folder)]


def test_a_folder_that_cannot_be_made_is_one_line():
    open("a.txt", "w").write(story(1))
    for tokenizer in ("bytes", "train:300"):
        assert "a.txt" in refused("a.txt", "--out=a.txt/out", f"--tokenizer={tokenizer}")
    assert os.listdir() == ["a.txt"]


def test_a_figures_file_that_cannot_be_written_is_named():
    open("a.txt", "w").write(story(1))
    line = refused("a.txt", "--out=out", "--json=a.txt/figures.json")
    assert "a.txt" in line and "could not write out" not in line and os.listdir() == ["a.txt"]


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_disk_that_takes_no_more_is_one_line_and_nothing_is_left(size):
    resource = pytest.importorskip("resource", reason="the limit on file sizes is POSIX's")
    write_jsonl("a.jsonl", [story(i) for i in range(300)])
    line = refused("a.jsonl", "--out=out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert "could not write out: File too large" in line and os.listdir() == ["a.jsonl"]


LONG = story(0, 100)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_a_killed_run_leaves_nothing_under_the_final_name():
    write_jsonl("a.jsonl", [f"{i} {LONG}" for i in range(4000)])
    process = start("a.jsonl", "--out=out", "--tokenizer=bytes", "--workers=1")
    wait_for(lambda: glob.glob("out*/train_*"))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL and not os.path.exists("out") and os.path.exists("out.part")
    open("a.jsonl", "w").write(json.dumps({"text": story(1)}))
    prepared("a.jsonl", "--out=out")
    assert sorted(os.listdir()) == ["a.jsonl", "out"] and meta("out")["cleaning"]["read"] == 1


@pytest.mark.skipif(not os.path.exists(f"/proc/self/task/{os.getpid()}/children"), reason="finds the worker in /proc")
def test_a_run_whose_worker_dies_ends_and_leaves_nothing():
    write_jsonl("a.jsonl", [f"{i} {LONG}" for i in range(4000)])
    process = start("a.jsonl", "--out=out", "--tokenizer=bytes", "--workers=1")
    try:
        wait_for(lambda: glob.glob("out*/train_*"))
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
            os.kill(int(f.read().split()[0]), signal.SIGKILL)  # as where memory runs out
        _, stderr = process.communicate(timeout=15)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 2 and "Traceback" not in stderr and os.listdir() == ["a.jsonl"]


def test_ctrl_c_leaves_nothing():
    write_jsonl("a.jsonl", [f"{i} {LONG}" for i in range(60_000)])
    process = start("a.jsonl", "--out=out", "--tokenizer=bytes", "--workers=1")
    wait_for(lambda: glob.glob("out*/train_*"))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the workers too
    process.communicate(timeout=20)
    assert process.returncode != 0 and os.listdir() == ["a.jsonl"]


# ---- Without inputs ----


@pytest.mark.slow
def test_without_inputs_it_is_the_standard_library():
    done = prepared("--tokenizer=train:4096", "--workers=2", timeout=300)
    m = meta("data/python")
    assert m["tokenizer"]["vocab_size"] == 4096 and m["cleaning"]["kept"] > 300 and m["splits"]["train"]["bytes"] > 5e6
    assert m["splits"]["val"]["documents"] > 5 and "data/python: vocabulary train:4096, 4,096 ids" in done.stdout
    assert any(d.startswith('"""') for d in documents("data/python", "val"))
