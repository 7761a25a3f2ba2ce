"""English phrases by which prompts of IFEval's form name their constraints, and others for them.

Every rule keeps the meaning: what is asked for, of what, and how much. Rules see a sentence with
its quoted parts and the constraints' own words masked, so they never change these.
"""

import re

NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
TIMES = {"once": 1, "twice": 2}
_N = rf"(\d+|{'|'.join(NUMBER_WORDS[1:])})"

# instruction id -> what a sentence about it says. Ids that are not here have wordings of their own.
ABOUT = {
    "punctuation:no_comma": r"\bcommas?\b",
    "length_constraints:number_words": r"\bwords?\b",
    "length_constraints:number_sentences": r"\bsentences?\b",
    "length_constraints:number_paragraphs": r"\b(?:paragraphs?|sections?|parts?|stanzas?)\b",
    "length_constraints:nth_paragraph_first_word": r"\bparagraph\b",
    "detectable_format:number_highlighted_sections": r"\b(?:highlight\w*|italic\w*)\b",
    "detectable_format:title": r"\bangular brackets\b",
    "detectable_format:multiple_sections": r"\bsections?\b",
    "detectable_format:number_bullet_lists": r"\bbullet points?\b",
    "detectable_format:json_format": r"\bJSON\b",
    "detectable_content:number_placeholders": r"\bplaceholders?\b",
    "detectable_content:postscript": r"\b(?:post ?script|note)\b|P\.S",
    "change_case:english_capital": r"\b(?:capital|all caps)\b",
    "change_case:english_lowercase": r"\b(?:capital|lower ?case)\b",
    "change_case:capital_word_frequency": r"\b(?:capital letters|all caps|all-caps)\b",
    "combination:two_responses": r"\*{6}",
    "startend:quotation": r"\bdouble quot",
    "startend:end_checker": r"\b(?:end|finish|last)\b",
    "language:response_language": r"\b(?:no other language|only|entirely|entire response)\b",
    "keywords:existence": r"\b(?:keywords?|words?|include|mention)\b",
    "keywords:forbidden_words": r"\b(?:keywords?|words?|include|mention|avoid|use|say)\b",
    "keywords:frequency": r"\b(?:keyword|word)\b",
    "keywords:letter_frequency": r"\bletter\b",
}

# instruction id -> what its number counts, after the number. {value}: the kwargs' own word, before.
COUNTED = {
    "length_constraints:number_words": r"[ -]words?\b",
    "length_constraints:number_sentences": r" sentences?\b",
    "length_constraints:number_paragraphs": r" (?:paragraphs?|sections?|parts?)\b",
    "detectable_format:number_highlighted_sections": r" (?:\w+ )?(?:sections?|parts?|phrases)\b",
    "detectable_format:multiple_sections": r" sections?\b",
    "detectable_format:number_bullet_lists": r" (?:\w+ )?bullet points?\b",
    "detectable_content:number_placeholders": r" placeholders?\b",
    "change_case:capital_word_frequency": r" (?:times|words)\b",
    "keywords:frequency": r" times\b",
    "keywords:letter_frequency": r" times\b",
}

_WHOLE = r"(your|the) (?:entire|whole) (\w+)"
_QUOTES = r"double (?:quotation marks|quotes)"

