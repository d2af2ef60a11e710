"""Command-line options that several commands share, and the values made of them.

Each decorator adds its options to a command. `sampling_options` hands them over as one argument
`sampling`, `runtime_options` and `load_options` as one argument `config`, `checkpoint_options` as
one argument `weights`, `report_options` as `quiet` and `as_json`. `out_option`, `count_option`,
`quiet_option` and `verbose_option` are `click.option` for the options that have a letter: -o, -n,
-q and -v.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.shell_completion import CompletionItem

from var_deploy.cli.console import VERBOSE, needs_extra
from var_deploy.config import (
    AUTO,
    BACKENDS,
    CHECKS,
    LAYOUT_CHOICES,
    PRECISIONS,
    RuntimeConfig,
)
from var_deploy.errors import UsageError, VarDeployError
from var_deploy.labels import label_words
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.sampling import Sampling, parse_setting

if TYPE_CHECKING:
    from var_deploy.export.checkpoint.hints import Hints
    from var_deploy.pipeline import Pipeline

    ParamType = click.ParamType[Any]  # generic since click 8.4, and only for type checkers
else:
    ParamType = click.ParamType

Command = Callable[..., None]
OLDEST_CAPABILITY = 75  # 7.5, the first that TensorRT for RTX builds for

# every command that has the long form has the letter: a test looks
out_option = functools.partial(click.option, "--out", "-o")
count_option = functools.partial(click.option, "--count", "-n")
quiet_option = functools.partial(click.option, "--quiet", "-q", is_flag=True)


class ChoiceList(ParamType):
    """Words of a known few, with commas between them, as in "fp16,int8"; a tuple. With
    `multiple=True` the option may be repeated as well: `flattened` makes one tuple of all."""

    name = "list"

    def __init__(self, choices: Sequence[str]) -> None:
        self.choices = tuple(choices)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        words = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
        for word in words:
            if word not in self.choices:
                known = f"{', '.join(self.choices[:-1])} and {self.choices[-1]}"
                self.fail(f"expected {known}, with commas between, found {word!r}", param, ctx)
        return tuple(words)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        *before, last = incomplete.split(",")
        start = "".join(f"{word}," for word in before)
        left = [word for word in self.choices if word.startswith(last) and word not in before]
        return [CompletionItem(start + word) for word in left]

    @staticmethod
    def flattened(
        ctx: click.Context, param: click.Parameter, value: Sequence[Sequence[str]]
    ) -> tuple[str, ...]:
        """A callback: every word once, in order."""
        return tuple(dict.fromkeys(word for words in value for word in words))


class ComputeCapability(ParamType):
    """A GPU's compute capability, as NVIDIA writes it (8.6) or as one number (86): 86."""

    name = "compute capability"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        text = str(value).strip()
        found = re.fullmatch(r"([0-9]{1,2})\.([0-9])|([0-9]{2,3})", text)
        number = int(text.replace(".", "")) if found else 0
        if number < OLDEST_CAPABILITY:
            oldest = f"{OLDEST_CAPABILITY // 10}.{OLDEST_CAPABILITY % 10}"
            self.fail(
                f"expected a compute capability of at least {oldest}, such as 8.6 or 86, found "
                f"{text[:80]!r}",
                param,
                ctx,
            )
        return number


