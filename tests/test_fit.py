"""Student, teacher and tokenizer that fit one another, or do not: what is refused, and what is settled by itself."""

import json

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconConfig,
    GPTNeoXConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MptConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from okd import OKDConfig, OKDTrainer
from okd.cli import main, parse_train
from okd.encoding import encode
from okd.online import attach_online_module
from okd.vocabularies import check_tokenizers, shared_vocab_size

EXAMPLES = tiny.examples(8)


def extended(*tokens):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def shuffled():
    """As many words, under other ids."""
    tokenizer = tiny.tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    vocab["w5"], vocab["w6"] = vocab["w6"], vocab["w5"]
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer.model)(vocab, unk_token="<unk>")
    return tokenizer


def trainer(tmp_path, student=None, teacher=None, tokenizer=None, train=EXAMPLES, **options):
    theirs = options.pop("teacher_processing_class", None)
    return OKDTrainer(
        tiny.llama() if student is None else student,
        tiny.llama(seed=1) if teacher is None else teacher,
        tiny.config(tmp_path, **{"method": "forward_kd", **options}),
        train,
        processing_class=tiny.tokenizer() if tokenizer is None else tokenizer,
        teacher_processing_class=theirs,
    )


# --- tokenizers


def test_added_tokens_beyond_those_that_both_know_may_differ():
    assert check_tokenizers(tiny.tokenizer(), tiny.tokenizer()) == 64
    assert check_tokenizers(extended("<a>", "<b>"), extended("<a>", "<c>", "<d>")) == 65
    assert check_tokenizers(tiny.tokenizer(), tiny.tokenizer(vocab=60), vocab_size=60) == 60
    with pytest.raises(ValueError, match=r"4 tokens differ, such as 'w60' .student id 60, teacher id None."):
        check_tokenizers(tiny.tokenizer(), tiny.tokenizer(vocab=60))
    with pytest.raises(ValueError, match=r"2 tokens differ, such as 'w5' .student id 5, teacher id 6."):
        check_tokenizers(tiny.tokenizer(), shuffled(), vocab_size=60)
    with pytest.raises(ValueError, match=r"such as '<a>' .student id 64, teacher id None."):
        check_tokenizers(extended("<a>", "<b>"), extended("<c>", "<b>"))


def test_vocab_size_is_what_all_share(tmp_path, caplog):
    """The loss, evaluations and sampling then see it, and the options that came are as they were."""
    logging.enable_propagation()
    teacher, args = tiny.llama(seed=1, vocab=80), tiny.config(tmp_path, method="gkd", student_share=1.0, max_steps=1)
    run = OKDTrainer(
        tiny.llama(vocab=72),
        teacher,
        args,
        EXAMPLES,
        processing_class=extended("<a>", "<b>"),
        teacher_processing_class=extended("<a>", "<c>"),
    )
    logging.disable_propagation()
    (line,) = [r.getMessage() for r in caplog.records if "vocab_size" in r.getMessage()]
    assert "vocab_size=65: the ids that all share, whose heads have 72, 80 rows" in line
    assert run.args.vocab_size == run.pair.options.vocab_size == run.sampler._vocab_size() == 65
    assert args.vocab_size is None
    run.train()


@pytest.mark.parametrize(
    ("sizes", "theirs", "expected"),
    [
        ((64, 64), tiny.tokenizer(), None),
        ((72, 72), tiny.tokenizer(), None),  # padding that both have
        ((72, 64), tiny.tokenizer(), 64),
        ((72, 68), tiny.tokenizer(), 64),
        ((72, 72), extended("<a>"), 64),  # a row that means something to one of them alone
        ((64, 64), extended("<a>"), None),  # a token without a row
    ],
)
def test_vocab_size_by_rows_and_tokenizers(sizes, theirs, expected):
    student, teacher = (tiny.llama(vocab=n) for n in sizes)
    assert shared_vocab_size(None, student, teacher, tiny.tokenizer(), theirs) == expected
    assert shared_vocab_size(50, student, teacher, tiny.tokenizer(), theirs) == 50


def test_the_teachers_tokenizer_is_compared_from_python_too(tmp_path):
    for given in (shuffled(), [shuffled()], {"a": shuffled()}):
        with pytest.raises(ValueError, match="expected student and teacher to share a tokenizer; 2 tokens differ"):
            trainer(tmp_path, teacher_processing_class=given)
    folder = tmp_path / "teacher"
    tiny.llama(seed=1).save_pretrained(folder)
    teacher = type(tiny.llama()).from_pretrained(folder)
    trainer(tmp_path, teacher=teacher)  # without a tokenizer beside it, nothing is known
    shuffled().save_pretrained(folder)
    with pytest.raises(ValueError, match="share a tokenizer"):
        trainer(tmp_path, teacher=teacher)
    several = [tiny.llama(seed=2), teacher]
    with pytest.raises(ValueError, match="share a tokenizer"):
        trainer(tmp_path, teacher=several, method="gated_ensemble")
    trainer(tmp_path, teacher=teacher, teacher_processing_class=tiny.tokenizer())
    trainer(tmp_path, teacher=teacher, method="sft")


def test_a_row_beyond_the_vocabulary_is_named(tmp_path):
    tokenizer = extended("<a>")
    bad = {"id": "odd", "prompt": "w2 <a>", "completion": "w3"}
    for part in ("train", "held-out"):
        with pytest.raises(ValueError, match=r"expected token ids below 64, .* got 64 in row odd"):
            train, held_out = ([*EXAMPLES, bad], None) if part == "train" else (EXAMPLES, {"a": [*EXAMPLES, bad]})
            OKDTrainer(tiny.llama(), None, tiny.config(tmp_path, method="sft"), train, held_out, tokenizer)
    rows = encode(EXAMPLES, tiny.tokenizer(), max_length=32).rows
    rows[3]["teacher_prompt"] = [2, 90]
    with pytest.raises(ValueError, match="got 90 in row example-3"):
        trainer(tmp_path, train=rows)
    with pytest.raises(ValueError, match="expected token ids below 20, "):
        trainer(tmp_path, vocab_size=20)


