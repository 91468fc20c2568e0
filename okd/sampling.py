"""Who writes the responses of a training batch: one policy for each answer, named in `POLICIES`.

A policy gets the rows of a batch as the dataset has them and returns the rows to train on. Sampling is seeded by the
run's seed, the step and the process, so that a resumed run draws what an uninterrupted one would.

A row is `{"id": str, "input_ids": list[int], "labels": list[int]}`, and `"student_written": True` where it is. A
written row is its prompt, everything before the first response of the dataset's row, and one response: later turns of a
chat, which answered other words, are dropped. It keeps its id. Rows of plain text, whose prompt is the first token at
most, and rows whose prompt leaves no room in max_length stay as the dataset has them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from okd.answers import end_tokens, prompt_and_reference
from okd.data import IGNORE, Collator
from okd.decoding import Draw, write
from okd.models import evaluating, position_limit
from okd.teachers import base_teacher
from okd_kernels import LinearHead

if TYPE_CHECKING:
    from okd.config import OKDConfig

Row = dict[str, Any]
SEED_STRIDE = 1_000_003  # between the seeds of two batches
PHI_STEP, LOSS_RISE = 0.1, 0.1  # DistiLLM's: phi grows by the one when the held-out loss rises by the other
logger = logging.get_logger(__name__)


class Sampler:
    """Rewrites batches by the method's policy, and keeps what the policy must remember.

    Attributes:
        state: what the policy remembers, JSON: it is saved with each checkpoint.
        coin: uniform on [0, 1) for each batch, the same on all processes: those that wait for one another at the
            backward pass all generate, or none.
        since: when the interval began that the next log entry is about; later by what an evaluation took.
        generator: of what is drawn for the batch at hand, on the CPU whatever the models' device; one for each process.
    """

    def __init__(self, args: OKDConfig, pair: Any, tokenizer: Any):
        self.args, self.pair, self.tokenizer = args, pair, tokenizer
        self.policy = POLICIES[args.preset.sequences]
        self.collate = Collator(tokenizer.pad_token_id)
        self.state: dict[str, Any] = {}
        self.coin, self.generator = 0.0, torch.Generator()
        self._sums: dict[str, float] = {}
        self.since = time.perf_counter()
        if self.policy is replay:
            self.state = {"phi": 0.0, "previous": None, "buffer": []}
            if args.eval_strategy == "no":
                logger.warning(
                    f"{args.method} lets the student write once the held-out loss rises; got eval_strategy=no, with "
                    "which every batch will be the dataset's: set eval_strategy=steps and eval_steps"
                )

    def __call__(self, batches: Sequence[Mapping[str, Any]], step: int) -> list[dict[str, Any]]:
        """The batches of one optimizer step, written by whom the policy chooses; on the device of the old ones."""
        result = []
        for i, batch in enumerate(batches):
            device = batch["input_ids"].device
            started = time.perf_counter()
            seed = self.args.seed + (step * self.args.gradient_accumulation_steps + i) * SEED_STRIDE
            self.coin = torch.rand((), generator=self.generator.manual_seed(2 * seed)).item()
            self.generator.manual_seed(2 * (seed * 4096 + self.args.process_index) + 1)
            rows = self.policy(self, rows_of(batch))
            self.note(generating_seconds=time.perf_counter() - started, rows=len(rows))
            self.note(student_written_rows=sum(bool(row.get("student_written")) for row in rows))
            collated = self.collate(rows)
            result.append({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in collated.items()})
        return result

    def respond(self, rows: Sequence[Row], writer: str = "student") -> list[Row]:
        """The rows with responses of the writer: "student", "teacher", or "both" by interleaved sampling (SKD).

        "teacher" is the teacher as it was before an online module of this run. That module moves towards the student,
        so the teacher's own later words, taken as labels, would teach both what the student says already. As a judge
        ("both") it is the teacher of the moment, whose distribution is the loss's target too.
        """
        args, student, teacher = self.args, self.pair.student, self.pair.teacher
        prompts = [prompt_and_reference(row)[0] for row in rows]
        limits = [min(args.max_new_tokens, self._max_length() - len(prompt)) for prompt in prompts]
        asked = [i for i, prompt in enumerate(prompts) if len(prompt) > 1 and limits[i] > 0]
        if not asked:
            return list(rows)
        options: dict[str, Any] = {"draw": Draw(args.sampling_temperature, args.sampling_top_p, args.sampling_top_k)}
        if writer == "both":
            options = {
                "draw": Draw(args.skd_student_temperature, args.skd_top_p),
                "teacher": teacher,
                "teacher_draw": Draw(args.skd_teacher_temperature, args.skd_top_p),
                "gamma": args.skd_gamma,
                "top_k": args.skd_top_k,
            }
        before_module = writer == "teacher" and args.online
        author: Any = teacher if writer == "teacher" else student
        if before_module:  # a prompt or prefix that is off must not be looked for
            author = author.get_base_model()
        with evaluating(student, teacher), base_teacher(teacher) if before_module else nullcontext():
            written = write(
                author,
                [prompts[i] for i in asked],
                [limits[i] for i in asked],
                ends=end_tokens(self.tokenizer, student, teacher),
                vocab_size=self._vocab_size(),
                generator=self.generator,
                **options,
            )
        self.note(generated_tokens=written.tokens)
        if writer == "both":
            self.note(accepted=written.accepted, judged=written.tokens)
        result = list(rows)
        for i, response in zip(asked, written.responses, strict=True):
            labels = [IGNORE] * len(prompts[i]) + response
            result[i] = {"id": rows[i]["id"], "input_ids": prompts[i] + response, "labels": labels}
            if writer == "student":
                result[i]["student_written"] = True
        return result

    def _max_length(self) -> int:
        """Tokens of the longest row that both models have positions for."""
        known = [position_limit(model) for model in (self.pair.student, self.pair.teacher)]
        return min([self.args.max_length, *(length for length in known if length is not None)])

    def _vocab_size(self) -> int:
        """Ids that both models know: one written by one of them is read by the other."""
        heads = [LinearHead.from_model(m) for m in (self.pair.student, self.pair.teacher) if m is not None]
        return min([len(head.weight) for head in heads] + [self.args.vocab_size or len(heads[0].weight)])

    def note(self, **values: float) -> None:
        """Add to the sums behind the next log entry."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def logs(self) -> dict[str, float]:
        """What happened since the last call.

        `generating_share` of the time; `generated_tokens_per_second` of generating; `student_written_share` of the
        rows, replayed ones too; SKD's `acceptance_rate`, the share of tokens that the student wrote; DistiLLM's `phi`.
        """
        sums = self._sums
        seconds = sums.pop("generating_seconds", 0.0)
        logs = {"generating_share": seconds / (time.perf_counter() - self.since)}
        if seconds:
            logs["generated_tokens_per_second"] = sums.pop("generated_tokens", 0.0) / seconds
            logs["student_written_share"] = sums.pop("student_written_rows") / sums.pop("rows")
        if "judged" in sums:
            logs["acceptance_rate"] = sums.pop("accepted") / sums.pop("judged")
        if "phi" in self.state:
            logs |= {"phi": self.state["phi"], "replay_rows": len(self.state["buffer"])}
        self._sums, self.since = {}, time.perf_counter()
        return logs | sums

    def on_evaluate(self, loss: float) -> None:
        """The held-out loss, for policies that adapt to it: DistiLLM's phi grows when it rises between evaluations."""
        if self.policy is replay:
            previous, self.state["previous"] = self.state["previous"], loss
            if previous is not None and loss >= previous + LOSS_RISE:
                self.state["phi"] = min(self.state["phi"] + PHI_STEP, 1.0)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.state))

    def load(self, path: Path) -> None:
        """Raises FileNotFoundError, but of a policy that has nothing to remember."""
        if not self.state:
            return
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected the sampler's state of this run; got no such file")
        self.state = json.loads(path.read_text())


