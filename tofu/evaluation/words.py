"""Words of a text in any script, for ROUGE; and whether ROUGE's own tokenizer reads a text at all."""

import re
import unicodedata

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


def unread(text: str) -> bool:
    """Whether ROUGE's own tokenizer, which reads a to z and 0 to 9, finds nothing in a text that has words."""
    return not re.search("[a-z0-9]", text.lower()) and bool(tokens(text))
