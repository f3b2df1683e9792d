"""The regular expressions by which byte-level tokenizers split a text, and llama.cpp's names.

llama.cpp knows each way of splitting by a name. Which one a tokenizer means is read from the
structure of its pre-tokenizer; spellings that mean the same are brought into one first.
"""

from __future__ import annotations

import re
from typing import Any

#: English contractions in either case, as most regular expressions spell them.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#: Other spellings of the same in the regular expressions below.
SPELLINGS = {
    "\r": r"\r",
    "\n": r"\n",
    "{1}": "",
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": CONTRACTIONS,
    "'(?i:[sdmt]|ll|ve|re)": CONTRACTIONS,
    # Possessive repeats, where giving back would not help: what comes next is not in the class
    # before, or may be missing.
    r"]?+\p{L}+|": r"]?\p{L}+|",
    r"]++[\r\n]*|": r"]+[\r\n]*|",
    # \s* takes all line ends but one by itself.
    r"|\s*[\r\n]|": r"|\s*[\r\n]+|",
}

_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    + _REST
)  # fmt: skip
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    + _REST
)  # fmt: skip
SEED = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+"
    + _REST
)  # fmt: skip
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST
)
#: The regular expressions that split a text, one after the other -> llama.cpp's name of them.
#: Of several names for the same, the one that only splits and switches nothing else on.
SPLITS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    (r"\p{N}", GPT2): "smollm",
    (LLAMA3,): "smaug-bpe",
    (QWEN2,): "qwen2",
    (QWEN35,): "qwen35",
    (SEED,): "seed-coder",
    (TEKKEN,): "tekken",
    (GPT4O,): "gpt-4o",
}


def canonical(regex: str) -> str:
    """One spelling of regular expressions that differ only in spelling.

    The parts of a character class are put in order, :data:`SPELLINGS` replaced.
    """
    for spelling, plain in SPELLINGS.items():
        regex = regex.replace(spelling, plain)

    def ordered(found: re.Match[str]) -> str:
        parts = re.findall(r"\\p\{\w+\}|\\.|.-.|.", found[2])
        return f"[{found[1]}{''.join(sorted(parts))}]"

    return re.sub(r"\[(\^?)((?:\\.|[^\]\\])+)\]", ordered, regex)


def name_of(regexes: list[str]) -> str | None:
    """llama.cpp's name of a split, of canonical regular expressions; None where it has none."""
    return {tuple(map(canonical, key)): name for key, name in SPLITS.items()}.get(tuple(regexes))


def regexes_of(steps: list[dict[str, Any]]) -> list[str]:
    """The regular expressions by which a pre-tokenizer splits, each in its one spelling."""
    found = []
    for number, step in enumerate(steps):
        kind = step["type"]
        # To remove all but the matches is to isolate them, where they cover every text.
        isolates = (step.get("behavior"), step.get("invert")) in (
            ("Isolated", False),
            ("Removed", True),
        )
        if kind == "ByteLevel" and number == len(steps) - 1:
            found += [canonical(GPT2)] if step.get("use_regex", True) else []
        elif kind == "Digits":
            found.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif kind == "Split" and isolates and "Regex" in step["pattern"]:
            found.append(canonical(step["pattern"]["Regex"]))
        else:
            found.append(f"<{kind}>")
    return found


def shown(regexes: list[str]) -> str:
    shown = " then ".join(r if len(r) <= 60 else f"{r[:60]}..." for r in regexes)
    return shown or "nothing"
