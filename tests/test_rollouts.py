"""Responses by a vLLM server: a stand-in that speaks its interface, and writes with the weights that it was given."""

import copy
import json
import os
import sys
import threading
import types
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gloo
import pytest
import tiny
import torch
import urllib3
from peft import PeftModel
from ranks import run_ranks
from transformers import AutoModelForCausalLM

from okd import OKDConfig, OKDTrainer, rollouts
from okd.data import seed_of
from okd.decoding import Draw, write

LIMIT = 6


class Stand(ThreadingHTTPServer):
    """A server of `model`, which is another than the student until weights are pushed.

    Attributes:
        seen: (path, body) of each request. answers: by path, (status, body) in place of the right ones, in turn.
    """

    daemon_threads = True

    def __init__(self, max_model_len=64):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.adapters = tiny.llama(seed=7).eval(), {}
        self.max_model_len, self.seen, self.answers = max_model_len, [], {}
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self, path="/v1/completions"):
        return [body for seen, body in self.seen if seen == path]

    def paths(self):
        return Counter(path for path, _ in self.seen)

    def answer(self, path, body):
        if self.answers.get(path):
            return self.answers[path].pop(0)
        if path == "/v1/models":
            return 200, {"data": [{"id": "base", "max_model_len": self.max_model_len}]}
        if path == "/get_world_size":
            return 200, {"world_size": 2}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
            return 200, {"results": [None]}
        if path == "/v1/load_lora_adapter":
            base = copy.deepcopy(tiny.llama())
            self.adapters[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return 200, "Success"
        return 200, {"choices": [self.complete(**body)]}

    def complete(self, model, prompt, max_tokens, seed, stop_token_ids, temperature, top_p, top_k, **others):
        written = write(
            self.model if model == "base" else self.adapters[model],
            [prompt],
            [max_tokens],
            ends=stop_token_ids,
            vocab_size=len(others.get("allowed_token_ids", range(tiny.VOCAB))),
            seeds=[seed],
            draw=Draw(temperature, top_p, top_k),
        )
        (ids,) = written.responses
        return {"token_ids": ids, "text": "", "finish_reason": "stop" if ids[-1] in stop_token_ids else "length"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def respond(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        with self.server.lock:
            self.server.seen.append((self.path, body))
            self.server.key = self.headers.get("Authorization")
            status, answer = self.server.answer(self.path, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = respond

    def log_message(self, *_):
        pass


@contextmanager
def standing(**options):
    server = Stand(**options)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server():
    with standing() as found:
        yield found


@pytest.fixture
def at_once(monkeypatch):
    """Failures are not tried again."""
    monkeypatch.setattr(rollouts, "RETRIES", urllib3.Retry(0))


def trainer(directory, server=None, method="gkd", student=None, **options):
    defaults = {"max_new_tokens": LIMIT, "max_steps": 3, "max_length": 32}
    defaults |= {"student_share": 1.0} if method == "gkd" else {}
    defaults |= {} if server is None else {"rollout_url": server.url}
    return OKDTrainer(
        student or tiny.llama(),
        tiny.llama(seed=1, layers=3, hidden=48),
        tiny.config(directory, method=method, **{**defaults, **options}),
        train_dataset=tiny.examples(8),
        processing_class=tiny.tokenizer(),
    )


def written(run):
    """The rows of each step of the run, which trains."""
    seen, original = [], run.sampler.collate

    def collate(rows):
        seen.append([(row["id"], row["input_ids"], row.get("writer")) for row in rows])
        return original(rows)

    run.sampler.collate = collate
    return seen


CASES = {
    "gkd": {"method": "gkd"},
    "half of the steps": {"method": "imitkd", "max_steps": 6},
    "a LoRA": {"method": "gkd", "student_lora_rank": 4},
    "at epochs": {"method": "distillm2", "max_steps": 4},
    "in part": {"method": "gkd", "sampling_temperature": 0.7, "sampling_top_p": 0.9, "sampling_top_k": 20},
}


@pytest.mark.parametrize("case", CASES)
def test_a_server_that_draws_alike_trains_the_same_student(case, tmp_path, server):
    """It starts with other weights, so whatever it writes is of those that were pushed."""
    local, served = trainer(tmp_path / "local", **CASES[case]), trainer(tmp_path / "served", server, **CASES[case])
    expected, found = written(local), written(served)
    local.train()
    served.train()
    assert found == expected and any(writer == "student" for rows in found for _, _, writer in rows)
    tiny.assert_same_weights(served.pair, local.pair)
    entries = [e for e in served.state.log_history if "student_loss" in e]
    tokens = [e["generated_tokens_per_second"] > 0 for e in entries]
    assert tokens == [e["generated_tokens_per_second"] > 0 for e in local.state.log_history if "student_loss" in e]
    pushes = sum(server.paths()[path] for path in ("/collective_rpc", "/v1/load_lora_adapter"))
    by_student = [any(writer == "student" for _, _, writer in rows) for rows in found]
    assert pushes == (2 if case == "at epochs" else sum(by_student)) < 6, "a push for each time that it is asked"
    left = [path.name for path in (tmp_path / "served" / "rollouts").glob("*")]
    assert left == list(server.adapters), "of an adapter the last one, of a whole student nothing"


def test_what_a_request_says(tmp_path, server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    run = trainer(tmp_path, server, sampling_temperature=0.5, sampling_top_p=0.9, sampling_top_k=3, max_steps=2)
    rows = written(run)
    run.train()
    assert server.key == "Bearer secret" and "secret" not in run.args.to_json_string()
    bodies = server.bodies()
    assert len(bodies) == 8 and len({body["cache_salt"] for body in bodies}) == 2
    for step in range(2):
        prompts = {seed_of(42, step, name, "student"): ids[:3] for name, ids, _ in rows[step]}
        of_step = bodies[4 * step : 4 * step + 4]
        assert {body.pop("seed"): body.pop("prompt") for body in of_step} == prompts
        assert len({body.pop("cache_salt") for body in of_step}) == 1
        for body in of_step:
            assert body == {
                "model": "base",
                "max_tokens": LIMIT,
                "temperature": 0.5,
                "top_p": 0.9,
                "top_k": 3,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "stop_token_ids": [tiny.EOS],
                "return_token_ids": True,
            }


def test_weights_serve_for_some_steps(tmp_path, server):
    trainer(tmp_path, server, rollout_sync_steps=2, max_steps=5).train()
    paths = [path for path, _ in server.seen if path in ("/collective_rpc", "/v1/completions")]
    assert "".join("P" if path == "/collective_rpc" else "." for path in paths) == "P........P........P...."


@pytest.mark.slow
def test_a_resumed_run_is_written_the_same(tmp_path, server):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", server, **options)
    expected = written(whole)
    whole.train()
    server.model = tiny.llama(seed=7).eval()
    resumed = trainer(tmp_path / "resumed", server, **options)
    found = written(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert found == expected[2:]
    tiny.assert_same_weights(resumed.pair, whole.pair)


def test_ids_beyond_the_vocabulary_are_drawn_again(tmp_path, server):
    """Padding of the head, which the server draws: such rows are asked for once more, with the ids they may use."""
    known = 40
    local = trainer(tmp_path / "local", vocab_size=known, max_steps=1)
    served = trainer(tmp_path / "served", server, vocab_size=known, max_steps=1)
    (expected,), (found,) = [(run.train(), rows)[1] for run, rows in ((run, written(run)) for run in (local, served))]
    again = {body["seed"]: body for body in server.bodies() if "allowed_token_ids" in body}
    assert 0 < len(again) <= 4 and len(server.bodies()) == 4 + len(again)
    assert all(body["allowed_token_ids"] == list(range(known)) for body in again.values())
    for ours, theirs in zip(expected, found, strict=True):
        assert max(theirs[1]) < known
        assert ours == theirs or seed_of(42, 0, theirs[0], "student") not in again


def vllm_here(monkeypatch, server, seen):
    """The parts of vLLM's package that push weights: the trainer's engine, whose workers are the stand-in."""

    class Engine:
        def __init__(self, source):
            self.source = source

        def send_weights(self):
            with server.lock, torch.no_grad():
                own = dict(server.model.named_parameters())
                sent = {name: x for name, x in self.source.named_parameters()}
                assert sent.keys() == own.keys()
                for name, x in sent.items():
                    own[name].copy_(x)
            seen.append("sent")

    class Factory:
        @staticmethod
        def trainer_init(init_info, *, client, source):
            seen.append((vars(init_info), client))
            return Engine(source)

    transfer = types.ModuleType("vllm.distributed.weight_transfer")
    transfer.HTTPVLLMWeightSyncClient = lambda url, timeout: (url, timeout)
    transfer.ModuleSource = lambda module: module
    transfer.WeightTransferTrainerFactory = Factory
    nccl = types.ModuleType("vllm.distributed.weight_transfer.nccl_engine")
    nccl.NCCLTrainerInitInfo = types.SimpleNamespace
    network = types.ModuleType("vllm.utils.network_utils")
    network.get_ip, network.get_open_port = lambda: "10.0.0.1", lambda: 1234
    for module in (transfer, nccl, network):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("vllm", "vllm.distributed", "vllm.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def test_vllms_engine_is_given_the_student(tmp_path, server, monkeypatch):
    seen = []
    local = trainer(tmp_path / "local")
    local.train()
    vllm_here(monkeypatch, server, seen)
    served = trainer(tmp_path / "served", server, rollout_push="nccl", rollout_timeout=99.0)
    served.train()
    tiny.assert_same_weights(served.pair, local.pair)
    info = {"master_address": "10.0.0.1", "master_port": 1234, "world_size": 3, "rank": 0}
    assert seen == [(info, (server.url, 99.0)), "sent", "sent", "sent"]
    assert not (tmp_path / "served" / "rollouts").exists()


def test_a_passing_failure_is_tried_again(tmp_path, server, monkeypatch):
    monkeypatch.setattr(rollouts, "RETRIES", rollouts.RETRIES.new(backoff_factor=0.01))
    server.answers["/v1/completions"] = [(503, "busy")] * 2
    trainer(tmp_path, server, max_steps=1).train()
    assert len(server.bodies()) == 6


# --- what is refused ---


def test_a_server_that_is_not_there(tmp_path, at_once):
    with standing() as gone:
        pass
    with pytest.raises(ConnectionError, match=rf"expected a vLLM server at {gone.url}/v1/models; got .*start it"):
        trainer(tmp_path, gone).train()


def test_a_server_with_too_little_room(tmp_path):
    with standing(max_model_len=31) as server, pytest.raises(ValueError, match=r"room for max_length=32 .*=31 of base"):
        trainer(tmp_path, server).train()


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/v1/completions", (400, {"error": {"message": "too long"}}), "got 400, .*too long"),
        ("/v1/completions", (200, {"choices": [{"text": "w3", "finish_reason": "stop"}]}), "got None ids.*0.10.2"),
        ("/v1/completions", (200, {"choices": [{"token_ids": [3], "finish_reason": "abort"}]}), "finished by abort"),
        ("/v1/models", (401, {"error": "Unauthorized"}), "got 401, .*Unauthorized"),
        ("/collective_rpc", (404, {"detail": "Not Found"}), "got 404, .*VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_answers_that_are_none(path, answer, message, tmp_path, server, at_once):
    server.answers[path] = [answer] * 4
    with pytest.raises(OSError, match=message):
        trainer(tmp_path, server).train()


def test_a_server_without_loras(tmp_path, server, at_once):
    server.answers["/v1/load_lora_adapter"] = [(404, {"detail": "Not Found"})]
    with pytest.raises(OSError, match=r"start it with --enable-lora, .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        trainer(tmp_path, server, student_lora_rank=4).train()


def test_a_lora_does_not_go_by_nccl(tmp_path, server):
    with pytest.raises(ValueError, match="expected rollout_push=disk with a student with a LoRA; got nccl"):
        trainer(tmp_path, server, student_lora_rank=4, rollout_push="nccl").train()


def test_nccl_wants_vllm(tmp_path, server):
    with pytest.raises(ImportError, match=r"expected vLLM 0\.28 or later beside the trainer.*pass rollout_push=disk"):
        trainer(tmp_path, server, rollout_push="nccl").train()


URL = "http://localhost:8000"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gkd", "rollout_push": "disk"}, "expected rollout_url with rollout_push; got disk without"),
        ({"method": "gkd", "rollout_url": "localhost:8000"}, "such as http://localhost:8000.*got 'localhost:8000'"),
        ({"method": "gkd", "rollout_url": "http://me:word@host"}, "without a name, a password.*got 'http://host'"),
        (
            {"method": "distillm2", "rollout_url": URL, "rollout_sync_steps": 2},
            "expected no rollout_sync_steps with generate=epoch",
        ),
        *(
            ({"method": method, "rollout_url": URL}, f"expected options that method {method} reads; got rollout_url")
            for method in ("skd", "minillm", "seqkd", "okd")
        ),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        OKDConfig(use_cpu=True, **options)


# --- several processes ---


def test_processes_replay_or_write_together(tmp_path):
    """One whose rows of the past are complete writes while another's are not: both push weights, or neither."""
    run = trainer(tmp_path, method="distillm", replay_size=1)
    rows = run.sampler.respond(run.train_dataset[:2])
    run.sampler.state |= {"phi": 0.9, "buffer": rows[:1]}
    run.sampler.coin, run.pair.progress = 0.5, 1.0
    policy = run.sampler.method.responses
    assert policy(run.sampler, run.train_dataset[:2]) == rows[:1]
    run.sampler.together, run.sampler.respond = (lambda x: 1), lambda _: rows
    assert policy(run.sampler, run.train_dataset[:2]) == rows, "the other process is not complete"


SGD = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 1e9, "per_device_train_batch_size": 2}
STUDENTS = {"whole": {}, "LoRA": {"student_lora_rank": 4}}


def _rank(rank, world, folder, urls, kind):
    if kind != "ddp":
        gloo.on_gloo(with_deepspeed=kind.startswith("zero"))
        SGD.update(shard=kind, use_cpu=not kind.startswith("zero"))
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")} | {"WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    found = {}
    for student, options in STUDENTS.items():
        run = trainer(f"{folder}/{student}", rollout_url=urls[student], **SGD, **options)
        rows = written(run)
        run.train()
        found[student] = [row for step in rows for row in step]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_two_ranks_ask_for_their_own_rows(kind, tmp_path):
    """The first one pushes what both hold; the rows are those of one process that writes itself."""
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    with standing() as whole, standing() as with_lora:
        urls = {"whole": whole.url, "LoRA": with_lora.url}
        found = run_ranks(_rank, 2, tmp_path, str(tmp_path), urls, kind)
    assert whole.paths() == {"/v1/models": 2, "/collective_rpc": 3, "/v1/completions": 12}
    assert with_lora.paths()["/v1/load_lora_adapter"] == 3 and len(with_lora.bodies()) == 12
    for student, options in STUDENTS.items():
        alone = trainer(tmp_path / "alone" / student, gradient_accumulation_steps=2, **SGD, **options)
        expected = written(alone)
        alone.train()
        rows = sorted(row for rank in found for row in rank[student])
        assert rows == sorted(row for step in expected for row in step), student
