"""text.py: what prepare.py does to one document."""
import ast
import gzip
import json
import os
import random
import time
import unicodedata
import warnings

import pytest

import prepare
import text
from text import BadDocument, classical, clean, decode, extract, kind_of, records


# ---- Cleaning ----


@pytest.mark.parametrize(
    "content",
    [
        "",
        "plain",
        "    indented first line\n\tand a tab\n\t  both",
        "Case, STAYS; (and) [punctuation]: “too”… — ¿? <b>&amp;</b> `~!@#$%^&*_+=|\\/\"'",
        "two  blanks   inside\tand\ttabs",
        "one\n\ntwo\n\n\nthree",
        "a last line that ends\n",
        "def f(x):\n    if x:\n        return 1\n\n\nclass A:\n    pass",
        "naïve café 红楼梦 👩‍👩‍👧‍👦 🇩🇪 مرحبا हिन्दी \ufffd \u200b\u200d",
        "<|endoftext|>",
        "\u3000\u3000a paragraph that begins with wide blanks",
    ],
)
def test_what_is_clean_stays(content):
    assert clean(content) == content


@pytest.mark.parametrize(
    "content, cleaned",
    [
        ("a\r\nb\rc\nd\r\n", "a\nb\nc\nd\n"),
        ("a\r\n\r\nb", "a\n\nb"),
        ("a  \nb\t\nc \t \n\nd\u00a0\u3000\n", "a\nb\nc\n\nd\n"),
        ("a \r\nb \r\n", "a\nb\n"),
        ("a\nb  ", "a\nb"),
        ("a\n\n\n\nb", "a\n\n\nb"),
        ("a" + "\n" * 50 + "b", "a\n\n\nb"),
        ("a\n \n\t\n  \n \nb", "a\n\n\nb"),
        ("\n\n  a\n\n", "  a\n"),
        ("a\n \n", "a\n"),
        (" \n\t\n", ""),
        ("\n", ""),
        ("e\u0301 A\u030a \u1112\u1161\u11ab", "é Å 한"),
        ("ﬁ ² ①", "ﬁ ² ①"),
        ("a\x00b\x07c\x1b[31md\x7fe\x85f\x9fg", "abc[31mdefg"),
        ("a\x01 \nb", "a\nb"),
        ("a\x0c\nb\x0b", "a\nb"),
        ("x" + " " * 2_000_000 + "y\n" + "\t" * 1500, "x" + " " * 1000 + "y\n"),
    ],
)
def test_what_is_not_clean_is_mended(content, cleaned):
    assert clean(content) == cleaned


def test_every_control_character_but_tab_and_line_feed_goes():
    everything = [chr(c) for c in range(0x3100)]
    kept = set(clean("x".join(["", *everything, ""])))
    assert {c for c in kept if unicodedata.category(c) == "Cc"} == {"\t", "\n"}
    assert "".join(clean(f"x{c}x") for c in " \t\u00a0\u200b\u2028") == "x xx\txx\u00a0xx\u200bxx\u2028x"


def test_what_is_cleaned_is_clean_and_stays_so():
    chance = random.Random(0)
    for _ in range(5000):
        content = chance.choices(" \t\n\n\n\r\x00\x0b\x0c\x85\u00a0\u2000\u2028\u3000aé", k=12)
        content += chance.choices("e\u0301\u0300\u0323A\u030a😀\ufeff \n", k=8)
        content = "".join(chance.sample(content, len(content)))
        once = clean(content)
        assert clean(once) == once
        assert unicodedata.is_normalized("NFC", once) and "\n\n\n\n" not in once
        assert not any(line != line.rstrip() for line in once.split("\n")) and not once.startswith("\n") and not once.endswith("\n\n")


def test_every_module_of_the_standard_library_still_parses():
    broken, changed = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in prepare.standard_library():
            with open(path, "rb") as f:
                source = f.read()
            try:
                cleaned = clean(extract("text", source))
                changed += cleaned != source.decode().strip("\n")
                ast.parse(cleaned)
            except (SyntaxError, BadDocument) as e:
                try:
                    ast.parse(source)  # as it is, in the encoding that it declares
                    if not isinstance(e, BadDocument):
                        broken.append(path)
                except SyntaxError:
                    pass
    assert not broken and changed > 10 and len(prepare.standard_library()) > 300


