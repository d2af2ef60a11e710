"""Sampling settings, and the random numbers of a generation.

The same seed gives the same image on every backend, whatever the batch size and wherever in the
batch the image sits: each image takes its T uniforms from a Philox stream of its own, (seed,
number). Image i of a call has seed + i and number 0, see `image_seeds`; image n of a set has the
set's seed and number n, see `numbered`.

"More smooth" sampling, which a bundle has from its export or has not, draws tokens in the same way
but adds a mix of codes to the image in place of a token's own: see `smoothing`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from var_deploy.errors import LabelError, UsageError

Label = TypeVar("Label")

MAX_SEED = 2**64 - 1
MAX_TOP_K = 2**31 - 1  # far above any codebook, and an integer to every backend


@dataclass(frozen=True, kw_only=True)
class ScaleSampling:
    """Sampling settings of one scale.

    `guidance` is t in logits = (1 + t)·conditional - t·unconditional.
    """

    guidance: float
    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one `generate` call: each a number, or a sequence of one value per scale.

    Attributes:
        cfg: a number is the guidance at the last of K scales, and scale k uses cfg · k/(K-1)
            (VAR, section 3); a sequence is taken as it stands.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the smallest set of codes with this probability; 0 keeps all.
        temperature: divides the logits before filtering.

    Sequences are kept as tuples. Raises UsageError for a value that is NaN or out of range; how
    many values there must be is not known here, see `check`.
    """

    cfg: float | tuple[float, ...] = 4.0
    top_k: int | tuple[int, ...] = 900
    top_p: float | tuple[float, ...] = 0.95
    temperature: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value = value.tolist()
            if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
                value = tuple(
                    _setting(field.name, v, f" of scale {k}") for k, v in enumerate(value)
                )
            else:
                value = _setting(field.name, value)
            object.__setattr__(self, field.name, value)

    def at(self, scale: int, scales: int) -> ScaleSampling:
        """Return the settings of `scale` out of `scales`. Raises UsageError as `check` does."""
        self.check(scales)

        def pick(values: Any) -> Any:
            return values[scale] if isinstance(values, tuple) else values

        return ScaleSampling(
            guidance=self.guidance(scale, scales),
            temperature=pick(self.temperature),
            top_k=pick(self.top_k),
            top_p=pick(self.top_p),
        )

    def guidance(self, scale: int, scales: int) -> float:
        """Return t at `scale`: logits = (1 + t)·conditional - t·unconditional."""
        if isinstance(self.cfg, tuple):
            return self.cfg[scale]
        return self.cfg * scale / (scales - 1) if scales > 1 else self.cfg

    @property
    def guides(self) -> bool:
        """Whether any scale has guidance; without, a bundle exported without guidance suffices."""
        return any(self.cfg) if isinstance(self.cfg, tuple) else self.cfg != 0

    def check(self, scales: int) -> None:
        """Raise UsageError where a sequence does not have one value for each of the scales."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) != scales:
                raise UsageError(
                    f"{field.name} has {_count(len(value), 'value')}, but the model has "
                    f"{_count(scales, 'scale')}: give one number, or one per scale"
                )

    def texts(self) -> dict[str, str]:
        """Return each setting as text that `parse_setting` reads, to the last digit."""
        return {f.name: _text(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        return ", ".join(f"{k.replace('_', '-')} {text}" for k, text in self.texts().items())

    def replace(self, **changes: Any) -> Sampling:
        """Return a copy with those settings that are not None; they are validated again."""
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class BitSampling(Sampling):
    """Settings of a text-to-image call (Infinity, arXiv 2412.04431), whose tokens are bits.

    Attributes:
        cfg: guidance of every scale in cfg · conditional + (1 - cfg) · unconditional: 1 is none.
        top_p: a bit's less likely value is dropped where its probability is at most 1 - top_p; 0
            keeps it. Up to 0.5 every bit takes its likelier value.
        top_k: always 0: a bit has two values.
        temperature: divides the logits before guidance, which is the same.
    """

    cfg: float | tuple[float, ...] = 3.0
    top_k: int | tuple[int, ...] = 0
    top_p: float | tuple[float, ...] = 0.97
    temperature: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k != 0:
            raise UsageError(
                f"top_k must be 0 for this model, whose tokens are bits, found {self.top_k}; "
                "top_p filters them"
            )

    def texts(self) -> dict[str, str]:
        found = super().texts()
        del found["top_k"]
        return found

    def guidance(self, scale: int, scales: int) -> float:
        """Return cfg at `scale`: logits = cfg · conditional + (1 - cfg) · unconditional."""
        return self.cfg[scale] if isinstance(self.cfg, tuple) else self.cfg

    @property
    def guides(self) -> bool:
        return any(c != 1 for c in (self.cfg if isinstance(self.cfg, tuple) else (self.cfg,)))


LIMITS = {"cfg": (0.0, 1000.0), "top_p": (0.0, 1.0), "temperature": (1e-3, 1000.0)}


def _setting(name: str, value: Any, where: str = "") -> Any:
    """Return the value as a Python number. Raises UsageError for a value out of range."""
    if name == "top_k":
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise UsageError(f"top_k{where} must be a whole number, found {value!r}")
        if not 0 <= int(value) <= MAX_TOP_K:
            raise UsageError(f"top_k{where} must lie between 0 (off) and 2**31 - 1, found {value}")
        return int(value)
    low, high = LIMITS[name]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name}{where} must be a number, found {value!r}")
    if not math.isfinite(float(value)) or not low <= float(value) <= high:
        raise UsageError(f"{name}{where} must lie between {low:g} and {high:g}, found {value}")
    return float(value)


def parse_setting(name: str, text: str, scales: int) -> Any:
    """Parse the text of a setting of `Sampling`, for a model of K scales.

    "4" is a number; "0,1,2,4" one value per scale; "1:4" a straight line from 1 at the first scale
    to 4 at the last, v_k = 1 + (4 - 1)·k/(K-1), rounded to whole numbers for top_k.

    Raises UsageError for a text that is none of these, a wrong count, or a value out of range.
    """
    parts = text.split(":" if ":" in text else ",")
    values = tuple(_read(name, part, text) for part in parts)
    setting: Any = values if len(values) > 1 else values[0]
    if ":" in text:
        if len(values) != 2:
            raise UsageError(f"{name} {text!r}: a ramp has two ends, as in 1:4")
        if name in ("top_k", "top_p") and 0 in values:
            raise UsageError(f"{name} {text!r}: 0 keeps every code and cannot end a ramp")
        first, last = (_setting(name, value) for value in values)
        ramp = (first + (last - first) * k / max(scales - 1, 1) for k in range(scales))
        setting = tuple(round(value) for value in ramp) if name == "top_k" else tuple(ramp)
    sampling = Sampling(**{name: setting})
    sampling.check(scales)
    return getattr(sampling, name)


def _read(name: str, part: str, text: str) -> float:
    kind = int if name == "top_k" else float
    try:
        return kind(part)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(
            f"{name} {text!r} is not {what}, a ramp such as 1:4, or one value per scale such as "
            "0,1,2"
        ) from None


def _text(value: float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    if isinstance(value, int):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def check_seed(seed: object) -> int:
    """Return the seed as an int in 0 … 2⁶⁴-1. Raises UsageError for anything else."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise UsageError(f"seed must be a whole number, found {seed!r}")
    if not 0 <= int(seed) <= MAX_SEED:
        raise UsageError(f"seed must lie between 0 and 2**64 - 1, found {seed}")
    return int(seed)


