"""Time and memory of whole training steps, ours and with whole logits: `python -m benchmarks.step --help`.

Each candidate is a method of `okd.METHODS` run by `OKDTrainer` itself: fetching, generating where the method
does, both models' forward, the loss, backward, clipping and AdamW. "eager" swaps the pair's `distil`, and nothing else,
for the loss that trainers write, on the same response rows. Every round runs each candidate in a fresh process, through
the list and back by turns; its first steps are discarded. Rows are random tokens, half prompt and half response, and no
response ends early, so that all candidates train on equally many tokens.

With `--epochs`, the steps go over one set of rows so many times. A candidate with `teacher_cache=new` fills a cache of
its own before its first step, whose time has that in it; the sum over all epochs says what it comes to.

With `--beside METHOD` each candidate runs at the same time as that one, each on a CPU core of its own with one thread,
and the cores change at each round: what slows a shared machine slows both, and the ratio is of the two.

Of a step, "loss" is from hidden states to their gradients: the call of `distil`, and in the backward pass the time from
the gradient of the loss until the first model goes backward. "Generating" is all before the first forward pass. Memory:
peak resident set on a CPU, the allocator's peak on a GPU, over all steps, weights included.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from benchmarks import peers
from benchmarks.loss import DTYPES, environment, peak_rss
from benchmarks.variants import VARIANTS
from okd import METHODS, OKDConfig, OKDTrainer
from okd.config import GROUPS, MethodLike
from okd.data import IGNORE
from okd.layers import keep_layers, parse_layers
from okd.models import SMOLLM2, load_model
from okd_kernels import DistillationLoss, LinearHead

LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "bos_token_id": None}
CONFIGS = {  # of models with random weights; 1b and 8b have the shapes of Llama 3
    "llama-tiny": LLAMA
    | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "llama-8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    # as the last two are to one another, on a CPU: 7 times the weights below the head, and the heads' share of them
    "llama-14m": LLAMA
    | {"vocab_size": 10240, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    | {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-98m": LLAMA
    | {"vocab_size": 10240, "hidden_size": 768, "intermediate_size": 2688, "num_hidden_layers": 12}
    | {"num_attention_heads": 12, "num_key_value_heads": 3, "tie_word_embeddings": False},
}
DEFAULT_METHODS = ("forward_kd", "okd", "okd:online_layers=0.333", "gkd:student_share=1.0")
EAGER = ("forward_kd", "okd")  # run with whole logits too
KNOWN = {**METHODS, **VARIANTS}
CACHED = "forward_kd:teacher_cache=new", "okd:online_layers=0.333,teacher_cache=new"
RATIOS = (
    ("okd", "forward_kd"),
    ("okd:online_layers=0.333", "forward_kd"),
    ("gkd:student_share=1.0", "okd"),
    (CACHED[0], "forward_kd"),
    (CACHED[1], "forward_kd"),
    (CACHED[1], "okd"),
)


def parse_variant(text: str) -> tuple[MethodLike, dict[str, Any]]:
    """Method and options of "okd:teacher_kl_weight=0.9,online_rank=16". Raises ValueError for what neither knows."""
    method, _, rest = text.partition(":")
    if method not in KNOWN:
        raise ValueError(f"expected a method out of {', '.join(KNOWN)}; got {method!r}")
    return VARIANTS.get(method, method), parse_options(rest.split(",") if rest else [])


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of `OKDConfig` from "name=value" texts; a value is a Python literal, else a string."""
    options = {}
    known = {field.name for field in dataclasses.fields(OKDConfig) if field.init}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name not in known:
            raise ValueError(f"expected name=value with an option of OKDConfig; got {text!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def read_by(method: MethodLike, own: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """Of options `common` to all methods, those that a method with options of its `own` reads; transformers' all."""
    kept: dict[str, Any] = {}
    while True:  # one option, such as online_teacher, may have others read
        resolved = OKDConfig(use_cpu=True, method=method, **{**kept, **own}).resolved
        unread = {x.name for group in GROUPS if group not in resolved.option_groups for x in dataclasses.fields(group)}
        found = {name: value for name, value in common.items() if name not in unread}
        if found == kept:
            return kept
        kept = found


class Clock(TrainerCallback):
    """Seconds of each training step, from the end of the last to its own; logging and evaluation between are left out.

    Attributes:
        steps: seconds of each step.
        before: of these, those before the first forward pass: fetching the batch, and generating where a method does.
    """

    def __init__(self, device: str):
        self.device = device
        self.steps: list[float] = []
        self.before: list[float] = []
        self._since = 0.0

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _restart(self, *_: Any, **__: Any) -> None:
        self._since = self._now()

    on_train_begin = on_log = on_evaluate = on_save = _restart

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.before.append(self._now() - self._since)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(self._now() - self._since)
        self._restart()


class LossClock:
    """Stands in for a pair's `distil`, and notes when it and its backward pass begin and end.

    Attributes:
        tokens: rows of each call.
    """

    def __init__(self, distil: Callable[..., DistillationLoss], device: str):
        self.distil, self.device = distil, device
        self.tokens: list[int] = []
        self._marks: list[list[Any]] = []

    def _mark(self) -> Any:
        """A point in time: of the device's queue, where it has one, which it does not hold up."""
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(
        self, student: Tensor, teacher: Tensor, targets: Tensor, /, *args: Any, **options: Any
    ) -> DistillationLoss:
        marks = [self._mark()]
        loss = self.distil(student, teacher, targets, *args, **options)
        marks += [self._mark(), None, None]  # forward: begin, end; backward: begin, end
        self._marks.append(marks)
        self.tokens.append(len(targets))

        def begin(_: Tensor) -> None:
            marks[2] = marks[2] or self._mark()

        def end(_: Tensor) -> None:
            # Called when the model that made the rows is about to go backward. Autograd goes back through what was done
            # last first: the loss, one model, the other; so the first call counts.
            marks[3] = marks[3] or self._mark()

        for tensors, hook in (((loss.student, loss.teacher), begin), ((student, teacher), end)):
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    tensor.register_hook(hook)
        return loss

    def seconds(self) -> list[float]:
        """Of each call, forward and backward."""
        if self.device != "cuda":
            return [b - a + d - c for a, b, c, d in self._marks]
        torch.cuda.synchronize()
        return [(a.elapsed_time(b) + c.elapsed_time(d)) / 1e3 for a, b, c, d in self._marks]


def eager_distil(pair: Any) -> Callable[..., DistillationLoss]:
    """`StudentTeacher.distil` from whole logits, by `benchmarks.peers.eager`: a batch's mean, no accumulation."""
    online = pair.teacher_objective is not None
    divergence = "okd" if online else pair.student_objective.divergence
    weight = pair.teacher_objective.weight if online else peers.OKD_WEIGHT
    if divergence not in peers.DIVERGENCES or weight != peers.OKD_WEIGHT:
        raise ValueError(f"expected what peers.eager can: {', '.join(peers.DIVERGENCES)}; got {divergence}, a {weight}")

    def distil(
        student: Tensor, teacher: Tensor, targets: Tensor, /, normalizer: Any = None, **_: Any
    ) -> DistillationLoss:
        heads = [head.weight for head in (pair.student_head(), pair.teacher_head())]
        return DistillationLoss(peers.eager(student, heads[0], teacher, heads[1], targets, divergence), None, {})

    return distil


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Since `reset_peak`: of the allocator on a GPU, of the resident set elsewhere."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss()


def model(source: str, dtype: str, device: str, seed: int) -> Any:
    """A model with random weights from a name out of `CONFIGS` or a JSON configuration, or a saved one."""
    if source not in CONFIGS and not source.endswith(".json"):
        return load_model(source, DTYPES[dtype]).to(device)
    config = dict(CONFIGS[source] if source in CONFIGS else json.loads(Path(source).read_text()))
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config), dtype=DTYPES[dtype]
        )


