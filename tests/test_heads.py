"""Heads read off real transformers models: the logits must be the model's own."""

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from okd.models import check_head, hidden_states
from okd.teachers import as_it_was
from okd_kernels import LinearHead

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}
RECURRENT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def newer(name, **options):
    """A model that not every version of transformers has that we support."""
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"no {name} in transformers {transformers.__version__}")
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SMALL, **options))


MODELS = {
    "llama": lambda: tiny.llama(),
    "gemma2: softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=3.0)),
    "cohere: logit_scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "granite: logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "recurrent gemma: another softcap": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            **{k: v for k, v in SMALL.items() if k in RECURRENT},
            logits_soft_cap=3.0,
            block_types=["recurrent", "attention"],
        )
    ),
    "hyperclovax: logits_scaling multiplies": lambda: newer("HyperCLOVAX", logits_scaling=0.25),
    "phi: bias": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
    "gpt2: tied, fused projections": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
}


def randomise(model):
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_models_own(name):
    model = randomise(MODELS[name]())
    ids = torch.randint(2, 64, (2, 9))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        ours = LinearHead.from_model(model).logits(hidden_states(model, ids, mask))
        theirs = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    check_head(model, "student")


@pytest.mark.parametrize("name", ["gemma2: softcap", "cohere: logit_scale", "granite: logits_scaling"])
def test_a_head_read_without_its_scale_is_noticed(name, monkeypatch):
    """What peers ignore silently: with the options dropped, check_head must refuse the model."""
    model = randomise(MODELS[name]())
    weight = model.get_output_embeddings().weight
    monkeypatch.setattr(LinearHead, "from_model", classmethod(lambda cls, m: cls(weight)))
    with pytest.raises(ValueError, match="expected the student's logits to be its head applied"):
        check_head(model, "student")


@pytest.mark.parametrize(
    "options, scale, softcap",
    [
        ({"output_multiplier": 0.25, "final_logit_softcapping": 30.0}, 0.25, 30.0),
        ({"logits_mup_width_multiplier": 4.0}, 0.25, None),
        ({"lm_head_multiplier": 2.0, "output_logit_soft_cap": 20.0}, 2.0, 20.0),
    ],
)
def test_scales_and_softcaps_by_their_names(options, scale, softcap):
    model = tiny.llama()
    model.config.update(options)
    head = LinearHead.from_model(model)
    assert (head.logit_scale, head.softcap) == (scale, softcap)


def test_a_scale_that_is_no_number_is_refused():
    model = tiny.llama()
    model.config.logit_scale = "inv_sqrt_d_model"  # MPT's
    with pytest.raises(TypeError, match="logit_scale as a number; got 'inv_sqrt_d_model'"):
        LinearHead.from_model(model)


def test_logits_at_no_ids():
    head = LinearHead(torch.randn(5, 3, requires_grad=True))
    assert head.logits_at(torch.randn(4, 3), torch.zeros(4, 0, dtype=torch.int64)).shape == (4, 0)


def test_peft_model_around_a_model():
    model = tiny.llama()
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert LinearHead.from_model(peft).weight is model.lm_head.weight


def adapted(**options):
    model = get_peft_model(
        tiny.llama(tie_word_embeddings=False), LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], **options)
    )
    return randomise(model)


def test_lora_on_the_head_is_honoured():
    """TRL #4612, axolotl #3206: ignored by others. Active, switched off and merged."""
    model = adapted(r=4, lora_alpha=6)
    ids = torch.randint(2, 64, (2, 9))
    mask = torch.ones_like(ids)

    def both():
        with torch.no_grad():
            ours = LinearHead.from_model(model).logits(hidden_states(model, ids, mask))
            return ours, model(input_ids=ids, attention_mask=mask).logits

    active = both()
    with as_it_was(model):
        base = both()
    model.merge_adapter()
    merged = both()
    for ours, theirs in (active, base, merged):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (active[0] - base[0]).abs().max() > 0.1
    check_head(model, "student")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_an_adapter_that_is_not_a_plain_lora_is_refused(options):
    with pytest.raises(TypeError, match="without dropout, DoRA or bias; got default: activate one"):
        LinearHead.from_model(adapted(**options).train())


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="may do more than a matrix product: merge adapters"):
        LinearHead.of(nn.Sequential(nn.Linear(4, 8)))


