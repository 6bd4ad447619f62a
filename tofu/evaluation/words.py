"""ROUGE, and words of a text in any script for it; and whether ROUGE's own tokenizer reads a text at all."""

import functools
import re
import unicodedata
from typing import Any

# scripts that write no spaces between words: a token per character there
SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO")


def tokens(text: str) -> list[str]:
    """Runs of letters, digits and their marks, in one case and one form; single characters of scripts without spaces.

    A combining mark stays with the character before it.
    """
    found: list[str] = []
    open_word = False
    for letter in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(letter)[0]
        if kind == "M" and found:
            found[-1] += letter
        elif kind in "LN" and unicodedata.name(letter, "").startswith(SPACELESS):
            found.append(letter)
            open_word = False
        elif kind in "LN":
            if open_word:
                found[-1] += letter
            else:
                found.append(letter)
            open_word = True
        else:
            open_word = False
    return found


class Unicode:
    """A tokenizer as rouge_score takes one."""

    def tokenize(self, text: str) -> list[str]:
        """See `tokens`."""
        return tokens(text)


@functools.cache
def scorer(tokenizer: str = "default") -> Any:
    """The scorer of generations: ROUGE-1 and ROUGE-L, with the stemmer, as the benchmark has it.

    Args:
        tokenizer: `default` reads a to z and 0 to 9; `unicode` every script (`tokens`), without the stemmer.
    """
    from rouge_score.rouge_scorer import RougeScorer  # it imports nltk and scipy: a second

    own = Unicode() if tokenizer == "unicode" else None
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True, tokenizer=own)


@functools.lru_cache(maxsize=8192)  # the log and several metrics ask for the same pairs
def rouge(truth: str, text: str, tokenizer: str = "default") -> dict[str, Any]:
    """ROUGE-1 and ROUGE-L (`rouge1`, `rougeL`: precision, recall, fmeasure) of a text against the true one.

    Args:
        tokenizer: as of `scorer`.
    """
    return scorer(tokenizer).score(truth, text)


def unread(text: str) -> bool:
    """Whether ROUGE's own tokenizer, which reads a to z and 0 to 9, finds nothing in a text that has words."""
    return not re.search("[a-z0-9]", text.lower()) and bool(tokens(text))
