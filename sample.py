"""Text from a trained model.

    python sample.py out/quickstart                                # from the start of a document
    python sample.py out/quickstart --prompt="def main("
    python sample.py out/quickstart --prompt_file=start.txt --num_samples=4 --top_p=0.9 --seed=7
    python sample.py gpt2 --prompt="The answer is" --greedy        # OpenAI's weights, from the Hugging Face hub
    python sample.py out/quickstart --interactive

Text appears as it is decoded; the speed is told on stderr at the end.
"""
import codecs
import os
import sys
import time

import torch

import config
import tokens
from model import GPT, Growing, find_checkpoint, pick_device
from text import read_text

# What to continue
prompt = ""  # empty: the start of a document
prompt_file = ""  # a UTF-8 file whose content is the prompt
interactive = False  # ask for prompts, one after another; an empty line ends
# How to choose the next token
temperature = 0.8  # below 1: safer, above: wilder; 0: greedy
greedy = False  # always the likeliest token
top_k = 0  # only the k likeliest; 0: off
top_p = 1.0  # only the likeliest that together reach this probability (arXiv:1904.09751); 1: off
min_p = 0.0  # only those at least this share as likely as the likeliest (arXiv:2407.01082); 0: off
repetition_penalty = 1.0  # above 1: tokens that stand in the text already become less likely (arXiv:1909.05858)
beams = 0  # beam search of this width instead of sampling; 0: off
# How much
max_new_tokens = 256
num_samples = 1  # continuations, made in one batch
stop: str | list = ""  # a string, or a list of them, before which to stop
seed = 1337  # sample i is a function of seed and i, whatever num_samples is
# How
stream = True  # print a single sample as it is decoded
cache = True  # False recomputes every token: slow, for comparison
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # of the weights: auto, float32, bfloat16, float16


def filter_logits(logits, sequences, temperature, top_k, top_p, min_p, repetition_penalty):
    """Logits (B, V) as the settings bend them, -inf where a token is out; in the order in which transformers applies these rules."""
    if repetition_penalty != 1:
        logits = logits.clone()
        for row, sequence in zip(logits, sequences):
            seen = torch.tensor(sorted(set(sequence)), device=logits.device)
            row[seen] = torch.where(row[seen] > 0, row[seen] / repetition_penalty, row[seen] * repetition_penalty)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -torch.inf)
    if top_p < 1:
        values, order = logits.sort(descending=True)
        probabilities = values.softmax(-1)
        out = probabilities.cumsum(-1) - probabilities >= top_p  # what came before suffices; the likeliest always stays
        logits = logits.masked_fill(out.gather(-1, order.argsort(-1)), -torch.inf)
    if min_p:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.max(-1, keepdim=True).values, -torch.inf)
    return logits


@torch.inference_mode()
def beam_search(model, ids, width, max_new_tokens, end, known):
    """The continuation (list of ids) with the highest mean log-probability that a beam search of this width finds."""
    growing, scores, finished = Growing(model, [ids], max_new_tokens), torch.zeros(1), []
    for length in range(1, max_new_tokens + 1):
        logits = growing.logits().cpu().masked_fill(~known, -torch.inf)
        totals = (logits.log_softmax(-1) + scores[:, None]).flatten()  # (rows * V,)
        best, rows, ids_, kept = totals.topk(min(2 * width, len(totals))), [], [], []
        for total, flat in zip(best.values.tolist(), best.indices.tolist()):
            row, token = divmod(flat, logits.size(-1))
            if total == -torch.inf:
                continue
            if token == end and len(rows) < width:
                finished.append((total / length, growing.sequences[row][len(ids) :]))
            elif token == end:
                continue  # an end that is not among the best: others would have to be worse
            elif len(rows) < width:
                rows.append(row), ids_.append(token), kept.append(total)
        if not rows or (len(finished) >= width and max(finished)[0] >= kept[0] / length):
            break
        growing.append(ids_, rows)
        scores = torch.tensor(kept)
    else:
        finished += [(total / length, sequence[len(ids) :]) for total, sequence in zip(kept, growing.sequences)]
    return max(finished)[1]


class Output:
    """One sample's text as its tokens come: whole characters only, and nothing from a stop string on."""

    def __init__(self, stops):
        self.stops, self.decoder, self.text, self.shown, self.done = stops, codecs.getincrementaldecoder("utf-8")("replace"), "", 0, False

    def add(self, data, final=False):
        """Take a token's bytes; returns the text that is certain now and was not returned yet."""
        if self.done:
            return ""
        self.text += self.decoder.decode(data, final)
        found = [at for at in (self.text.find(s) for s in self.stops) if at >= 0]
        if found:
            self.text, self.done = self.text[: min(found)], True
        end = len(self.text)
        if not self.done and not final:  # what may be the beginning of a stop string waits
            held = [n for s in self.stops for n in range(1, len(s)) if self.text.endswith(s[:n])]
            end -= max(held, default=0)
        new, self.shown = self.text[self.shown : end], max(self.shown, end)
        self.done = self.done or final
        return new