def rows(count: int, length: int, vocab_size: int) -> list[dict[str, Any]]:
    """Random tokens, half of them prompt, half response."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocab_size, (count, length), generator=generator).tolist()
    prompt = length // 2
    return [{"id": str(i), "input_ids": x, "labels": [IGNORE] * prompt + x[prompt:]} for i, x in enumerate(ids)]


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps in this process; what was measured of each of them, the warm-up left out."""
    device, length, epochs = job["device"], job["length"], job.get("epochs")
    if job.get("core") is not None:
        os.sched_setaffinity(0, {job["core"]})
        torch.set_num_threads(1)
    count, warmup = (epochs * job["steps"], job["steps"]) if epochs else (job["warmup"] + job["steps"], job["warmup"])
    student, teacher = (
        model(job[side], job["dtype"], device, seed) for seed, side in enumerate(("student", "teacher"))
    )
    method, options = parse_variant(job["variant"])
    options = {**read_by(method, options, {"max_new_tokens": length - length // 2}), **options}
    for one in (student, teacher):
        one.generation_config.eos_token_id = None  # nor has the tokenizer an end: responses are as long as they may be
    # one word, its padding: rows are tokens already
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>")
    with tempfile.TemporaryDirectory() as folder:
        if "teacher_cache" in options:
            options["teacher_cache"] = f"{folder}/cache"
        args = OKDConfig(
            output_dir=folder,
            method=method,
            max_steps=count,
            per_device_train_batch_size=job["batch_size"],
            max_length=length,
            learning_rate=1e-6,
            logging_strategy="no",
            logging_first_step=False,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            **options,
        )
        vocab_size = min(len(LinearHead.from_model(m).weight) for m in (student, teacher))
        data = rows(count // (epochs or 1) * job["batch_size"], length, vocab_size)
        clock = Clock(device)
        trainer = OKDTrainer(student, teacher, args, data, processing_class=tokenizer, callbacks=[clock])
        loss = LossClock(trainer.pair.distil if job["loss"] == "ours" else eager_distil(trainer.pair), device)
        trainer.pair.distil = loss
        reset_peak(device)
        trainer.train()
        kept = sum(file.stat().st_size for file in Path(folder).glob("cache/**/*.safetensors"))
    if len(loss.tokens) != count:
        raise ValueError(
            f"expected a method that calls distil once a step, as forward_kd does; got {len(loss.tokens)} calls in "
            f"{count} steps of {job['variant']}: time it with benchmarks.methods"
        )
    measured = slice(warmup, None)
    starts = range(0, count, job["steps"]) if epochs else ()
    return {
        "epochs_s": [sum(clock.steps[i : i + job["steps"]]) for i in starts],
        "cache_bytes": kept,
        "step_s": clock.steps[measured],
        "before_s": clock.before[measured],
        "loss_s": loss.seconds()[measured],
        "tokens": loss.tokens[measured],
        "peak_bytes": peak_bytes(device),
    }


def subprocess_job(module: str, job: dict[str, Any]) -> dict[str, Any]:
    """The job in a fresh process of `python -m module --job`, which prints its result as its last line.

    Raises RuntimeError with the end of what it wrote.
    """
    command = [sys.executable, "-m", module, "--job", json.dumps(job)]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines()
    if result.returncode or not lines:
        raise RuntimeError(f"{module} exited with {result.returncode}: {result.stderr.strip()[-2000:]}")
    return json.loads(lines[-1])


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one candidate over its rounds: medians of its steps, its largest peak."""
    step, before, loss, tokens = (
        [x for result in results for x in result[name]] for name in ("step_s", "before_s", "loss_s", "tokens")
    )
    epochs = [sum(result["epochs_s"]) for result in results if result["epochs_s"]]
    return {
        "epochs_s": statistics.median(epochs) if epochs else None,
        "median_s": statistics.median(step),
        "min_s": min(step),
        "tokens": statistics.fmean(tokens),
        "tokens_per_second": sum(tokens) / sum(step),
        "loss_share": sum(loss) / sum(step),
        "generating_share": sum(before) / sum(step),
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "rounds": results,
    }


def show(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    print(f"\n{'':<44}{'':<7}{'ms/step':>9}{'min':>9}{'tokens/s':>10}{'loss':>7}{'generating':>12}{'peak MiB':>10}")
    for (variant, loss), x in found.items():
        print(
            f"{variant:<44}{loss:<7}{1e3 * x['median_s']:>9.1f}{1e3 * x['min_s']:>9.1f}{x['tokens_per_second']:>10.1f}"
            f"{x['loss_share']:>7.1%}{x['generating_share']:>12.1%}{x['peak_bytes'] / 2**20:>10.0f}"
        )
    for (variant, loss), x in found.items():
        if x["epochs_s"] is not None:
            kept = statistics.fmean(result["cache_bytes"] for result in x["rounds"]) / 2**20
            print(f"{variant:<44}{loss:<7}all epochs {x['epochs_s']:.1f} s, kept {kept:.1f} MiB")
    pairs = [((a, "ours"), (b, "ours")) for a, b in RATIOS] + [((name, "eager"), (name, "ours")) for name in EAGER]
    for a, b in pairs:
        if a in found and b in found:
            time_ratio, memory_ratio = (found[a][key] / found[b][key] for key in ("median_s", "peak_bytes"))
            print(f"{' '.join(a)} / {' '.join(b)}: time {time_ratio:.2f}, peak memory {memory_ratio:.2f}")


def run_beside(jobs: Sequence[dict[str, Any]], cores: Sequence[int]) -> list[dict[str, Any]]:
    """Results of jobs that run at once, each on its core. Raises RuntimeError where one fails."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        placed = [{**job, "core": core} for job, core in zip(jobs, cores, strict=True)]
        return list(pool.map(lambda job: subprocess_job("benchmarks.step", job), placed))


def beside(args: argparse.Namespace, shape: dict[str, Any], variants: Sequence[str]) -> list[dict[str, Any]]:
    """Of each candidate its figures, the other's of the same time, and ratios of the two, by round."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    pairs: dict[str, list[list[dict[str, Any]]]] = {variant: [] for variant in variants if variant != args.beside}
    for i in range(args.rounds):
        for variant, rounds in pairs.items():
            jobs = [{**shape, "variant": v, "loss": "ours"} for v in (variant, args.beside)]
            rounds.append(run_beside(jobs, cores[:: 1 if i % 2 == 0 else -1]))
            found = [statistics.median(result["step_s"]) for result in rounds[-1]]
            print(f"round {i + 1}: {variant}: {found[0]:.2f} s/step, {args.beside}: {found[1]:.2f}", flush=True)
    table = []
    for variant, rounds in pairs.items():
        ratios = {
            "step": [statistics.median(a["step_s"]) / statistics.median(b["step_s"]) for a, b in rounds],
            "epochs": [sum(a["epochs_s"]) / sum(b["epochs_s"]) for a, b in rounds if a["epochs_s"]],
            "peak": [a["peak_bytes"] / b["peak_bytes"] for a, b in rounds],
        }
        own, other = (summarise([pair[i] for pair in rounds]) for i in (0, 1))
        table.append({"variant": variant, **own, "beside": other, "ratios": ratios})
        means = {name: statistics.fmean(x) for name, x in ratios.items() if x}
        print(f"{variant} / {args.beside}: {', '.join(f'{name} {x:.3f}' for name, x in means.items())}")
    return table


def save_models(args: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """(student, teacher) as jobs load them: real models from safetensors, as GGUF takes long to dequantise."""
    teacher, student = args.teacher, args.student
    if student is None:
        whole = load_model(teacher)
        n_layers = whole.config.get_text_config().num_hidden_layers
        keep_layers(whole, parse_layers(args.student_layers, n_layers)).save_pretrained(folder / "student")
        whole.save_pretrained(folder / "teacher")
        student, teacher = str(folder / "student"), str(folder / "teacher")
    return student, teacher


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    source = f"model or, with random weights, {', '.join(CONFIGS)} or a JSON configuration"
    add("--teacher", help=f"{source}; default: {SMOLLM2}, or llama-8b on a GPU")
    add("--student", help=f"{source}; default: layers of the teacher, or llama-1b on a GPU")
    add("--student-layers", default="0-9,20-29", help="of the teacher; default: %(default)s")
    add(
        "--methods",
        nargs="+",
        default=DEFAULT_METHODS,
        metavar="METHOD[:OPTION=VALUE,...]",
        help="default: %(default)s",
    )
    add("--eager", nargs="*", default=EAGER, metavar="METHOD", help="of these, also with whole logits")
    add("--batch-size", type=int, default=4)
    add("--length", type=int, help="tokens of a row; default: 256, or 1024 on a GPU")
    add("--steps", type=int, help="measured steps of a process; default: 3, or 8 on a GPU")
    add("--beside", metavar="METHOD", help="run each at the same time as this one, on a core each")
    add("--epochs", type=int, help="passes over the rows of --steps steps, in place of a warm-up")
    add("--warmup", type=int, help="steps before them; default: 1, or 3 on a GPU")
    add("--rounds", type=int, default=2, help="processes of each candidate")
    add("--dtype", choices=DTYPES, help="default: fp32, or bf16 on a GPU")
    add("--output", type=Path, help="default: benchmarks/results/DATE-DEVICE-step.json")
    add("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    for name, cpu, cuda in (("length", 256, 1024), ("steps", 3, 8), ("warmup", 1, 3), ("dtype", "fp32", "bf16")):
        if getattr(args, name) is None:
            setattr(args, name, cuda if gpu else cpu)
    if args.teacher is None:
        args.teacher, args.student = ("llama-8b", args.student or "llama-1b") if gpu else (SMOLLM2, args.student)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.job:
        print(json.dumps(run_job(json.loads(args.job))))
        return
    absent = [variant for variant in args.methods if variant.partition(":")[0] not in KNOWN]
    for variant in absent:
        print(f"skipped: {variant}, which is no method of this version")
    variants = [variant for variant in args.methods if variant not in absent]
    for variant in variants:
        parse_variant(variant)
    candidates = [(v, loss) for v in variants for loss in ("ours", "eager") if loss == "ours" or v in args.eager]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {candidate: [] for candidate in candidates}
    failures: dict[str, str] = {}
    about = environment(args.device)
    default = Path(__file__).parent / "results" / f"{about['date'][:19].replace(':', '')}-{args.device}-step.json"
    path = args.output or default
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items() if name != "job"}

    def save() -> dict[tuple[str, str], dict[str, Any]]:
        """After each process: a run that is cut off has what it has."""
        found = {candidate: summarise(x) for candidate, x in results.items() if x}
        table = [{"variant": variant, "loss": loss, **x} for (variant, loss), x in found.items()]
        whole = {**about, "arguments": options, "skipped": absent, "failed": failures, "results": table}
        path.write_text(json.dumps(whole, indent=1) + "\n")
        return found

    print(f"{about['device']}, {about['threads']} threads, commit {about['commit']}, {about['versions']}")
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = save_models(args, Path(folder))
        sizes = ("device", "dtype", "batch_size", "length", "steps", "warmup", "epochs")
        shape = {name: getattr(args, name) for name in sizes}
        if args.beside:
            table = beside(args, {**shape, "student": student, "teacher": teacher}, variants)
            path.write_text(json.dumps({**about, "arguments": options, "results": table}, indent=1) + "\n")
            print(f"\n{path}")
            return
        for i in range(args.rounds):
            for variant, loss in candidates[:: 1 if i % 2 == 0 else -1]:
                job = {**shape, "student": student, "teacher": teacher, "variant": variant, "loss": loss}
                try:
                    results[variant, loss].append(subprocess_job("benchmarks.step", job))
                except RuntimeError as error:  # one that does not fit the device should not cost the others
                    failures[f"{variant}, {loss}"] = str(error)
                    print(f"round {i + 1}: {variant}, {loss}: FAILED: {str(error).splitlines()[-1]}", flush=True)
                else:
                    seconds = statistics.median(results[variant, loss][-1]["step_s"])
                    print(f"round {i + 1}: {variant}, {loss}: {1e3 * seconds:.1f} ms/step", flush=True)
                save()
    show(save())
    print(f"\n{path}")


if __name__ == "__main__":
    main()
