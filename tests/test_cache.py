"""A cached teacher gives the losses and gradients of one that is computed; what does not fit its cache is refused."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from okd import OKDTrainer
from okd.cache import MANIFEST, TeacherCache
from okd.encoding import encode
from okd.layers import first_trainable_layer
from tests import tiny


def trainer_of(folder, name, method, teacher=None, train=None, held_out=None, **options):
    args = tiny.config(folder / name, method=method, **options)
    student, teacher = tiny.llama(), tiny.llama(seed=1, layers=6, hidden=48) if teacher is None else teacher
    train = tiny.examples() if train is None else train
    held_out = tiny.examples(6, seed=9) if held_out is None else held_out
    return OKDTrainer(student, teacher, args, train, held_out, processing_class=tiny.tokenizer())


def history(trainer):
    trainer.train()
    kept = ("student_loss", "teacher_loss", "base_forward_kl", "teacher_shift", "grad_norm", "teacher_grad_norm")
    return [{k: entry[k] for k in kept if k in entry} for entry in trainer.state.log_history if "loss" in entry]


def assert_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance / 10), name


CASES = {
    "forward_kd": {},
    "reverse_kd": {"temperature": 2.0},
    "taid": {},
    "rlkd": {},
    "okd": {"online_layers": 1 / 3, "teacher_kl_weight": 0.5},
    "okd at the top": {"online_layers": 0.1},
    "okd packed": {"online_layers": 1 / 3, "packing": True, "max_length": 32},
    "okd checkpointed": {"online_layers": 0.5, "gradient_checkpointing": True},
    "okd reentrant": {
        "online_layers": 0.5,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "forward_kd packed": {"packing": True, "max_length": 32},
    "okd every": {"online_layers": 0.5, "online_every": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_cached_is_uncached(tmp_path, case):
    method, options = case.split()[0], CASES[case]
    expected = trainer_of(tmp_path, "uncached", method, **options)
    cached = trainer_of(tmp_path, "cached", method, teacher_cache=str(tmp_path / "cache"), **options)
    assert_close(history(cached), history(expected), 1e-4)
    for one, other in zip(cached.pair.student.parameters(), expected.pair.student.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert cached.evaluate() == pytest.approx(expected.evaluate(), rel=1e-3)
