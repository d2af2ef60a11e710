"""The settings that decide every byte of an image set, and the place of each image in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from var_deploy.config import AUTO, Loaded, RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.sampling import BitSampling, Sampling, check_seed

SHARD_SIZE = 256  # some 25 MB of 256 px images: soon written, and little is lost with one
MOST_IMAGES, MOST_SHARDS = 10**9, 10**6  # the digits of their names

TAR, PARQUET = "tar", "parquet"
FORMATS = (TAR, PARQUET)  # each is the suffix of its files
DECIDED = ("precision", "backend", "layout")  # "auto" until a pipeline decides
DECIDED_OF_TEXT = ("precision", "backend")  # those of the text encoder
MOST_LISTED = 1 << 16  # bytes of prompts that set.json holds; of more it holds their hash alone

# "FID-50K" of VAR (arXiv 2404.02905, README of its code)
FID_PER_CLASS = 50
FID_SAMPLING: Mapping[str, Any] = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "temperature": 1.0}


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """The prompts of a text-to-image set, and what turns them into features. Made by `of`.

    Attributes:
        count: number of prompts.
        sha256: hash of all prompts, as a JSON list in UTF-8 without spaces between its items.
        texts: the prompts in order; () where only their hash is known.
        negative: what all images are guided away from; "" for nothing.
        text_encoder: digest of the text encoder.
        precision, backend: those of the text encoder; "auto" until a pipeline decides.
    """

    count: int
    sha256: str
    texts: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    negative: str = ""
    text_encoder: str
    precision: str = AUTO
    backend: str = AUTO

    @classmethod
    def of(cls, texts: Sequence[str], negative: str, text_encoder: str) -> PromptSpec:
        """Return the settings of these prompts. Raises UsageError where there are none."""
        if not texts:
            raise UsageError("a set needs one prompt or more")
        listed = json.dumps(list(texts), ensure_ascii=False, separators=(",", ":"))
        return cls(
            count=len(texts),
            sha256=hashlib.sha256(listed.encode()).hexdigest(),
            texts=tuple(texts),
            negative=negative,
            text_encoder=text_encoder,
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, without the prompts where they have more than MOST_LISTED bytes."""
        data = dataclasses.asdict(self)
        if sum(len(text.encode()) for text in self.texts) > MOST_LISTED:
            data["texts"] = ()
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PromptSpec:
        """Parse the result of `to_json`. Raises TypeError, KeyError or ValueError for anything
        else."""
        parsed = cls(**{**data, "texts": tuple(data["texts"])})
        if parsed.texts and cls.of(parsed.texts, "", "").sha256 != parsed.sha256:
            raise ValueError("the prompts do not match their hash")
        return parsed


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """Settings of a set.

    Image n has label n mod classes and the random numbers of (seed, n), so that it does not depend
    on any other image, and each run of `classes` images has every class once. Prompts take turns in
    the same way.

    Attributes:
        bundle: digest of the bundle.
        precision, backend, layout: never "auto", since each rounds differently.
        classes: of the model; 0 where it has none, which counts as one class without a label.
        per_class: images of each class, or of each prompt, which set.json calls per_prompt.
        format: of the shards' files, one of `FORMATS`.
        prompts: those of a text-to-image model; None for a model of classes.

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
    prompts: PromptSpec | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("per_class", "shard_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                title = "per_prompt" if self.prompts and name == "per_class" else name
                raise UsageError(f"{title} must be a whole number above 0, found {value!r}")
        if self.format not in FORMATS:
            raise UsageError(f"format must be one of {', '.join(FORMATS)}, found {self.format!r}")
        if self.images > MOST_IMAGES or self.shards > MOST_SHARDS:
            raise UsageError(
                f"a set has at most {MOST_IMAGES:,} images in {MOST_SHARDS:,} shards, found "
                f"{self.images:,} in {self.shards:,}: ask for fewer images or larger shards"
            )

    @property
    def images(self) -> int:
        return self.per_class * (self.prompts.count if self.prompts else max(self.classes, 1))

    @property
    def shards(self) -> int:
        return math.ceil(self.images / self.shard_size)

    @property
    def negative(self) -> str:
        """The negative prompt, which all images are guided away from; "" for none."""
        return self.prompts.negative if self.prompts else ""

    def label(self, image: int) -> int | None:
        """Return the label of an image by its number; None where the model has no classes."""
        return image % self.classes if self.classes else None

    def prompt(self, image: int) -> str | None:
        """Return the prompt of an image by its number; None for a model without prompts.

        Raises UsageError where only the hash of the prompts is known.
        """
        if self.prompts is None:
            return None
        if not self.prompts.texts:
            raise UsageError("the set's prompts are not at hand, only their hash: give them again")
        return self.prompts.texts[image % self.prompts.count]

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

    def text_config(self, given: RuntimeConfig) -> RuntimeConfig | None:
        """Return `given` with the precision and backend of the set's text encoder; None where no
        pipeline has decided them yet."""
        if self.prompts is None or AUTO in (self.prompts.precision, self.prompts.backend):
            return None
        return dataclasses.replace(
            given, precision=self.prompts.precision, backend=self.prompts.backend
        )

    def complete(self, given: RuntimeConfig) -> RuntimeConfig:
        """Return `given` with those of this set where `given` leaves them open."""
        own = {name: getattr(self, name) for name in DECIDED if getattr(given, name) == AUTO}
        return dataclasses.replace(given, **own)

    def decided_by(self, how: Loaded) -> SetSpec:
        """Return the set with the precision, backend and layout of a loaded pipeline, and those of
        its text encoder."""
        prompts, text = self.prompts, how.text_encoder
        if prompts is not None and text is not None:
            prompts = dataclasses.replace(prompts, precision=text.precision, backend=text.backend)
        return dataclasses.replace(
            self,
            precision=how.precision,
            backend=how.backend,
            layout=how.layout,
            prompts=prompts,
        )

    def drawn_by(self, how: Loaded) -> bool:
        """Whether a loaded pipeline generates this set, as far as the set is decided."""
        pairs: list[tuple[Any, Any, tuple[str, ...]]] = [(self, how, DECIDED)]
        if self.prompts is not None:
            pairs.append((self.prompts, how.text_encoder, DECIDED_OF_TEXT))
        return all(
            getattr(mine, name) in (AUTO, getattr(found, name, None))
            for mine, found, names in pairs
            for name in names
        )

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        del data["prompts"]
        if self.prompts is None:
            return data
        # in the order of a set of classes
        titles = {"per_class": "per_prompt"}
        told = {titles.get(name, name): value for name, value in data.items() if name != "classes"}
        return {**told, "prompts": self.prompts.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SetSpec:
        """Parse the result of `to_json`. Raises TypeError, KeyError or UsageError for anything
        else."""
        if "prompts" not in data:
            return cls(**{**data, "sampling": Sampling(**data["sampling"])})
        rest = dict(data)
        return cls(
            classes=0,
            per_class=rest.pop("per_prompt"),
            sampling=BitSampling(**rest.pop("sampling")),
            prompts=PromptSpec.from_json(rest.pop("prompts")),
            **rest,
        )

    def differences(self, other: SetSpec) -> list[str]:
        """Return "seed is 1 and not 0" for every setting in which `other` differs from this set."""
        mine, others = self._texts(), other._texts()
        return [
            f"{name} is {others.get(name, 'none')} and not {mine[name]}"
            for name in mine
            if mine[name] != others.get(name)
        ]

    def _texts(self) -> dict[str, str]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        sampling = fields.pop("sampling").texts()
        fields["bundle"] = fields["bundle"][:12]
        prompts = fields.pop("prompts")
        if prompts is not None:
            del fields["classes"]
            fields["per_prompt"] = fields.pop("per_class")
            fields["prompts"] = f"{prompts.count} with the hash {prompts.sha256[:12]}"
            fields["negative"] = repr(prompts.negative)
            fields["text_encoder"] = prompts.text_encoder[:12]
            for name in DECIDED_OF_TEXT:
                fields[f"text_encoder's {name}"] = getattr(prompts, name)
        return {name.replace("_", " "): str(text) for name, text in {**fields, **sampling}.items()}
