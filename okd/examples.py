"""Examples -> rows: read, split, tokenise with a response mask.

A mask that is off by one still trains, only worse. So masks are cut from the rendered text, never searched for among
token ids, and every example that is shortened, changed or left out is counted and named.

An example is a dict of one of three shapes, with an optional "id":
    {"messages": [{"role", "content"}, ...]}     {"prompt": str, "completion": str}     {"text": str}
It may name the one of several teachers that teaches it, "teacher": str, and what its teacher reads in place of the
prompt, "teacher_prompt": str or messages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils import logging

from okd.chat import IGNORE, Template, has_strings, is_turn
from okd.data import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)


def read_jsonl(path: str | Path, completions: bool = True) -> list[dict[str, Any]]:
    """The examples of a JSON lines file, each with a string `id`: its own, else "<file name>:<line number>".

    Blank lines are skipped. A line that holds no example becomes {"id", "bad": why}, which `encode` counts. Without
    `completions` an example may be a prompt, or messages, without a response: a dash stands in. Raises
    FileNotFoundError, or ValueError for a file without examples.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSON lines file, got no file of that name; check the path")
    examples = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        name = f"{path.name}:{number}"
        try:
            example = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            got = _excerpt(line.decode(errors="replace"))
            examples.append({"id": name, "bad": f"expected a JSON object, got {got} ({error}); correct it"})
            continue
        if not completions:
            example = _with_answer(example)
        try:
            _shape(example)
        except ValueError as error:
            examples.append({"id": name, "bad": str(error)})
            continue
        examples.append({**example, "id": _id(example, default=name)})
    if not examples:
        raise ValueError(f"{path}: expected at least one example, got an empty file; write one JSON object on a line")
    return examples


def _with_answer(example: Any) -> Any:
    if has_strings(example, "prompt") and example.get("completion") is None:
        return {**example, "completion": "-"}
    messages = example.get("messages") if isinstance(example, Mapping) else None
    if isinstance(messages, list) and all(has_strings(m, "role") and m["role"] != "assistant" for m in messages):
        return {**example, "messages": [*messages, {"role": "assistant", "content": "-"}]}
    return example


