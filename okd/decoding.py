"""Responses written token by token: by one model, or drafted by a student under its teacher's eye (SKD).

One uniform number belongs to each token of each row, and one more to the teacher's replacement of it. So a response is
a function of its prompt and its numbers alone: not of the batch it is in, not of how many tokens are drafted at a time,
and not of the device beyond its rounding. That makes speculation exact: a draft that was dropped is drawn again, in
another context, from the same number, as it would have been by drawing one token after the other.

Shapes: B rows; W columns, the tokens of the longest row so far; g tokens drafted in a round; V the vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from okd.layers import decoder_of
from okd.models import device_of, head_of, hidden_states, relative_error, rounding

# Layers whose cache has a column for each token; that of others is a state that all tokens have gone into.
COLUMNS = {"full_attention", "sliding_attention", "chunked_attention"}
ROUND = 4  # tokens that one model writes before the host asks whether all rows have ended


@dataclass(frozen=True)
class Draw:
    """How a token is drawn: softmax(logits / temperature), cut to the top_k likeliest, then to the nucleus of top_p.

    The nucleus is the fewest likeliest tokens whose probabilities reach top_p together (arXiv 1904.09751); top_k=0 and
    top_p=1 cut nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __call__(
        self,
        logits: Tensor,  # (B, V)
        uniform: Tensor,  # (B,) in [0, 1)
    ) -> Tensor:  # (B,)
        """The first token whose cumulative probability exceeds `uniform`; where there is a cut, likeliest first."""
        logits = logits.float() / self.temperature
        last: Any = logits.shape[-1] - 1
        if self.top_p == 1 and not self.top_k:
            cumulative, order = logits.softmax(-1).cumsum(-1), None
        else:
            logits, order = logits.topk(min(self.top_k, last + 1)) if self.top_k else logits.sort(descending=True)
            probabilities = logits.softmax(-1)
            cumulative = probabilities.cumsum(-1)
            kept = cumulative - probabilities < self.top_p  # a prefix
            last = kept.sum(-1).sub(1).clamp(min=0)
            cumulative = cumulative.where(kept, cumulative.gather(-1, last.unsqueeze(-1)))
        threshold = uniform.unsqueeze(-1) * cumulative[..., -1:]
        chosen = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
        chosen = chosen.clamp(max=last)  # NaN gives any token, so that the loss, not an index, stops the run
        return chosen if order is None else order.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


class Decoder:
    """A model and its KV cache. Rows are padded on the left, so that all of them end in the same column.

    Args:
        vocab_size: columns of the logits that may be drawn; the rest is padding of the head.
        rollback: `keep` will be called. The cache then holds every token in every layer, sliding windows included.
        device: where tokens are drawn, default: the model's. Hidden states come there, and a copy of the head.

    Raises ValueError for a model with a prefix or a prompt, which PEFT puts in without regard to the cache; and with
    `rollback` for one with `recurrent_layers`.
    """

    def __init__(self, model: Any, vocab_size: int, rollback: bool = False, device: torch.device | None = None):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                f"expected a model without a prompt of virtual tokens to write or to judge responses; got one with "
                f"{type(model.active_peft_config).__name__}: use a LoRA (online_module=lora) with this method"
            )
        if rollback and (layers := recurrent_layers(model)):
            raise ValueError(
                f"expected a model with keys and values of each token, out of whose cache drafts can be taken; got "
                f"{type(model).__name__} with {', '.join(layers)}: choose a method without drafts, such as gkd"
            )
        self.model, self.vocab_size = model, vocab_size
        self.device = device_of(model) if device is None else device
        self.head = head_of(model, self.device)
        self.cache = DynamicCache() if rollback else DynamicCache(config=model.config)
        parameters = inspect.signature(decoder_of(model).forward).parameters
        self.keyword = "cache" if "cache" in parameters else "past_key_values"  # transformers 5.24 renamed it

    def feed(
        self,
        tokens: Tensor,  # (B, n), the next of each row
        mask: Tensor,  # (B, W) bool, of all columns: those in the cache, and these n
        last_position: int | None = None,
    ) -> Tensor:  # (B, n, D)
        """Hidden states of these tokens. Positions count a row's own tokens; `last_position` bounds them."""
        positions = (mask.cumsum(1) - 1).clamp(min=0, max=last_position)[:, -tokens.shape[1] :]
        options: dict[str, Any] = {"position_ids": positions, "use_cache": True, self.keyword: self.cache}
        return hidden_states(self.model, tokens, mask.long(), **options).to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., V)
        with torch.autocast(hidden.device.type, enabled=False):  # which would round them to 16 bits
            return self.head.logits(hidden.to(self.head.weight.dtype), self.vocab_size)

    def keep(
        self,
        columns: Tensor,  # (B, W)
    ) -> None:
        """Go on from a cache made of these columns of the old one, which differ from row to row."""
        index = columns[:, None, :, None]
        layer: Any
        for layer in self.cache.layers:
            own = index.to(layer.keys.device)
            layer.keys, layer.values = layer.keys.take_along_dim(own, 2), layer.values.take_along_dim(own, 2)


