"""Options that stand beside the code that reads them: how one is declared, checked, and found again by its readers.

A group is a dataclass of options; `okd.config.OKDConfig` inherits all groups. A part of a method (a loss, a sampling
policy, a selection) names the groups that it reads with `@reads(Group)`, so that an option which the chosen method
would ignore can be refused, with the names of the methods that take it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

Part = TypeVar("Part", bound=Callable)


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float = math.inf,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with its help on the command line, and what `check` holds its value to."""
    text = Help(help)
    text.least, text.above, text.most, text.choices = least, above, most, choices
    return dataclasses.field(default=default, metadata={"help": text})


class Help(str):
    """What an option is, and its limits: in one, since HfArgumentParser gives all metadata of a field to argparse."""

    least: float | None
    above: float | None
    most: float
    choices: tuple[str, ...] | None


def check(options: Any) -> None:
    """Raise ValueError for a value out of its range. None is always allowed: it leaves the choice to the method."""
    for field in dataclasses.fields(options):
        value, limits = getattr(options, field.name), field.metadata.get("help")
        if value is None or not isinstance(limits, Help):
            continue
        if limits.choices is not None and value not in limits.choices:
            raise ValueError(f"expected {field.name} to be one of {', '.join(limits.choices)}; got {value!r}")
        least, above, most = limits.least, limits.above, limits.most
        if least is None and above is None:
            continue
        low = above < value if above is not None else least is None or least <= value
        if not (low and value <= most and value < math.inf):
            bound = f"at least {least}" if above is None else f"above {above}"
            bound += f" and at most {most}" if most < math.inf else ", and finite"
            raise ValueError(f"expected {field.name} to be {bound}; got {value}")


def reads(*groups: type) -> Callable[[Part], Part]:
    """Declare the groups of options that a part of a method reads."""

    def declare(part: Part) -> Part:
        part.reads = frozenset(groups)  # type: ignore[attr-defined]
        return part

    return declare


def groups_of(*parts: Any) -> frozenset[type]:
    """The groups that these parts read; a part that declares none reads none."""
    return frozenset().union(*(getattr(part, "reads", ()) for part in parts))
