"""A loss that is not finite ends its run: the ids of those examples are written down, and an error names the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NON_FINITE = "non_finite_batch_"  # begins the names of these files in a run's directory


def stop(step: int, output_dir: str, losses: Sequence[tuple[list[str], Any]], finite: Sequence[bool]) -> None:
    """Raise FloatingPointError for the micro-batches whose loss is not finite; their ids are written first."""
    bad = [pair for pair, good in zip(losses, finite, strict=True) if not good]
    path = Path(output_dir) / f"{NON_FINITE}{step}.json"
    if bad:  # else those of another rank
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": step, "ids": [name for names, _ in bad for name in names]}, indent=2))
    _, loss = (bad or losses)[0]
    teacher = "none" if loss.teacher is None else f"{loss.teacher.item():.4g}"
    raise FloatingPointError(
        f"step {step}: expected a finite loss; got student {loss.student.item():.4g}, teacher {teacher}. {path} names "
        "the examples of its batch: look at them, or lower learning_rate or max_grad_norm"
    )