def rows_of(batch: Mapping[str, Any]) -> list[Row]:
    """The rows that `okd.data.Collator` made a batch of."""
    lengths = batch["attention_mask"].sum(1).tolist()
    columns = zip(batch["ids"], batch["input_ids"].tolist(), batch["labels"].tolist(), lengths, strict=True)
    return [{"id": name, "input_ids": ids[:n], "labels": labels[:n]} for name, ids, labels, n in columns]


def dataset(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """The responses of the dataset."""
    return rows


def student(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """With probability `student_share` the student writes the batch (ImitKD, GKD; MiniLLM: always)."""
    share = sampler.args.preset.student_share if sampler.args.student_share is None else sampler.args.student_share
    return sampler.respond(rows) if sampler.coin < share else rows


def teacher(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """The teacher's responses (SeqKD), anew for each batch."""
    return sampler.respond(rows, "teacher")


def interleaved(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """The student's drafts, mended by the teacher (SKD, arXiv 2410.11325)."""
    return sampler.respond(rows, "both")


def paired(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """Twice the rows: the teacher's responses, then the student's to the same prompts (DistiLLM-2, arXiv 2503.07067).

    A row without a prompt comes once, as the dataset has it.
    """
    students = [row for row in sampler.respond(rows) if row.get("student_written")]
    return sampler.respond(rows, "teacher") + students


def replay(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """The dataset's, the student's or replayed rows, by DistiLLM's adaptive off-policy schedule (arXiv 2402.03898).

    u < phi (1 - t/T), or u < phi while the buffer is not full: the student writes, and its rows join the buffer, from
    which the oldest leave. Else u < phi: as many rows of the buffer, drawn without replacement. Else the dataset's.
    Each process has its own buffer.
    """
    phi, buffer, size = sampler.state["phi"], sampler.state["buffer"], sampler.args.replay_size
    if sampler.coin >= phi:
        return rows
    if sampler.coin < phi * (1 - sampler.pair.progress) or len(buffer) < size:
        written = sampler.respond(rows)
        buffer += [row for row in written if row.get("student_written")]
        del buffer[:-size]
        return written
    drawn = torch.randperm(len(buffer), generator=sampler.generator)[: len(rows)]
    return [buffer[i] for i in drawn.tolist()]


POLICIES: Mapping[str, Callable[[Sampler, list[Row]], list[Row]]] = {
    policy.__name__: policy for policy in (dataset, student, teacher, interleaved, paired, replay)
}
