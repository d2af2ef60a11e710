"""Class labels as people write them: by name or by number."""

from __future__ import annotations

import functools
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from var_deploy.errors import LabelError

SHOWN = 60  # characters of a name that a message repeats
NO_CLASS = "none"  # on the command line, the image without a class
LONGEST = 1000  # characters of a text that may be a name
STRIDE = 7  # coprime to the class counts of ImageNet and pocket


def class_stride(classes: int) -> int:
    """The step from one image's class to the next one's that comes to every class."""
    return next(n for n in range(STRIDE, STRIDE + max(classes, 1)) if math.gcd(n, classes) == 1)


def spread_labels(classes: int, count: int, first: int = 0) -> list[int]:
    """Class numbers for `count` images from number `first` on, where any class will do: neighbours
    differ. A model without classes gets 0."""
    return [STRIDE * n % max(classes, 1) for n in range(first, first + count)]


def resolve_labels(
    text_or_items: str | int | Iterable[str | int], names: Sequence[str], classes: int
) -> list[int]:
    """Turn "star,3" (or a sequence of names and numbers) into class numbers.

    Names are matched without regard to case, and an underscore is as good as a space. A name that
    lists synonyms ("tench, Tinca tinca") is matched whole or by any one of them, and one that ends
    in a note ("crane (bird)") without it too. Only a string given for the whole list is split at
    commas.

    Args:
        text_or_items: the labels.
        names: class names, index = label; empty where they are not known.
        classes: number of classes; labels run from 0 to classes - 1.

    Raises LabelError for an empty list, an unknown or ambiguous name, and a number out of range.
    """
    if classes < 1:
        raise LabelError("this model has no classes: leave the labels out")
    items: Iterable[str | int]
    if isinstance(text_or_items, str):
        items = _split(text_or_items, names)
    elif isinstance(text_or_items, Iterable):
        items = text_or_items
    else:
        items = [text_or_items]
    labels = [_resolve(item, names, classes) for item in items]
    if not labels:
        raise LabelError(f"no label given; {_choices(names, classes)}")
    return labels


def _split(text: str, names: Sequence[str]) -> list[str]:
    """Parts between commas; a text that is one whole name with commas stays in one piece."""
    if _fold(text) in map(_fold, names):
        return [text]
    return [part for part in text.split(",") if part.strip()]


def _resolve(item: object, names: Sequence[str], classes: int) -> int:
    if isinstance(item, numbers.Integral) and not isinstance(item, bool):
        return _in_range(int(item), classes)
    if not isinstance(item, str):
        raise LabelError(f"a label is a name or a whole number, found {item!r}")
    if len(item) > LONGEST and len(item) > 2 * max(map(len, names), default=0):
        raise LabelError(f"no class is called {_short(item)!r}; {_choices(names, classes)}")
    wanted = _fold(item)
    if re.fullmatch(r"[+-]?[0-9]{1,18}", wanted):
        return _in_range(int(wanted), classes)
    spellings = _spellings(tuple(names))
    found = spellings.whole.get(wanted) or spellings.synonyms.get(wanted, ())
    if len(found) == 1:
        return found[0]
    if found:
        numbered = ", ".join(f"{n} ({names[n]})" for n in found)
        raise LabelError(f"label {item!r} names several classes, give the number: {numbered}")
    close = _close(wanted, spellings)
    hint = f"did you mean {' or '.join(close)}?" if close else _choices(names, classes)
    raise LabelError(f"no class is called {_short(item.strip())!r}; {hint}")


@dataclass(frozen=True, kw_only=True)
class _Spellings:
    """What class names are matched by: the numbers of the classes, by folded text."""

    whole: Mapping[str, Sequence[int]]
    synonyms: Mapping[str, Sequence[int]]
    names: Mapping[str, str]  # every text above, and the name that it stands for


@functools.lru_cache(maxsize=4)
def _spellings(names: tuple[str, ...]) -> _Spellings:
    whole: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    meant: dict[str, str] = {}
    for n, name in enumerate(names):
        whole.setdefault(_fold(name), []).append(n)
        meant[_fold(name)] = name
        for synonym in dict.fromkeys(_synonyms(name)):
            synonyms.setdefault(synonym, []).append(n)
            meant[synonym] = name
    return _Spellings(whole=whole, synonyms=synonyms, names=meant)


