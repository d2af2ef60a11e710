"""Configuration values that are passed whole through the program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from var_deploy.errors import UsageError
from var_deploy.host.machine import check_threads

Precision = Literal["fp32", "fp16", "int8"]
Layout = Literal["per-scale", "shared"]
LayoutSet = Literal["per-scale", "shared", "both"]  # of exports and of engine builds

CPU, CUDA = "onnxruntime-cpu", "onnxruntime-cuda"
TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt_rtx"
AUTO = "auto"
BACKENDS = (AUTO, TENSORRT, TENSORRT_RTX, CUDA, CPU)
PRECISIONS = (AUTO, "fp32", "fp16", "int8")
LAYOUTS: tuple[Layout, ...] = ("per-scale", "shared")
LAYOUT_CHOICES = (AUTO, *LAYOUTS)
LAYOUT_SETS: tuple[LayoutSet, ...] = ("both", *LAYOUTS)
CHECKS = ("changed", "hashes", "sizes")
# bytes; attention of a text-to-image model whose scores would need more is done in pieces
LARGEST_SCORES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class GraphForm:
    """Form of a model's graphs, besides its sizes.

    Attributes:
        precision: of the products: "fp32", "fp16" or "int8".
        batch: B, images per launch.
        guidance: classifier-free guidance, which doubles the rows.
        more_smooth: mix codes as the published `more_smooth` does, see `sampling.smoothing`.
    """

    precision: Precision
    batch: int = 1
    guidance: bool = False
    more_smooth: bool = False

    @property
    def rows(self) -> int:
        """G: a row per image, and with guidance another one without a class."""
        return 2 * self.batch if self.guidance else self.batch


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Choices for running a bundle. `planning.selection.select` resolves "auto".

    Attributes:
        backend: one of BACKENDS.
        precision: one of PRECISIONS.
        layout: one of LAYOUT_CHOICES.
        threads: CPU threads; None leaves their number open. With backend "auto" a number asks for
            the CPU.
        cuda_graph: on a GPU, record each launch once and replay it.
        check: "changed" compares the hash of every file of the bundle, and reads weights for that
            only where they are new or have changed since an earlier process of this user read
            them; "hashes" reads every file; "sizes" trusts files of the right size.
        keep_text_encoder: keep the text encoder of a text-to-image bundle in memory beside the
            scales; else it takes turns with them where memory is short, see
            `planning.text_memory.keeps_text_encoder`.

    Raises UsageError for a value that is none of these. The bound of `threads` is that of another
    machine, since a config may travel; the machine that runs it looks again.
    """

    backend: str = AUTO
    precision: str = AUTO
    layout: str = AUTO
    threads: int | None = None
    cuda_graph: bool = True
    check: Literal["changed", "hashes", "sizes"] = "changed"
    keep_text_encoder: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("backend", BACKENDS),
            ("precision", PRECISIONS),
            ("layout", LAYOUT_CHOICES),
            ("check", CHECKS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, found {value!r}")
        object.__setattr__(self, "threads", check_threads(self.threads))


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Description of what runs a loaded bundle, for reports.

    Attributes:
        precision, backend, layout: those that were taken, never "auto".
        settings: versions, device and settings of the backend, by what a person calls them.
        reason: why this backend, where that was left open; "" where nothing was passed over.
        threads: CPU threads of a launch, None on a GPU.
        loading: seconds that parts of loading took: "checking" the files, "opening" the graphs.
        text_encoder: what runs the text encoder, where that was asked for.
    """

    precision: str
    backend: str
    layout: str
    settings: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    threads: int | None = None
    loading: Mapping[str, float] = field(default_factory=dict, compare=False)
    text_encoder: Loaded | None = None

    def to_json(self) -> dict[str, str]:
        """Everything as text, as reports hold it."""
        chosen = {"precision": self.precision, "layout": self.layout, "backend": self.backend}
        reason = {"chosen because": self.reason} if self.reason else {}
        text = self.text_encoder
        texts = {"text encoder": f"{text.precision}, {text.backend}"} if text else {}
        return {**chosen, **self.settings, **reason, **texts}

    def __str__(self) -> str:
        return ", ".join(f"{name}: {text}" for name, text in self.to_json().items())
