"""Conversations -> tokens: what a template renders, and which of its tokens are responses.

A response token is one that the model must write itself: what begins in the text of an assistant turn, after the
generation prompt, and the token that ends the turn. What a template puts there by itself (an empty thought) is none.

1. A template with `{% generation %}` says which tokens those are.
2. Else, where it only appends, the turns lie in one render of the conversation, each between the render of what comes
   before it, with the generation prompt, and the render through it.
3. Else (templates that drop the thoughts of earlier turns, as Qwen3's and R1's) each turn is a row of its own, rendered
   as the model meets it at generation: its prefix with the generation prompt, and the turn.
4. Turns that do not begin with their own prompt even so are left out, and counted.

Where a tokenizer would merge the end of a prompt with the turn (a space with the next word), the text is tokenised in
two, as it is at generation.
"""

from __future__ import annotations

import datetime
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import render_jinja_template

from okd.options import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
# A macro in place of transformers' function: to templates it hands data only, no function of ours.
NOW = """{%- macro strftime_now(format) -%}
{%- set text = namespace(now=format) -%}
{%- for directive, value in DATE.items() -%}{%- set text.now = text.now.replace(directive, value) -%}{%- endfor -%}
{{- text.now -}}
{%- endmacro %}
"""
DIRECTIVES = [f"%{letter}" for letter in "aAbBdHIjmMpSUwWyY"]
PROMPT_END = 32  # characters of a prompt by whose tokens it is known
MARKED = re.compile(r"\{%-?\s*generation\b")
APART, THOUGHTLESS, LOST = (
    "with turns as rows of their own, as the template rewrites earlier ones",
    "with an empty thought of the template's, which is not trained",
    "with turns left out, which the template renders unlike their prompt",
)


