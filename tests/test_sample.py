import itertools
import os
import random
import subprocess
import sys

import pytest
import torch

import sample
import tokens
from conftest import ROOT
from model import GPT, Growing, GPTConfig, context_start, find_checkpoint

CPU = ("--device=cpu", "--dtype=float32")


def make(seed, **settings):
    """A model of random weights, large enough that its choices are decided ones."""
    sizes = {"block_size": 8, "vocab_size": 5, "n_layer": 1, "n_head": 2, "n_embd": 8}
    model, chance = GPT(GPTConfig(**sizes | settings)).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.5 if p.dim() == 1 else 0.0, 0.5, generator=chance)
    return model


# ---- Which token ----


def test_logits_are_filtered_as_transformers_does():
    warpers = pytest.importorskip("transformers", reason="its logits processors are the reference here").generation.logits_process
    chance = random.Random(0)
    for trial in range(200):
        torch.manual_seed(trial)
        logits, sequences = torch.randn(3, 50) * chance.choice((1, 3)), torch.randint(50, (3, 20))
        temperature, penalty = chance.choice((0.3, 1.0, 2.5)), chance.choice((1.0, 1.3, 0.7))
        top_k, top_p, min_p = chance.choice((0, 1, 5, 99)), chance.choice((1.0, 0.9, 0.4, 0.01)), chance.choice((0.0, 0.1, 0.5, 1.0))
        rules = [warpers.RepetitionPenaltyLogitsProcessor(penalty), warpers.TemperatureLogitsWarper(temperature)]
        rules += [warpers.TopKLogitsWarper(top_k)] if top_k else []
        rules += [warpers.TopPLogitsWarper(top_p), warpers.MinPLogitsWarper(min_p)]
        expected, before = logits, logits.clone()
        for rule in rules:
            expected = rule(sequences, expected)
        ours = sample.filter_logits(logits, sequences.tolist(), temperature, top_k, top_p, min_p, penalty)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(logits, before)


# ---- Beam search ----


def continuations(model, ids, length, end, known):
    """All of them: (mean log-probability, ids), those that end with `end` and those of full length."""
    todo, done = [(0.0, [])], []
    while todo:
        total, new = todo.pop()
        sequence = ids + new
        with torch.no_grad():
            window = sequence[context_start(len(sequence), model.config.block_size) :]
            logits = model(torch.tensor([window]))[0, -1].masked_fill(~known, -torch.inf)
        for token, logp in enumerate(logits.log_softmax(-1).tolist()):
            if token == end:
                done.append(((total + logp) / (len(new) + 1), new))
            elif known[token]:
                next_ = (total + logp, [*new, token])
                todo.append(next_) if len(new) + 1 < length else done.append((next_[0] / length, next_[1]))
    return done


@pytest.mark.parametrize("prompt", [[3], [3, 0, 1, 2, 0, 1, 2], [3, 0, 1, 2, 2, 1, 0, 1, 1]])  # the second grows past the window, the third is longer
def test_a_beam_that_is_wide_enough_finds_the_best_of_all(prompt):
    known = torch.tensor([True] * 4 + [False])
    answers = set()
    for seed in range(6):
        model = make(seed)
        best = max(continuations(model, prompt, 4, 3, known))[1]
        assert sample.beam_search(model, prompt, 4**4, 4, 3, known) == best
        answers.add(tuple(best))
    assert len(answers) > 2


def plain_beams(model, ids, width, length, known):
    """Beam search by the book, without an end: only the `width` likeliest survive each step."""
    beams = [(0.0, [])]
    for _ in range(length):
        found = []
        for total, new in beams:
            sequence = ids + new
            with torch.no_grad():
                window = sequence[context_start(len(sequence), model.config.block_size) :]
                logits = model(torch.tensor([window]))[0, -1].masked_fill(~known, -torch.inf)
            found += [(total + logp, [*new, token]) for token, logp in enumerate(logits.log_softmax(-1).tolist()) if known[token]]
        beams = sorted(found, reverse=True)[:width]
    return beams[0][1]