def parse_seeds(text: str) -> list[int]:
    """Parse seeds between commas. Raises UsageError for one that `check_seed` refuses."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"seed {text!r} is not a whole number, or several such as 1,2,3") from None
    return [check_seed(seed) for seed in seeds]


def image_seeds(seed: int | Sequence[int], count: int | None = None) -> list[int]:
    """The seed of each of the `count` images of a call: generate, edit or vary.

    One seed counts up, so image i has seed + i and can be made again by a call of its own. Several
    seeds are one per image. Without `count` there are as many images as seeds.

    Raises UsageError for a seed that `check_seed` refuses, for a series that runs past the last
    seed, and for several seeds that are not one per image.
    """
    if _several(seed):
        if not len(seed):
            raise UsageError("seed is empty: give one number, or one per image")
        if count not in (None, len(seed)):
            raise UsageError(
                f"{_count(len(seed), 'seed')} for {_count(count or 0, 'image')}: give one, which "
                "counts up, or one per image"
            )
        return [check_seed(one) for one in seed]
    first, wanted = check_seed(seed), 1 if count is None else count
    if first + wanted - 1 > MAX_SEED:
        raise UsageError(
            f"image i of a call has seed + i, and the last seed is 2**64 - 1: {wanted} images "
            f"from seed {first} on are too many"
        )
    return list(range(first, first + wanted))


def _several(seed: object) -> TypeGuard[Sequence[int]]:
    """Whether it is a list of seeds, rather than one, or what was meant as one."""
    return isinstance(seed, (Sequence, np.ndarray)) and not isinstance(seed, str)


def series(
    labels: Sequence[Label],
    seed: int | Sequence[int],
    count: int | None = None,
    *,
    what: str = "label",
) -> tuple[list[Label], list[int]]:
    """The label (or prompt) and the seed of each image of a call: generate, edit or vary.

    Labels are taken in their order, again and again up to `count`; for the seeds see `image_seeds`.
    Without `count` there is one image per label or one per seed, whichever are more. `what` is what
    a message calls them.

    Raises LabelError for a count that would leave labels out, and UsageError for one below 1, for
    an empty list, and as `image_seeds`.
    """
    if not labels:
        instead = ", or leave them out" if what == "label" else ""
        raise LabelError(f"no {what} given: name some{instead}")
    seeds = len(seed) if _several(seed) else 1
    if count is None:
        count = max(len(labels), seeds)
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
        raise UsageError(f"count must be a whole number above 0, found {count!r}")
    if count < len(labels):
        raise LabelError(
            f"{_count(len(labels), what)} for {_count(count, 'image')}: give a count of "
            f"{len(labels)} or more, or fewer {what}s"
        )
    return [labels[n % len(labels)] for n in range(count)], image_seeds(seed, count)


def call_keys(seed: int | Sequence[int], count: int | None = None) -> list[tuple[int, int]]:
    """(seed, number) of the uniforms of each image of a call: number 0 of its seed.

    Raises UsageError as `image_seeds`.
    """
    return [(one, 0) for one in image_seeds(seed, count)]


def uniforms(seed: int, image: int, tokens: int) -> NDArray[np.float32]:
    """Return [tokens] numbers in [0, 1) for the image with this seed and number.

    Philox4x64 (Salmon et al., SC 2011) keyed by (seed, image). The top 24 bits are used, so every
    number is exact in fp32 and none rounds up to 1.
    """
    bits = np.random.Philox(key=np.array([seed, image], np.uint64)).random_raw(tokens)
    drawn: NDArray[np.float32] = (bits >> np.uint64(40)).astype(np.float32)
    drawn *= np.float32(2.0**-24)
    return drawn


def stack_uniforms(streams: Iterable[tuple[int, int]], tokens: int) -> NDArray[np.float32]:
    """Return [N, tokens] numbers: the `uniforms` of each (seed, image number)."""
    return np.stack([uniforms(seed, image, tokens) for seed, image in streams])


def numbered(seed: int, first: int, count: int) -> list[tuple[int, int]]:
    """(seed, number) of the images `first` … `first + count - 1` of a set, which has one seed."""
    return [(seed, image) for image in range(first, first + count)]


def smoothing(scale: int, scales: int) -> tuple[float, float]:
    """Return (factor, tau) of "more smooth" sampling at `scale` out of `scales`.

    In place of the code of the token that was drawn, softmax((logits · factor + gumbel) / tau) ·
    codebook is what the scale adds to f_hat. The logits are those that the token is drawn from:
    guided, over the temperature, and only what top-k and top-p left. As published with VAR
    (arXiv 2404.02905, `more_smooth` of its code), with r = k/(K-1): factor = 1 + r and
    tau = max(0.27 · (1 - 0.95 · r), 0.005). A single scale counts as the last, as in `guidance`.

    A token that is given instead of drawn adds its own code; tokens tell nothing of a mix, so the
    tokens of such an image decode to another one, with the same things in it.
    """
    way = scale / (scales - 1) if scales > 1 else 1.0
    return 1 + way, max(0.27 * (1 - 0.95 * way), 0.005)


def gumbel(seed: int, image: int, tokens: int, codes: int) -> NDArray[np.float32]:
    """Return [tokens, codes] numbers of the Gumbel distribution, -ln(-ln u), for the image with
    this seed and number.

    From the Philox stream of `uniforms`, at the count 2¹⁹², so that the tokens drawn are the same
    with it and without. u is the middle of one of 2²³ equal parts of (0, 1), exact in fp32.
    """
    count = tokens * codes
    stream = np.random.Philox(key=np.array([seed, image], np.uint64), counter=[0, 0, 0, 1])
    bits = stream.random_raw((count + 1) // 2)
    halves = bits.astype("<u8", copy=False).view("<u4")[:count]
    u = (halves >> np.uint32(9)).astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-23)
    for _ in range(2):
        np.log(u, out=u)
        np.negative(u, out=u)
    noise: NDArray[np.float32] = u.reshape(tokens, codes)
    return noise
