"""What prepare.py does to one document, as pure functions: read, decode, extract, clean."""
import gzip
import json
import os
import re
import unicodedata
import zlib

KINDS = {".txt": "text", ".md": "text", ".py": "text", ".html": "html", ".htm": "html", ".jsonl": "json"}  # by a file's ending, .gz aside


class BadDocument(ValueError):
    """A document that cannot be read; the message is the reason, counted in meta.json."""


def kind_of(path):
    """text, html or json, by the file's ending; None where the ending says nothing."""
    return KINDS.get(os.path.splitext(path.lower().removesuffix(".gz"))[1])


def records(path, kind):
    """The documents in a file, not decoded yet: (where, kind, bytes, bytes of the file read so far).

    A text or HTML file is one document, a JSON-lines file one a line (blank lines aside). A file that cannot be read, or not to its
    end, yields a last record of kind "broken" whose bytes say why."""
    try:
        with open(path, "rb") as raw:
            file = gzip.open(raw, "rb") if path.lower().endswith(".gz") else raw
            if kind == "json":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", kind, line, raw.tell()
            else:
                yield path, kind, file.read(), raw.tell()
    except (OSError, EOFError, zlib.error) as e:
        yield path, "broken", f"unreadable file ({type(e).__name__})".encode(), 0


def decode(data):
    """Text of UTF-8 bytes, with or without a byte-order mark. Raises BadDocument."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadDocument("not UTF-8") from e


def read_text(path):
    """The text of a UTF-8 file. Raises ValueError, OSError."""
    with open(path, "rb") as f:
        try:
            return decode(f.read())
        except BadDocument as e:
            raise ValueError(f"{path}: {e}; convert it first, such as by iconv") from e


def extract(kind, data, text_key="text", html=False):
    """The text of one record of `records`, tags and entities taken out of HTML (with html=True of every document). Raises BadDocument."""
    if kind == "broken":
        raise BadDocument(data.decode())
    content = decode(data)
    if kind == "json":
        try:
            entry = json.loads(content)
        except (ValueError, RecursionError) as e:
            raise BadDocument("not JSON") from e
        if not isinstance(entry, dict) or not isinstance(entry.get(text_key), str):
            raise BadDocument(f"no text under the key {text_key!r}")
        content = SURROGATES.sub(lambda m: m[0].encode("utf-16", "surrogatepass").decode("utf-16", "replace"), entry[text_key])
    return strip_html(content) if html or kind == "html" else content


def strip_html(content):
    """The text that a browser would show of HTML: no tags, scripts or styles; entities resolved, blocks on lines of their own."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError as e:
        raise ImportError("HTML needs the resiliparse library: pip install resiliparse") from e
    return extract_plain_text(content, preserve_formatting=True, main_content=False, alt_texts=False)


# Everything that Unicode calls a control character but tab and line feed. Carriage returns are mended before.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SURROGATES = re.compile(r"[\ud800-\udfff]+")  # halves of characters, which JSON can spell and UTF-8 cannot
BLANKS = re.compile(r"[^\S\n]{1000,}")  # tokenizers' patterns take time in the square of such a run


def clean(content):
    """The text as a generator should learn it: Unicode NFC, line feeds, no control characters, no blanks at the ends of lines, at most two
    blank lines in a row, none at the beginning or end. Indentation, case and punctuation stay: a cleaned Python module still parses. Idempotent."""
    content = CONTROLS.sub("", content.replace("\r\n", "\n").replace("\r", "\n"))
    content = unicodedata.normalize("NFC", content)
    content = "\n".join(line.rstrip() for line in content.split("\n"))
    content = BLANKS.sub(lambda m: m[0][:1000], content)
    content = re.sub(r"\n{4,}", "\n\n\n", content).lstrip("\n")
    return content.rstrip("\n") + "\n" * content.endswith("\n")


STOPWORDS = frozenset(
    """a about above after again all also am an and any are as at be because been before being below between both but by can could did do does
    doing down during each few for from further had has have having he her here hers herself him himself his how i if in into is it its itself
    just me more most my myself no nor not now of off on once only or other our ours ourselves out over own same she should so some such than
    that the their theirs them themselves then there these they this those through to too under until up very was we were what when where which
    while who whom why will with would you your yours yourself yourselves""".split()
)


def classical(content, lowercase=False, strip_punctuation=False, drop_stopwords=False):
    """The preprocessing of the bag-of-words years, for those who want it. Each part is off by default: it takes away what a generator must learn."""
    if lowercase:
        content = content.lower()
    if drop_stopwords:
        content = re.sub(r"[^\W\d_]+(?:['’][^\W\d_]+)?[^\S\n]*", lambda m: "" if m[0].strip().lower() in STOPWORDS else m[0], content)
    if strip_punctuation:  # Unicode's punctuation and symbols
        content = "".join(c for c in content if unicodedata.category(c)[0] not in "PS")
    return content
