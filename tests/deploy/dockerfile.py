"""Reads deploy/Dockerfile: its stages, with continued lines joined and comments left out."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One instruction: RUN, COPY, …; `options` are what starts with -- before its text."""

    keyword: str
    options: tuple[str, ...]
    text: str

    def words(self) -> list[str]:
        """The exec form, or words as a shell splits them."""
        found: list[str] = (
            json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)
        )
        return found

    def mounts(self) -> Iterator[dict[str, str]]:
        """The bind mounts of a RUN: source, target and perhaps from."""
        for option in self.options:
            if option.startswith("--mount="):
                pairs = option.removeprefix("--mount=").split(",")
                yield dict(pair.split("=", 1) for pair in pairs)


@dataclass(kw_only=True)
class Stage:
    """What stands between two FROM."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)

    def of(self, keyword: str) -> list[Step]:
        return [step for step in self.steps if step.keyword == keyword]

    def last(self, keyword: str) -> Step:
        return self.of(keyword)[-1]

    def env(self) -> dict[str, str]:
        return dict(word.split("=", 1) for step in self.of("ENV") for word in step.words())

    def labels(self) -> dict[str, str]:
        return dict(word.split("=", 1) for step in self.of("LABEL") for word in step.words())

    def healthcheck(self) -> list[str]:
        """The command, in exec form."""
        return Step(
            keyword="CMD",
            options=(),
            text=self.last("HEALTHCHECK").text.removeprefix("CMD").strip(),
        ).words()


def read_stages() -> dict[str, Stage]:
    """All stages by name, the global ARGs put into their FROM."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.M)
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage = None
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line.strip():
            continue
        step = _step(line)
        if step.keyword == "FROM":
            base, _, name = step.words()
            stage = stages[name] = Stage(
                name=name, base=re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], base)
            )
        elif stage is None:
            assert step.keyword == "ARG", line
            key, _, value = step.text.partition("=")
            arguments[key] = value
        else:
            stage.steps.append(step)
    return stages


def _step(line: str) -> Step:
    keyword, _, rest = line.strip().partition(" ")
    options = []
    while (rest := rest.strip()).startswith("--"):
        option, _, rest = rest.partition(" ")
        options.append(option)
    return Step(keyword=keyword, options=tuple(options), text=rest)
