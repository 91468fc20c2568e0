"""Responses that a vLLM server writes in the student's place; and how the server gets the student's weights.

The server is asked through its OpenAI-compatible interface: token ids in, token ids out (`return_token_ids`, vLLM
0.10.2 or later), a request for each row, since one seed serves all prompts of a request; vLLM batches them. An end
token that it stopped at is the last id, as in `okd.decoding.write`. `cache_salt` is another after each push, so that no
prefix of older weights is found in the server's cache. Seeds are those of a run without a server, the numbers drawn
with them are not; the server rounds by what else it computes at the time, so a resumed run draws the same but for that.

Weights go by an interface of vLLM's own:

* disk: a directory that both see. The adapter of a student with a LoRA (`/v1/load_lora_adapter`, under a new name each
  time); else the whole student (`reload_weights`, by `/collective_rpc`).
* nccl: from GPU to GPU by `vllm.distributed.weight_transfer` (vLLM 0.28 or later), of a whole student whose modules
  have the names of its checkpoint.

Tests ask a stand-in that answers as vLLM's documentation and source say; no real server has been asked yet.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import uuid
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import urllib3
from accelerate.utils import broadcast_object_list

from okd.decoding import Draw
from okd.kept import Asked
from okd.models import position_limit
from okd.options import option
from okd.sharding import divide, is_divided, whole

CONCURRENT = 256  # requests that wait for the server at a time
RETRIES = urllib3.Retry(5, read=1, backoff_factor=1, status_forcelist=(429, 502, 503, 504), allowed_methods=None)
# what else a server may take from the model's generation_config.json
PLAIN = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass
class RolloutOptions:
    """Read by methods whose student writes alone."""

    rollout_url: str | None = option(
        None,
        "vLLM server of the student's model that writes the student's responses, such as http://localhost:8000; "
        "default: the student writes them here",
    )
    rollout_push: str | None = option(
        None,
        "how the server gets the student's weights: disk (a directory that both see), or nccl (vLLM's weight transfer, "
        "for which vLLM is installed here, too); default: nccl for a whole student where vLLM is here, else disk",
        choices=("disk", "nccl"),
    )
    rollout_sync_steps: int = option(1, "optimizer steps that the server's weights serve for", least=1)
    rollout_timeout: float = option(600.0, "seconds that the server may take for an answer", above=0)


def check_rollout_options(options: Any) -> None:
    """Raise ValueError for what does not go together."""
    if options.rollout_url is None:
        for field in fields(RolloutOptions):
            if getattr(options, field.name) != field.default:
                raise ValueError(
                    f"expected rollout_url with {field.name}; got {getattr(options, field.name)} without: leave it out"
                )
        return
    url = urlsplit(options.rollout_url)
    if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query:
        raise ValueError(
            "expected rollout_url to be the address of a server, such as http://localhost:8000, without a name, a "
            f"password or a query; got {url._replace(netloc=url.netloc.rpartition('@')[2], query='').geturl()!r}: "
            "correct it, and put the server's key into the environment variable VLLM_API_KEY"
        )
    if options.resolved.generate == "epoch" and options.rollout_sync_steps != 1:
        raise ValueError(
            "expected no rollout_sync_steps with generate=epoch, whose responses are written at the start of each; got "
            f"{options.rollout_sync_steps}: leave it out, or pass generate=step"
        )


class Server:
    """A vLLM server by HTTP, with the key in VLLM_API_KEY, if any. Passing failures are tried again for half a minute.

    Raises ConnectionError where it is not reached, and OSError with its words for what it refuses.
    """

    def __init__(self, url: str, timeout: float):
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.pool = urllib3.PoolManager(maxsize=CONCURRENT, headers=headers, timeout=timeout, retries=RETRIES)

    def get(self, path: str) -> Any:
        return self._asked("GET", path, None).json()

    def post(self, path: str, body: dict[str, Any], hint: str = "see its log") -> Any:
        return self._asked("POST", path, body, hint)

    def _asked(self, method: str, path: str, body: Any, hint: str = "check rollout_url") -> Any:
        try:
            answer = self.pool.request(method, self.url + path, json=body)
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionError(
                f"expected a vLLM server at {self.url}{path}; got {error}: start it (`vllm serve`), or correct "
                "rollout_url; rollout_timeout is how long it may take"
            ) from error
        if answer.status != 200:
            words = answer.data.decode(errors="replace").strip()[:1000]
            raise OSError(f"expected {self.url}{path} to answer; got {answer.status}, {words}: {hint}")
        return answer


class Push(Protocol):
    """A way of the student's weights to the server. All processes call it, outside of any forward; the first one talks
    to the server."""

    def __call__(self, name: str) -> None:
        """Let the server have the weights of the moment; of a LoRA under this name."""


class Disk:
    """By files in `directory`, which the server sees under the same path."""

    def __init__(self, server: Server, student: Any, directory: Path, process: int, divided: bool):
        self.server, self.student, self.directory = server, student, directory
        self.process, self.divided = process, divided
        self.is_lora, self.last = is_lora(student), ""
        if process == 0:
            shutil.rmtree(directory, ignore_errors=True)  # of a run that ended

    def __call__(self, name: str) -> None:
        state = self._whole_state() if self.divided else None
        if self.process > 0:
            return
        path, last = self.directory / name, self.last
        self.student.save_pretrained(path, state_dict=state)
        if self.is_lora:
            self.server.post(
                "/v1/load_lora_adapter",
                {"lora_name": name, "lora_path": str(path.resolve())},
                "start it with --enable-lora, a --max-lora-rank that is large enough, and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, where it sees this path",
            )
            if last:
                self.server.post("/v1/unload_lora_adapter", {"lora_name": last})
                shutil.rmtree(self.directory / last)
            self.last = name
        else:
            self.server.post(
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": str(path.resolve())}},
                "start it with VLLM_SERVER_DEV_MODE=1, where it sees this path",
            )
            shutil.rmtree(path)

    def _whole_state(self) -> dict[str, torch.Tensor]:
        """One weight after the other, on the CPU of the first process."""
        divide(self.student)
        found = {}
        for name, p in self.student.named_parameters():
            if p.requires_grad or not self.is_lora:
                x = _from_zero3(p) if hasattr(p, "ds_id") and p.requires_grad else whole(p)
                if self.process == 0:
                    found[name] = x.cpu()
        return found


def _from_zero3(p: torch.Tensor) -> torch.Tensor:
    """From the optimizer's part of it: the model's may be on its way, fetched ahead of a forward that did not come."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(p)


