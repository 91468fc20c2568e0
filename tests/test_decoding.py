"""Batched, cached, speculative decoding against one token at a time without a cache, and against its law."""

import itertools
from collections import Counter
from contextlib import nullcontext

import pytest
import tiny
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    LogitsProcessorList,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
)
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from okd import OKDTrainer, checks, decoding
from okd.data import seed_of
from okd.decoding import Decoder, Draw, write

PROMPTS = [[3, 4, 5], [7, 8], [9, 10, 11, 12, 13, 14], [5, 5, 5, 5], [20, 21, 22, 23, 24, 25]]
LIMITS = [12, 7, 20, 1, 16]
ENDS = {1, 30, 31, 32}
DRAW, TEACHER_DRAW = Draw(0.9), Draw(0.7, 0.95)
SEED = 4  # whose rows of PROMPTS end in part by a token, in part by their limit
SMALL, LENGTH, N = 5, 3, 20_000  # vocabulary, tokens and number of responses whose law is compared


def models():
    return tiny.llama(seed=0).eval(), tiny.llama(seed=1, layers=3, hidden=48).eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def seeds(n, seed=SEED):
    return [seed_of(seed, i) for i in range(n)]


def written(student, teacher=None, prompts=PROMPTS, limits=LIMITS, seed=SEED, **options):
    defaults = {"ends": ENDS, "vocab_size": tiny.VOCAB, "draw": DRAW, "teacher_draw": TEACHER_DRAW}
    defaults["seeds"] = seeds(len(prompts), seed)
    return write(student, prompts, limits, teacher=teacher, **{**defaults, **options})


@torch.no_grad()
def one_at_a_time(student, teacher=None, top_k=0, seed=SEED, share=0.0):
    """(responses, tokens by the student): Algorithm 1 of SKD as it is written down. No batch, cache or speculation.

    With a share a: every token from (1 - a) q + a p.
    """
    responses, own = [], 0
    for prompt, limit, row_seed in zip(PROMPTS, LIMITS, seeds(len(PROMPTS), seed), strict=True):
        uniforms, response = torch.rand(2, limit, generator=generator(row_seed)), []
        while len(response) < limit and not (response and response[-1] in ENDS):
            ids, u = torch.tensor([prompt + response]), uniforms[:, len(response)]
            logits = student(ids).logits[:, -1]
            if share:
                q, p = logits.softmax(-1), teacher(ids).logits[:, -1].softmax(-1)
                logits = ((1 - share) * q + share * p).log()
            token = DRAW(logits, u[:1])
            if teacher is not None and not share:
                logits = teacher(ids).logits[:, -1]
                if token.item() not in logits[0].argsort(descending=True)[:top_k]:
                    token, own = TEACHER_DRAW(logits, u[1:]), own - 1
            own += 1
            response.append(token.item())
        responses.append(response)
    return responses, own


# --- one draw ---


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1, 1, 0), (0.5, 0.5, 0), (0.7, 1, 4), (1.3, 0.8, 6), (2, 0.01, 0)]
)
def test_draw_has_the_law_of_transformers_warpers(temperature, top_p, top_k):
    logits = torch.randn(1, 12) * 2
    warpers = [TemperatureLogitsWarper(float(temperature)), *([TopKLogitsWarper(top_k)] if top_k else [])]
    expected = LogitsProcessorList([*warpers, TopPLogitsWarper(top_p)])(None, logits).softmax(-1)[0]
    n = 100_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5).div(n).float()
    drawn = Draw(temperature, top_p, top_k)(logits.expand(n, -1), uniform)
    frequency = torch.bincount(drawn, minlength=12) / n
    torch.testing.assert_close(frequency, expected, rtol=0, atol=3e-5)


def test_draw_at_the_largest_number_is_a_token_that_may_be_drawn():
    """Where rounding might take u * total to the total itself."""
    uniform = torch.full((500,), 1 - 2**-24)
    logits = torch.randn(500, 50)
    kept = logits.topk(7).values[:, -1]
    for draw in (Draw(top_k=7), Draw(top_k=7, top_p=0.999999)):
        drawn = draw(logits, uniform)
        assert (logits.gather(1, drawn[:, None])[:, 0] >= kept).all()
    assert (Draw()(logits, uniform) < 50).all()


# --- the batch is each row alone ---


