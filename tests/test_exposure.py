"""ExAccErr against its exact expectation, by enumeration of every sequence over a small vocabulary."""

import itertools

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from okd import exposure
from okd.exposure import exposure_bias

SMALL, LENGTH = 5, 3  # ids and steps: 5^3 sequences
PROMPT = [2, 3, 4]


def model(seed):
    """Random, in float64, far from uniform."""
    llama = tiny.llama(seed, vocab=SMALL, tie_word_embeddings=False).double().eval()
    with torch.no_grad():
        llama.lm_head.weight *= 2
    return llama


def pair(adapted=False):
    """(student, teacher, the teacher that counts)."""
    student, teacher, base = model(0), model(1), model(1)
    if adapted:
        teacher = get_peft_model(teacher, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).double().eval()
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=2.0)
    return student, teacher, base


def rows(n, prompt=PROMPT):
    return [{"id": str(i), "input_ids": [*prompt, 2], "labels": [-100] * len(prompt) + [2]} for i in range(n)]


@torch.no_grad()
def log_probabilities(model, prefix):
    return model(torch.tensor([[*PROMPT, *prefix]])).logits[0, -1].log_softmax(-1)


def enumerate_sequences(student, teacher):
    """{sequence, cut after its end: (probability under q, under p, [KL(p || q) of each step])}."""
    found = {}
    for tokens in itertools.product(range(SMALL), repeat=LENGTH):
        end = tokens.index(tiny.EOS) + 1 if tiny.EOS in tokens else LENGTH
        tokens = tokens[:end]
        q = p = 1.0
        kl = []
        for t, y in enumerate(tokens):
            log_q, log_p = (log_probabilities(model, tokens[:t]) for model in (student, teacher))
            kl.append((log_p.exp() * (log_p - log_q)).sum().item())
            q, p = q * log_q[y].exp().item(), p * log_p[y].exp().item()
        found[tokens] = (q, p, kl)
    return found


def moments(sequences, writer, length):
    """Mean and variance of sum_{t <= length} KL_t under the writer (0: student, 1: teacher)."""
    weights = [(found[writer], sum(found[2][:length])) for found in sequences.values()]
    mean = sum(w * x for w, x in weights)
    return mean, sum(w * (x - mean) ** 2 for w, x in weights)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_exaccerr_is_its_expectation(adapted):
    student, teacher, base = pair(adapted)
    sequences = enumerate_sequences(student, base)
    assert sum(s[0] for s in sequences.values()) == pytest.approx(1) == sum(s[1] for s in sequences.values())
    n = 3000
    metrics = exposure_bias(
        *(student, teacher, tiny.tokenizer(SMALL), rows(n)),
        **{"max_new_tokens": LENGTH, "lengths": [1, 2, 3], "batch_size": 1000, "progress": False},
    )
    assert metrics["exaccerr_1"] == pytest.approx(0, abs=1e-9)  # the first step has the prompt alone before it
    for length in (2, 3):
        (own, own_variance), (given, given_variance) = (moments(sequences, writer, length) for writer in (0, 1))
        error = own / given * (own_variance / (n * own**2) + given_variance / (n * given**2)) ** 0.5
        assert abs(own / given - 1) > 12 * error  # far enough from no bias at all for the comparison to show something
        assert metrics[f"exaccerr_{length}"] / 100 == pytest.approx(own / given - 1, abs=4 * error)
    for name, writer in (("student_steps", 0), ("teacher_steps", 1)):
        mean = sum(len(tokens) * found[writer] for tokens, found in sequences.items())
        assert metrics[name] == pytest.approx(mean, abs=4 * LENGTH / n**0.5 / 2)


def test_every_response_counts_each_of_its_steps_and_none_after_its_end(monkeypatch):
    """The estimate itself, from responses that are given: lengths differ, and so do prompts."""
    student, teacher, _ = pair()
    sequences = enumerate_sequences(student, teacher)
    written = {student: [[0, 4, 2], [3, tiny.EOS]], teacher: [[tiny.EOS], [2, 2, tiny.EOS]]}
    monkeypatch.setattr(exposure, "generate_responses", lambda writer, *_, **__: written[writer])
    metrics = exposure_bias(student, teacher, tiny.tokenizer(SMALL), rows(2), max_new_tokens=3, lengths=[3])
    own, given = (sum(sum(sequences[tuple(r)][2]) for r in written[model]) for model in (student, teacher))
    assert metrics == pytest.approx({"exaccerr_3": 100 * (own / given - 1), "student_steps": 2.5, "teacher_steps": 2})


def test_equal_models_have_no_error_to_compare_with_and_the_teacher_is_as_it_was():
    _, teacher, base = pair(adapted=True)
    before = [(name, p.requires_grad) for name, p in teacher.named_parameters()]
    inputs = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = teacher(inputs).logits
    metrics = exposure_bias(base, teacher, tiny.tokenizer(SMALL), rows(4), max_new_tokens=2, progress=False)
    assert metrics["exaccerr_2"] is None or abs(metrics["exaccerr_2"]) < 1e-6
    assert [(name, p.requires_grad) for name, p in teacher.named_parameters()] == before
    with torch.no_grad():
        assert torch.equal(teacher(inputs).logits, logits)


def test_padding_of_a_larger_head_is_never_sampled(monkeypatch):
    """Its logits belong to no token that the other model knows."""
    student = tiny.llama(seed=0, vocab=SMALL)
    teacher = tiny.llama(seed=1, vocab=SMALL + 3)
    with torch.no_grad():
        teacher.lm_head.weight[SMALL:] = 50 * teacher.lm_head.weight[:3]
    written = []
    original = exposure.token_statistics
    monkeypatch.setattr(
        exposure, "token_statistics", lambda *args, **options: written.append(args[2]) or original(*args, **options)
    )
    exposure_bias(student, teacher, tiny.tokenizer(SMALL), rows(50), max_new_tokens=3, progress=False)
    assert len(written) == 2
    assert max(max(sequence["input_ids"]) for sequences in written for sequence in sequences) < SMALL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [0, 2]}, "expected lengths between 1 and max_new_tokens, 3; got \\[0, 2\\]"),
        ({"lengths": [4]}, "expected lengths between 1 and max_new_tokens, 3; got \\[4\\]"),
        ({"prompts": 0}, "expected a row with a prompt, got none"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    student, teacher, _ = pair()
    with pytest.raises(ValueError, match=message):
        exposure_bias(student, teacher, tiny.tokenizer(SMALL), rows(2), **{"max_new_tokens": 3, **options})
