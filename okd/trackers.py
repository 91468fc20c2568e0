"""Figures before and after a training, for the trackers that `report_to` names and `Trainer` writes the log to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_reporting_integration_callbacks


def check_trackers(names: Any) -> None:
    """Raise ValueError for one that transformers does not know, ImportError for one that is not installed."""
    for name in names:
        (tracker,) = get_reporting_integration_callbacks(name)
        try:
            tracker()
        except (ImportError, RuntimeError) as error:
            raise ImportError(f"expected report_to to name what is installed; got {name}: {error}") from error


def send(trainer: Any, when: str, figures: Mapping[str, Any], step: int) -> None:
    """As `eval/<when>/...`, where the trackers' own names for figures of held-out examples are `eval/...`.

    To the trackers alone: neither to log.jsonl nor to `log_history`. While they are open: in the training.
    """
    state = copy.copy(trainer.state)
    state.global_step = step
    logs = {f"eval_{when}/{name}": value for name, value in figures.items() if isinstance(value, int | float)}
    kinds: Any = tuple(INTEGRATION_TO_CALLBACK.values())
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, kinds):
            callback.on_log(trainer.args, state, trainer.control, model=trainer.pair, logs=dict(logs))