@dataclass
class ChatOptions:
    """Read by all methods."""

    chat_template: bool | None = option(
        None, "render examples with the tokenizer's chat template; default: if it has one"
    )
    chat_template_kwargs: str | None = option(
        None, """JSON of variables for the chat template, such as '{"enable_thinking": false}'"""
    )
    chat_date: str = option("2025-01-01", "the day that a template prints as today's, resumed or not")
    max_bad_share: float = option(
        0.01,
        "share of the examples that may be none, or not fit the template, before a run is refused",
        least=0,
        most=1,
    )

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Raises ValueError for what is no JSON object, or no date."""
        given = json.loads(self.chat_template_kwargs or "{}")
        if not isinstance(given, dict):
            raise ValueError(f"expected chat_template_kwargs as a JSON object; got {self.chat_template_kwargs}")
        date = datetime.date.fromisoformat(self.chat_date)
        return {"strftime_now": date.strftime, "date_string": date.strftime("%d %b %Y"), **given}


@dataclass
class Rendered:
    """Rows (input_ids, labels) of one conversation, and what is to be said of it."""

    rows: list[tuple[list[int], list[int]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Template:
    """A fast tokenizer's chat template.

    ends: ids that end a response at generation; the tokenizer's eos is one. kwargs: variables of the template, over
    those of `ChatOptions`, which pin the date.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = (), kwargs: Mapping[str, Any] | None = None
    ):
        self.tokenizer, self.kwargs = tokenizer, {**ChatOptions().template_kwargs, **(kwargs or {})}
        now = self.kwargs.pop("strftime_now")
        date = {name: now(name) for name in DIRECTIVES}
        self.now = NOW.replace("DATE", json.dumps(date | {"%-d": str(int(date["%d"])), "%-m": str(int(date["%m"]))}))
        self.ends = {*ends, tokenizer.eos_token_id} - {None}
        self.is_marked = bool(MARKED.search(str(tokenizer.chat_template)))
        self._endings: dict[str, list[int]] = {}

    def _options(self, tools: Any) -> dict[str, Any]:
        source = self.tokenizer.get_chat_template(None, tools)
        return {"chat_template": (self.now if "strftime_now" in source else "") + source, "tools": tools, **self.kwargs}

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, prompt: bool = False) -> str:
        """Text; `prompt`: and what opens the turn that the model is to write."""
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt, **self._options(tools)}
        conversation: Any = list(messages)
        return str(self.tokenizer.apply_chat_template(conversation, **options))

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        return self.tokenizer(self.render(messages, tools, prompt=True), add_special_tokens=False)["input_ids"]

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Rendered:
        """The rows of a conversation. Raises ValueError where nothing of it can be trained as it would be generated."""
        found = Rendered()
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if turns[:1] == [0]:
            raise ValueError('expected a message before that of role "assistant", got none; begin with a user message')
        trained = [i for i in turns if is_trained(messages[i])]
        if not trained:
            return found
        if self.is_marked:
            found.rows.append(self._by_marks(messages, tools, turns, trained))
            return found
        through, spans = "", dict[int, tuple[str, int, int]]()
        for i in trained:
            before, through = self.render(messages[:i], tools, prompt=True), self.render(messages[: i + 1], tools)
            if through.startswith(before):
                thought = _inserted_thought(messages[i], through[len(before) :])
                if thought:
                    found.notes.append(THOUGHTLESS)
                spans[i] = through, len(before) + thought, len(through.rstrip())
        if len(spans) < len(trained):
            found.notes.append(LOST)
        if not spans:
            raise ValueError(
                "expected a chat template that renders a turn after its own prompt; got one that rewrites it: pass "
                "chat_template=False with prompt and completion, or another template"
            )
        text = through if trained[-1] == len(messages) - 1 else self.render(messages, tools)
        if all(text.startswith(part) for part, _, _ in spans.values()):
            found.rows.append(self._tokens(text, [(first, last) for _, first, last in spans.values()], messages, tools))
        else:
            found.notes.append(APART)
            for i, (through, first, last) in spans.items():
                found.rows.append(self._tokens(through, [(first, last)], messages[: i + 1], tools))
        return found

    def _tokens(
        self, text: str, spans: Sequence[tuple[int, int]], messages: Sequence[Mapping[str, Any]], tools: Any
    ) -> tuple[list[int], list[int]]:
        return self._closed(*self._labelled(text, spans), messages, tools)

    def _labelled(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Tokens, and those of them that begin within the spans."""
        ids, offsets = self.cut(text)
        cuts = [first for first, last in spans if first < last and self._merges(text, first, ids, offsets)]
        if cuts:
            ids, offsets = [], []
            for start, end in pairwise([0, *cuts, len(text)]):
                part, places = self.cut(text[start:end], goes_on=start > 0)
                ids += part
                offsets += [(start + a, start + b) for a, b in places]
        starts, labels = [start for start, _ in offsets], [IGNORE] * len(ids)
        for first, last in spans:
            for i in range(bisect_left(starts, first), bisect_left(starts, last)):
                if first < offsets[i][1]:  # some tokenizers trim a space before the turn to an empty range there
                    labels[i] = ids[i]
        return ids, labels

    def cut(self, text: str, goes_on: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens and where they lie. `goes_on`: after other text, where SentencePiece puts no space before it."""
        before = "\n" if goes_on else ""
        tokens = self.tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
        if not goes_on:
            return ids, offsets
        first = self.tokenizer(before, add_special_tokens=False)["input_ids"]
        n = len(first)
        if ids[:n] != first:  # merged with it: a tokenizer that has newlines in its words puts no space there
            return self.cut(text)
        return ids[n:], [(max(a - len(before), 0), b - len(before)) for a, b in offsets[n:]]

    def _merges(self, text: str, first: int, ids: list[int], offsets: list[tuple[int, int]]) -> bool:
        """Whether the tokens before `first` are others than those of a prompt that ends there, by its last two."""
        prompt = self._ending(text[max(0, first - PROMPT_END) : first])
        n = bisect_right(offsets, first, key=lambda place: place[1])
        return ids[max(0, n - len(prompt)) : n] != prompt

    def _ending(self, text: str) -> list[int]:
        """Its last two tokens. Most prompts end alike."""
        if text not in self._endings:
            if len(self._endings) == 1000:
                self._endings.clear()
            self._endings[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"][-2:]
        return self._endings[text]

    def _by_marks(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, turns: Sequence[int], trained: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        text, spans = self._marks(messages, tools)
        if len(trained) < len(turns):  # a turn may have several marks, or none
            starts = [len(self._marks(messages[:i], tools)[1]) for i in turns]
            ends = [*starts[1:], len(spans)]
            spans = [s for i, a, b in zip(turns, starts, ends, strict=True) if i in trained for s in spans[a:b]]
        ids, labels = self._labelled(text, spans)
        if self.ends.intersection(labels):  # the marks know where a turn ends, of which they may make several pieces
            return ids, labels
        return self._closed(ids, labels, messages, tools)

    def _marks(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """Text, and where `{% generation %}` marks it."""
        render: Any = render_jinja_template  # whose annotation is another
        options = {**self.tokenizer.special_tokens_map, **self._options(tools)}
        conversations: Any = [list(messages)]
        texts, marks = render(conversations, return_assistant_tokens_mask=True, **options)
        return texts[0], marks[0]

    def _closed(
        self, ids: list[int], labels: list[int], messages: Sequence[Mapping[str, Any]], tools: Any
    ) -> tuple[list[int], list[int]]:
        """With the token that ends each trained turn among its labels. Raises ValueError where a turn has none."""
        ids, labels = list(ids), list(labels)
        lasts = [i for i, (a, b) in enumerate(pairwise([*labels, IGNORE])) if a != IGNORE and b == IGNORE]
        for i in lasts:
            if ids[i] in self.ends:
                continue
            if i + 1 < len(ids) and ids[i + 1] in self.ends:
                labels[i + 1] = ids[i + 1]
            elif i + 1 == len(ids):
                end = self._closing(messages, tools)
                ids.append(end)
                labels.append(end)
            else:
                raise ValueError(
                    f"expected a turn to end with a token that ends generation, one of {sorted(self.ends)}; the "
                    f"template puts {ids[i + 1]} there: set tokenizer.eos_token, or the model's generation_config"
                )
        return ids, labels

    def _closing(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> int:
        """The token that a template puts after a turn only when another one follows, where generation ends at it."""
        text = self.render(messages, tools)
        more = self.render([*messages, {"role": "user", "content": "-"}], tools)
        after = more[len(text) :] if more.startswith(text) else ""
        first = self.tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        if first and first[0] in self.ends:
            return first[0]
        if self.tokenizer.eos_token_id is None:
            raise ValueError("expected an eos token to end the response with, got none; set tokenizer.eos_token")
        return int(self.tokenizer.eos_token_id)


def has_strings(value: Any, *keys: str) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in keys)


def is_turn(message: Any) -> bool:
    """{"role": str, "content": str}, the content null or absent where it calls tools."""
    if not has_strings(message, "role"):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def is_trained(message: Mapping[str, Any]) -> bool:
    """Unless it says otherwise, by `weight: 0` or `train: false`."""
    return bool(message.get("weight", 1)) and message.get("train", True) is not False


def _inserted_thought(message: Mapping[str, Any], response: str) -> int:
    """Characters of an empty thought that the template has put before the turn, which has none."""
    own = str(message.get("content") or "").lstrip().startswith("<think>")
    found = EMPTY_THOUGHT.match(response)
    return found.end() if found and not own and not message.get("reasoning_content") else 0
