"""The keyword arguments that `Pipeline.generate`, `edit` and `vary` have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar, cast

from var_deploy.runtime.request import ScaleEvent
from var_deploy.sampling import Sampling

Method = TypeVar("Method", bound=Callable[..., Any])


class GenerationOptions(TypedDict, total=False):
    """Options of a generation; each may be left out.

    Keys:
        cfg, top_k, top_p, temperature: a number, or one per scale; see `Sampling`. None takes the
            value of `sampling`. They may also be positional, after the method's own arguments.
        on_progress: called with (launches done, total launches).
        on_scale: called with a `ScaleEvent` after each scale of each batch.
        deadline: seconds for the whole call. An image is decoded from the scales that were done in
            time, at least one; `scales_done` of the result says how many. The times of scales and
            decoder are learned from earlier runs.
        sampling: all four settings in one value; None takes the bundle's defaults.

    With `on_progress`, `on_scale` or `deadline` the host waits for the GPU after every scale.
    """

    cfg: float | Sequence[float] | None
    top_k: int | Sequence[int] | None
    top_p: float | Sequence[float] | None
    temperature: float | Sequence[float] | None
    on_progress: Callable[[int, int], None] | None
    on_scale: Callable[[ScaleEvent], object] | None
    deadline: float | None
    sampling: Sampling | None


SETTINGS = ("cfg", "top_k", "top_p", "temperature")  # may be positional


def takes_generation_options(method: Method) -> Method:
    """Decorator: replace `**options` in a method's signature by the keys of `GenerationOptions`.

    A call is bound to that signature first, so an unknown keyword is a TypeError, and `help` shows
    all keywords.
    """
    own = [p for p in inspect.signature(method).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD
            if name in SETTINGS
            else inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=getattr(annotation, "__forward_arg__", annotation),
        )
        for name, annotation in GenerationOptions.__annotations__.items()
    ]
    # sorted by kind, the method's own first
    signature = inspect.signature(method).replace(
        parameters=sorted([*own, *shared], key=lambda parameter: parameter.kind)
    )

    @functools.wraps(method)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return method(**signature.bind(*arguments, **keywords).arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return cast(Method, call)