@pytest.mark.parametrize("gamma", [1, 2, 5, 9])
@pytest.mark.parametrize("top_k", [0, 3, 25, tiny.VOCAB])
def test_interleaved_sampling_is_algorithm_1(top_k, gamma):
    """Token for token: ragged acceptance, caches that are rolled back, ends, limits and padding change nothing."""
    student, teacher = models()
    expected, own = one_at_a_time(student, teacher, top_k)
    found = written(student, teacher, top_k=top_k, gamma=gamma)
    assert found.responses == expected
    assert (found.tokens, found.accepted) == (sum(map(len, expected)), own)
    assert {0: own == 0, 25: 0 < own < found.tokens, tiny.VOCAB: own == found.tokens}.get(top_k, True)
    assert any(row[-1] in ENDS for row in expected) and any(row[-1] not in ENDS for row in expected)


@pytest.mark.parametrize("gamma", [1, 4, 7])
def test_one_model_alone(gamma):
    student, _ = models()
    expected, own = one_at_a_time(student)
    found = written(student, gamma=gamma)
    assert found.responses == expected and found.accepted == own == found.tokens


def test_accepting_everything_is_on_policy_sampling():
    student, teacher = models()
    for seed in range(5):
        options = {"draw": Draw(0.5, 0.5), "seed": seed}
        alone = written(student, **options)
        assert written(student, teacher, top_k=tiny.VOCAB, gamma=5, **options).responses == alone.responses


def test_accepting_nothing_is_sampling_from_the_teacher():
    """The same law, out of the other half of the numbers."""
    student, teacher = models()
    many = {"prompts": [[3, 4]] * 4000, "limits": [2] * 4000, "draw": TEACHER_DRAW}

    def last_token(found):
        return torch.bincount(torch.tensor([row[-1] for row in found.responses]), minlength=64) / 4000

    found = written(student, teacher, top_k=0, **many)
    assert found.accepted == 0
    assert (last_token(found) - last_token(written(teacher, **many))).abs().sum() < 0.2
    assert (last_token(found) - last_token(written(student, **many))).abs().sum() > 0.8


# --- a row's numbers ---


def test_numbers_of_a_row_are_its_own():
    """Whatever rows share its batch, in whatever order, and however many tokens they may have."""
    alone = {seed: decoding._uniforms([seed], [limit]) for seed, limit in ((3, 7), (8, 12), (2**62 + 5, 1))}
    found = decoding._uniforms([8, 2**62 + 5, 3], [12, 1, 7])
    assert found.shape == (2, 3, 12) and ((found >= 0) & (found < 1)).all()
    for i, (seed, limit) in enumerate(((8, 12), (2**62 + 5, 1), (3, 7))):
        assert torch.equal(found[:, i, :limit], alone[seed][:, 0])
        assert not found[:, i, limit:].any()
        expected = torch.rand(2, limit, generator=generator(seed))
        assert torch.equal(found[:, i, :limit], expected)
    again = decoding._uniforms([3, 3], [7, 7])
    assert torch.equal(again[:, 0], again[:, 1]) and not torch.equal(found[0, 2, :7], found[1, 2, :7])


def test_a_row_is_written_alike_whatever_shares_its_batch():
    student, teacher = models()
    row_seeds = seeds(len(PROMPTS))
    for options in ({}, {"teacher": teacher, "top_k": 3}, {"teacher": teacher, "share": 0.3}):
        together = written(student, **options).responses
        for part in ([4, 0], [3], [2, 1]):
            prompts, limits, own = ([x[i] for i in part] for x in (PROMPTS, LIMITS, row_seeds))
            found = written(student, prompts=prompts, limits=limits, seeds=own, **options)
            assert found.responses == [together[i] for i in part]


# --- samples from a mixture of both models (MiniLLM) ---


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_mixture_one_token_at_a_time(share, gamma):
    student, teacher = models()
    expected, _ = one_at_a_time(student, teacher, share=share)
    found = written(student, teacher, share=share, gamma=gamma)
    assert found.responses == expected and found.tokens == found.accepted == sum(map(len, expected))
    assert found.responses != written(student).responses


def test_a_mixture_begins_at_the_student_and_ends_at_the_teacher():
    student, teacher = models()
    for seed in range(2):
        alone = written(student, seed=seed).responses
        assert written(student, teacher, share=1e-9, seed=seed).responses == alone
        assert written(student, None, share=0.0, seed=seed).responses == alone
        of_teacher = written(teacher, seed=seed).responses
        assert written(student, teacher, share=1 - 1e-9, seed=seed).responses == of_teacher