@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 1}, {"positions": "learned", "norm": "layer"}])
def test_beams_follow_their_cache_past_the_window(settings):
    known, answers = torch.tensor([True] * 10 + [False] * 2), set()
    for seed in range(4):
        model = make(seed, vocab_size=12, **settings)
        best = plain_beams(model, [3, 0, 1], 3, 25, known)
        assert sample.beam_search(model, [3, 0, 1], 3, 25, 11, known) == best
        answers.add(tuple(best))
    assert len(answers) == 4


def test_a_beam_of_one_is_greedy():
    known, ended = torch.ones(12, dtype=torch.bool), 0
    for seed in range(20):
        model = make(seed, vocab_size=12)
        greedy = [i.item() for i in model.generate([[3, 0]], 20)]
        if 5 in greedy:
            greedy, ended = greedy[: greedy.index(5)], ended + 1
        assert sample.beam_search(model, [3, 0], 1, 20, 5, known) == greedy, seed
    assert 0 < ended < 20


def test_beam_search_keeps_nothing_for_a_gradient():
    model, kept = make(0), []
    model.lm_head.register_forward_hook(lambda _, inputs, output: kept.append(output.requires_grad))
    sample.beam_search(model, [3], 2, 3, 4, torch.ones(5, dtype=torch.bool))
    assert kept and not any(kept)


# ---- Text as it comes ----

MIXED = "aé — naïve 日本 🎉🏽 e\u0301nd"


def feed(output, pieces):
    shown = [output.add(piece) for piece in pieces]
    return [*shown, output.add(b"", final=True)]


def test_no_half_characters_are_shown():
    for size in (1, 2, 3, 5):
        data = MIXED.encode()
        shown = feed(sample.Output([]), [data[i : i + size] for i in range(0, len(data), size)])
        assert "".join(shown) == MIXED and not any("\ufffd" in s for s in shown)
    assert feed(sample.Output([]), [b"a", "🎉".encode()[:2]]) == ["a", "", "\ufffd"]  # nothing more will come
    assert feed(sample.Output([]), [b"a\xffb"]) == ["a\ufffdb", ""]


def test_text_ends_before_the_stop_string_and_nothing_of_it_leaks():
    chance = random.Random(0)
    for _ in range(500):
        text = "".join(chance.choices("ab\n", k=20))
        stop = "".join(chance.choices("ab\n", k=chance.randint(1, 4)))
        pieces, rest = [], text
        while rest:
            n = chance.randint(1, 4)
            pieces, rest = [*pieces, rest[:n].encode()], rest[n:]
        output, seen, given = sample.Output([stop]), "", ""
        for piece in pieces:
            seen, given = seen + piece.decode(), given + output.add(piece)
            expected = seen.partition(stop)[0]
            assert expected.startswith(given) and output.done == (stop in seen)
            waiting = expected[len(given) :]
            assert not waiting if output.done else stop.startswith(waiting) and waiting != stop  # what waits may become the stop string
        given += output.add(b"", final=True)
        assert given == output.text == text.partition(stop)[0] and output.done


def test_of_several_stop_strings_the_first_ends():
    output = sample.Output(["END", "\n\n"])
    assert feed(output, [b"one\n", b"two E", b"N", b"x\n", b"\nthree END"]) == ["one", "\ntwo ", "", "ENx", "", ""]
    assert output.text == "one\ntwo ENx"


def test_a_stop_string_may_be_of_any_characters():
    data = "ab日本cd".encode()
    assert "".join(feed(sample.Output(["本c"]), [data[i : i + 1] for i in range(len(data))])) == "ab日"


# ---- The command ----


def texts(out):
    """The samples of a command that printed several."""
    return [part.partition(" ---\n")[2] for part in ("\n" + out.removesuffix("\n")).split("\n--- ")[1:]]