def split_by_hash(examples: Iterable[dict[str, Any]], held_out: float = 0.1) -> tuple[list[dict], list[dict]]:
    """(train, held_out): an example is held out if the sha256 of its prompt, as a fraction of its range, is below
    `held_out`.

    The prompt is what comes before the first response; of plain text and of rows, all of it. So one prompt never lies
    on both sides, and an example stays on its side whatever else is added, and stays held out when the fraction grows.
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"expected held_out to be a fraction in [0, 1], got {held_out}; pass 0.1 for a tenth")
    sides: tuple[list[dict], list[dict]] = ([], [])
    for example in examples:
        digest = hashlib.sha256(_prompt(example).encode(errors="surrogatepass")).digest()
        sides[int.from_bytes(digest, "big") / 2**256 < held_out].append(example)
    return sides


def _prompt(example: Any) -> str:
    if not isinstance(example, Mapping):  # none, as `encode` will say
        return str(example)
    messages = example.get("messages")
    if isinstance(messages, list) and all(map(is_turn, messages)):
        before = []
        for message in messages:
            if message["role"] == "assistant":
                break
            before.append([message["role"], message.get("content")])
        return json.dumps(before)
    keys = ("prompt", "text", "input_ids", "id")
    return str(next((example[key] for key in keys if example.get(key) is not None), ""))


@dataclass
class Encoded:
    """What `encode` made of its examples: the rows, and the ids of those it shortened, left out, or changed."""

    rows: list[Row] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)  # ids of rows cut to max_length
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> ids of examples without a response
    bad: dict[str, list[str]] = field(default_factory=dict)  # reason -> ids of examples that are none
    notes: dict[str, list[str]] = field(default_factory=dict)  # what was done to examples -> their ids

    def summary(self) -> str:
        """One line for the log: "3 examples, 40 tokens (12 response); truncated 1; skipped 1 for a reason (its id)"."""
        tokens = sum(len(row["labels"]) for row in self.rows)
        response = sum(label != IGNORE for row in self.rows for label in row["labels"])
        parts = [f"{len(self.rows):,} examples, {tokens:,} tokens ({response:,} response)"]
        if self.truncated:
            parts.append(f"truncated {len(self.truncated):,}")
        bad = list(self.bad.items())
        parts += [f"skipped {_counted(ids)}: {reason}" for reason, ids in bad[:5]]
        if len(bad) > 5:  # a reason quotes the example, so there may be as many
            parts.append(f"skipped {sum(len(ids) for _, ids in bad[5:]):,} for other reasons")
        parts += [f"skipped {_counted(ids, reason)}" for reason, ids in self.skipped.items()]
        parts += [_counted(ids, note) for note, ids in self.notes.items()]
        return "; ".join(parts)


def _counted(ids: Sequence[str], reason: str = "") -> str:
    return f"{len(ids):,}{reason and ' '}{reason} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"


def encode(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    ends: Collection[int] = (),
    max_bad_share: float = 0.01,
) -> Encoded:
    """Rows whose labels equal input_ids on response tokens and -100 elsewhere, cut on the right to max_length.

    chat_template
        True   "messages" and "prompt" + "completion" are rendered with the tokenizer's chat template; which tokens are
               responses, `okd.chat` says
        False  [bos] + prompt + completion + eos; the response is completion + eos
        None   True if the tokenizer has a chat template, else False
    template_kwargs: variables of the template. `ends`: ids that end a response at generation, beside the tokenizer's.
    "text" is never rendered: [bos] + text + eos is all response. Rows pass through, under the same rules.

    An example that cannot be encoded is left out, and counted by reason. Raises ValueError if more than `max_bad_share`
    of them are, or if none has a response token.
    """
    template = _template(tokenizer, chat_template, ends, template_kwargs)
    encoded, seen = Encoded(), 0
    for seen, example in enumerate(examples, start=1):
        name = _id(example, default=f"#{seen - 1}")
        try:
            rows, notes = _encode_one(example, tokenizer, template)
            teacher_prompt = _teacher_prompt(example, [labels for _, labels in rows], tokenizer, template)
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            encoded.bad.setdefault(str(error), []).append(name)
            continue
        for note in dict.fromkeys(notes):
            encoded.notes.setdefault(note, []).append(name)
        for i, (ids, labels) in enumerate(rows, start=1):
            row = _row(encoded, name if len(rows) == 1 else f"{name}#{i}", ids, labels, max_length)
            if row is not None and example.get("teacher") is not None:
                row["teacher"] = str(example["teacher"])
            if row is not None and teacher_prompt is not None:
                row["teacher_prompt"] = teacher_prompt
    bad = sum(map(len, encoded.bad.values()))
    if bad > max_bad_share * seen:
        reasons = "; ".join(f"{reason} ({', '.join(ids[:5])})" for reason, ids in list(encoded.bad.items())[:5])
        raise ValueError(
            f"expected at most {100 * max_bad_share:.1f} % of the examples to be none; got {bad:,} of {seen:,}: "
            f"{reasons}. Correct them, or raise max_bad_share"
        )
    if not encoded.rows:
        raise ValueError(
            f"expected at least one example with a response token, got {encoded.summary()}; "
            'raise max_length, or see that the data has completions or messages of role "assistant"'
        )
    return encoded


def _row(encoded: Encoded, name: str, input_ids: list[int], labels: list[int], max_length: int) -> Row | None:
    """Add a row, cut to max_length; None where it has no response token then."""
    cut = len(input_ids) > max_length
    input_ids, labels = input_ids[:max_length], labels[:max_length]
    labels[:1] = [IGNORE]  # no position comes before the first token to predict it
    if all(label == IGNORE for label in labels):
        reason = f"without response token in the first {max_length:,}" if cut else "without response token"
        encoded.skipped.setdefault(reason, []).append(name)
        return None
    if cut:
        encoded.truncated.append(name)
    row: Row = {"id": name, "input_ids": input_ids, "labels": labels}
    encoded.rows.append(row)
    return row


def _template(
    tokenizer: PreTrainedTokenizerBase, wanted: bool | None, ends: Collection[int], kwargs: Mapping[str, Any] | None
) -> Template | None:
    """The tokenizer's chat template, where it is to be used. Raises ValueError where it cannot be."""
    if wanted and not tokenizer.chat_template:
        raise ValueError(
            "expected a tokenizer with a chat template because of chat_template=True, got one without; "
            "set tokenizer.chat_template, or pass chat_template=False for raw text"
        )
    if not (bool(tokenizer.chat_template) if wanted is None else wanted):
        return None
    if not tokenizer.is_fast:
        raise ValueError(
            f"expected a fast tokenizer, whose character offsets cut the mask, got {type(tokenizer).__name__}; "
            "load one with AutoTokenizer.from_pretrained"
        )
    return Template(tokenizer, ends, kwargs)


Tokens = tuple[list[int], list[int]]  # input_ids and labels


def _encode_one(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template | None
) -> tuple[list[Tokens], list[str]]:
    """Rows of one example, at full length, and what is to be said of it."""
    if isinstance(example, Mapping) and example.get("input_ids") is not None:
        input_ids, labels = ([int(i) for i in example.get(key, ())] for key in ("input_ids", "labels"))
        if len(input_ids) != len(labels):
            raise ValueError(
                f"expected a label for each of {len(input_ids)} tokens, got {len(labels)}; use -100 for none"
            )
        return [(input_ids, labels)], []
    if isinstance(example, Mapping) and set(example) == {"id", "bad"}:
        raise ValueError(str(example["bad"]))
    shape = _shape(example)
    if shape == "text":
        return [_encode_raw("", example["text"], tokenizer)], []
    if template is None and shape == "messages":
        raise ValueError(
            'expected a chat template for "messages", got a tokenizer without one or chat_template=False; '
            'set tokenizer.chat_template, or write "prompt" and "completion"'
        )
    if template is None:
        return [_encode_raw(example["prompt"], example["completion"], tokenizer)], []
    turns: Any = example.get("messages") or [
        {"role": "user", "content": example["prompt"]},
        {"role": "assistant", "content": example["completion"]},
    ]
    rendered = template.encode(turns, example.get("tools"))
    return rendered.rows or [([], [])], rendered.notes


