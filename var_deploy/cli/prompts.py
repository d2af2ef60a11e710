"""The options for prompts that several commands share."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from var_deploy.cli.options import Command, added, gathered
from var_deploy.config import RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.manifest import Manifest
from var_deploy.text.prompt_tokenizer import check_prompt, check_prompts

MOST_PROMPTS = 100_000  # of a file; more of them than anybody means
MOST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Values of the options for prompts.

    Attributes:
        prompt: those of --prompt.
        prompts: a file with one prompt per line; "-" is standard input.
        negative: what images are guided away from.
        text_encoder: folder of the text encoder, where the bundle does not hold it.
        keep_text_encoder: keep it in memory beside the scales, whatever memory is free.
    """

    prompt: tuple[str, ...]
    negative: str | None
    text_encoder: Path | None
    keep_text_encoder: bool = False
    prompts: str | None = None

    def read(self, manifest: Manifest) -> list[str]:
        """Return the prompts, [] for a bundle that takes none.

        Raises UsageError where the bundle takes none and some are given, the file cannot be read,
        or a prompt is longer than any that is tokenized.
        """
        given = [*self.prompt, *self._from_file()]
        if manifest.takes_text:
            check_prompts(given)
            check_prompt(self.negative or "")
            return given
        encoder = self.text_encoder is not None or self.keep_text_encoder
        if given or self.negative is not None or encoder:
            takes = "labels" if manifest.model.transformer.conditional else "no labels"
            raise UsageError(f"this bundle takes {takes} and no prompts: leave --prompt out")
        return []

    def over(self, config: RuntimeConfig) -> RuntimeConfig:
        """Return `config` with what these options say of the text encoder."""
        if not self.keep_text_encoder:
            return config
        return dataclasses.replace(config, keep_text_encoder=True)

    def told(self, text: Mapping[str, str]) -> dict[str, str]:
        """Return the settings text of an image with the negative prompt added."""
        return {**text, **({"negative": self.negative} if self.negative else {})}

    def _from_file(self) -> list[str]:
        if self.prompts is None:
            return []
        name = "standard input" if self.prompts == "-" else self.prompts
        try:
            if self.prompts == "-":
                if sys.stdin is None:
                    raise UsageError("--prompts - reads standard input, which is closed")
                data = sys.stdin.buffer.read(MOST_BYTES + 1)
            else:
                with open(self.prompts, "rb") as stream:
                    data = stream.read(MOST_BYTES + 1)
        except OSError as error:
            raise UsageError(f"--prompts: {name} cannot be read: {error.strerror}") from None
        if len(data) > MOST_BYTES:
            raise UsageError(f"--prompts: {name} has more than {MOST_BYTES >> 20} MiB")
        try:
            lines = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UsageError(f"--prompts: {name} is not UTF-8 text") from None
        found = [line for line in lines if line.strip()]
        if not found:
            raise UsageError(f"--prompts: {name} holds no prompt; give one a line")
        if len(found) > MOST_PROMPTS:
            raise UsageError(
                f"--prompts: {name} holds {len(found):,} prompts, at most {MOST_PROMPTS:,} are "
                "taken"
            )
        return found


def check_text_width(place: Path, width: int, wanted: int) -> None:
    """Raise UsageError where the text encoder at `place` gives features of another width than the
    model takes."""
    if width != wanted:
        raise UsageError(
            f"{place} gives features of width {width}, the model takes {wanted}: give the text "
            "encoder that it was trained with"
        )


def text_encoder_option(
    help: str = "The bundle of the text encoder, for a bundle that takes prompts.",
    default: str = "in or beside the bundle",
) -> Callable[[Command], Command]:
    """--text-encoder, with a help text and the words for its default."""
    return click.option(
        "--text-encoder",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        show_default=default,
        help=help,
    )


keep_text_encoder_option = click.option(
    "--keep-text-encoder",
    is_flag=True,
    help="Keep the text encoder in memory; without, it is released before the scales are loaded "
    "where both would not fit.",
)


def prompt_options(*, one: bool = False) -> Callable[[Command], Command]:
    """--prompt --prompts --negative --text-encoder, as `PromptOptions` called `prompts`.

    `one`: a single --prompt, without --prompts.
    """

    def single(
        context: click.Context, option: click.Parameter, texts: tuple[str, ...]
    ) -> tuple[str, ...]:
        if one and len(texts) > 1:
            raise UsageError(f"--prompt is given {len(texts)} times, expected once")
        return texts

    several = "" if one else "; several times for several"
    file = click.option(
        "--prompts",
        metavar="FILE",
        help="A file with one prompt per line, - for standard input.",
    )
    options: list[Callable[[Command], Command]] = [
        click.option(
            "--prompt",
            multiple=True,
            callback=single,
            metavar="TEXT",
            help=f"Text that describes the image, for a bundle that takes prompts{several}.",
        ),
        *([] if one else [file]),
        click.option("--negative", metavar="TEXT", help="What to guide away from."),
        text_encoder_option("The bundle of the text encoder."),
        keep_text_encoder_option,
    ]
    names = [field.name for field in dataclasses.fields(PromptOptions)]
    taken = [name for name in names if not one or name != "prompts"]
    return lambda command: added(options, gathered(command, "prompts", PromptOptions, taken))
