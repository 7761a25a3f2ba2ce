"""Kinds of IFTrain (arXiv 2507.02833) that no other file has; its ids are in ids.py.

They check what their instruction says. Where the public verifiers (allenai/open-instruct, IFEvalG)
check something else, ids.py says so.
"""

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from iopo.constraints import text as cut
from iopo.constraints.base import Constraint, Counted, wordings
from iopo.constraints.wording import COMMON_WORDS, FirstWord, LastWord

_LOWERCASE = re.compile(r"\b[a-z]+\b")
_LETTER = re.compile("[a-zA-Z]")
_MARKS_AROUND = re.compile(r"^\W+|\W+$")
_HYPHEN_BETWEEN = re.compile(r"(?<=[.!?])-(?=\S)")


def spoken(text: str) -> list[str]:
    """Words as a reader counts them, between blanks and without the marks at their ends.

    >>> spoken("A well-kept river's bank!")
    ['A', 'well-kept', "river's", 'bank']
    """
    return [word for piece in text.split() if (word := _MARKS_AROUND.sub("", piece))]


class Letters(Counted):
    """Number of letters of the English alphabet."""

    kind = "letters"
    excludes = "words"
    unit = ("letter", "letters", "个英文字母")
    measured_relations = ("at least", "at most")
    step = 50
    smallest = 50

    def count(self, text: str) -> int:
        return len(_LETTER.findall(text))


class LowercaseWords(Counted):
    """Number of words in small letters throughout."""

    kind = "lowercase_words"
    excludes = "words case english_case"
    unit = ("word in all lowercase letters", "words in all lowercase letters", "个全小写单词")
    measured_relations = ("at least", "at most")
    step = 10
    smallest = 0

    def count(self, text: str) -> int:
        return len(_LOWERCASE.findall(text))


@dataclass(frozen=True)
class _SentenceWord(Constraint):
    """Shared by kinds about the word at one end of every sentence, in any case."""

    word: str

    dimension = "Inclusion"
    index: ClassVar[int]

    def __post_init__(self) -> None:
        self._require_text("word", "a word")

    def check(self, text: str) -> bool:
        ends = [spoken(sentence)[self.index].lower() for sentence in cut.sentences(text)]
        return bool(ends) and all(end == self.word.lower() for end in ends)

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        ends = {spoken(sentence)[cls.index].lower() for sentence in cut.sentences(text)}
        return [{"word": word} for word in ends if len(ends) == 1 and word.isalpha()]

    def alternatives(self, rng: random.Random) -> list[Constraint]:
        others = [word for word in COMMON_WORDS if word != self.word.lower()]
        return [type(self)(word) for word in rng.sample(others, 3)]


class SentenceFirstWord(_SentenceWord):
    """The first word of every sentence is the word."""

    kind = "sentence_first_word"
    excludes = "first_word start_phrase"
    index = 0
    templates = wordings("""
        The first word of each sentence should be the word '{word}'.
        Begin every sentence with '{word}'.
        Every sentence has to start with the word '{word}'.
        Let '{word}' be the first word of each sentence.
        每个句子的第一个词都应是“{word}”。
        请让每句话都以“{word}”开头。
        所有句子必须由“{word}”开始。
        每句都要用“{word}”起首。
    """)


class SentenceLastWord(_SentenceWord):
    """The last word of every sentence, before its marks, is the word."""

    kind = "sentence_last_word"
    excludes = "last_word end_phrase"
    index = -1
    templates = wordings("""
        The last word of each sentence, before punctuation, should be the word '{word}'.
        End every sentence with '{word}'.
        Every sentence has to finish with the word '{word}'.
        Let '{word}' be the last word of each sentence.
        每个句子在标点之前的最后一个词都应是“{word}”。
        请让每句话都以“{word}”结尾。
        所有句子必须由“{word}”结束。
        每句都要用“{word}”收尾。
    """)


class AnswerFirstWord(FirstWord):
    """The first word as a reader counts words: "Don't" does not begin with 'don'."""

    kind = "answer_first_word"
    excludes = "first_word start_phrase sentence_first_word"
    words = staticmethod(spoken)