@pytest.mark.parametrize("blanks", [" ", "\t", "\u3000", "\r", " \n", "\n", "\x00", "\u0301"])
def test_a_long_run_costs_time_in_proportion(blanks):
    begun = time.process_time()
    clean("x" + blanks * 10_000 + "y")
    assert time.process_time() - begun < 0.25


# ---- Reading ----


@pytest.mark.parametrize(
    "path, kind",
    [
        ("a.txt", "text"), ("a.md", "text"), ("a.py", "text"), ("a.html", "html"), ("a.htm", "html"), ("a.jsonl", "json"),
        ("A.TXT.GZ", "text"), ("a.jsonl.gz", "json"), ("b/c.d/a.html.gz", "html"),
        ("a.gz", None), ("a.json", None), ("a", None), ("txt", None), ("a.txt.zip", None),
    ],
)  # fmt: skip
def test_a_files_ending_says_its_kind(path, kind):
    assert kind_of(path) == kind


def test_text_is_decoded_with_and_without_a_byte_order_mark():
    assert decode("\ufeffä\ufeff中".encode()) == "ä\ufeff中" and decode("ä中".encode()) == "ä中" and decode(b"") == ""


@pytest.mark.parametrize("data", ["é".encode("latin-1"), "a".encode("utf-16"), b"\xed\xa0\x80", b"\xc0\x80", b"ok \xe4\xb8"])
def test_what_is_not_utf8_is_a_bad_document(data):
    with pytest.raises(BadDocument, match="not UTF-8"):
        decode(data)


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_file_is_one_record_and_a_json_file_one_a_line(tmp_path, packed):
    def write(name, data):
        path = tmp_path / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(data) if packed else data)
        return str(path)

    path = write("a.txt", b"one\r\ntwo\n")
    assert list(records(path, "text")) == [(path, "text", b"one\r\ntwo\n", os.path.getsize(path))]
    path = write("a.jsonl", b'{"text": "a"}\r\n\n  \n{"text": "b\\u2028"}\n{"text": "\xe2\x80\xa8"}')
    got = list(records(path, "json"))
    assert [where for where, *_ in got] == [f"{path}:1", f"{path}:4", f"{path}:5"]
    assert [extract(kind, data) for _, kind, data, _ in got] == ["a", "b\u2028", "\u2028"]
    assert got[-1][3] == os.path.getsize(path)
    assert list(records(write("b.jsonl", b""), "json")) == []


def lines(n):
    return [json.dumps({"text": f"{i} {random.Random(i).random()}"}).encode() + b"\n" for i in range(n)]


def test_a_gzip_that_breaks_off_yields_what_it_held_then_says_so(tmp_path):
    whole = gzip.compress(b"".join(lines(1000)))
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    *got, last = records(str(path), "json")
    assert 100 < len(got) < 900 and [data for _, _, data, _ in got] == lines(1000)[: len(got)]
    with pytest.raises(BadDocument, match="unreadable file"):
        extract(*last[1:3])


def damage(data, kind):
    if kind == "cut":
        return data[: len(data) // 2]
    if kind == "block":
        return data[:10] + b"\x07" + data[11:]  # a deflate block of a type that there is not
    if kind == "checksum":
        return data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]
    return b"no gzip at all"


@pytest.mark.parametrize("kind", ["text", "html", "json"])
@pytest.mark.parametrize("how", ["cut", "block", "checksum", "header"])
def test_a_damaged_gzip_is_a_bad_document(tmp_path, kind, how):
    path = tmp_path / "a.gz"
    path.write_bytes(damage(gzip.compress(b"".join(lines(10))), how))
    *_, last = records(str(path), kind)
    with pytest.raises(BadDocument, match="unreadable file"):
        extract(*last[1:3])


# ---- Extracting ----


def test_the_text_of_a_json_line_stands_under_a_key():
    line = '\ufeff{"id": 1, "text": "tëxt", "body": "b"}'.encode()
    assert extract("json", line) == "tëxt" and extract("json", line, text_key="body") == "b"
    assert extract("json", b'{"text": ""}') == "" and extract("json", b'{"text": "\\ud83d\\ude00"}') == "😀"


