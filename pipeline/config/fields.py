"""Types of single settings, with their limits."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


def _parse_fraction(value: Any) -> Any:
    if isinstance(value, str) and "/" in value:
        numerator, _, denominator = value.partition("/")
        if numerator.strip().isdigit() and denominator.strip().isdigit() and int(denominator):
            value = Fraction(int(numerator), int(denominator))
    elif isinstance(value, float):
        value = Fraction(value).limit_denominator(1000)  # 0.3333 means one third
    if isinstance(value, Fraction) and not 0 < value <= 1:
        raise ValueError("a fraction of the layers must be in (0, 1]")
    return value


LayerCount = Annotated[PositiveInt | Annotated[Fraction, PlainSerializer(str)] | None, BeforeValidator(_parse_fraction)]

# A path or a URL; a Path would drop one of the slashes in `s3://bucket`.
Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
