"""Recipe: which modules get which weights, by pattern of their path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from fastinfer.errors import RecipeError
from fastinfer.ops.int4_matmul import GROUP_SIZES
from fastinfer.quantize.int4 import METHODS

WEIGHTS = ("keep", "int8", "int4")
ACTIVATIONS = ("keep", "int8")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a matching linear becomes.

    weights:     "keep" | "int8" | "int4"
    group_size:  32 | 64 | 128, int4 only; None: 64, or 32 where 64 does not divide K, else int8 (the report says so)
    method:      "hqq" (the default) | "rtn", int4 only
    activations: "keep" | "int8" (int8 weights only); None: by the kind of model
    """

    weights: str = "int8"
    group_size: int | None = None
    method: str | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("weights", self.weights, WEIGHTS),
            ("group_size", self.group_size, (None, *GROUP_SIZES)),
            ("method", self.method, (None, *METHODS)),
            ("activations", self.activations, (None, *ACTIVATIONS)),
        ):
            if value not in known:
                raise RecipeError(f"{name} must be one of {known}, got {value!r}")
        for name, value, needs in (
            ("group_size", self.group_size, "int4"),
            ("method", self.method, "int4"),
            ("activations", self.activations, "int8"),
        ):
            if value is not None and self.weights != needs and (name, value) != ("activations", "keep"):
                raise RecipeError(f"{name}={value!r} needs weights={needs!r}, got weights={self.weights!r}")


class Recipe:
    """Patterns of module paths to what the linears they match become; the first pattern that matches counts.

    A pattern is a shell-style glob over the whole dotted path ("*.mlp.*", "lm_head"). A value is "keep", "int8",
    "int4", a dict of Spec's fields, or a Spec. Linears that no pattern matches are kept. A weight that several modules
    share goes by all their paths.

    Raises: RecipeError for anything else.

    >>> Recipe({"lm_head": "int8", "*.mlp.*": {"weights": "int4", "group_size": 32}, "*": "int8"})
    """

    def __init__(self, patterns: Mapping[str, str | Mapping[str, Any] | Spec]):
        if not isinstance(patterns, Mapping) or not patterns:
            raise RecipeError(f"a Recipe takes a non-empty mapping of path patterns, got {patterns!r}")
        self.patterns = {self._pattern(p): self._spec(p, value) for p, value in patterns.items()}

    @staticmethod
    def _pattern(pattern: object) -> str:
        if not isinstance(pattern, str) or not pattern:
            raise RecipeError(f"a pattern must be a non-empty string, got {pattern!r}")
        return pattern

    @staticmethod
    def _spec(pattern: str, value: object) -> Spec:
        try:
            if isinstance(value, Spec):
                return value
            if isinstance(value, str):
                return Spec(value)
            return Spec(**value)  # type: ignore[arg-type]
        except (RecipeError, TypeError) as error:
            raise RecipeError(f"pattern {pattern!r}: {error}") from None

    @classmethod
    def of(cls, weights: str | Mapping | Recipe, **fields: Any) -> Recipe:
        """The recipe that `patch`'s arguments stand for; `fields` (of Spec, None where not given) go with a string."""
        given = {name: value for name, value in fields.items() if value is not None}
        if isinstance(weights, str):
            return cls({"*": Spec(weights, **given)})
        if given:
            raise RecipeError(f"{', '.join(given)}: give these inside the recipe, a pattern at a time")
        return weights if isinstance(weights, Recipe) else cls(weights)

    def match(self, paths: Iterable[str]) -> tuple[str, Spec] | None:
        """The first pattern that matches one of the paths a module has, with its spec."""
        paths = list(paths)
        for pattern, spec in self.patterns.items():
            if any(fnmatchcase(path, pattern) for path in paths):
                return pattern, spec
        return None

    def __repr__(self) -> str:
        return f"Recipe({self.patterns!r})"