def _teacher_prompt(
    example: Mapping[str, Any], rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, template: Template | None
) -> list[int] | None:
    """What the teacher reads before the response: text, messages, or (of a row) ids. None: what the student does."""
    given = example.get("teacher_prompt")
    if given is None:
        return None
    labels = [label for row in rows for label in (IGNORE, *row)]
    if sum(label != IGNORE and labels[i - 1] == IGNORE for i, label in enumerate(labels)) > 1:
        raise ValueError(
            "expected one response with teacher_prompt, which stands in place of all before it; got several: split the "
            "conversation into one example for each turn"
        )
    if isinstance(given, str) and template is None:
        first = tokenizer("a")["input_ids"][:1]
        bos = first if first == [tokenizer.bos_token_id] else []
        return bos + tokenizer(given, add_special_tokens=False)["input_ids"]
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if isinstance(given, list) and all(isinstance(token, int) for token in given):
        return list(given)
    if template is None or not isinstance(given, list) or not all(map(is_turn, given)):
        raise ValueError(
            f"expected teacher_prompt as a string, or messages where there is a chat template; got {_excerpt(given)}"
        )
    return template.prompt(given, example.get("tools"))


def _encode_raw(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """[bos] + prompt + response + eos. The two are tokenised apart, so that no token lies across their boundary; but
    where a tokenizer puts a space before each text (SentencePiece), they are cut from the joined text."""
    if tokenizer.eos_token_id is None:
        raise ValueError("expected an eos token to end the response with, got none; set tokenizer.eos_token")
    first = tokenizer("a")["input_ids"][:1]
    context = first if first == [tokenizer.bos_token_id] else []  # bos, where this tokenizer puts one
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    if prompt and tokenizer.is_fast and "".join(pieces).startswith("\u2581"):
        joined = tokenizer(prompt + response, add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = joined["input_ids"], [end for _, end in joined["offset_mapping"]]
        # a token across the boundary is response: "x " and "y" are one piece, " y", and the completion keeps it
        labels = [token if end > len(prompt) else IGNORE for token, end in zip(ids, ends, strict=True)]
        end = [tokenizer.eos_token_id]
        return context + ids + end, [IGNORE] * len(context) + labels + end
    context = context + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return context + answer, [IGNORE] * len(context) + answer


def _shape(example: Mapping[str, Any]) -> str:
    """Which of "messages", "prompt" (with "completion") and "text" the example has. Raises ValueError if none."""
    expected = 'expected {"messages": [...]}, {"prompt": string, "completion": string} or {"text": string}'
    if not isinstance(example, Mapping):
        raise ValueError(f"{expected}, got {_excerpt(example)}; write an object")
    messages = example.get("messages")
    if messages is not None:
        is_list = isinstance(messages, list) and len(messages) > 0
        broken = [m for m in messages if not is_turn(m)] if is_list else [messages]
        if broken:
            raise ValueError(
                'expected "messages" to be a list of {"role": string, "content": string} (or null beside tool_calls), '
                f"got {_excerpt(broken[0])}; correct or remove it"
            )
        return "messages"
    if has_strings(example, "prompt", "completion"):
        return "prompt"
    if has_strings(example, "text"):
        return "text"
    raise ValueError(f"{expected}, got {_excerpt(dict(example))}; rename the fields, or make them strings")


def _id(example: Mapping[str, Any], default: str) -> str:
    given = example.get("id") if isinstance(example, Mapping) else None
    return default if given is None else str(given)


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def encoded_rows(data: Any, tokenizer: Any, options: Any, ends: Collection[int] = ()) -> Any:
    """Encoded rows, by an `OKDConfig`: a list, or of a mapping one of lists."""
    if data is None:
        return None
    if isinstance(data, Mapping):
        return {name: encoded_rows(part, tokenizer, options, ends) for name, part in data.items()}
    if isinstance(data, Encoded):
        return data.rows
    encoded = encode(data, tokenizer, ends=ends, **encoding_options(options))
    said = encoded.truncated or encoded.skipped or encoded.bad or encoded.notes
    logger.log(logging.WARNING if said else logging.INFO, encoded.summary())
    return encoded.rows


def encoding_options(options: Any) -> dict[str, Any]:
    """What `encode` takes of an `OKDConfig`."""
    names = ("max_length", "chat_template", "template_kwargs", "max_bad_share")
    return {name: getattr(options, name) for name in names}