def expected_greedy(trained, prompt, n):
    """The greedy continuation by the model alone, of ids that stand for something."""
    folder = find_checkpoint(trained)
    encoding, model = tokens.load_tokenizer(folder), GPT.from_pretrained(folder).eval()
    begun = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    ids = [i.item() for i in model.generate([begun], n, lambda logits, _: logits[:, : encoding.n_vocab].argmax(-1))]
    ids = ids[: ids.index(encoding.eot_token)] if encoding.eot_token in ids else ids
    return prompt + b"".join(tokens.token_bytes(encoding)[i] for i in ids).decode("utf-8", "replace")


def test_a_process_continues_greedily(trained, process):
    done = process("sample.py", trained, "--prompt=the café", "--greedy", "--max_new_tokens=50", *CPU)
    assert done.returncode == 0 and done.stdout == expected_greedy(trained, "the café", 50) + "\n"
    assert "tokens/s" in done.stderr and "Traceback" not in done.stderr


def test_all_ways_to_be_greedy_agree(trained, command):
    expected = expected_greedy(trained, "the cat", 40)
    for way in (["--greedy"], ["--temperature=0"], ["--top_k=1"], ["--top_p=1e-9"], ["--greedy", "--cache=False"], ["--greedy", "--stream=False"]):
        done = command("sample.py", trained, "--prompt=the cat", "--max_new_tokens=40", *way, *CPU)
        assert done.returncode == 0 and done.stdout == expected + "\n", way


def test_a_sample_depends_on_its_seed_and_not_on_its_company(trained, command):
    options = ("--prompt=def", "--max_new_tokens=30", "--stream=False", *CPU)
    together = texts(command("sample.py", trained, "--num_samples=4", "--seed=10", *options).stdout)
    assert len(together) == 4 == len(set(together))
    for i in range(4):
        assert command("sample.py", trained, f"--seed={10 + i}", *options).stdout == together[i] + "\n"


def test_an_empty_prompt_begins_a_document(trained, command):
    done = command("sample.py", trained, "--greedy", "--max_new_tokens=20", *CPU)
    assert done.stdout == expected_greedy(trained, "", 20) + "\n"


def test_a_prompt_longer_than_the_window_works(trained, command):
    prompt = "the cat sat on a mat, " * 20
    done = command("sample.py", trained, f"--prompt={prompt}", "--greedy", "--max_new_tokens=40", *CPU)
    assert done.stdout == expected_greedy(trained, prompt, 40) + "\n"


def test_a_prompt_may_come_from_a_file(trained, command, tmp_path):
    (tmp_path / "start.txt").write_bytes("\ufeffthe café\n".encode())
    done = command("sample.py", trained, f"--prompt_file={tmp_path / 'start.txt'}", "--greedy", "--max_new_tokens=20", *CPU)
    assert done.stdout == expected_greedy(trained, "the café\n", 20) + "\n"


def test_the_text_ends_before_a_stop_string(trained, command):
    whole = expected_greedy(trained, "the", 60)[3:]
    stop = whole[20:23]
    for stream in (True, False):
        for value in (f"--stop={stop}", f"--stop={[stop, 'never this']!r}"):
            done = command("sample.py", trained, "--prompt=the", "--greedy", "--max_new_tokens=60", value, f"--stream={stream}", *CPU)
            assert done.stdout == "the" + whole.partition(stop)[0] + "\n"


@pytest.mark.parametrize("how", [["--temperature=50", "--num_samples=3"], ["--temperature=50", "--repetition_penalty=3"], ["--beams=3"]])
def test_ids_beyond_the_vocabulary_never_come(trained, command, how):
    """The run has 84 of them, which after six steps are as likely as the others."""
    done = command("sample.py", trained, "--max_new_tokens=100", *how, *CPU)
    assert done.returncode == 0 and done.stdout.strip()