def exceeds(counts, probabilities):
    """Probability of a chi-square statistic at least as large, if these were the probabilities."""
    expected = probabilities * counts.sum()
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


@torch.no_grad()
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_law_of_a_first_token_is_the_mixture(share):
    student, teacher = tiny.llama(0, vocab=SMALL).eval(), tiny.llama(10, vocab=SMALL).eval()
    many = {"prompts": [[2, 3]] * N, "limits": [1] * N, "vocab_size": SMALL, "ends": (), "draw": Draw()}
    tokens = torch.tensor(written(student, teacher, share=share, **many).responses)[:, 0]
    counts = torch.bincount(tokens, minlength=SMALL).double()
    q, p = (m(torch.tensor([[2, 3]])).logits[0, -1].double().softmax(-1) for m in (student, teacher))
    assert exceeds(counts, (1 - share) * q + share * p) > 1e-3
    for wrong in (q, p, (1.1 - share) * q + (share - 0.1) * p, (q.log() * (1 - share) + p.log() * share).softmax(-1)):
        assert exceeds(counts, wrong) < 1e-6, "the test sees a difference"
    plain = torch.tensor(written(student, **many).responses)[:, 0]
    assert exceeds(torch.bincount(plain, minlength=SMALL).double(), q) > 1e-3


# --- the law of whole sequences, by enumeration ---

SMALL_DRAWS = {"draw": Draw(1.5), "teacher_draw": Draw(1.2, 0.95)}


@torch.no_grad()
def law(student, teacher, top_k, bonus_after=None):
    """{sequence: probability} of Algorithm 1; with `bonus_after=g`, of a wrong one: a bonus token after g accepted."""

    def step(prefix):
        logits = [m(torch.tensor([[2, 3, *prefix]])).logits[0, -1].double() for m in (student, teacher)]
        q = (logits[0] / 1.5).softmax(-1)
        p = (logits[1] / 1.2).softmax(-1)
        order = p.argsort(descending=True)
        nucleus = order[: int((p[order].cumsum(0) < 0.95).sum()) + 1]
        p = torch.zeros_like(p).index_copy(0, nucleus, p[nucleus])
        p = p / p.sum()
        likely = torch.zeros_like(p)
        likely[logits[1].argsort(descending=True)[:top_k]] = 1
        return q * likely, (q * (1 - likely)).sum() * p, p

    result = {}

    def grow(prefix, probability, streak):
        if len(prefix) == LENGTH or (prefix and prefix[-1] == 1):
            result[prefix] = result.get(prefix, 0) + probability
            return
        accepted, replaced, p = step(prefix)
        for token in range(SMALL):
            if streak == bonus_after:
                grow((*prefix, token), probability * p[token].item(), 0)
            else:
                grow((*prefix, token), probability * accepted[token].item(), streak + 1)
                grow((*prefix, token), probability * replaced[token].item(), 0)

    grow((), 1.0, 0)
    return result


def chi_square(sequences, law):
    """(statistic - degrees of freedom) / its standard deviation; rare sequences pooled."""
    counts = Counter(map(tuple, sequences))
    large = [(counts.pop(s, 0), p * N) for s, p in law.items() if p * N >= 5]
    cells = [*large, (sum(counts.values()), max(N - sum(e for _, e in large), 5))]
    freedom = len(cells) - 1
    return (sum((n - e) ** 2 / e for n, e in cells) - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_the_law_of_sequences(seed):
    student, teacher = tiny.llama(seed, vocab=SMALL), tiny.llama(seed + 10, vocab=SMALL)
    student.eval(), teacher.eval()
    many = {"prompts": [[2, 3]] * N, "limits": [LENGTH] * N, "vocab_size": SMALL, "ends": {1}}
    sequences = written(student, teacher, gamma=2, top_k=2, **many, **SMALL_DRAWS).responses
    truth = law(student, teacher, top_k=2)
    assert sum(truth.values()) == pytest.approx(1)
    assert len([p for p in truth.values() if p * N >= 5]) > 30
    assert abs(chi_square(sequences, truth)) < 4
    # the test sees a difference: another K, and the bonus token of speculative decoding
    assert chi_square(sequences, law(student, teacher, top_k=3)) > 20
    assert chi_square(sequences, law(student, teacher, top_k=2, bonus_after=2)) > 20


# --- caches ---


def mistral():
    """A sliding window shorter than the rows."""
    torch.manual_seed(0)
    options = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return MistralForCausalLM(
        MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, sliding_window=6, **options)
    )