def _close(wanted: str, spellings: _Spellings) -> list[str]:
    """Up to four names that may be meant: such as have the wanted text as one of their words
    ("panda" → "giant panda"), else such as are spelled much like it."""
    names = spellings.names
    found = [s for s in names if _has_words(s, wanted)] if wanted else []
    import difflib

    found = found or difflib.get_close_matches(wanted[:SHOWN], names, n=3)
    return list(dict.fromkeys(names[f] for f in found))[:4]


def _has_words(text: str, words: str) -> bool:
    """Whether `words` stands in `text`, and not as a part of longer words."""
    start = text.find(words)
    while start >= 0:
        if _word_ends(text, start) and _word_ends(text, start + len(words)):
            return True
        start = text.find(words, start + 1)
    return False


def _word_ends(text: str, place: int) -> bool:
    """Whether a word begins or ends before the character at `place`."""
    before, after = text[max(place - 1, 0) : place], text[place : place + 1]
    return _in_word(before) != _in_word(after)


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _in_range(label: int, classes: int) -> int:
    if not 0 <= label < classes:
        raise LabelError(f"label {label} is out of range; the model has 0 to {classes - 1}")
    return label


def _choices(names: Sequence[str], classes: int) -> str:
    numbers_only = f"labels are the numbers 0 to {classes - 1}"
    if not names:
        return numbers_only
    if len(names) > 16:
        return f"{numbers_only} and the names that `var-deploy labels` lists"
    return f"{numbers_only} and {', '.join(names)}"


def _fold(text: str) -> str:
    return " ".join(text.replace("_", " ").split()).casefold()


def _synonyms(name: str) -> list[str]:
    """What else a name is matched by: each part between commas, with and without its note."""
    parts = [_fold(part) for part in name.split(",") if part.strip()]
    return [*parts, *(re.sub(r" \([^()]*\)$", "", part) for part in parts)]


@dataclass(frozen=True, kw_only=True)
class ClassNames:
    """What a class is called.

    Attributes:
        number: the label.
        name: "" where the classes have no names.
        synonyms: what else it is searched by.
    """

    number: int
    name: str
    synonyms: tuple[str, ...] = ()


def search_classes(word: str, classes: Sequence[ClassNames]) -> list[ClassNames]:
    """The classes that `word` may mean, the best first.

    First come those with that number, name or synonym, then those with it as words of a name or
    synonym, then those with it anywhere in one; of each the lower numbers first.
    """
    wanted, found = _fold(word), list[tuple[int, ClassNames]]()
    for each in classes:
        texts = [_fold(text) for text in (each.name, *each.synonyms)]
        texts += [synonym for text in texts[:1] for synonym in _synonyms(text)]
        if wanted == str(each.number) or wanted in texts:
            found.append((0, each))
        elif wanted and any(_has_words(text, wanted) for text in texts):
            found.append((1, each))
        elif any(wanted in text for text in texts):
            found.append((2, each))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


def close_names(word: str, names: Sequence[str]) -> list[str]:
    """Up to four of the class names that are spelled much like `word`."""
    return _close(_fold(word), _spellings(tuple(names)))


def label_words(names: Sequence[str], classes: int) -> list[tuple[str, str]]:
    """(label, name) of every class, the label without anything that a shell takes apart.

    It is the name in small letters, or its first synonym, with underscores for spaces; and the
    number where that would not be plain or would mean several classes.
    """
    if not names:
        return [(str(n), "") for n in range(classes)]
    words, texts = _spellings(tuple(names)), list[tuple[str, str]]()
    for n, name in enumerate(names):
        short = next(iter(_synonyms(name)), "")
        meant = words.whole.get(short) or words.synonyms.get(short, ())
        plain = re.fullmatch(r"[\w -]*[^\W\d][\w -]*", short) and list(meant) == [n]
        texts.append((short.replace(" ", "_") if plain else str(n), name))
    return texts


def resolve_labels_or_none(
    text_or_items: str | Iterable[str], names: Sequence[str], classes: int
) -> list[int | None]:
    """Class numbers as `resolve_labels` gives them, with None for each label "none": the image
    without a class. Where a class is called "none", that class is meant.

    Raises LabelError as `resolve_labels` does. A model without classes takes "none" alone.
    """
    texts = _split(text_or_items, names) if isinstance(text_or_items, str) else [*text_or_items]
    called = {synonym for name in names for synonym in (_fold(name), *_synonyms(name))}
    empty = [_fold(text) == NO_CLASS and NO_CLASS not in called for text in texts]
    if texts and all(empty):
        return [None] * len(texts)
    others = [text for text, without in zip(texts, empty, strict=True) if not without]
    numbers = iter(resolve_labels(others, names, classes))
    return [None if without else next(numbers) for without in empty]