@pytest.mark.parametrize(
    "spelled, content",
    [
        (r"\ud83d\ude00", "😀"),
        (r"half \ud83d and \ude00 and whole \ud83d\ude00", "half \ufffd and \ufffd and whole 😀"),
        (r"\ude00\ud83d", "\ufffd\ufffd"),
        (r"\ud83d\ud83d\ude00\ude00", "\ufffd😀\ufffd"),
        (r"\ufffd \ufeff \u0000", "\ufffd \ufeff \x00"),
    ],
)
def test_halves_of_surrogate_pairs_are_replaced(spelled, content):
    assert extract("json", b'{"text": "%s"}' % spelled.encode()) == content
    clean(content).encode()


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "not JSON"),
        (b"text", "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"id": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"other": "a"}', "no text under the key 'text'"),
        (b'{"text": 3}', "no text under the key 'text'"),
        (b'{"text": null}', "no text under the key 'text'"),
        (b'{"text": ["a"]}', "no text under the key 'text'"),
        (b'["text"]', "no text under the key 'text'"),
        (b'"text"', "no text under the key 'text'"),
        (b"null", "no text under the key 'text'"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_a_bad_document_with_a_reason(line, reason):
    with pytest.raises(BadDocument) as e:
        extract("json", line)
    assert str(e.value) == reason


def test_a_bad_document_is_a_value_error():
    assert issubclass(BadDocument, ValueError)


PAGE = """<!doctype html><html><head><title>T</title><style>p { color: red }</style><script>let x = "<p>no</p>";</script></head>
<body><!-- a comment --><h1>Fish &amp; Chips</h1><p>1 &lt; 2 &eacute;&#8212;&#x4e2d;&nbsp;<b>bo</b>ld</p><ul><li>one<li>two</ul></body></html>"""


def page_is_read(content):
    assert "Fish & Chips" in content and "1 < 2 é—中" in content and "bold" in content
    assert content.splitlines()[0] == "Fish & Chips"
    for gone in ("<p>", "</", "&amp;", "&#", "color", "let x", "comment"):
        assert gone not in content


def test_tags_and_entities_are_taken_out_of_html_files():
    pytest.importorskip("resiliparse", reason="resiliparse reads HTML")
    page_is_read(extract("html", PAGE.encode()))
    page_is_read(extract("html", b"\xef\xbb\xbf" + PAGE.encode()))


def test_tags_and_entities_are_taken_out_of_other_text_where_asked():
    pytest.importorskip("resiliparse", reason="resiliparse reads HTML")
    line = json.dumps({"text": PAGE}).encode()
    assert extract("text", PAGE.encode()) == PAGE and extract("json", line) == PAGE
    page_is_read(extract("text", PAGE.encode(), html=True))
    page_is_read(extract("json", line, html=True))
    assert "good\nbad" in extract("json", b'{"text": "good<br /><br />bad"}', html=True).replace("\n\n", "\n")


@pytest.mark.parametrize("content", ["", "no tags", "a < b & c > d", "<", "<p", "&", "</p></div>", "<p>" * 500, "\x00<b>x"])
def test_broken_html_is_no_error(content):
    pytest.importorskip("resiliparse", reason="resiliparse reads HTML")
    assert isinstance(extract("html", content.encode()), str)


def test_html_with_half_a_surrogate_pair_is_no_error():
    pytest.importorskip("resiliparse", reason="resiliparse reads HTML")
    assert clean(extract("json", b'{"text": "<b>a</b> \\ud800 b"}', html=True)) == "a \ufffd b"


# ---- The classical options ----


def test_the_classical_options_are_off_by_default():
    content = "The cat, and THE dog's \"tail\"!  1+1=2 naïve"
    assert classical(content) == content


@pytest.mark.parametrize(
    "content, options, result",
    [
        ("The CAT Äß Σ", {"lowercase": True}, "the cat äß σ"),
        ("a, b. (c) “d” — e_f $5 <x> 1+1 é!", {"strip_punctuation": True}, "a b c d  ef 5 x 11 é"),
        ("你好，世界。", {"strip_punctuation": True}, "你好世界"),
        ("The cat and the dog", {"drop_stopwords": True}, "cat dog"),
        ("theme another android It", {"drop_stopwords": True}, "theme another android "),
        ("I was\nin the\n\nhouse", {"drop_stopwords": True}, "\n\n\nhouse"),
        ("THE End. Of it", {"lowercase": True, "drop_stopwords": True, "strip_punctuation": True}, "end "),
    ],
)
def test_each_classical_option_does_its_part(content, options, result):
    assert classical(content, **options) == result


def test_words_that_begin_like_a_stopword_stay():
    assert classical("don't can't we'll they’re cannot", drop_stopwords=True) == "don't can't we'll they’re cannot"


def test_every_stopword_is_lower_case():
    assert len(text.STOPWORDS) > 100 and all(word == word.lower() and word.isalpha() for word in text.STOPWORDS)