def gpt2():
    """Learned positions, no more of them than the rows need."""
    torch.manual_seed(0)
    options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2, "n_positions": 27}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, **options))


@pytest.mark.parametrize("build", [tiny.llama, mistral, gpt2])
@torch.no_grad()
def test_cached_logits_are_those_from_scratch(build):
    """Rows keep different numbers of tokens in each round; every logit afterwards is that of the row alone."""
    model = build().eval()
    rows = [[3, 4, 5], [7, 8], [9, 10, 11, 12, 13, 14]]
    decoder, width = Decoder(model, tiny.VOCAB, rollback=True), 6
    mask = torch.tensor([[width - i <= len(row) for i in range(width)] for row in rows])
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    decoder.feed(tokens, mask)
    choose = generator()
    for _ in range(5):
        draft = torch.randint(2, 64, (3, 4), generator=choose)
        grown = torch.cat([mask, torch.ones(3, 4, dtype=torch.bool)], 1)
        logits = decoder.logits(decoder.feed(draft, grown))
        for row, new, found in zip(rows, draft.tolist(), logits, strict=True):
            expected = model(torch.tensor([row + new])).logits[0, -4:]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        added = torch.randint(0, 5, (3,), generator=choose)
        rows = [row + new[:n] for row, new, n in zip(rows, draft.tolist(), added.tolist(), strict=True)]
        width = max(map(len, rows))
        columns = torch.arange(width) - width + mask.shape[1] + added[:, None]
        mask = grown.gather(1, columns.clamp(min=0)) & (columns >= 0)
        decoder.keep(columns.clamp(min=0))
        assert decoder.cache.get_seq_length() == width, "no more columns than the longest row has tokens"


def test_rows_that_have_ended_write_on_within_the_positions():
    """The first has the longest prompt and ends at once; the others go on for as long as there are positions."""
    model = gpt2().eval()
    found = written(model, prompts=[[3] * 16, [4, 5]], limits=[1, 25], ends=())
    assert list(map(len, found.responses)) == [1, 25]
    alone = written(model, models()[1], prompts=[[3] * 16, [4, 5]], limits=[1, 25], ends=(), top_k=64, gamma=7)
    assert alone.responses == found.responses


@pytest.mark.parametrize("build", [mistral, gpt2])
def test_other_models_write_as_one_token_at_a_time(build):
    model = build().eval()
    for teacher, top_k in ((None, 0), (models()[1], 25)):
        expected, _ = one_at_a_time(model, teacher, top_k)
        assert written(model, teacher, top_k=top_k, gamma=5).responses == expected
    expected, _ = one_at_a_time(models()[0], model, 25)
    assert written(models()[0], model, top_k=25, gamma=5).responses == expected


def test_padding_columns_of_a_head_are_never_written():
    student = tiny.llama(vocab=80).eval()
    found = written(student, vocab_size=20, draw=Draw(50.0), limits=[60] * 5, ends=())
    assert found.tokens == 300 and set(itertools.chain(*found.responses)) == set(range(20))


def test_under_autocast():
    """In bfloat16 most first tokens are those of float32, and none of the responses has a different form."""
    student, teacher = models()
    many = {"prompts": PROMPTS * 20, "limits": LIMITS * 20, "top_k": 25, "gamma": 5}
    exact = written(student, teacher, **many)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = written(student, teacher, **many)
    same = [a[0] == b[0] for a, b in zip(exact.responses, rounded.responses, strict=True)]
    assert sum(same) > 70
    for limit, row in zip(many["limits"], rounded.responses, strict=True):
        assert (row[-1] in ENDS or len(row) == limit) and not ENDS & set(row[:-1])


# --- errors ---


def test_refuses_prompts_of_one_token():
    with pytest.raises(ValueError, match="at least two tokens and limits of at least one; got 1 and 1"):
        written(models()[0], prompts=[[3]], limits=[1])
    with pytest.raises(ValueError, match="got 2 and 0"):
        written(models()[0], prompts=[[3, 4]], limits=[0])


def test_refuses_a_prefix_that_the_cache_does_not_know():
    student, teacher = models()
    teacher = get_peft_model(teacher, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"without a prompt of virtual tokens.*PrefixTuningConfig: use a LoRA"):
        written(student, teacher, top_k=3)
    assert decoding.Decoder(student, 64).vocab_size == 64