def test_beam_search_answers_like_its_function(trained, command):
    folder = find_checkpoint(trained)
    encoding, model = tokens.load_tokenizer(folder), GPT.from_pretrained(folder).eval()
    known = torch.arange(model.config.vocab_size) < encoding.n_vocab
    new = sample.beam_search(model, [encoding.eot_token, *encoding.encode_ordinary("the")], 3, 40, encoding.eot_token, known)
    done = command("sample.py", trained, "--prompt=the", "--beams=3", "--max_new_tokens=40", *CPU)
    assert done.stdout == "the" + b"".join(tokens.token_bytes(encoding)[i] for i in new).decode("utf-8", "replace") + "\n"


def test_text_streams_out_of_the_process(trained):
    arguments = [sys.executable, ROOT / "sample.py", trained, "--prompt=the", "--max_new_tokens=600", "--cache=False", *CPU]
    environment, reads = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}, []
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as child:
        while data := os.read(child.stdout.fileno(), 2**16):
            reads.append((data, child.poll() is None))
    assert child.returncode == 0
    assert len(reads) > 10 and all(running for _, running in reads[:5])
    b"".join(data for data, _ in reads).decode("utf-8")


def test_interactive_asks_until_an_empty_line_or_the_end(trained, command):
    first, second = expected_greedy(trained, "the cat", 10), expected_greedy(trained, "def", 10)
    for typed in ("the cat\ndef\n\nnot this\n", "the cat\ndef\n"):
        done = command("sample.py", trained, "--interactive", "--greedy", "--max_new_tokens=10", *CPU, input=typed)
        assert done.returncode == 0 and done.stdout.replace("> ", "") == f"{first}\n{second}\n"


def test_a_mistake_ends_the_process_with_a_line(process):
    done = process("sample.py", "out/no-such-run")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("sample.py: there is no model at") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name one model"),
        (["RUN", "RUN"], "name one model"),
        (["out/no-such-run"], "there is no model at 'out/no-such-run'"),
        (["RUN", "--temperature=-1"], "temperature must be 0 (greedy) or between 0.001 and 1000, not -1"),
        (["RUN", "--temperature=warm"], "temperature must be float, not 'warm'"),
        (["RUN", "--top_p=0"], "top_p"),
        (["RUN", "--top_p=1.5"], "top_p"),
        (["RUN", "--min_p=2"], "min_p"),
        (["RUN", "--top_k=-1"], "top_k"),
        (["RUN", "--repetition_penalty=0"], "repetition_penalty"),
        (["RUN", "--num_samples=0"], "num_samples"),
        (["RUN", "--max_new_tokens=0"], "max_new_tokens"),
        (["RUN", "--beams=2", "--num_samples=2"], "beams=2 or num_samples=2"),
        (["RUN", "--prompt_file=/no/such/file"], "/no/such/file"),
        (["RUN", "--prompt_file=LATIN"], "UTF-8"),
        (["RUN", "--stop=[1, 2]"], "stop"),
        (["RUN", "--device=gpu"], "device must be"),
        (["RUN", "--dtype=float64"], "dtype must be"),
        (["RUN", "--temprature=1"], "did you mean temperature?"),
    ],
)
def test_mistakes_end_with_one_line(arguments, words, trained, command, tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    done = command("sample.py", *(a.replace("RUN", trained).replace("LATIN", str(tmp_path / "latin.txt")) for a in arguments))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sample.py: ") and words in done.stderr


def test_a_prompt_file_that_is_no_text_is_named(trained, command, tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    done = command("sample.py", trained, f"--prompt_file={tmp_path / 'latin.txt'}")
    assert "latin.txt" in done.stderr


def test_a_vocabulary_larger_than_the_model_is_a_mistake(command, tmp_path):
    make(0).save_pretrained(tmp_path)
    tokens.save_tokenizer(tokens.get_tokenizer("bytes"), tmp_path, 8)
    done = command("sample.py", tmp_path, *CPU)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_the_sample_survives_an_output_that_knows_fewer_characters(trained, process):
    done = process("sample.py", trained, "--prompt=日本", "--max_new_tokens=5", *CPU, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
