"""How close is the student to its teacher, where it is not, and how good are its answers?

A falling OKD training loss says little, because its target moves with the student. So everything here is measured
against the teacher as it was before training, its online module switched off, over all response tokens of given rows.

A row is `{"id": str, "input_ids": list[int], "labels": list[int]}`, as `okd.encoding.encode` makes them.
Shapes: B rows padded to T tokens, N of which come before a response token; D the hidden size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd.answers import SAMPLED, batches, generate_answers, padding_token, rouge_l, seeded
from okd.clock import EVALUATING, timed
from okd.data import IGNORE, Batch, Collator, Row, on_device
from okd.encoding import encoded_rows
from okd.meters import not_counted
from okd.models import device_of, evaluating, response_rows
from okd.objectives import cross_entropy_of
from okd.teachers import as_it_was, head_of_judge, rows_of_judge
from okd_kernels import LinearHead, Outcomes, linear_distillation_loss, linear_outcome_distillation_loss

STATISTICS = ("student_nll", "teacher_nll", "forward_kl", "reverse_kl", "top1_agreement")  # of the loss, per token


def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    vocab_size: int | None = None,
    outcomes: tuple[Outcomes, Outcomes] | None = None,
    generate: int | None = None,
    max_new_tokens: int = 64,
    seeds: int | None = None,
    progress: bool = True,
    in_step: bool = False,
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """(metrics, answers): `divergence_metrics` of all `rows`, and ROUGE-L of answers to the first `generate` of them.

    `generate=None` answers every row, 0 none. It adds `rouge_l` (0 to 100; None when nothing was answered) to the
    metrics, and two counts, `rows` and `answers`. Answers are greedy; with `seeds` of 2 or more they are sampled from q
    itself (T = 1) once for each seed 0, 1, ...: `rouge_l` is then the mean over seeds, `rouge_l_std` their standard
    deviation (of n - 1), and the answers returned are those of seed 0. `in_step`: all processes write as long as one
    does, as models whose weights are divided want. Raises ValueError where `divergence_metrics`
    does.
    """
    if generate is not None and generate < 0:
        raise ValueError(f"expected generate to be a number of rows >= 0, got {generate}; pass None to answer all rows")
    if seeds is not None and seeds < 1:
        raise ValueError(f"expected seeds >= 1, got {seeds}; 1 answers greedily, as None does")
    pad_token_id = padding_token(tokenizer)
    divergences = divergence_metrics(
        student,
        teacher,
        rows,
        pad_token_id=pad_token_id,
        batch_size=batch_size,
        vocab_size=vocab_size,
        outcomes=outcomes,
        progress=progress,
    )
    sampled = seeds is not None and seeds > 1
    answers: list[list[dict[str, Any]]] = []
    for seed in range(seeds or 1):
        with seeded(seed, student):
            answers.append(
                generate_answers(
                    student,
                    tokenizer,
                    islice(rows, generate),
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    progress=progress,
                    **(SAMPLED if sampled else {}),
                    **({"synced_gpus": True} if in_step else {}),
                )
            )
    scores = [rouge_l(a) for a in answers if a]
    metrics = {**divergences, "rouge_l": statistics.fmean(scores) if scores else None}
    if sampled:
        metrics["rouge_l_std"] = statistics.stdev(scores) if scores else None
    return {**metrics, "rows": len(rows), "answers": len(answers[0])}, answers[0]


def divergence_metrics(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    rows: Iterable[Row],
    *,
    pad_token_id: int,
    batch_size: int = 8,
    vocab_size: int | None = None,
    outcomes: tuple[Outcomes, Outcomes] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Means over all response tokens y of `rows`, with p the *unadapted* teacher and q the student.

    `forward_kl` KL(p‖q) and `reverse_kl` KL(q‖p) in nats; `perplexity` exp(mean of -log q(y)) and `teacher_perplexity`;
    `top1_agreement`, the share of tokens with argmax p = argmax q; `tokens`, their number. With `teacher=None` only
    `perplexity` and `tokens`. Over the first `vocab_size` ids, or all that both heads
    have: padding that they share counts unless it is cut off. Sums are float64:
    the batch size changes nothing beyond the models' own rounding.

    Each also with `_easy` and `_hard`: over the half of the tokens that the teacher finds easier and over the rest, by
    its uncertainty UNC = 1 - p(y) (arXiv 2409.12512); `unc_median` is the largest UNC of an easy token. Tokens of equal
    UNC count as easier the earlier they come in `rows`; a single token has no halves.

    Of a teacher with a tokenizer of its own (rows by an `okd.alignment.Alignment`, `outcomes` by its method of that
    name): divergences and agreement over outcomes, as means over the aligned positions, `aligned` their number;
    perplexities over all response tokens, of each model its own; no halves.

    Raises ValueError for rows without a response token or with an id outside a model's vocabulary, and if student and
    teacher are one model.
    """
    rows = [row for row in rows if any(label != IGNORE for label in row["labels"][1:])]  # none predicts a first token
    if not rows:
        raise ValueError("expected a row with a response token, got none; pass rows whose labels are not all -100")
    options: dict[str, Any] = {"pad_token_id": pad_token_id, "batch_size": batch_size, "progress": progress}
    if teacher is not None and "aligned" in rows[0]:
        if outcomes is None:
            raise ValueError(
                "expected outcomes to compare models of two tokenizers by; got None: pass those of the Alignment that "
                "made the rows"
            )
        return _aligned_metrics(student, teacher, rows, outcomes, **options)
    tokens = torch.cat(token_statistics(student, teacher, rows, vocab_size=vocab_size, **options), dim=1)
    metrics = _means(tokens)
    if teacher is None:
        return {"perplexity": metrics["perplexity"], "tokens": tokens.shape[1]}
    nll = tokens[STATISTICS.index("teacher_nll")]  # increases with UNC = 1 - exp(-nll), and rounds it away less
    order = nll.argsort(stable=True)
    easy, hard = order[: (len(order) + 1) // 2], order[(len(order) + 1) // 2 :]
    if len(hard):
        metrics |= {f"{name}_easy": value for name, value in _means(tokens[:, easy]).items()}
        metrics |= {f"{name}_hard": value for name, value in _means(tokens[:, hard]).items()}
        metrics["unc_median"] = -math.expm1(-nll[easy[-1]].item())
    return {**metrics, "tokens": tokens.shape[1]}


def _means(tokens: torch.Tensor) -> dict[str, float]:  # (len(STATISTICS), n)
    mean = dict(zip(STATISTICS, tokens.mean(dim=1).tolist(), strict=True))
    perplexity, teacher_perplexity = (_exp(mean.pop(name)) for name in ("student_nll", "teacher_nll"))
    return {"perplexity": perplexity, "teacher_perplexity": teacher_perplexity, **mean}


def _aligned_metrics(
    student: Any, teacher: Any, rows: Sequence[Row], outcomes: tuple[Outcomes, Outcomes], **options: Any
) -> dict[str, float]:
    sums = dict.fromkeys(STATISTICS, 0.0)
    counts = dict.fromkeys(STATISTICS, 0)
    for _, batch, (student_hidden, student_head, teacher_hidden, teacher_head) in _compared(
        student, teacher, rows, **options
    ):
        ours, theirs = batch["aligned"]
        of_student, of_teacher = (of.to(ours.device) for of in outcomes)
        loss = linear_outcome_distillation_loss(
            *(student_hidden[ours], student_head, of_student),
            *(teacher_hidden[theirs], teacher_head, of_teacher),
        )
        found = {name: loss.metrics[name] for name in STATISTICS}
        nlls = (
            ("student_nll", student_hidden, student_head, batch["targets"]),
            ("teacher_nll", teacher_hidden, teacher_head, batch["teacher_targets"]),
        )
        for name, hidden, head, targets in nlls:
            found[name] = cross_entropy_of(hidden, head, targets, 1.0).metrics["student_nll"]
        for name, values in found.items():
            sums[name] += values.double().sum().item()
            counts[name] += len(values)
    mean = {name: sums[name] / max(counts[name], 1) for name in STATISTICS}
    perplexities = {"perplexity": _exp(mean.pop("student_nll")), "teacher_perplexity": _exp(mean.pop("teacher_nll"))}
    return {**perplexities, **mean, "tokens": counts["student_nll"], "aligned": counts["forward_kl"]}


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def token_statistics(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    batch_size: int = 8,
    vocab_size: int | None = None,
    progress: bool = True,
) -> list[torch.Tensor]:
    """Of each row, in order, `STATISTICS` of its response tokens: (len(STATISTICS), n_i), float64 on the CPU.

    The teacher's online module is off. Without a teacher the student stands in for it: that takes one forward a batch.
    """
    result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    options: dict[str, Any] = {"pad_token_id": pad_token_id, "batch_size": batch_size, "progress": progress}
    for indices, batch, given in _compared(student, teacher, rows, **options):
        sizes = [len(head.weight) for head in given[1::2]]
        # compact: all rows are counted
        loss = linear_distillation_loss(*given, batch["targets"], vocab_size=vocab_size or min(sizes), compact=False)
        # on the CPU: one transfer a batch, and not every accelerator has float64
        tokens = torch.stack([loss.metrics[name] for name in STATISTICS]).cpu().double()
        for index, of_row in zip(indices, tokens.split(batch["counts"], dim=1), strict=True):
            result[index] = of_row
    return result


def _compared(
    student: Any,
    teacher: Any,
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[Sequence[int], Batch, tuple[Any, LinearHead, Any, LinearHead]]]:
    """Indices of the rows of a batch, the batch, and hidden states and head of both models."""
    if teacher is student:
        raise ValueError(
            "expected two models, got one as student and teacher; load the teacher apart, as its adapter is off here "
            "while the student's is on"
        )
    collate: Any = Collator(pad_token_id)
    if (cache := getattr(teacher, "cache", None)) is not None:
        collate = cache.collating(collate)
    modules = [m for m in (student, teacher) if isinstance(m, torch.nn.Module)]
    with evaluating(*modules), nullcontext() if teacher is None else as_it_was(teacher) as judge:
        device = device_of(student)
        student_head = _head(student, "student", rows, device)
        teacher_head = student_head if judge is None else _head(judge, "teacher", rows, device)
        items = list(enumerate(rows))
        for part in batches(items, lambda item: len(item[1]["input_ids"]), batch_size, "divergence", progress):
            indices, batch_rows = zip(*part, strict=True)
            batch = on_device(collate(batch_rows), device)
            student_hidden = response_rows(student, batch)
            teacher_hidden = student_hidden if judge is None else rows_of_judge(judge, batch)
            yield indices, batch, (student_hidden, student_head, teacher_hidden, teacher_head)


def _head(model: PreTrainedModel, name: str, rows: Iterable[Row], device: torch.device) -> LinearHead:
    """The model's head. Raises ValueError if an id in `rows` lies outside its vocabulary, which crashes a GPU."""
    head = head_of_judge(model, device)
    ids = (row.get("teacher_input_ids", row["input_ids"]) if name == "teacher" else row["input_ids"] for row in rows)
    largest = max(map(max, ids))
    if largest >= len(head.weight):
        raise ValueError(
            f"expected token ids below {len(head.weight)}, the {name}'s vocabulary size, got {largest}; use the "
            "model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))"
        )
    return head


class Evaluation:
    """A trainer's evaluations, by the same route as the command's."""

    accelerator: Any
    alignment: Any
    args: Any
    callback_handler: Any
    control: Any
    data_collator: Any
    ends: set[int]
    eval_dataset: Any
    fill_held_out: Any
    inside: Any
    log: Any
    meters: Any
    pair: Any
    sampler: Any
    state: Any
    tokenizer: Any
    _prepare_inputs: Any

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Divergences, perplexity and top-1 agreement on held-out rows, against the teacher as it was.

        `eval_loss` is KL(p || q), whatever divergence trains, so that methods compare; without a teacher that judges
        the NLL, with several ones the method's distillation loss. Of a mapping, each set under `eval_<name>_`. Raises
        ValueError without rows, or of divided models before a training has begun.
        """
        rows: Any = (
            self.eval_dataset
            if eval_dataset is None
            else encoded_rows(eval_dataset, self.tokenizer, self.args, self.ends, self.alignment)
        )
        if rows is None:
            raise ValueError("expected an eval_dataset; got None: pass one to OKDTrainer or to evaluate")
        if isinstance(rows, Mapping):
            metrics: dict[str, float] = {}
            for i, (name, part) in enumerate(rows.items()):
                metrics |= self._evaluate_set(
                    part, f"{metric_key_prefix}_{name}", adapts=eval_dataset is None and i == 0
                )
            return metrics
        # what others evaluate in between is nothing that the method should adapt to
        return self._evaluate_set(rows, metric_key_prefix, adapts=eval_dataset is None)

    def _evaluate_set(self, rows: Sequence[Row], prefix: str, adapts: bool) -> dict[str, float]:
        with timed(EVALUATING), not_counted(self.meters, self.sampler):
            found = self.measured(rows)
            if adapts:
                self.sampler.on_evaluate(found["cross_entropy"])
            metrics = {f"{prefix}_{name}": value for name, value in found.items() if name != "cross_entropy"}
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measured(self, rows: Sequence[Row]) -> dict[str, float]:
        """The metrics, without a prefix, `loss` among them; and the labels' `cross_entropy`."""
        teacher = self.pair.teacher
        self.fill_held_out(rows)
        with self.accelerator.autocast():
            found = self.inside(
                lambda: divergence_metrics(
                    self.pair.student,
                    teacher if teacher is not None and teacher.judges else None,
                    rows,
                    pad_token_id=self.tokenizer.pad_token_id,
                    batch_size=self.args.per_device_eval_batch_size,
                    vocab_size=self.args.vocab_size,
                    outcomes=self.pair.outcomes,
                    progress=not self.args.disable_tqdm,
                )
            )
        nll = math.log(found["perplexity"]) if found["perplexity"] else 0.0
        loss = found.get("forward_kl", nll)
        if self.pair.method.takes_several:  # the KL to the first teacher is not what these students minimise
            loss = self.held_out_means(rows)["distillation_loss"]
        return {**found, "loss": loss, "cross_entropy": nll}

    def held_out_means(self, rows: Sequence[Row], loss: Any = None) -> dict[str, float]:
        """Means over the response tokens of held-out, encoded rows: the metrics of the method's loss, or another."""
        size, tokens = self.args.per_device_eval_batch_size, 0
        sums: dict[str, float] = {}
        with evaluating(self.pair), self.accelerator.autocast():
            for start in range(0, len(rows), size):
                batch = self._prepare_inputs(self.data_collator(rows[start : start + size]))
                for name, values in self.pair(batch, loss=loss).metrics.items():
                    sums[name] = sums.get(name, 0.0) + values.double().sum().item()
                tokens += len(batch["targets"])
        return {name: value / max(tokens, 1) for name, value in sums.items()}

    def first_eval_set(self) -> list[Row]:
        """The evaluation set that the method adapts to: of several by name the first."""
        rows: Any = self.eval_dataset
        return next(iter(rows.values())) if isinstance(rows, Mapping) else rows

    def held_out_batches(self) -> Any:
        """Held-out batches, one after the other, for a reward that asks how good the student has become."""
        rows: Any = self.eval_dataset
        if isinstance(rows, Mapping) or not rows:
            raise ValueError("expected an eval_dataset with selection_reward=dev, which is measured on it; got none")
        size = self.args.per_device_eval_batch_size

        def batch() -> Batch:
            start = self.pair.seed[1] * size
            return self._prepare_inputs(self.data_collator([rows[(start + i) % len(rows)] for i in range(size)]))

        return batch
