"""A student's model card: what it was made of and how, what it is worth, how it is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from okd.methods import Method
from okd.report import format_table

TAGS = ("okd-kernels", "knowledge-distillation")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")

CARD = """---
{metadata}
---

# {name}

A language model distilled{teacher} with `okd-kernels`, method `{method}`: {summary}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"){adapter}
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
{figures}
## Options

`okd train --config FILE`, with paths cut to their last part:

```yaml
{options}
```
"""

FIGURES = """
## On held-out examples, before and after

```text
{table}
```

After {steps:,} steps; seed {seed}; {versions}.
"""


def model_card(
    method: Method,
    options: Mapping[str, Any],
    name: str,
    figures: Mapping[str, Any] | None = None,
    is_adapter: bool = False,
    tags: str | list[str] | None = None,
    **metadata: Any,
) -> str:
    """README.md of a student's repository.

    options: as config.yaml has them. figures: those of metrics.json. metadata: of `huggingface_hub.ModelCardData`, such
    as license, in place of what the options say.
    """
    options = {key: _without_folders(value) for key, value in options.items() if key != "output_dir"}
    student = options.get("student") or options.get("teacher")
    teachers = [options["teacher"]] if options.get("teacher") else options.get("teachers") or []
    data = [re.split("[@:]", source)[0] for source in options.get("train_data") or [] if isinstance(source, str)]
    found = {
        "base_model": student if is_hub_id(student) else None,
        "datasets": [source for source in data if is_hub_id(source)] or None,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    given = [tags] if isinstance(tags, str) else tags or []
    header = ModelCardData(**{**found, **metadata}, tags=[*dict.fromkeys([*TAGS, method.name, *given])])
    table = ""
    if figures is not None:
        versions = ", ".join(f"{package} {version}" for package, version in figures["versions"].items())
        table = FIGURES.format(
            table=format_table(figures["before"], figures["after"]),
            **{"steps": figures["steps"], "seed": figures["seed"], "versions": versions},
        )
    return CARD.format(
        metadata=header.to_yaml().strip(),
        name=name,
        method=method.name,
        summary=ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", method.summary),
        teacher=f" from {' and '.join(f'`{teacher}`' for teacher in teachers)}" if teachers else "",
        adapter="  # an adapter: wants peft" if is_adapter else "",
        figures=table,
        options=yaml.safe_dump(options, sort_keys=False).strip(),
    )


def is_hub_id(source: Any) -> bool:
    """Rather than a place on this machine."""
    return isinstance(source, str) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not Path(source).exists()


def _without_folders(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists()) else value
