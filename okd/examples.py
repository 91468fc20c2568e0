"""Examples: reading them, splitting them, and the tokens of one with its response mask.

A mask that is off by one still trains, only worse. So masks are cut from the rendered text, never searched for among
token ids.

An example is a dict of one of three shapes, with an optional "id":
    {"messages": [{"role", "content"}, ...]}     {"prompt": str, "completion": str}     {"text": str}
It may name the one of several teachers that teaches it, "teacher": str, and what its teacher reads in place of the
prompt, "teacher_prompt": str or messages. Prompt and completion may be messages too, and turns {"from", "value"}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from okd.chat import IGNORE, Template, has_strings, is_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"human": "user", "gpt": "assistant", "function": "tool"}  # of turns with "from" and "value"


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
        example = parse(line.decode(errors="backslashreplace"), name)
        if not completions:
            example = _with_answer(example)
        try:
            if not _is_none(example):
                _shape(example)
            examples.append({**example, "id": id_of(example, default=name)})
        except ValueError as error:
            examples.append({"id": name, "bad": str(error)})
    if not examples:
        raise ValueError(f"{path}: expected at least one example, got an empty file; write one JSON object on a line")
    return examples


def parse(line: str, name: str) -> Any:
    """The example of a line of JSON; {"id": name, "bad": why} where there is none."""
    try:
        return json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        return {"id": name, "bad": f"expected a JSON object, got {_excerpt(line)} ({error}); correct it"}


def _is_none(example: Any) -> bool:
    return isinstance(example, Mapping) and set(example) == {"id", "bad"}


def _with_answer(example: Any) -> Any:
    if has_strings(example, "prompt") and example.get("completion") is None:
        return {**example, "completion": "-"}
    messages = example.get("messages") if isinstance(example, Mapping) else None
    if isinstance(messages, list) and all(has_strings(m, "role") and m["role"] != "assistant" for m in messages):
        return {**example, "messages": [*messages, {"role": "assistant", "content": "-"}]}
    return example


def place_of(example: Any) -> float:
    """In [0, 1), by the sha256 of the example's prompt alone: what comes before the first response; of plain text and
    of rows, all of it. Held out are the places below a share, so that one prompt never lies on both sides, and an
    example stays on its side whatever else is added.
    """
    return int.from_bytes(hashlib.sha256(_prompt(example).encode(errors="surrogatepass")).digest(), "big") / 2**256


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


def without_none(value: Any) -> Any:
    """Without the fields that Arrow adds to a row because others have them."""
    if isinstance(value, dict):
        return {key: without_none(x) for key, x in value.items() if x is not None}
    return [without_none(x) for x in value] if isinstance(value, list) else value


def in_our_words(example: dict[str, Any]) -> dict[str, Any]:
    """Messages of other common forms in ours: prompt and completion that are messages, turns with "from" and "value",
    and content in parts, all of them text."""
    prompt, completion = example.get("prompt"), example.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [{**turn, "train": False} if isinstance(turn, Mapping) else turn for turn in prompt]
        example = {**example, "messages": before + completion, "prompt": None, "completion": None}
    for name in ("messages", "teacher_prompt"):
        if isinstance(turns := example.get(name), list):
            example = {**example, name: [_turn(turn) for turn in turns]}
    return example


def _turn(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    if has_strings(turn, "from", "value") and "role" not in turn:
        turn = {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
    content = turn.get("content")
    if isinstance(content, list) and all(
        has_strings(part, "type", "text") and part["type"] == "text" for part in content
    ):
        turn = {**turn, "content": "".join(part["text"] for part in content)}
    return turn


def template_of(
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


def encode_one(
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
    if _is_none(example):
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


def teacher_prompt_of(
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


def id_of(example: Mapping[str, Any], default: str) -> str:
    given = example.get("id") if isinstance(example, Mapping) else None
    return default if given is None else str(given)


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