def _note_verbose(ctx: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        ctx.meta[VERBOSE] = True


verbose_option = functools.partial(  # read by `console.table`, so no command passes it on
    click.option,
    "--verbose",
    "-v",
    is_flag=True,
    expose_value=False,
    callback=_note_verbose,
    help="Every column of the tables, however wide the terminal is.",
)

# far above what is of use; a slip of the finger ends before any work
MOST_BATCH = 1024  # images per launch, clients of a service, processes of a model
MOST_ROUNDS = 100_000  # of a measurement, images of a check


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling settings of a command line; None stands for the bundle's default."""

    cfg: str | None
    top_k: str | None
    top_p: str | None
    temperature: str | None

    def over(self, manifest: Manifest, base: Sampling | None = None) -> Sampling:
        """`base`, or else the bundle's defaults, with these in their place. Raises UsageError."""
        scales, given = manifest.model.scales, dataclasses.asdict(self)
        parsed = {k: v if v is None else parse_setting(k, v, scales) for k, v in given.items()}
        return manifest.sampling(base, **parsed)


def load_pipeline(
    bundle: Path,
    manifest: Manifest,
    config: RuntimeConfig,
    text_encoder: Path | None = None,
    text_config: RuntimeConfig | None = None,
) -> Pipeline:
    """The pipeline of the bundle whose manifest was read before, and of no other that has taken
    its place. Where ONNX Runtime is missing, one line says what to install."""
    with needs_extra("cpu", click.get_current_context().info_name or "this"):
        from var_deploy.pipeline import Pipeline

        return Pipeline.open(
            bundle,
            config,
            digest=manifest.digest(),
            text_encoder=text_encoder,
            text_config=text_config,
        )


def check_graphs(manifest: Manifest, config: RuntimeConfig, *graphs: str) -> None:
    """Raise BundleError where the bundle lacks a graph: in the precision that was asked for, or
    with "auto" in every one."""
    chosen = [config.precision] if config.precision != AUTO else list(manifest.graphs)
    for graph in graphs:
        if not any(graph in manifest.graphs.get(precision, {}) for precision in chosen):
            manifest.graph(chosen[0], graph)


def sampling_options(command: Command) -> Command:
    """--cfg --top-k --top-p --temperature, as a `SamplingOptions`."""
    settings = {
        "--cfg": "Strength of guidance, 0 = off; of prompts 1 = off.",
        "--top-k": "Keep the k most likely codes, 0 = all.",
        "--top-p": "Keep the likeliest codes of this mass, 0 = all.",
        "--temperature": "Divides the logits.",
    }
    options = [
        click.option(name, metavar="SETTING", show_default="the bundle's", help=text)
        for name, text in settings.items()
    ]
    return added(options, gathered(command, "sampling", SamplingOptions))


RUNTIME = ("precision", "layout", "backend", "threads", "cuda_graph")


def load_options(command: Command) -> Command:
    """Add the options of `runtime_options` and --check, as a `RuntimeConfig`, for a command that
    loads the bundle itself."""
    check = click.option(
        "--check",
        type=click.Choice(CHECKS),
        default=RuntimeConfig.check,
        show_default=True,
        help="Compare hashes, reading weights only where they are new or changed; read everything "
        "again (hashes); or trust files of the right size (sizes).",
    )
    return _runtime_options(command, (*RUNTIME, "check"), (check,))


def runtime_options(command: Command) -> Command:
    """--precision --layout --backend --threads --cuda-graph, as a `RuntimeConfig`."""
    return _runtime_options(command, RUNTIME)


def _runtime_options(
    command: Command,
    names: Sequence[str],
    more: Sequence[Callable[[Command], Command]] = (),
) -> Command:
    options: list[Callable[[Command], Command]] = [
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            default=AUTO,
            show_default=True,
            help="auto: fp16 on a GPU; on a CPU int8 where the bundle has it, else fp32.",
        ),
        click.option(
            "--layout",
            type=click.Choice(LAYOUT_CHOICES),
            default=AUTO,
            show_default=True,
            help="One graph per scale, or one for all of them.",
        ),
        click.option(
            "--backend",
            type=click.Choice(BACKENDS),
            default=AUTO,
            show_default=True,
            help="What runs the graphs; auto takes the fastest that can.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(1),
            show_default="every core that it may use",
            help="CPU threads.",
        ),
        click.option(
            "--cuda-graph/--no-cuda-graph",
            default=True,
            show_default=True,
            help="On a GPU: record every launch and replay it.",
        ),
        *more,
    ]
    return added(options, gathered(command, "config", RuntimeConfig, names))


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Checkpoint files, and facts about the model that they may lack."""

    checkpoint: Path | None
    tokenizer: Path | None
    key: str | None
    tokenizer_key: str | None
    patch_nums: tuple[int, ...] | None
    heads: int | None

    @property
    def given(self) -> bool:
        """Whether any of them was."""
        return any(value is not None for value in dataclasses.astuple(self))

    def files(self) -> dict[Literal["tokenizer", "transformer"], Path | None]:
        """The file of each part, None where it was not given."""
        return {"tokenizer": self.tokenizer, "transformer": self.checkpoint}

    def hints(self) -> Hints:
        """The same for the half that reads the files."""
        from var_deploy.export.checkpoint.hints import Hints

        return Hints(
            key=self.key,
            tokenizer_key=self.tokenizer_key,
            patch_nums=self.patch_nums,
            heads=self.heads,
        )


def checkpoint_options(command: Command) -> Command:
    """--checkpoint --tokenizer, their keys, --patch-nums --heads, as a `CheckpointOptions`."""
    file = click.Path(path_type=Path, dir_okay=False)
    options = [
        click.option(
            "--checkpoint",
            type=click.Path(path_type=Path),
            help="Transformer weights, .pth or .safetensors, or the folder of their shards.",
        ),
        click.option(
            "--tokenizer", type=file, help="Tokenizer (VQVAE) weights, .pth or .safetensors."
        ),
        click.option(
            "--key",
            metavar="NAME",
            help="Where the transformer lies in a file that holds several, such as ema or "
            "trainer.var_wo_ddp; a dot is the top level.",
        ),
        click.option(
            "--tokenizer-key", metavar="NAME", help="Where the tokenizer lies in its file."
        ),
        click.option(
            "--patch-nums",
            metavar="SIDES",
            callback=_patch_nums,
            help="Side length of each scale's token map, such as 1,2,3,5,8, for a checkpoint that "
            "lacks the buffer lvl_1L.",
        ),
        click.option(
            "--heads",
            type=click.IntRange(1, 4096),
            help="Attention heads, for a model without L2 norm: its weights do not tell.",
        ),
    ]
    return added(options, gathered(command, "weights", CheckpointOptions))


def _patch_nums(
    context: click.Context, option: click.Parameter, text: str | None
) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        numbers = tuple(map(int, parts))
        if numbers[0] == 1 and list(numbers) == sorted(set(numbers)):
            return numbers
    raise click.BadParameter(
        f"expected numbers that grow from 1, such as 1,2,3,5,8, found {text[:80]!r}",
        context,
        option,
    )


class _OneText(click.types.StringParamType):
    """A text; one from the environment is whole, though the option may be given several times."""

    def split_envvar_value(self, rv: str) -> list[str]:
        return [rv]


def label_option(
    one: str, other: str, *, how: str, **settings: Any
) -> Callable[[Command], Command]:
    """An option for labels that goes by either name, `one` being what its argument is called.

    `how` says how several classes are given. A shell completes the labels of the argument BUNDLE.
    """

    def single(
        context: click.Context, option: click.Parameter, texts: tuple[str, ...]
    ) -> str | None:
        if len(texts) > 1:
            raise UsageError(f"{one} and {other} are one option, found {len(texts)}: {how}")
        return texts[0] if texts else None

    return click.option(
        one,
        other,
        one.removeprefix("--"),
        type=_OneText(),
        multiple=True,
        callback=single,
        shell_complete=complete_labels,
        **settings,
    )


def complete_labels(
    context: click.Context, option: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The labels of the bundle that a command line names, for what comes after the last comma."""
    # click leaves arguments alone while an option has no value: they are words still
    typed = [context.params.get("bundle"), *context.args]
    try:
        manifest = read_manifest(next(Path(word) for word in typed if word is not None))
    except (VarDeployError, OSError, StopIteration):
        return []  # there is no bundle yet
    before, comma, start = incomplete.rpartition(",")
    transformer = manifest.model.transformer
    classes = transformer.classes if transformer.conditional else 0
    return [
        CompletionItem(f"{before}{comma}{word}", help=about)
        for word, about in label_words(manifest.labels, classes)
        if word.startswith(start.casefold())
    ]


def report_options(command: Command) -> Command:
    """--quiet and --json."""
    options = [
        quiet_option(help="No progress and no closing line."),
        click.option("--json", "as_json", is_flag=True, help="What was done, as JSON on stdout."),
    ]
    return added(options, command)


def gathered(
    command: Command, argument: str, kind: Any, names: Sequence[str] | None = None
) -> Command:
    """The command with options gathered into one argument, a dataclass: those called `names`, or
    one per field."""
    names = names or [field.name for field in dataclasses.fields(kind)]

    @functools.wraps(command)  # with the options that it has already
    def gather(**given: Any) -> None:
        command(**{argument: kind(**{name: given.pop(name) for name in names})}, **given)

    return gather


def added(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    """The command with options that its help lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command
