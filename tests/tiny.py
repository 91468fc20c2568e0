"""Models, a tokenizer and data small enough to train in a test."""

import json

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, EOS = 64, 1


def llama(seed=0, layers=2, hidden=32, vocab=VOCAB, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
        **{"tie_word_embeddings": True, "max_position_embeddings": 64, **options},
    )
    return LlamaForCausalLM(config)


def tokenizer(vocab=VOCAB):
    words = {"<unk>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, vocab)}}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def save_models(root):
    """A teacher and a student, as directories of these names."""
    for name, model in (("teacher", llama(seed=1, layers=3, hidden=48)), ("student", llama())):
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)


def examples(n=24, seed=0):
    """Prompts of words and completions that continue them by a rule, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for i in range(n):
        start, length = (int(torch.randint(2, 40, (1,), generator=generator)) for _ in range(2))
        words = [f"w{start + k}" for k in range(4 + length % 5)]
        result.append({"id": f"example-{i}", "prompt": " ".join(words[:3]), "completion": " ".join(words[3:])})
    return result


def split_by_hash(given, share=0.1):
    """(train, held out), as a run divides examples."""
    from okd.examples import place_of

    sides = [], []
    for example in given:
        sides[place_of(example) < share].append(example)
    return sides


def config(folder, **options):
    """A few steps on the CPU, each logged, nothing saved."""
    from okd import OKDConfig

    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-2,
    }
    return OKDConfig(**{**defaults, **options})


def assert_same_weights(one, other):
    expected = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def save_inputs(root):
    """Those of `okd train`: the models, train.jsonl and eval.jsonl."""
    save_models(root)
    for name, lines in (("train", examples(60)), ("eval", examples(12, seed=9))):
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


def train_arguments(root, output, *options, method="sft"):
    """`okd train` of a few steps, each logged and saved."""
    return [
        "train", method, "--teacher", str(root / "teacher"), "--student", str(root / "student"),
        "--train-data", str(root / "train.jsonl"), "--eval-data", str(root / "eval.jsonl"),
        "--output-dir", str(output), "--max-steps", "4", "--use-cpu", "--eval-answers", "2", "--eval-examples", "4",
        "--eval-max-new-tokens", "2", "--disable-tqdm", "true", "--learning-rate", "1e-2", "--logging-steps", "1",
        "--save-strategy", "steps", "--save-steps", "1", "--save-total-limit", "2", *options,
    ]  # fmt: skip