def respond(model, encoding, known, beginning):
    """Continue one prompt, print what comes of it, and its speed on stderr."""
    table, end = tokens.token_bytes(encoding), encoding.eot_token
    ids = [end, *encoding.encode_ordinary(beginning)]  # as a document begins
    stops = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
    outputs = [Output(stops) for _ in range(num_samples)]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_samples)]
    live = stream and num_samples == 1 and not beams
    begun, made = time.monotonic(), 0

    def pick(logits, sequences):
        logits = logits.cpu().masked_fill(~known, -torch.inf)
        if greedy or temperature == 0:
            return filter_logits(logits, sequences, 1.0, 0, 1.0, 0.0, repetition_penalty).argmax(-1)
        probabilities = filter_logits(logits, sequences, temperature, top_k, top_p, min_p, repetition_penalty).softmax(-1)
        return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators)])

    if live:
        print(beginning, end="", flush=True)
    if beams:
        steps = ([i] for i in beam_search(model, ids, beams, max_new_tokens, end, known))
    else:
        steps = (i.tolist() for i in model.generate([ids] * num_samples, max_new_tokens, pick, cache))
    for new in steps:
        for output, token in zip(outputs, new):
            made += not output.done
            shown = output.add(b"" if token == end else table[token], final=token == end)
            if live:
                print(shown, end="", flush=True)
        if all(o.done for o in outputs):
            break
    for i, output in enumerate(outputs):
        rest = output.add(b"", final=True)
        if live:
            print(rest)
        else:
            print(f"--- {i + 1} ---\n" * (num_samples > 1) + beginning + output.text)
    seconds = time.monotonic() - begun
    print(f"[{made} tokens, {made / seconds:,.1f} tokens/s]", file=sys.stderr)


def main():
    runs, given = config.apply(globals(), files=False)
    if len(runs) != 1:
        config.fail("name one model: a run (out/…), a step folder, a Hugging Face folder or hub name")
    bounds = (("temperature", temperature == 0 or 0.001 <= temperature < 1000, "0 (greedy) or between 0.001 and 1000"), ("top_p", 0 < top_p <= 1, "above 0 and at most 1"), ("min_p", 0 <= min_p <= 1, "between 0 and 1"))
    bounds += (("repetition_penalty", repetition_penalty > 0, "above 0"), ("num_samples", num_samples >= 1, "1 or more"), ("top_k", top_k >= 0, "0 or more"))
    bounds += (("seed", 0 <= seed < 2**63, "between 0 and 2^63"),)
    bounds += (("beams", beams >= 0, "0 or more"), ("max_new_tokens", max_new_tokens >= 1, "1 or more"))
    for name, good, wanted in bounds:
        if not good:
            config.fail(f"{name} must be {wanted}, not {globals()[name]}")
    if isinstance(stop, list) and not all(isinstance(s, str) for s in stop):
        config.fail(f"stop must be a string or a list of strings, not {stop!r}")
    idle = given & {"temperature", "greedy", "top_k", "top_p", "min_p", "repetition_penalty"}
    if beams and idle:
        config.fail(f"beam search does not sample, so it has no use for {', '.join(sorted(idle))}; leave out either")
    if beams and num_samples > 1:
        config.fail(f"beam search gives the one best continuation: leave out beams={beams} or num_samples={num_samples}")
    with config.user_errors():
        where, number_type, _ = pick_device(device, dtype)
        folder = find_checkpoint(runs[0])
        encoding = tokens.load_tokenizer(folder)
        model = GPT.from_pretrained(folder).to(where, number_type).eval()  # not autocast, which would convert all weights at every token
        if encoding.n_vocab > model.config.vocab_size:
            raise ValueError(f"{folder}: its tokenizer has {encoding.n_vocab} ids, more than the {model.config.vocab_size} of its model's vocabulary")
        beginning = prompt
        if prompt_file:
            beginning = read_text(prompt_file)
    known = torch.zeros(model.config.vocab_size, dtype=torch.bool)  # ids that stand for something: a padded vocabulary has more
    known[[i for i, token in enumerate(tokens.token_bytes(encoding)) if token is not None]] = True
    if not interactive:
        try:
            respond(model, encoding, known, beginning)
        except BrokenPipeError:  # | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line:
            return
        respond(model, encoding, known, line)


if __name__ == "__main__":
    main()
