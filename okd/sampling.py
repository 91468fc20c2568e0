"""Who writes the responses of a training batch: one policy for each answer.

A policy gets the rows of a batch as the dataset has them and returns the rows to train on. What is drawn for a row
hangs on the run's seed, the step and the row's id alone: not on the batch it is in, nor on the process; so a resumed
run draws what an uninterrupted one would, and several processes what one would.

A written row is its prompt, everything before the first response of the dataset's row, and one response: later turns of
a chat, which answered other words, are dropped. It keeps its id. Rows of plain text, whose prompt is the first token at
most, and rows whose prompt leaves no room in max_length stay as the dataset has them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from okd.answers import generate_responses, padding_token, prompt_and_reference
from okd.data import (
    BOTH,
    IGNORE,
    STUDENT,
    TEACHER,
    TEXT,
    Batch,
    Collator,
    Row,
    on_device,
    packed,
    rows_of,
    seed_of,
    uniform,
)
from okd.decoding import Draw, write
from okd.kept import Asked, Keeper, KeptOptions
from okd.models import evaluating, position_limit
from okd.options import option, reads
from okd.rollouts import CONCURRENT, RolloutOptions, Rollouts
from okd.sharding import most, ranks
from okd_kernels import LinearHead

PHI_STEP, LOSS_RISE = 0.1, 0.1  # DistiLLM's: phi grows by the one when the held-out loss has risen by the other
logger = logging.get_logger(__name__)


@dataclass
class LengthOptions:
    """Read by methods whose responses are not all the dataset's."""

    max_new_tokens: int = option(
        128, "longest response written, in tokens; with its prompt, at most max_length", least=1
    )


@dataclass
class DrawOptions:
    """Read by methods that sample from one model."""

    sampling_temperature: float | None = option(
        None, "temperature of sampled responses; default: 1, or as the method says", above=0
    )
    sampling_top_p: float | None = option(None, "nucleus of sampled responses; default: all", above=0, most=1)
    sampling_top_k: int | None = option(None, "sample out of so many likeliest tokens; default, and 0: all", least=0)


@dataclass
class ShareOptions:
    """Read by imitkd and gkd."""

    student_share: float | None = option(
        None, "share of batches that the student writes; default: as the method says", least=0, most=1
    )


@dataclass
class MixtureOptions:
    """Read by minillm."""

    teacher_share: float | None = option(
        None, "share of the teacher in the mixture that responses are sampled from; default: 0.2", least=0, most=0.999
    )


@dataclass
class InterleavedOptions:
    """Read by skd."""

    skd_gamma: int = option(5, "tokens that the student drafts in a round", least=1)
    skd_top_k: int = option(25, "the teacher replaces a draft that is not among its so many likeliest tokens", least=0)
    skd_student_temperature: float = option(0.5, "temperature of the student's drafts", above=0)
    skd_teacher_temperature: float = option(0.2, "temperature of the teacher's replacements", above=0)
    skd_top_p: float = option(0.5, "nucleus of both", above=0, most=1)


@dataclass
class ReplayOptions:
    """Read by distillm."""

    replay_size: int = option(1000, "student-written rows that are kept for replay, on each process", least=1)