def test_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has none"):
        LinearHead.from_model(tiny.llama().model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bias": torch.zeros(9)}, r"bias of shape \(8,\), one for each row of its weight; got \(9,\)"),
        ({"logit_scale": 0.0}, "logit_scale > 0; got 0.0"),
        ({"softcap": -1.0}, "softcap > 0, or None for no softcap; got -1.0"),
        ({"bias": torch.zeros(8, device="meta")}, "bias on cpu, as its weight; got meta"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        LinearHead(torch.zeros(8, 4), **options)


def test_of_takes_a_weight_a_linear_layer_or_a_head():
    layer = nn.Linear(4, 8)
    assert LinearHead.of(layer).bias is layer.bias
    assert LinearHead.of(layer.weight).bias is None
    head = LinearHead(layer.weight)
    assert LinearHead.of(head) is head


def test_a_detached_head_is_the_same_number_without_a_gradient():
    shapes = ((8, 4), (8,), (2, 4), (8, 2))
    weight, bias, down, up = leaves = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    head = LinearHead(weight, bias, logit_scale=0.5, softcap=3.0, lora=(down, up, 0.7))
    hidden = torch.randn(5, 4, requires_grad=True)
    still = head.detach()
    assert (still.logit_scale, still.softcap, still.lora[2]) == (0.5, 3.0, 0.7)
    assert torch.equal(still.logits(hidden), head.logits(hidden))
    found = torch.autograd.grad(still.logits(hidden).sum(), [hidden, *leaves], allow_unused=True)
    assert found[0] is not None and found[1:] == (None,) * 4
    assert still.weight.data_ptr() == weight.data_ptr() and all(x.requires_grad for x in leaves)
    assert LinearHead(weight).detach().bias is None and LinearHead(weight).detach().lora is None


def test_a_sharded_weight_is_gathered(tmp_path):
    """FSDP2 outside of the root's forward: a DTensor must not slip into a GEMM, and its gradient is one, too."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        hidden, whole, ids = torch.randn(3, 4), torch.randn(8, 4), torch.tensor([[1, 7], [0, 0], [5, 2]])
        weight = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
        head, expected = LinearHead(weight), LinearHead(whole.requires_grad_())
        assert torch.equal(head.logits_at(hidden, ids), expected.logits_at(hidden, ids))
        for logits in (head.logits(hidden), expected.logits(hidden)):
            logits.square().sum().backward()
        assert weight.grad.placements == (Shard(0),) and torch.equal(weight.grad.full_tensor(), whole.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 1.5}], ids=str)
def test_logits_at_chosen_ids_are_those_of_all_logits(options, monkeypatch):
    """Values and gradients of everything the head has; ids that repeat; three tokens at a time."""
    monkeypatch.setattr("okd_kernels.heads.GATHERED_ELEMENTS", 3 * 4 * 8)
    n, k, v, d, r = 7, 4, 11, 8, 2
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((n, d), (v, d), (v,), (r, d), (v, r))
    ]
    hidden, weight, bias, down, up = leaves
    head = LinearHead(weight, bias, lora=(down, up, 0.7), **options)
    ids = torch.randint(0, v, (n, k))
    ids[:, 1] = ids[:, 0]
    ours, truth = head.logits_at(hidden, ids), head.logits(hidden).gather(1, ids)
    torch.testing.assert_close(ours, truth)
    upstream = torch.randn(n, k, dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (ours, truth)), strict=True):
        torch.testing.assert_close(one, other)


def test_logits_at_chosen_ids_are_not_rounded():
    """bf16 operands, also through autocast: products are summed and kept in fp32, gradients come in the operands'."""
    hidden, weight = (torch.randn(*s).bfloat16().requires_grad_() for s in ((5, 64), (9, 64)))
    ids = torch.randint(0, 9, (5, 3))
    truth = (hidden.float() @ weight.float().T).gather(1, ids)
    with torch.autocast("cpu", torch.bfloat16):
        ours = LinearHead(weight).logits_at(hidden, ids)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    ours.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_hidden_states_of_embeddings_are_those_of_their_tokens():
    ids, mask = torch.randint(2, 64, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    for model in (tiny.llama(), adapted()):
        embeddings = model.get_input_embeddings()(ids)
        ours = hidden_states(model, None, mask, inputs_embeds=embeddings)
        torch.testing.assert_close(ours, hidden_states(model, ids, mask))
