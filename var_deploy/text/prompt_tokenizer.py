"""Turns prompts into the tokens of a T5 text encoder, with the library `tokenizers` alone.

The steps are those of the published sampler of Infinity: no prefix, no lower-casing; `</s>` ends
every prompt, also one that is cut off; an empty prompt is `</s>` alone. Text that spells a special
token (`</s>`, `<extra_id_3>`) becomes that token, as it does there, so that a prompt gives the same
features in both programs. Such a token is a position of the text like any other: it ends nothing.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy.bundle.json_values import shown
from var_deploy.errors import BackendError, BundleError, UsageError, one_line
from var_deploy.host.installation import pip_install
from var_deploy.text.tokenizer_json import check_tokenizer_json

PADDING, END = 0, "</s>"
MAX_CHARACTERS = 20_000  # of a prompt; no released model reads more than 512 tokens
MAX_LENGTH = 4096  # most tokens that a text encoder takes
WORDS = re.compile(r"\w+|[^\w\s]+")
ENDING = 24  # characters of the place at which a prompt is cut off, in the message
# of Unicode but for tab and the ends of a line, which are spaces to a tokenizer
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedPrompt:
    """The tokens of one prompt.

    Attributes:
        ids: [S] int64, S being the tokens that were asked for; positions from `length` on hold 0.
        mask: [S] bool, True for the first `length` positions.
        length: tokens that are used, `</s>` included: at least 1, at most S.
        tokens: tokens of the whole prompt, `</s>` included.
        truncation: one line that says where the prompt was cut off; "" where it was not.
        unknown: words of the prompt that hold a character or a piece which the vocabulary lacks,
            in their order; the model reads each as "something".
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    length: int
    tokens: int
    truncation: str
    unknown: tuple[str, ...] = ()


class PromptTokenizer:
    """A T5 tokenizer that returns `length` tokens for every prompt, padded or truncated.

    Args:
        tokenizer_json: content of a tokenizer.json, which may be untrusted.
        length: S, from 1 to MAX_LENGTH.
        vocab_size: rows of the model's embedding, which every id must be below; None: unknown.

    Raises BundleError where the file is not a T5 tokenizer or does not fit the model, BackendError
    where the library `tokenizers` is not installed, UsageError for a length out of range.
    """

    def __init__(
        self, tokenizer_json: bytes, length: int, *, vocab_size: int | None = None
    ) -> None:
        if type(length) is not int or not 1 <= length <= MAX_LENGTH:
            raise UsageError(f"the text length must be from 1 to {MAX_LENGTH}, found {length}")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise BackendError(
                f"tokenizers is not installed; run {pip_install('text', 'tokenizers')}"
            ) from None
        checked = check_tokenizer_json(tokenizer_json)
        self._unknown = checked.unknown
        try:
            self._tokenizer: Any = Tokenizer.from_str(checked.json)
            ids = self._tokenizer.get_vocab(with_added_tokens=True)
            end = self._tokenizer.token_to_id(END)
            alone = self._tokenizer.encode("").ids
        except BaseException as error:
            raise _refused(error) from None
        self.length = length
        if end is None or alone != [end]:
            raise BundleError(f"tokenizer.json has no token {END}, which ends every prompt of T5")
        self._end = int(end)
        last = max(ids, key=lambda token: ids[token])
        if vocab_size is not None and ids[last] >= vocab_size:
            raise BundleError(
                f"tokenizer.json gives {shown(last)} the id {ids[last]}, but the text encoder has "
                f"only {vocab_size} tokens: they do not belong together"
            )

    def __call__(self, prompt: str, length: int | None = None) -> TokenizedPrompt:
        """Tokenize one prompt, of any script and possibly empty.

        `length` (at least 1) takes the place of the tokenizer's own. Raises UsageError for text of
        more than MAX_CHARACTERS or with half a surrogate pair.
        """
        check_prompt(prompt)
        try:
            encoded = self._tokenizer.encode(prompt)
        except BaseException as error:
            raise _refused(error) from None
        found: list[int] = encoded.ids
        most = self.length if length is None else length
        length = min(len(found), most)
        ids = np.full(most, PADDING, np.int64)
        ids[:length] = found[:length]
        ids[length - 1] = self._end
        truncation = ""
        if length < len(found):
            # offsets count the characters of the prompt as it was given
            kept = prompt[: encoded.offsets[length - 2][1]] if length > 1 else ""
            truncation = (
                f"the prompt has {len(found)} tokens, this bundle takes {most}: it ends at "
                f"'{_ending(kept)}'"
            )
        return TokenizedPrompt(
            ids=ids,
            mask=np.arange(most) < length,
            length=length,
            tokens=len(found),
            truncation=truncation,
            unknown=tuple(dict.fromkeys(self._unknown_words(prompt, encoded))),
        )

    def _unknown_words(self, prompt: str, encoded: Any) -> Iterator[str]:
        """Yield the words, and the signs between them, that hold an unknown token."""
        tokens = zip(encoded.ids, encoded.offsets, strict=True)
        spans = [span for token, span in tokens if token == self._unknown]
        ends = [end for _, end in spans]
        for word in WORDS.finditer(prompt):
            nearest = bisect.bisect_right(ends, word.start())  # ends behind it
            if nearest < len(spans) and spans[nearest][0] < word.end():
                yield word.group()


def check_prompt(prompt: object) -> None:
    """Raise UsageError where `prompt` is not text of at most MAX_CHARACTERS that UTF-8 can hold."""
    if not isinstance(prompt, str):
        raise UsageError(f"a prompt must be text, found {type(prompt).__name__}")
    if len(prompt) > MAX_CHARACTERS:
        raise UsageError(
            f"the prompt has {len(prompt)} characters, at most {MAX_CHARACTERS} are accepted"
        )
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"character {error.start} of the prompt is {prompt[error.start]!a}, half a "
            "surrogate pair: give text that UTF-8 can hold"
        ) from None


def check_prompts(prompts: Iterable[object]) -> None:
    """Check a list as `check_prompt` checks one prompt; the message counts the prompts from 1."""
    for number, prompt in enumerate(prompts, 1):
        try:
            check_prompt(prompt)
        except UsageError as error:
            raise UsageError(f"prompt {number}: {error}") from None


def check_sent_prompt(text: str, what: str, most: int = MAX_CHARACTERS) -> None:
    """Check a prompt that a client sent to a service, which calls it `what`.

    Raises UsageError as `check_prompt`, for more than `most` characters, and for control characters
    other than tab and the ends of a line: neither a tokenizer nor the text of a PNG has a use for
    them.
    """
    if len(text) > most:
        raise UsageError(
            f"{what} has {len(text)} characters, at most {most} are taken: shorten it"
        )
    if found := CONTROL.search(text):
        raise UsageError(
            f"character {found.start()} of {what} is the control character "
            f"U+{ord(found[0]):04X}: leave it out"
        )
    check_prompt(text)


def _ending(kept: str) -> str:
    """Return the last words of a text, marked where the beginning is left out."""
    last = kept.rstrip()[-ENDING:]
    if len(last) < len(kept.rstrip()):
        last = f"… {last.split(maxsplit=1)[-1]}" if " " in last else f"…{last}"
    return one_line(ValueError(last)) if last else last


def _refused(error: BaseException) -> BaseException:
    """Turn an error of the library into a BundleError; its panics are not an Exception."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        words = one_line(error)[:200]
        return BundleError(f"tokenizer.json is not a T5 tokenizer that can be used: {words}")
    return error