class AnswerLastWord(LastWord):
    """The last word as a reader counts words."""

    kind = "answer_last_word"
    excludes = "last_word end_phrase sentence_last_word"
    words = staticmethod(spoken)


class UniqueWords(Constraint):
    """No word occurs twice, in any case."""

    kind = "unique_words"
    dimension = "Text pattern"
    excludes = "word_frequency keyword_frequency"
    templates = wordings("""
        Only use unique words in your response: no word should be repeated.
        Do not use any word twice.
        Every word of the answer must be a different one.
        No word may occur more than once in the reply.
        回答中只能使用不重复的词。
        任何词都不要使用两次。
        回答里的每个词都必须不同。
        回复中没有一个词可以出现一次以上。
    """)

    def check(self, text: str) -> bool:
        words = [word.lower() for word in spoken(text)]
        return len(words) == len(set(words))

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return [{}] if cls().check(text) else []


class Palindrome(Constraint):
    """Some word of three letters or more reads the same backwards, in any case."""

    kind = "palindrome"
    dimension = "Inclusion"
    templates = wordings("""
        Include a palindrome in your response.
        Use a word that reads the same backwards, such as "level".
        Your answer must contain a palindrome.
        Some word of the reply should be a palindrome.
        回答中要包含一个回文单词。
        请使用一个正反读都相同的单词，例如“level”。
        答案里必须有一个回文单词。
        回复中应出现回文单词。
    """)

    def check(self, text: str) -> bool:
        words = (word.lower() for word in cut.letter_words(text))
        return any(len(word) > 2 and word == word[::-1] for word in words)

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return [{}] if cls().check(text) else []


@dataclass(frozen=True)
class WordPosition(Constraint):
    """The `position`th word of the `sentence`th sentence is the word."""

    word: str
    sentence: int
    position: int

    kind = "word_position"
    dimension = "Inclusion"
    repeatable = True
    templates = wordings("""
        Include keyword '{word}' in sentence {sentence}, as word {position} of that sentence.
        Word {position} of sentence {sentence} must be '{word}'.
        Put '{word}' at word {position} of sentence {sentence}.
        In sentence {sentence}, let word {position} be '{word}'.
        请让第{sentence}句的第{position}个词是“{word}”。
        第{sentence}句中，第{position}个词必须为“{word}”。
        把“{word}”放在第{sentence}句的第{position}个词处。
        在第{sentence}句，用“{word}”作第{position}个词。
    """)

    def __post_init__(self) -> None:
        self._require_text("word", "a word")
        for field in ("sentence", "position"):
            value = getattr(self, field)
            self._require(isinstance(value, int) and value >= 1, field, "a whole number from 1")

    def check(self, text: str) -> bool:
        found = cut.sentences(text)[self.sentence - 1 : self.sentence]
        words = spoken(found[0]) if found else []
        return words[self.position - 1 : self.position] == [self.word]


class SameEnds(Constraint):
    """The answer begins and ends with the same word, in any case; no mark follows it."""

    kind = "same_ends"
    dimension = "Text pattern"
    excludes = "last_word end_phrase closing_note wrapped"
    templates = wordings("""
        Start and end your response with the same word; write nothing after it, not even a mark.
        The last word must be the first word again, with no punctuation after it.
        Begin and finish with one and the same word and put no mark behind it.
        Let the answer end with the word that it begins with, without a full stop.
        回答的首尾必须是同一个词，其后不写任何标点。
        最后一个词要与第一个词相同，之后没有标点。
        请以同一个词开头和结尾，结尾不加标点。
        让回答以它开头的那个词结束，不加句号。
    """)

    def check(self, text: str) -> bool:
        words = [word.lower() for word in spoken(text)]
        ends = len(words) > 1 and words[0] == words[-1]
        return ends and text.strip().lower().endswith(words[-1])

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return [{}] if cls().check(text) else []


