"""`pipe(prompt).images[0]`: calls of `Pipeline` in the words of Hugging Face's library diffusers.

For programs and people that are used to them. Names and meanings are those of the pipelines there:
`StableDiffusionPipeline` for prompts, `DiTPipeline` for classes. What is drawn is what
`Pipeline.generate` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar, cast

from PIL import Image

from var_deploy.errors import UsageError
from var_deploy.manifest import Manifest
from var_deploy.runtime.generated import Images
from var_deploy.runtime.generation_options import GenerationOptions

Value = TypeVar("Value")

OutputType = Literal["pil", "np"]


class Generator(Protocol):
    """The part of a `torch.Generator` that a call uses: the seed that it was made with."""

    def initial_seed(self) -> int: ...


Generators: TypeAlias = Generator | Sequence[Generator]


@dataclass(frozen=True)
class PipelineOutput:
    """The result of a call of a pipeline in diffusers' words.

    Attributes:
        images: PIL images, or with `output_type="np"` uint8 [N, height, width, channels].
    """

    images: list[Image.Image] | Images


def draw(
    generate: Callable[..., Images],
    manifest: Manifest,
    options: GenerationOptions,
    *,
    prompt: str | Sequence[str] | None,
    class_labels: int | str | Sequence[int | str] | None,
    negative_prompt: str | None,
    num_images_per_prompt: int,
    guidance_scale: float | None,
    generator: Generators | None,
    seed: int | Sequence[int],
    output_type: OutputType,
) -> PipelineOutput:
    """Call `Pipeline.generate` as `Pipeline.__call__` was called, whose arguments these are."""
    if output_type not in ("pil", "np"):
        raise UsageError(f"output_type is pil or np, found {output_type!r}")
    if guidance_scale is not None:
        if options.get("cfg") is not None:
            raise UsageError("guidance_scale and cfg are two ways to say one thing: give one")
        options["cfg"] = cfg_of(manifest, guidance_scale)
    images = generate(
        _each(class_labels, num_images_per_prompt),
        _seeds(generator, seed),
        prompts=_each(prompt, num_images_per_prompt),
        negative=negative_prompt,
        count=num_images_per_prompt if prompt is None and class_labels is None else None,
        **options,
    )
    return PipelineOutput(images.pil() if output_type == "pil" else images)


def cfg_of(manifest: Manifest, guidance_scale: float) -> float:
    """Return `cfg` of a guidance scale s, which is s · conditional + (1 - s) · unconditional
    (Ho and Salimans 2022, as diffusers writes it), and no guidance up to 1.

    Infinity's cfg is the same number; VAR's is (1 + cfg) · conditional - cfg · unconditional.
    """
    scale = max(guidance_scale, 1)
    return scale if manifest.takes_text else scale - 1


def _each(values: Value | Sequence[Value] | None, count: int) -> list[Value] | None:
    """Return every value `count` times in a row, so that all images of the first go first; None
    where none are given.

    A number or a text is one value. Raises UsageError where count is below 1.
    """
    if isinstance(count, bool) or count < 1:
        raise UsageError(f"num_images_per_prompt must be 1 or more, found {count}")
    if values is None:
        return None
    several = [values] if isinstance(values, (int, str)) else cast(Sequence[Value], values)
    return [value for value in several for _ in range(count)]


def _seeds(generator: Generators | None, seed: int | Sequence[int]) -> int | Sequence[int]:
    """Return the seeds of a call: those of its generators where it has some."""
    if generator is None:
        return seed
    if isinstance(generator, Sequence):
        return [one.initial_seed() for one in generator]
    return generator.initial_seed()