class Nccl:
    """By vLLM's engine for it, which gathers divided weights itself. The group is made at the first push."""

    def __init__(self, server: Server, student: Any, process: int, timeout: float):
        if not goes_by_nccl(student):
            what = "a LoRA" if is_lora(student) else "weights that ZeRO-3 divides"
            raise ValueError(f"expected rollout_push=disk with a student with {what}; got nccl: leave it out")
        self.server, self.student, self.process, self.timeout = server, student, process, timeout

    def __call__(self, name: str) -> None:
        self._engine.send_weights()

    @cached_property
    def _engine(self) -> Any:
        try:
            from vllm.distributed.weight_transfer import (
                HTTPVLLMWeightSyncClient,
                ModuleSource,
                WeightTransferTrainerFactory,
            )
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
            from vllm.utils.network_utils import get_ip, get_open_port
        except ImportError as error:
            raise ImportError(
                f"expected vLLM 0.28 or later beside the trainer for rollout_push=nccl; got {error}: install it, or "
                "pass rollout_push=disk"
            ) from error
        workers = self.server.get("/get_world_size")["world_size"]
        address, port = broadcast_object_list([get_ip(), get_open_port()])
        return WeightTransferTrainerFactory.trainer_init(
            init_info=NCCLTrainerInitInfo(
                master_address=address, master_port=port, world_size=workers + 1, rank=self.process
            ),
            client=HTTPVLLMWeightSyncClient(self.server.url, timeout=self.timeout),
            source=ModuleSource(self.student),
        )