class HyphenatedSentences(Constraint):
    """Two sentences or more, with a hyphen and no blank between them."""

    kind = "hyphenated_sentences"
    dimension = "Text pattern"
    excludes = "lines paragraphs bullets numbered_items layout"
    templates = wordings("""
        All sentences must be connected using hyphens, with no spaces between them.
        Put a hyphen, and no blank, between one sentence and the next.
        Join the sentences by hyphens without spaces.
        Between two sentences there must be a hyphen only.
        所有句子必须用连字符连接，之间没有空格。
        句与句之间只写一个连字符，不留空格。
        请用连字符把句子连起来，不加空格。
        两个句子之间只能有一个连字符。
    """)

    def check(self, text: str) -> bool:
        parts = _HYPHEN_BETWEEN.split(text.strip())
        whole = all(part == part.strip() and len(cut.sentences(part)) == 1 for part in parts)
        return len(parts) > 1 and whole


class NoConsecutiveInitials(Constraint):
    """No word begins with the letter of the alphabet after that of the word before it."""

    kind = "no_consecutive_initials"
    dimension = "Text pattern"
    templates = wordings("""
        No two adjacent words can start with consecutive letters of the alphabet.
        A word must not begin with the letter that follows the initial of the word before it.
        Avoid neighbouring words whose initials follow one another in the alphabet, as a and b do.
        Adjacent words may not have initials such as c and d.
        相邻两个英文单词的首字母不能是字母表中连续的字母。
        一个单词不得以紧接前一单词首字母之后的字母开头。
        请避免首字母在字母表中前后相连的相邻单词。
        相邻单词的首字母不能像c和d那样连续。
    """)

    def check(self, text: str) -> bool:
        initials = [word[0].lower()[0] for word in spoken(text)]  # a number is a word too
        pairs = zip(initials, initials[1:], strict=False)
        return all(ord(b) - ord(a) != 1 for a, b in pairs if a.isalpha() and b.isalpha())

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return [{}] if cls().check(text) else []


@dataclass(frozen=True)
class _Marked(Constraint):
    """Shared by kinds that put marks around every word or every two."""

    dimension = "Text pattern"
    excludes = "wrapped first_word last_word start_phrase end_phrase placeholders layout"
    size: ClassVar[int]
    marks: ClassVar[tuple[str, str]]

    def check(self, text: str) -> bool:
        """A last group may be smaller; then it stands as it is."""
        words = text.split()
        groups = [words[at : at + self.size] for at in range(0, len(words), self.size)]
        groups = [group for group in groups if len(group) == self.size]
        opening, closing = self.marks
        return bool(groups) and all(
            group[0].startswith(opening) and group[-1].endswith(closing) for group in groups
        )

    def _edit(self, text: str, rng: random.Random) -> str | None:
        words = text.split()
        groups = [words[at : at + self.size] for at in range(0, len(words), self.size)]
        opening, closing = self.marks
        return " ".join(f"{opening}{' '.join(group)}{closing}" for group in groups)


class BracketedWords(_Marked):
    """Every word stands in square brackets."""

    kind = "bracketed_words"
    size = 1
    marks = ("[", "]")
    templates = wordings("""
        Enclose every word in your response within square brackets.
        Write each word in [square] [brackets].
        Put square brackets around every single word.
        Each word of the reply must stand in square brackets.
        请把回答中的每个词都放在方括号里。
        每个词都写成[这样]。
        请给每一个词加上方括号。
        回复中的每个词必须用方括号括起。
    """)


class WrappedBigrams(_Marked):
    """Every two words stand in double angular brackets."""

    kind = "wrapped_bigrams"
    excludes = f"{_Marked.excludes} title first_line_title bracketed_words"
    size = 2
    marks = ("<<", ">>")
    templates = wordings("""
        Wrap every word bigram in double angular brackets, such as <<I am>> <<at home>>.
        Put every two words in double angular brackets, like <<this one>>.
        Write the answer in pairs of words, each wrapped like <<so it>>.
        Every pair of words must stand between << and >>.
        请把每两个词放在双尖括号里，例如<<I am>> <<at home>>。
        每两个词写成<<这 样>>。
        请给每一对词加上双尖括号。
        每两个词必须用<<和>>括起。
    """)