def test_evaluate_takes_the_ids_that_both_share(tmp_path, capsys):
    """Beyond them a row means something to one of the models alone, and would count as a divergence."""
    for name, tokenizer, seed in (("student", tiny.tokenizer(), 0), ("teacher", extended("<a>", "<b>"), 1)):
        tiny.llama(seed=seed, vocab=80).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    command = ["evaluate", "--file", str(tmp_path / "x.jsonl"), "--answers", "0"]
    command += [word for name in ("student", "teacher") for word in (f"--{name}", str(tmp_path / name))]
    found = []
    for options in ([], ["--vocab-size", "64"]):
        assert main([*command, *options]) == 0
        found.append(json.loads(capsys.readouterr().out)["forward_kl"])
    assert found[0] == found[1]


# --- processors


class Processor:
    """What of a multimodal processor is asked for."""

    def __init__(self, tokenizer, chat_template=None):
        self.tokenizer, self.chat_template = tokenizer, chat_template

    def save_pretrained(self, folder, **_):
        self.tokenizer.save_pretrained(folder)
        (folder / "processor_config.json").write_text("{}")


def test_a_processor_stands_for_its_tokenizer(tmp_path):
    template = "{% for m in messages %}{{ m.content }} <eos> {% endfor %}"
    processor = Processor(tiny.tokenizer(), template)
    chats = [
        {"messages": [{"role": "user", "content": e["prompt"]}, {"role": "assistant", "content": e["completion"]}]}
        for e in EXAMPLES
    ]
    run = trainer(tmp_path, tokenizer=processor, train=chats, teacher_processing_class=Processor(tiny.tokenizer()))
    assert run.tokenizer is processor.tokenizer and run.tokenizer.chat_template == template
    run.train()
    run.save_model(str(tmp_path / "out"))
    saved = tmp_path / "out" / "student"
    assert (saved / "processor_config.json").is_file()
    assert isinstance(AutoTokenizer.from_pretrained(saved), PreTrainedTokenizerFast)


# --- where the teacher's LoRA goes

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 4}
LATENT = {**GATED, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
FUSED = {
    "phi3": (Phi3Config(**GATED), {"qkv_proj"}),
    "falcon": (FalconConfig(**SIZES), {"query_key_value"}),
    "gpt_neox": (GPTNeoXConfig(**SIZES, intermediate_size=48), {"query_key_value"}),
    "mpt": (MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4), {"Wqkv"}),
    "deepseek_v2": (DeepseekV2Config(**LATENT, q_lora_rank=None), {"q_proj", "kv_b_proj"}),
    "deepseek_v3": (DeepseekV3Config(**LATENT, q_lora_rank=8), {"q_b_proj", "kv_b_proj"}),
}


def carrying(teacher):
    """Names of the modules that carry a LoRA."""
    names = [name for name, _ in teacher.named_parameters() if "lora_A" in name]
    return {name.partition(".lora_A")[0].removeprefix("base_model.model.") for name in names}


def adapted(model, tmp_path, **options):
    return carrying(attach_online_module(model, OKDConfig(output_dir=str(tmp_path), use_cpu=True, **options)))


@pytest.mark.parametrize("kind", FUSED)
def test_lora_finds_what_holds_query_and_value(tmp_path, kind):
    config, expected = FUSED[kind]
    found = adapted(AutoModelForCausalLM.from_config(config), tmp_path, online_layers=0.5)
    assert {name.rpartition(".")[2] for name in found} == expected
    assert len(found) == len(expected) and all(".1." in name for name in found)


def test_lora_goes_where_it_is_told(tmp_path):
    found = adapted(tiny.llama(), tmp_path, online_target_modules=["o_proj", "mlp.up_proj"])
    assert {name.rpartition(".")[2] for name in found} == {"o_proj", "up_proj"} and len(found) == 4
    every = adapted(tiny.llama(), tmp_path, online_target_modules=["all-linear"], online_layers=0.5)
    assert len(every) == 7 and all("layers.1." in name for name in every)
    with pytest.raises(ValueError, match=r"are down_proj, gate_proj, k_proj, .*; got lm_head, q: pass some of those"):
        adapted(tiny.llama(), tmp_path, online_target_modules=["lm_head", "q", "v_proj"])
    state_space = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(ValueError, match="are dt_proj, in_proj, out_proj, x_proj; got none"):
        adapted(state_space, tmp_path)
    command = ["okd", "--online-target-modules", "k_proj", "v_proj", "--output-dir", str(tmp_path), "--use-cpu"]
    assert parse_train(command)[1].online_target_modules == ["k_proj", "v_proj"]


@pytest.mark.parametrize("wanted", [None, ["all-linear"], ["q_proj"]])
def test_lora_stays_out_of_a_vision_tower(tmp_path, wanted):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = tiny.llama().config
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=63))
    outside = [n for n, _ in model.named_modules() if n.endswith("q_proj") and "language_model" not in n]
    run = trainer(tmp_path, teacher=model, method="okd", online_target_modules=wanted, online_layers=0.5, max_steps=1)
    found = carrying(run.teacher)
    assert outside and found and all(n.startswith("model.language_model.layers.1.") for n in found)
    run.train()
