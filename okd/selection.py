"""Which of several teachers teaches an example: one module for each answer, named in `SELECTIONS`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

SELECTIONS: Mapping[str, type[nn.Module]] = {}