def is_lora(student: Any) -> bool:
    return hasattr(student, "disable_adapter")


def goes_by_nccl(student: Any) -> bool:
    return not is_lora(student) and not is_divided(student)


class Rollouts:
    """The server as the student's hand.

    Attributes:
        name: of the weights that it has, which no other push of any run shares.
    """

    def __init__(self, options: Any, student: Any, divided: bool):
        self.options, self.student, self.divided = options, student, divided
        self.server = Server(options.rollout_url, options.rollout_timeout)
        self.name, self.moment, self.vocab_size = "", -1, 0

    def begin_run(self, vocab_size: int) -> None:
        """Of responses of these ids. Raises where there is no server, or one that does not fit."""
        self.moment, self.vocab_size = -1, vocab_size
        _ = self.served, self.push

    @cached_property
    def served(self) -> str:
        """The name of its model, which has room for the longest rows."""
        model = self.server.get("/v1/models")["data"][0]
        longest = min(self.options.max_length, position_limit(self.student) or self.options.max_length)
        if model.get("max_model_len", longest) < longest:
            raise ValueError(
                f"expected a server with room for max_length={longest} tokens; got max_model_len="
                f"{model['max_model_len']} of {model['id']}: start it with --max-model-len {longest}, or lower "
                "max_length"
            )
        return model["id"]

    @cached_property
    def push(self) -> Push:
        kind, process = self.options.rollout_push, self.options.process_index
        if kind is None:
            is_here = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()
            kind = "nccl" if is_here and goes_by_nccl(self.student) else "disk"
        if kind == "nccl":
            return Nccl(self.server, self.student, process, self.options.rollout_timeout)
        directory = Path(str(self.options.output_dir)) / "rollouts"
        return Disk(self.server, self.student, directory, process, self.divided)

    def sync(self, moment: int) -> None:
        """Push the student's weights, if that has not been done at this moment (a number, at least 0)."""
        if moment == self.moment:
            return
        name = f"okd-{uuid.uuid4().hex}"
        self.push(name)
        (self.name,) = broadcast_object_list([name])  # which other processes wait for
        self.moment = moment

    def write(
        self,
        asked: Sequence[Asked],
        seeds: Sequence[int],
        *,
        ends: Collection[int],
        draw: Draw,
    ) -> list[list[int]]:
        """Responses of the student as it was when it was last pushed."""
        if not asked:
            return []
        common = {
            **PLAIN,
            "model": self.name if is_lora(self.student) else self.served,
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "top_k": draw.top_k,
            "stop_token_ids": sorted(ends),
            "return_token_ids": True,
            "cache_salt": self.name,
        }

        def respond(one: Asked, seed: int) -> list[int]:
            body = {**common, "prompt": one.prompt, "max_tokens": one.limit, "seed": seed}
            ids = self._ids(body)
            if max(ids) >= self.vocab_size:  # padding of the head, drawn so rarely that no list is sent each time
                ids = self._ids({**body, "allowed_token_ids": list(range(self.vocab_size))})
            return ids

        with ThreadPoolExecutor(min(len(asked), CONCURRENT)) as threads:
            return list(threads.map(respond, asked, seeds))

    def _ids(self, body: dict[str, Any]) -> list[int]:
        (choice,) = self.server.post("/v1/completions", body).json()["choices"]
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if not ids or reason not in ("stop", "length"):
            raise OSError(
                f"expected {self.server.url} to return the ids of a finished response; got {ids and len(ids)} ids, "
                f"finished by {reason}: ask a vLLM server, of version 0.10.2 or later, that nothing else stops"
            )
        return ids
