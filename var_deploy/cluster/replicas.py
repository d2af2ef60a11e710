"""How many replicas of the service draw."""

from __future__ import annotations

from dataclasses import dataclass

from var_deploy.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """As many as there is work for, between two numbers."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """Of "3" or "1:4". Raises UsageError."""
        least, colon, most = text.partition(":")
        numbers = [int(part) for part in (least, most if colon else least) if part.isdecimal()]
        if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
            raise UsageError(
                "--replicas takes a number from 1 on, or the least and the most as in 1:4, found "
                f"{text!r}"
            )
        return cls(least=numbers[0], most=numbers[1])
