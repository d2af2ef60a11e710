"""The number of replicas of the service."""

from __future__ import annotations

from dataclasses import dataclass

from var_deploy.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """The least and the most replicas; Ray Serve scales between them with the load."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """Parse "3" or "1:4". Raises UsageError for other texts."""
        least, colon, most = text.partition(":")
        numbers = [int(part) for part in (least, most if colon else least) if part.isdecimal()]
        if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
            raise UsageError(
                "--replicas takes a number from 1 on, or the least and the most as in 1:4, found "
                f"{text!r}"
            )
        return cls(least=numbers[0], most=numbers[1])