class Sampler:
    """Rewrites batches by the method's policy, and keeps what the policy must remember.

    Attributes:
        state: what the policy remembers, JSON: it is saved with each checkpoint, for each process.
        coin: uniform on [0, 1) for each step, the same on all processes: those that wait for one another at the
            backward pass all generate, or none.
        since: when the interval began that the next log entry is about; later by what an evaluation took.
        texts: rows of a second data set, of which each batch gets as many as it has rows (MiniLLM).
    """

    def __init__(
        self,
        options: Any,
        pair: Any,
        tokenizer: Any,
        ends: set[int],  # ids that end a response
        rows: Sequence[Row] = (),
        texts: Sequence[Row] = (),
        alignment: Any = None,  # with a teacher that has a tokenizer of its own
    ):
        self.options, self.pair, self.tokenizer, self.ends, self.alignment = options, pair, tokenizer, ends, alignment
        self.method = options.resolved
        self.rows, self.texts = rows, texts
        self.collate = Collator(tokenizer.pad_token_id)
        self.state: dict[str, Any] = {}
        self.coin, self.step = 0.0, 0
        self.together = most if pair.is_sharded or (options.rollout_url and ranks() > 1) else int
        self.keeper = Keeper(options, pair.teacher, self._write, self._vocab_size, self.together)
        self.rollouts = None if options.rollout_url is None else Rollouts(options, pair.student, pair.is_sharded)
        self._pass, self._order = -1, list[int]()  # of the texts
        self._sums: dict[str, float] = {}
        self.since = time.perf_counter()
        if self.method.responses is replay:
            self.state = {"phi": 0.0, "reference": None, "buffer": []}
            if options.eval_strategy == "no":
                logger.warning(
                    f"{self.method.name} lets the student write once the held-out loss rises; got eval_strategy=no, "
                    "with which every batch will be the dataset's: set eval_strategy=steps and eval_steps"
                )

    @property
    def is_idle(self) -> bool:
        """Every batch is the dataset's."""
        return self.method.responses is dataset and not self.texts

    @property
    def is_served(self) -> bool:
        """What is written is written by a server: no weight is read."""
        return self.rollouts is not None and self.method.responses is not paired

    def __call__(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        """The batches of one optimizer step, written by whom the policy chooses; on the device of the old ones."""
        result = []
        self.step, self.coin = step, uniform(self.options.seed, step)
        for i, batch in enumerate(batches):
            device, started = batch["input_ids"].device, time.perf_counter()
            rows = self.method.responses(self, rows_of(batch))
            self.note(generating_seconds=time.perf_counter() - started, rows=len(rows))
            self.note(student_written_rows=sum(row.get("writer") == STUDENT for row in rows))
            if self.texts:
                place = (step * self.options.gradient_accumulation_steps + i) * ranks() + self.options.process_index
                size = self.options.per_device_train_batch_size  # of lines of several rows, where they are packed
                rows = rows + self._texts(place * size, min(size, len(batch["ids"])))
            result.append(on_device(self.collate(self._lines(rows)), device))
        return result

    def _lines(self, rows: Sequence[Row]) -> Sequence[Any]:
        lengths = [len(row["input_ids"]) for row in rows]
        return (
            [[rows[i] for i in line] for line in packed(lengths, self.options.max_length)]
            if self.options.packing
            else rows
        )

    def _texts(self, first: int, n: int) -> list[Row]:
        """Rows first, ..., first + n - 1 of the second data set, in an order of its own in each pass."""
        chosen = []
        for i in range(first, first + n):
            turn, place = divmod(i, len(self.texts))
            if turn != self._pass:
                draws = torch.Generator().manual_seed(seed_of(self.options.seed, "texts", turn))
                self._pass, self._order = turn, torch.randperm(len(self.texts), generator=draws).tolist()
            chosen.append(Row(**{**self.texts[self._order[place]], "writer": TEXT}))
        return chosen

    # --- writing

    def respond(self, rows: Sequence[Row], writer: str = STUDENT, share: float = 0.0) -> list[Row]:
        """The rows with responses of the writer: the student (in a mixture with the teacher, where that has a share),
        the teacher, or both by interleaved sampling (SKD).

        The teacher that writes is the one before an online module of this run. That module moves towards the student,
        so the teacher's own later words, taken as labels, would teach both what the student says already. As a judge,
        or in a mixture, it is the teacher of the moment, whose distribution is the loss's target too.
        """
        asked = self._answerable(rows, writer)
        if self.method.generate == "step":
            responses = self._write(list(asked.values()), writer, share)
        else:
            responses = self.keeper.look_up(list(asked.values()), writer)
        result = list(rows)
        for i, response in zip(asked, responses, strict=True):
            prompt, _ = prompt_and_reference(rows[i])
            labels = [IGNORE] * len(prompt) + response
            result[i] = Row(id=rows[i]["id"], input_ids=prompt + response, labels=labels, writer=writer)
            for name in ("teacher", "teacher_prompt"):
                if name in rows[i]:
                    result[i][name] = rows[i][name]
            if "aligned" in rows[i]:
                result[i] = self.alignment.answered(result[i], rows[i])
        return result

    def _answerable(self, rows: Sequence[Row], writer: str) -> dict[int, Asked]:
        """By index, the rows whose prompt asks for something, and leaves room for it."""
        found = {}
        for i, row in enumerate(rows):
            prompt, _ = prompt_and_reference(row)
            told = row.get("teacher_prompt", prompt)
            limit = self._limit(prompt, told)
            if len(prompt) > 1 and limit > 0:
                found[i] = Asked(row["id"], told if writer == TEACHER else prompt, limit)
        return found

    def _limit(self, prompt: Sequence[int], told: Sequence[int]) -> int:
        """Longest response, in tokens, that the data's limit and both models have positions for, each after its prompt;
        the teacher's may be another."""
        rooms = [self.options.max_new_tokens, self.options.max_length - len(prompt)]
        teacher = None if self.pair.teacher is None else self.pair.teacher.model
        for model, read in ((self.pair.student, prompt), (teacher, told)):
            if (positions := position_limit(model)) is not None:
                rooms.append(positions - len(read))
        return min(rooms)

    def _write(self, asked: Sequence[Asked], writer: str, share: float = 0.0) -> list[list[int]]:
        if not self.together(len(asked)):
            return []
        if self.method.generate == "once":
            return self._beams(asked)
        if self.rollouts is not None and writer == STUDENT:
            return self._asked_for(self.rollouts, asked)
        answered = asked or [Asked("", [0, 0], 1)]  # where only others write, whose layers all processes gather
        options, student, teacher = self.options, self.pair.student, self.pair.teacher
        chosen: dict[str, Any] = {"draw": self.method.draw}
        if share:
            chosen |= {"teacher": teacher.model, "share": share}
        if writer == BOTH:
            chosen = {
                "draw": Draw(options.skd_student_temperature, options.skd_top_p),
                "teacher": teacher.model,
                "teacher_draw": Draw(options.skd_teacher_temperature, options.skd_top_p),
                "gamma": options.skd_gamma,
                "top_k": options.skd_top_k,
            }
        with evaluating(student, None if teacher is None else teacher.model), self._author(writer) as author:
            written = write(
                author,
                [one.prompt for one in answered],
                [one.limit for one in answered],
                ends=self.ends,
                vocab_size=self._vocab_size(),
                seeds=[seed_of(options.seed, self.step, one.name, writer) for one in answered],
                together=self.together,
                **chosen,
            )
        if not asked:
            return []
        self.note(generated_tokens=written.tokens)
        if writer == BOTH:
            self.note(accepted=written.accepted, judged=written.tokens)
        return written.responses

    def _asked_for(self, rollouts: Rollouts, asked: Sequence[Asked]) -> list[list[int]]:
        """Responses of the student by a server."""
        responses = rollouts.write(
            asked,
            [seed_of(self.options.seed, self.step, one.name, STUDENT) for one in asked],
            ends=self.ends,
            draw=self.method.draw,
        )
        self.note(generated_tokens=sum(map(len, responses)))
        return responses

    def _beams(self, asked: Sequence[Asked]) -> list[list[int]]:
        """The teacher's most probable responses, by beam search (sequence-level KD, arXiv 1606.07947)."""
        if self.pair.is_sharded:  # all search for what each is asked, so that they gather the same layers
            of_ranks = gather_object([list(asked)])
            first = sum(map(len, of_ranks[: self.options.process_index]))
            asked, own = [one for of_rank in of_ranks for one in of_rank], slice(first, first + len(asked))
        else:
            own = slice(None)
        responses: list[list[int]] = [[] for _ in asked]
        with self._author(TEACHER) as author:
            padding = range(self._vocab_size(), len(LinearHead.from_model(author).weight))
            for limit in sorted({one.limit for one in asked}):
                at = [i for i, one in enumerate(asked) if one.limit == limit]
                written = generate_responses(
                    author,
                    [asked[i].prompt for i in at],
                    ends=self.ends,
                    pad_token_id=padding_token(self.tokenizer),
                    max_new_tokens=limit,
                    batch_size=self.options.per_device_eval_batch_size,
                    progress=False,
                    num_beams=self.options.num_beams,
                    suppress_tokens=list(padding) or None,
                    synced_gpus=self.pair.is_sharded,
                )
                for i, response in zip(at, written, strict=True):
                    responses[i] = response
        self.note(generated_tokens=sum(map(len, responses[own])))
        return responses[own]

    def _author(self, writer: str) -> Any:
        if writer != TEACHER:
            return nullcontext(self.pair.student)
        teacher = self.pair.teacher  # a self-teacher keeps nothing of what it was: it writes as it is
        return teacher.as_it_was() if teacher.judges else nullcontext(teacher.model)

    def _vocab_size(self) -> int:
        """Ids that both models know: one written by one of them is read by the other."""
        heads = [LinearHead.from_model(self.pair.student)]
        if self.pair.teacher is not None and self.alignment is None:
            heads.append(self.pair.teacher.head())
        return min([len(head.weight) for head in heads] + [self.options.vocab_size or len(heads[0].weight)])

    def push(self, step: int | None = None, epoch: int | None = None) -> None:
        """The student's weights to the server that will write for this step, or this epoch; outside of any forward, in
        which some are whole and others are not. All processes call it."""
        if self.rollouts is None or (epoch is None) == (self.method.generate == "epoch"):
            return
        started = time.perf_counter()
        if epoch is not None:
            self.rollouts.sync(epoch)
        else:
            self.coin = uniform(self.options.seed, step)
            if student_writes(self):
                self.rollouts.sync(step // self.options.rollout_sync_steps)
        self.note(generating_seconds=time.perf_counter() - started)

    def begin_run(self, epoch: int) -> None:
        """Forget what later epochs of an earlier run in this directory left; -1: all of them."""
        self.keeper.begin_run(epoch)
        if self.rollouts is not None:
            self.rollouts.begin_run(self._vocab_size())
        if self.pair.is_sharded and self.method.generate != "step":
            _ = self.keeper.how  # reads weights, which all processes gather

    def begin_epoch(self, epoch: int) -> None:
        """Write what the epoch will read: the student's responses, and, where they are missing, the teacher's."""
        self.step, self.keeper.epoch = epoch, epoch
        if self.method.generate != "epoch":
            return
        started = time.perf_counter()
        for writer in (TEACHER, STUDENT) if self.method.responses is paired else (TEACHER,):
            by_server = writer == STUDENT and self.rollouts is not None
            size = CONCURRENT if by_server else self.options.per_device_eval_batch_size
            self.keeper.write_ahead(list(self._answerable(self.rows, writer).values()), writer, size)
        self.note(generating_seconds=time.perf_counter() - started)

    # --- the log, and what is remembered

    def note(self, **values: float) -> None:
        """Add to the sums behind the next log entry."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def logs(self) -> dict[str, float]:
        """What happened since the last call, on all processes.

        `generating_share` of the time; `generated_tokens_per_second` of generating; `student_written_share` of the
        rows, replayed ones too; SKD's `acceptance_rate`, the share of tokens that the student wrote; DistiLLM's `phi`.
        """
        of_ranks = gather_object([self._sums]) if ranks() > 1 else [self._sums]
        sums = {name: sum(x.get(name, 0.0) for x in of_ranks) for x in of_ranks for name in x}
        seconds = sums.get("generating_seconds", 0.0) / len(of_ranks)
        logs = {"generating_share": seconds / (time.perf_counter() - self.since)}
        if seconds and "rows" in sums:
            logs["generated_tokens_per_second"] = sums.get("generated_tokens", 0.0) / seconds
            logs["student_written_share"] = sums["student_written_rows"] / sums["rows"]
        if "judged" in sums:
            logs["acceptance_rate"] = sums["accepted"] / sums["judged"]
        if "phi" in self.state:
            logs |= {"phi": self.state["phi"], "replay_rows": len(self.state["buffer"])}
        self._sums, self.since = {}, time.perf_counter()
        return logs

    @property
    def wants_reference(self) -> bool:
        """The policy compares held-out losses with one from before the training, which has not been measured."""
        return "reference" in self.state and self.state["reference"] is None

    def on_evaluate(self, loss: float) -> None:
        """The cross-entropy of the held-out labels, for policies that adapt to it.

        DistiLLM's phi grows, and only then the reference moves, where it has risen by LOSS_RISE above that; the first
        one, before the training, is the reference (its released code).
        """
        if self.wants_reference:
            self.state["reference"] = loss
        elif "reference" in self.state and loss >= self.state["reference"] + LOSS_RISE:
            self.state |= {"phi": min(self.state["phi"] + PHI_STEP, 1.0), "reference": loss}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.state))

    def load(self, path: Path) -> None:
        """Raises FileNotFoundError, but of a policy that has nothing to remember."""
        if not self.state:
            return
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected the sampler's state of this run; got no such file")
        self.state = json.loads(path.read_text())


# --- the policies

Policy = Callable[[Sampler, list[Row]], list[Row]]


def dataset(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """The responses of the dataset."""
    return rows


def student_writes(sampler: Sampler) -> bool:
    """Whether the student writes at this step, of the policies in which it does so alone; the same on all processes."""
    method, coin = sampler.method, sampler.coin
    if method.responses is not replay:
        return coin < method.student_share
    phi, is_full = sampler.state["phi"], len(sampler.state["buffer"]) >= sampler.options.replay_size
    return coin < phi and (coin < phi * (1 - sampler.pair.progress) or bool(sampler.together(not is_full)))


@reads(LengthOptions, DrawOptions, RolloutOptions, ShareOptions)
def student(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """At a share of the steps the student writes the batch (ImitKD, GKD)."""
    return sampler.respond(rows) if student_writes(sampler) else rows


@reads(LengthOptions, MixtureOptions)
def mixture(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """The student writes, each token drawn from (1 - a) q + a p (MiniLLM); at temperature 1 and without any cut, which
    its importance weights would not know of."""
    return sampler.respond(rows, share=sampler.method.teacher_share)


@reads(LengthOptions, DrawOptions, KeptOptions)
def teacher(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """The teacher's responses (SeqKD): by beam search once for each example, or sampled anew for each batch."""
    return sampler.respond(rows, TEACHER)


@reads(LengthOptions, InterleavedOptions)
def interleaved(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """The student's drafts, mended by the teacher (SKD, arXiv 2410.11325)."""
    return sampler.respond(rows, BOTH)


@reads(LengthOptions, DrawOptions, KeptOptions, RolloutOptions)
def paired(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """Twice the rows: the teacher's responses, then the student's to the same prompts (DistiLLM-2, arXiv 2503.07067).

    A row without a prompt comes once, as the dataset has it.
    """
    students = [row for row in sampler.respond(rows) if row.get("writer") == STUDENT]
    return sampler.respond(rows, TEACHER) + students


@reads(LengthOptions, DrawOptions, RolloutOptions, ReplayOptions)
def replay(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """The dataset's, the student's or replayed rows, by DistiLLM's adaptive off-policy schedule (arXiv 2402.03898).

    u < phi (1 - t/T), or u < phi while the buffer is not full: the student writes, and its rows join the buffer, from
    which the oldest leave. Else u < phi: as many rows of the buffer, drawn without replacement. Else the dataset's.
    Each process has its own buffer.
    """
    phi, buffer, size = sampler.state["phi"], sampler.state["buffer"], sampler.options.replay_size
    if sampler.coin >= phi:
        return rows
    if student_writes(sampler):
        written = sampler.respond(rows)
        buffer += [row for row in written if row.get("writer") == STUDENT]
        del buffer[:-size]
        return written
    names = [row["id"] for row in rows]
    draws = torch.Generator().manual_seed(seed_of(sampler.options.seed, sampler.step, *names))
    return [buffer[i] for i in torch.randperm(len(buffer), generator=draws)[: len(rows)].tolist()]