# (pattern, what may take its place); the case of the first letter is kept
REWORDINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # commas
    (r"without (?:using |the use of )?(?:any )?commas?\b", ("with no commas at all",)),
    (
        r"(?:do not|don't) (?:use|include|contain) (?:any )?commas\b",
        ("avoid commas", "leave out all commas", "use no commas"),
    ),
    (r"(?:refrain from|avoid) using (?:any )?commas\b", ("avoid all commas",)),
    (
        r"(should|must) not (?:contain|include|have) (?:any )?commas?\b",
        (r"\1 be free of commas", r"\1 have no commas"),
    ),
    # numbers
    (rf"at least {_N}\b", (r"no fewer than \1", r"a minimum of \1")),
    (rf"{_N} or more\b", (r"at least \1",)),
    (rf"(?<!no )less than {_N}\b(?! times)", (r"fewer than \1", r"under \1")),
    (rf"(?<!no )less than {_N} times\b", (r"fewer than \1 times",)),
    (rf"(?<!no )fewer than {_N}\b", (r"less than \1",)),
    (r"less than twice\b", ("fewer than two times",)),
    (rf"at most {_N}\b", (r"no more than \1",)),
    (rf"(?<!no )more than {_N}\b", (r"over \1",)),
    (rf"exactly {_N}\b", (r"precisely \1",)),
    (r"at least once\b", ("one time or more",)),
    (r"at least twice\b", ("two times or more",)),
    (r"at most once\b", ("no more than once",)),
    # letters
    (
        r"in all lowercase letters\b",
        ("in lowercase letters only", "in nothing but lowercase letters"),
    ),
    (r"(?:only use|use only|use all) lowercase letters\b", ("use nothing but lowercase letters",)),
    (
        r"(?<!words )(?<!phrases )in all capital letters\b",
        ("in capital letters only", "in nothing but capital letters"),
    ),
    (r"with all capital letters\b", ("written in all capital letters",)),
    (r"no capital letters are allowed\b", ("capital letters are not allowed",)),
    (r"without using (?:any )?capital letters\b", ("with no capital letters",)),
    (r"(?:have|contain) no capital letters\b", ("be free of capital letters",)),
    # quotation marks, brackets, markdown
    (
        rf"wrap {_WHOLE} (?:with|in|inside) {_QUOTES}",
        (
            r"put double quotation marks around \1 whole \2",
            r"enclose \1 whole \2 in double quotation marks",
        ),
    ),
    (
        rf"put {_QUOTES} around {_WHOLE}",
        (
            r"wrap \1 whole \2 in double quotation marks",
            r"enclose \1 whole \2 in double quotation marks",
        ),
    ),
    (rf"put {_WHOLE} (?:in|inside) {_QUOTES}", (r"put double quotation marks around \1 whole \2",)),
    (
        r"wrapped in double angular brackets\b",
        ("enclosed in double angular brackets", "put in double angular brackets"),
    ),
    (
        r"(?<!wrapped )(?<!enclosed )(?<!put )in double angular brackets\b",
        ("between double angular brackets",),
    ),
    (r"(?:represented by|with|in) square brackets\b", ("marked by square brackets",)),
    (r"in markdown format\b", ("written in markdown",)),
    (r"with markdown\b", ("using markdown",)),
    (r"(?:wrapped )?in JSON(?: format)?\b", ("as JSON", "in the JSON format")),
    # words
    (
        r"(?:do not|don't) (?:include|use) (?:the )?(?:following )?(keywords?|words?)\b",
        (r"leave out the \1", r"avoid the \1"),
    ),
    (
        r"(?<!not )(?<!n't )include (?:the )?(?:following )?(keywords?|words?)\b",
        (r"use the \1", r"mention the \1"),
    ),
    (
        r"avoid (?:using )?(?:the )?(?:following )?(keywords?|words?)\b",
        (r"do not use the \1", r"leave out the \1"),
    ),
    (r"(?:should|must) not appear\b", ("must not occur",)),
    (r"should (?:appear|show up)\b", ("must occur", "has to occur")),
    (r"(?<!not )use the word\b", ("mention the word",)),
    (r"(?:do not|don't) (?:mention|say) the (keywords?|words?)\b", (r"leave out the \1",)),
    (
        r"without (?:using|saying|mentioning) the (keywords?|words?)\b",
        (r"while leaving out the \1",),
    ),
    (r"appears\b", ("occurs",)),
    # beginnings and ends
    (
        r"add a postscript (?:starting|that starts) with\b",
        ("write a postscript that begins with", "add a postscript which begins with"),
    ),
    (
        r"(?:finish|end) (your (?:entire |whole )?\w+|the \w+) with (?:this|the) exact phrase\b"
        r"(?: of\b)?",
        (r"close \1 with exactly this phrase",),
    ),
    (r"end with (?:this|the) exact phrase\b", ("close with exactly this phrase",)),
    (r"(must|should) end with\b", (r"\1 close with",)),
    (r"(?:end|finish) (the [\w ]+?) with\b", (r"close \1 with",)),
    (r"no other words should follow\b", ("nothing else may follow",)),
    (r"(must|should) start with\b", (r"\1 begin with",)),
    (r"mark the beginning of each section with\b", ("begin each section with",)),
    # divisions
    (r"separate (?=the\b|your\b|those\b|paragraphs\b)", ("divide ",)),
    (
        r"(?<!be )separated by (6 asterisk symbols|the markdown divider|two new lines)\b",
        (r"with \1 between them",),
    ),
    # languages
    (r"no other language is allowed(?=[.,:])", ("with no other language",)),
    # what surrounds a constraint
    (
        r"your (?:entire|whole) (?:response|reply|answer)\b",
        ("your complete answer", "your entire reply", "your whole response"),
    ),
    (r"your (?:response|reply|answer)\b", ("your answer", "your reply", "your response")),
    (r"the (?:response|reply|answer)\b", ("your answer", "the reply", "the response")),
    (r"should contain\b", ("must have", "has to contain")),
    (r"must contain\b", ("should have", "has to contain")),
    (r"make sure to\b", ("be sure to",)),
    (r"make sure (?:that )?(?!to\b)", ("see to it that ",)),
    (r"you are not allowed to\b", ("you must not",)),
)
RULES = tuple(
    (re.compile(rf"(?<![\w-]){pattern}", re.IGNORECASE), others) for pattern, others in REWORDINGS
)

# A sentence that is a constraint and nothing else begins so: it can trade places with another.
RULE_OPENING = re.compile(
    r"(?:please |in your (?:entire )?(?:response|answer|reply),? )?(?:"
    r"(?:your|the) (?:entire |whole )?(?:response|answer|reply|output|words?|letter|number)\b"
    r"|words with all capital letters|(?:do not|don't|never) (?:use|include|contain|mention|say)\b"
    r"|make sure|ensure|include\b|use\b|wrap\b|put\b|highlight\b|italicize\b|mention\b|avoid\b"
    r"|refrain\b|no capital letters\b|there should be\b|answer (?:with|in)\b|respond (?:with|in)\b"
    r"|at the end of your|add a postscript|finish your|end your|give exactly two)",
    re.IGNORECASE,
)
# A sentence that goes on with the one before it, and moves with it.
CONTINUES = re.compile(
    r"(?:for example|example|such as|like|e\.g|i\.e|no other words|no words|nothing|no additional"
    r"|no capital letters|separated?|mark the|to indicate|use \*|each|this|that|these|those|they|it"
    r"|but|and|or|then|if|responses and only|paragraphs and only|paragraph \d|\*|-|\d+[.)])",
    re.IGNORECASE,
)
# Adds to a sentence before it, which must stay there.
ADDS = re.compile(
    r"(?:also|additionally|finally|then|in addition|furthermore|moreover|it|they|but|and)\b",
    re.IGNORECASE,
)
# Points at a sentence before it, so that it cannot stand first.
POINTS_BACK = re.compile(
    r"\b(?:it|its|it's|they|them|their|these|those|that|this|each|both|also|additionally|the same"
    r"|above|below|following|the (?!entire|whole|response|answer|reply|output|words?\b|keywords?"
    r"|letter|number|exact|markdown|end|postscript|json|very|phrase|\w+ language)\w+)\b",
    re.IGNORECASE,
)