# --- layers whose cache is a state

SIZES = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 1, "eos_token_id": 1}
MIXED = {**SIZES, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {f"linear_{name}": 2 if "num" in name else 8
          for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}  # fmt: skip
RECURRENT = {
    "lfm2": Lfm2Config(**MIXED, layer_types=["conv", "full_attention"]),
    "qwen3_next": Qwen3NextConfig(
        **MIXED, **LINEAR, layer_types=["linear_attention", "full_attention"], head_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "falcon_h1": FalconH1Config(**MIXED, mamba_d_state=8, mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32),
    "mamba": MambaConfig(**SIZES, state_size=4),
}  # fmt: skip


def recurrent(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RECURRENT[kind]).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next", "falcon_h1"])
def test_hybrid_models_write_as_one_token_after_the_other_would(kind):
    model = recurrent(kind)
    responses, _ = one_at_a_time(model)
    assert written(model).responses == responses


def trainer(tmp_path, student, teacher=None, **options):
    teacher = tiny.llama(seed=1) if teacher is None else teacher
    args = tiny.config(tmp_path, max_steps=1, **options)
    return OKDTrainer(student, teacher, args, tiny.examples(4), processing_class=tiny.tokenizer())


@pytest.mark.parametrize("kind", RECURRENT)
def test_drafts_of_recurrent_models_are_refused_before_training(tmp_path, kind):
    found = {"lfm2": "conv", "qwen3_next": "linear_attention", "falcon_h1": "hybrid", "mamba": ""}[kind]
    expected = f"keys and values of each token, .* got .* with {found}.*: choose a method without drafts, such as gkd"
    for models in ((recurrent(kind), None), (tiny.llama(), recurrent(kind))):
        with pytest.raises(ValueError, match=expected):
            trainer(tmp_path, *models, method="skd")


def test_recurrent_models_are_sampled_from_where_padding_changes_nothing(tmp_path):
    trainer(tmp_path, recurrent("lfm2"), method="gkd", student_share=1.0, max_new_tokens=4).train()
    with pytest.raises(ValueError, match=r"MambaForCausalLM takes padding for text .* per_device_train_batch_size=1"):
        trainer(tmp_path, recurrent("mamba"), method="gkd")
    alone = {"per_device_train_batch_size": 1, "student_share": 1.0, "max_new_tokens": 4}
    trainer(tmp_path, recurrent("mamba"), method="gkd", **alone).train()
    trainer(tmp_path, tiny.llama(), recurrent("mamba"), method="gkd")  # which only reads
    trainer(tmp_path, recurrent("mamba"), method="forward_kd")


TRAIN, EVAL = (f"per_device_{use}_batch_size" for use in ("train", "eval"))


@pytest.mark.parametrize(
    ("method", "writer", "generate", "sizes", "named"),
    [
        ("distillm2", "student", "epoch", (1, 8), EVAL),
        ("distillm2", "teacher", "epoch", (1, 8), EVAL),
        ("distillm2", "student", "epoch", (4, 1), None),
        ("distillm2", "student", "step", (4, 1), TRAIN),
        ("distillm2", "student", "step", (1, 8), None),
        ("seqkd", "teacher", "once", (4, 8), EVAL),
        ("seqkd", "teacher", "once", (4, 1), None),
        ("seqkd", "teacher", "once", (1, 8), None),  # what a batch of one row lacks
    ],
)
def test_recurrent_models_are_judged_by_the_batches_that_they_write(tmp_path, method, writer, generate, sizes, named):
    models = (recurrent("mamba"), None) if writer == "student" else (tiny.llama(), recurrent("mamba"))
    options = {"method": method, "generate": generate, **dict(zip((TRAIN, EVAL), sizes, strict=True))}
    refused = pytest.raises(ValueError, match=f"{writer} that .* takes padding for text .*: pass {named}=1, or choose")
    with nullcontext() if named is None else refused:
        trainer(tmp_path, *models, **options)


def test_several_processes_search_beams_together(tmp_path, monkeypatch):
    """Where they divide a teacher, of one row on each."""
    run = trainer(tmp_path, tiny.llama(), recurrent("mamba"), method="seqkd", **{TRAIN: 1})
    monkeypatch.setattr(checks, "ranks", lambda: 2)
    with pytest.raises(ValueError, match=f"teacher that .* takes padding for text .*: pass {EVAL}=1"):
        checks.check_writers(run.args, run.student, run.pair.teacher)
