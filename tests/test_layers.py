"""A decoder's upper layers go on from the states that its lower ones made, whatever the architecture, bit for bit."""

from functools import partial

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from okd import OKDTrainer
from okd.layers import _returns_tuple, first_trainable_layer, keep_layers, states_above, states_entering
from okd.models import hidden_states, packed_states

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 6, "n_head": 4}
ARCHITECTURES = {
    "llama": {},
    "gemma2": {},  # embeddings that are scaled, layers with windows of their own
    "gemma3_text": {},
    "gpt2": GPT,  # learned positions, added below the layers
    "gptj": {**GPT, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 6, "n_head": 4},
    "mixtral": {"num_local_experts": 2},
    "mamba": {},
    "qwen3_next": {},
}


def model_of(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**COMMON, **ARCHITECTURES[name]})).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_part_is_the_whole(name):
    model, ran = model_of(name), []
    ids = torch.arange(24).reshape(2, 12) + 3
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    decoder = model.get_decoder()
    with torch.no_grad():
        expected = hidden_states(model, ids, mask)
        states = hidden_states(model, ids, mask, partial(states_entering, layer=4))
        assert decoder in _returns_tuple
        lists = [m for m in decoder.children() if isinstance(m, torch.nn.ModuleList) and len(m) == 6]
        for i, layer in enumerate(lists[0]):
            layer.register_forward_hook(lambda *_, i=i: ran.append(i))
        found = hidden_states(model, ids, mask, partial(states_above, layer=4, states=states))
        assert ran == [4, 5]
        ran.clear()
        hidden_states(model, ids, mask, partial(states_entering, layer=2))
        assert ran == [0, 1]
    assert torch.equal(found[mask.bool()], expected[mask.bool()])
    assert len(lists[0]) == 6 and not torch.equal(states, expected)  # the model is as it was


def test_a_part_of_packed_lines():
    model = tiny.llama(layers=4).eval()
    ids = torch.arange(2, 18).unsqueeze(0)
    positions = torch.cat((torch.arange(7), torch.arange(9))).unsqueeze(0)
    with torch.no_grad():
        expected = packed_states(model, ids, positions)
        states = packed_states(model, ids, positions, partial(states_entering, layer=2))
        found = packed_states(model, ids, positions, partial(states_above, layer=2, states=states))
    assert torch.equal(found, expected)


class Crossing(torch.nn.Module):
    """A layer that passes on what it saw to a later one, past those between."""

    def __init__(self, layer, store):
        super().__init__()
        self.layer, self.store = layer, store

    def forward(self, hidden_states, **options):
        if "seen" in self.store:
            return self.layer(hidden_states + self.store.pop("seen"), **options)
        self.store["seen"] = hidden_states
        return self.layer(hidden_states, **options)


def test_layers_that_do_not_go_on_are_refused(tmp_path):
    teacher, store = tiny.llama(seed=1, layers=4, hidden=48), {}
    for i in (0, 3):
        teacher.model.layers[i] = Crossing(teacher.model.layers[i], store)
    options = {"online_layers": 0.5, "online_target_modules": ["up_proj"], "teacher_cache": str(tmp_path / "cache")}
    args = tiny.config(tmp_path / "run", **options)
    given = {"train_dataset": tiny.examples(), "processing_class": tiny.tokenizer()}
    with pytest.raises(ValueError, match="upper layers go on from states that enter layer 2"):
        OKDTrainer(tiny.llama(), teacher, args, **given).train()
    assert not (tmp_path / "cache").exists()  # found before anything was written


def test_layers_that_are_no_list_are_refused(tmp_path):
    teacher = tiny.llama(seed=1, layers=4, hidden=48).requires_grad_(False)
    teacher.model.layers = torch.nn.Sequential(*teacher.model.layers)
    assert first_trainable_layer(teacher) == 4
    with pytest.raises(ValueError, match="expected a decoder with one list of its 4 layers, of which a part runs"):
        states_entering(teacher.model, 2, input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="expected a decoder with one list of its 4 layers, of which the student"):
        keep_layers(teacher, [0, 1])