def recurrent_layers(model: Any) -> list[str]:
    """Kinds of its layers whose cache is not a column for each token: Mamba's states, a convolution's window."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - COLUMNS - {"attention"}
    return sorted(kinds) or ["a recurrent state"] * bool(getattr(model, "_is_stateful", False))


@torch.no_grad()
def check_writing(model: Any, name: str, option: str) -> None:
    """Raise ValueError for a model in evaluation mode whose cached states hang on the padding of its batch, which is of
    the size that `option` says."""
    rows, device = [[2, 3, 4, 5], [3, 4, 5, 2, 3, 4]], device_of(model)

    def state(rows: Sequence[Sequence[int]]) -> Tensor:  # (D,) of the first row, after a token with its cache
        width, decoder = max(map(len, rows)), Decoder(model, 1)
        tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device).bool()
        decoder.feed(tokens[:, :-1], mask[:, :-1])
        return decoder.feed(tokens[:, -1:], mask)[0, -1].float()

    alone, beside = state(rows[:1]), state(rows)
    error = relative_error(beside, alone)
    if not error <= rounding(model):
        raise ValueError(
            f"expected a {name} that writes the same whatever stands beside it in a batch; {type(model).__name__} takes"
            f" padding for text (its states differ by {100 * error:.2g} %): pass {option}=1, or choose a "
            "method that does not sample from it"
        )


@dataclass(frozen=True)
class Written:
    """Responses, and what it took.

    Attributes:
        responses: of each row; an end-of-sequence token is the last one, unless `limits` cut the row.
        tokens: of all responses.
        accepted: those that the model drafted; its teacher sampled the rest.
    """

    responses: list[list[int]]
    tokens: int
    accepted: int


@torch.no_grad()
def write(
    model: Any,
    prompts: Sequence[Sequence[int]],  # at least two tokens each
    limits: Sequence[int],  # longest response to each, in tokens, at least one
    *,
    ends: Collection[int],
    vocab_size: int,
    seeds: Sequence[int],  # of each prompt's numbers
    draw: Draw,
    teacher: Any | None = None,
    teacher_draw: Draw = Draw(),
    gamma: int = ROUND,
    top_k: int = 0,
    share: float = 0.0,
    together: Callable[[int], int] = int,  # the largest of a number of each process that writes in step with this one
) -> Written:
    """Responses that `model` samples; with a teacher, by SKD's interleaved sampling (arXiv 2410.11325, Alg. 1), or,
    where that has a `share` a, from (1 - a) q + a p (MiniLLM, arXiv 2306.08543, Eq. 6).

    The model drafts gamma tokens, the teacher scores them in one forward. The first that is not among the teacher's
    `top_k` likeliest (a tie is) is replaced by a sample of the teacher, and the drafts after it are dropped. There is
    no bonus token after gamma accepted ones. `top_k=0` accepts nothing: the teacher writes; `top_k=V` everything.

    Models should be in evaluation mode. The host waits once a round.
    """
    judges = teacher is not None and not share
    device = device_of(model)
    decoders = [Decoder(m, vocab_size, judges, device) for m in (model, teacher) if m is not None]
    sizes = [len(prompt) for prompt in prompts]
    if min(sizes) < 2 or min(limits) < 1:
        raise ValueError(
            f"expected prompts of at least two tokens and limits of at least one; got {min(sizes)} and {min(limits)}: "
            "leave such rows out"
        )
    rows = _Rows(decoders, prompts, limits, torch.tensor(sorted(ends), dtype=torch.long, device=device), gamma)
    uniforms = _uniforms(seeds, limits).to(device)
    remaining = together(max(limits))
    while remaining:
        g = min(gamma, remaining)
        places = rows.places(g).clamp(max=uniforms.shape[2] - 1)
        own, theirs = uniforms.gather(2, places.expand(2, -1, -1))  # (B, g) each
        grown, draft = rows.draft(g, draw, own, share)
        students = torch.ones_like(draft, dtype=torch.bool)  # drafted by the student, and not replaced
        if judges:
            draft, students = rows.mend(draft, grown, top_k, teacher_draw, theirs)
        added, remaining = rows.take(draft, students)
        remaining = together(remaining)
        if not judges:  # rows that have ended write on, past what counts
            rows.mask, rows.last = grown, draft[:, -1:]
        elif remaining:
            rows.align(draft, grown, added)
    responses = [r[:n] for r, n in zip(rows.responses.tolist(), rows.written.tolist(), strict=True)]
    return Written(responses, sum(map(len, responses)), int(rows.accepted.sum()))


class _Rows:
    """The rows of a batch while they are written.

    Rows of a batch accept different numbers of tokens. Both caches hold each row but for its last token, which opens
    the next round in both models: so every round feeds g tokens of every row to both, whatever was accepted. Then each
    row moves to the right in the caches by its dropped drafts. Again all rows end in one column and all padding is on
    the left, as every attention of transformers takes it; holes under the mask would fill the cache, and sliding
    windows would count them. The copy costs what appending one token to a `DynamicCache` does.
    """

    def __init__(
        self,
        decoders: Sequence[Decoder],
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        ends: Tensor,
        gamma: int,
    ):
        sizes = [len(prompt) for prompt in prompts]
        self.decoders, self.ends, self.width = decoders, ends, max(sizes)
        self.last_position = max(size + limit for size, limit in zip(sizes, limits, strict=True)) - 1
        self.lengths, self.limit = torch.tensor([sizes, limits], device=ends.device)
        tokens = torch.tensor([[0] * (self.width - len(p)) + list(p) for p in prompts], device=ends.device)
        self.mask = torch.arange(self.width, device=ends.device) >= self.width - self.lengths[:, None]
        for decoder in decoders:
            decoder.feed(tokens[:, :-1], self.mask[:, :-1])
        self.last = tokens[:, -1:]  # (B, 1), in no cache yet
        self.responses = tokens.new_zeros(len(prompts), max(limits) + gamma)
        self.written = tokens.new_zeros(len(prompts))  # (B,) tokens of the response so far
        self.accepted = tokens.new_zeros(len(prompts))  # (B,) of which are the student's
        self.running = torch.ones(len(prompts), dtype=torch.bool, device=ends.device)

    def places(self, g: int) -> Tensor:
        """(B, g) of the next tokens in the responses."""
        return self.written[:, None] + torch.arange(g, device=self.written.device)

    def draft(self, g: int, draw: Draw, own: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The mask (B, W + g) with the columns of this round's tokens, and the tokens (B, g)."""
        grown = nn.functional.pad(self.mask, (0, g), value=True)
        tokens = [self.last]
        for i in range(g):
            columns = grown[:, : self.mask.shape[1] + i]
            logits = [
                decoder.logits(decoder.feed(tokens[-1], columns, self.last_position)[:, -1])
                for decoder in (self.decoders if share else self.decoders[:1])
            ]
            tokens.append(draw(_mixture(logits[0], logits[1], share) if share else logits[0], own[:, i])[:, None])
        return grown, torch.cat(tokens[1:], 1)

    def mend(
        self, draft: Tensor, grown: Tensor, top_k: int, teacher_draw: Draw, theirs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The draft with the first token that the teacher would not say replaced, and which are the student's."""
        fed, g = torch.cat([self.last, draft[:, :-1]], 1), draft.shape[1]
        logits = self.decoders[1].logits(self.decoders[1].feed(fed, grown[:, :-1], self.last_position))  # (B, g, V)
        better = (logits > logits.gather(2, draft[:, :, None])).sum(2)
        students = (better < top_k).cumprod(1).bool()
        first = students.sum(1).clamp(max=g - 1)[:, None]  # (B, 1) where a replacement goes, if any
        sample = teacher_draw(logits.take_along_dim(first[:, :, None], 1)[:, 0], theirs.gather(1, first)[:, 0])
        here = torch.arange(g, device=draft.device) == first
        return torch.where(~students & here, sample[:, None], draft), students

    def take(self, draft: Tensor, students: Tensor) -> tuple[Tensor, int]:
        """Add what counts of the draft: (B,) tokens of each row; and how many the longest still wants."""
        step, at = torch.arange(draft.shape[1], device=draft.device), self.places(draft.shape[1])
        ending = torch.isin(draft, self.ends)
        kept = self.running[:, None] & (step <= students.sum(1, keepdim=True))  # a prefix of the round
        kept &= (ending.cumsum(1) - ending.long() == 0) & (at < self.limit[:, None])
        self.responses.scatter_(1, at, draft)
        added = kept.sum(1)
        self.written = self.written + added
        self.accepted = self.accepted + (kept & students).sum(1)
        self.running = self.running & ~(kept & ending).any(1) & (self.written < self.limit)
        remaining = ((self.limit - self.written) * self.running).max()
        self.width, remaining = torch.stack([(self.lengths + self.written).max(), remaining]).tolist()
        return added, remaining

    def align(self, draft: Tensor, grown: Tensor, added: Tensor) -> None:
        """Move each row to the right in the caches by the drafts that it dropped."""
        columns = torch.arange(self.width, device=draft.device) - self.width + self.mask.shape[1] + added[:, None]
        self.mask = grown.gather(1, columns.clamp(min=0)) & (columns >= 0)
        self.last = torch.cat([self.last, draft], 1).gather(1, added[:, None])
        for decoder in self.decoders:
            decoder.keep(columns[:, :-1].clamp(min=0))


def _uniforms(seeds: Sequence[int], limits: Sequence[int]) -> Tensor:
    """(2, B, longest limit) numbers in [0, 1), those of a row a function of its seed and limit alone."""
    found, generator = torch.zeros(2, len(limits), max(limits)), torch.Generator()
    for i, (seed, limit) in enumerate(zip(seeds, limits, strict=True)):
        found[:, i, :limit] = torch.rand(2, limit, generator=generator.manual_seed(seed))
    return found


def _mixture(logits: Tensor, teacher_logits: Tensor, share: float) -> Tensor:
    """log((1 - share) q + share p) of (B, V) logits."""
    q, p = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return torch.logaddexp(q + math.log1p(-share), p + math.log(share))
