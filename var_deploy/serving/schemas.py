"""Bodies and answers of the service, as JSON. OpenAPI is made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from var_deploy.serving.bodies import EncodedText

Label = int | str
Setting = float | list[float] | None
Base64 = Annotated[
    EncodedText,
    WithJsonSchema({"type": "string"}),
    Field(description="PNG, JPEG or WebP as base64; a data: URL will do"),
]
PICTURES = frozenset({"image", "mask"})  # the fields of that type


class Body(BaseModel):
    """What both kinds of request have. A field that is not known is refused, not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)

    seed: int | list[int] = Field(
        0, description="0 … 2⁶⁴-1; image i has seed + i, or one of several seeds"
    )
    negative: str | None = Field(
        None, description="what to guide away from, for a bundle that takes prompts"
    )
    cfg: Setting = Field(
        None,
        description="strength of guidance, 0 = off (with prompts 1 = off); a list: one a scale",
    )
    top_k: int | list[int] | None = Field(None, description="keep the k likeliest codes, 0 = all")
    top_p: Setting = Field(None, description="keep the likeliest codes of this mass, 0 = all")
    temperature: Setting = Field(None, description="divides the logits")
    deadline: float | None = Field(
        None,
        description="seconds from now: the best that can be done by then, see scales_done",
    )
    format: Literal["png", "json"] | None = Field(
        None, description="of the answer; without it `Accept: image/png` decides, else json"
    )


class ImagesBody(Body):
    """Images to draw."""

    labels: list[Label | None] | None = Field(
        None,
        description="names or numbers, repeated to fill count, which must leave none out; null, "
        "alone or among them, stands for no class",
    )
    label: Label | list[Label | None] | None = Field(
        None, description="labels under another name, or one of them"
    )
    prompts: list[str] | None = Field(
        None,
        description="texts, for a bundle that takes prompts; repeated to fill count, which must "
        "leave none out",
    )
    prompt: str | list[str] | None = Field(
        None, description="prompts under another name, or one of them"
    )
    count: int | None = Field(
        None, description="images; without it one a label or prompt, or one a seed"
    )


class EditBody(Body):
    """A part of a picture to draw anew: where the mask is white (or transparent), or in the box."""

    image: Base64
    mask: Base64 | None = Field(None, description="of the picture's size; this or box")
    box: list[int] | None = Field(None, description="x0, y0, x1, y1 in pixels of the picture")
    outside: bool = Field(False, description="draw what lies outside of mask or box instead")
    label: Label | None = Field(None, description="what to put there; null lets the rest decide")
    labels: list[Label | None] | None = Field(None, description="label as a list of one")
    prompt: str | list[str] | None = Field(
        None, description="what to put there; null lets the rest decide"
    )
    prompts: list[str] | None = Field(None, description="prompt as a list of one")
    count: int | None = Field(None, description="images; without it one a seed")
    keep_pixels: bool = Field(
        False, description="outside, put the picture's own pixels back, with a feathered seam"
    )


class VaryBody(Body):
    """More images like a picture: its tokens stay before a scale, and are new from there on."""

    image: Base64
    from_scale: int = Field(
        description="the first scale that is new, 0 … K: few keep the composition, many the detail"
    )
    label: Label | None = Field(None, description="what it shows; null lets the picture decide")
    labels: list[Label | None] | None = Field(None, description="label as a list of one")
    prompt: str | list[str] | None = Field(
        None, description="what it shows; null lets the picture decide"
    )
    prompts: list[str] | None = Field(None, description="prompt as a list of one")
    count: int | None = Field(None, description="images; without it one a seed")


class DrawnImage(BaseModel):
    png: str = Field(description="base64")
    label: Label | None = Field(description="name, or number where the bundle has no names")
    prompt: str | None = Field(description="null where the bundle takes none")
    seed: int
    number: int = Field(description="always 0: seed alone says which image it is")
    scales_done: int = Field(description="less than all of them where the deadline came first")


class Answer(BaseModel):
    images: list[DrawnImage]
    settings: dict[str, Any] = Field(description="cfg, top_k, top_p, temperature as they were used")
    digest: str = Field(description="of the bundle")
    seconds: float = Field(description="since the request came")
    remarks: list[str] = Field(
        description="lines about prompts: which were cut off, and which words are not known"
    )
    unknown: list[str] = Field(description="those words, as they are written in the prompts")


class Preview(BaseModel):
    number: int = Field(description="position of the image in the answer, from 0")
    png: str = Field(description="base64")


class QueuedEvent(BaseModel):
    """event: queued, whenever the queue has moved."""

    position: int = Field(description="requests before this one")
    seconds: float | None = Field(
        description="that these images will take once it is their turn, as the last batches did; "
        "null before the first batch"
    )


class ScaleDoneEvent(BaseModel):
    """event: scale. Images of one batch: a request may need several, one after the other."""

    scale: int = Field(description="which one is done, from 0")
    scales: int
    images: list[Preview] = Field(description="what they look like so far")


class ErrorAnswer(BaseModel):
    """Every answer of 4xx and 5xx, and event: error."""

    error: str = Field(description="one line")


class Defaults(BaseModel):
    cfg: float | list[float]
    top_k: int | list[int]
    top_p: float | list[float]
    temperature: float | list[float]


class LimitsAnswer(BaseModel):
    count: int
    pixels: int
    prompt: int = Field(description="characters of a prompt")
    queue: int
    body: int


class ModelAnswer(BaseModel):
    name: str
    digest: str
    takes: Literal["labels", "prompts", "nothing"]
    text_length: int = Field(description="tokens of a prompt that are read; 0 without prompts")
    examples: list[str] = Field(description="prompts to begin with; none without prompts")
    height: int
    width: int
    side: int | None = Field(description="null where height and width differ")
    channels: int
    grids: list[tuple[int, int]] = Field(description="rows and columns of tokens of each scale")
    patch_nums: list[int] | None = Field(description="their side; null where a grid is not square")
    scales: int
    labels: list[str] | None
    synonyms: list[list[str]] | None = Field(
        description="what else each class is called, to search by; null where there are no names"
    )
    classes: int
    codes: int = Field(
        description="of the codebook: what top_k can keep at most; 2 where tokens are bits"
    )
    conditional: bool
    guidance: bool
    defaults: Defaults
    precision: str
    backend: str
    batch: int
    limits: LimitsAnswer
    editing: bool
