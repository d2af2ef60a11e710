"""The settings that decide every byte of an image set, and the place of each image in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from var_deploy.config import AUTO, Loaded, RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.sampling import Sampling, check_seed

SHARD_SIZE = 256  # some 25 MB of 256 px images: soon written, and little is lost with one
MOST_IMAGES, MOST_SHARDS = 10**9, 10**6  # the digits of their names

TAR, PARQUET = "tar", "parquet"
FORMATS = (TAR, PARQUET)  # each is the suffix of its files
DECIDED = ("precision", "backend", "layout")  # "auto" until a pipeline decides

# "FID-50K" of VAR (arXiv 2404.02905, README of its code)
FID_PER_CLASS = 50
FID_SAMPLING: Mapping[str, Any] = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "temperature": 1.0}


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """Settings of a set.

    Image n has label n mod classes and the random numbers of (seed, n), so that it does not depend
    on any other image, and each run of `classes` images has every class once.

    Attributes:
        bundle: digest of the bundle.
        precision, backend, layout: never "auto", since each rounds differently.
        classes: of the model; 0 where it has none, which counts as one class without a label.
        format: of the shards' files, one of `FORMATS`.

    Raises UsageError for values out of range.
    """

    bundle: str
    precision: str
    backend: str
    layout: str
    sampling: Sampling
    seed: int
    classes: int
    per_class: int
    shard_size: int = SHARD_SIZE
    format: str = TAR

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("per_class", "shard_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} must be a whole number above 0, found {value!r}")
        if self.format not in FORMATS:
            raise UsageError(f"format must be one of {', '.join(FORMATS)}, found {self.format!r}")
        if self.images > MOST_IMAGES or self.shards > MOST_SHARDS:
            raise UsageError(
                f"a set has at most {MOST_IMAGES:,} images in {MOST_SHARDS:,} shards, found "
                f"{self.images:,} in {self.shards:,}: ask for fewer images or larger shards"
            )

    @property
    def images(self) -> int:
        return self.per_class * max(self.classes, 1)

    @property
    def shards(self) -> int:
        return math.ceil(self.images / self.shard_size)

    def label(self, image: int) -> int | None:
        """Return the label of an image by its number; None where the model has no classes."""
        return image % self.classes if self.classes else None

    def numbers(self, shard: int) -> range:
        """Return the numbers of the images of a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.images))

    def shard_file(self, shard: int) -> str:
        """Return a shard's file name: 000000.tar, for WebDataset's images/{000000..000195}.tar."""
        return f"{shard:06d}.{self.format}"

    def config(self, given: RuntimeConfig) -> RuntimeConfig:
        """Return `given` with the precision, backend and layout of this set."""
        return dataclasses.replace(
            given, precision=self.precision, backend=self.backend, layout=self.layout
        )

    def complete(self, given: RuntimeConfig) -> RuntimeConfig:
        """Return `given` with those of this set where `given` leaves them open."""
        own = {name: getattr(self, name) for name in DECIDED if getattr(given, name) == AUTO}
        return dataclasses.replace(given, **own)

    def decided_by(self, how: Loaded) -> SetSpec:
        """Return the set with the precision, backend and layout of a loaded pipeline."""
        return dataclasses.replace(
            self, precision=how.precision, backend=how.backend, layout=how.layout
        )

    def drawn_by(self, how: Loaded) -> bool:
        """Whether a loaded pipeline generates this set, as far as the set is decided."""
        return all(getattr(self, name) in (AUTO, getattr(how, name)) for name in DECIDED)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SetSpec:
        """Parse the result of `to_json`. Raises TypeError, KeyError or UsageError for anything
        else."""
        return cls(**{**data, "sampling": Sampling(**data["sampling"])})

    def differences(self, other: SetSpec) -> list[str]:
        """Return "seed is 1 and not 0" for every setting in which `other` differs from this set."""
        mine, others = self._texts(), other._texts()
        return [
            f"{name} is {others[name]} and not {mine[name]}"
            for name in mine
            if mine[name] != others[name]
        ]

    def _texts(self) -> dict[str, str]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        sampling = fields.pop("sampling").texts()
        fields["bundle"] = fields["bundle"][:12]
        return {name.replace("_", " "): str(text) for name, text in {**fields, **sampling}.items()}
