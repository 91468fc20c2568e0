"""The student on the hub: its repository is what `student/` holds, with a model card. A failed push loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

import okd_kernels
from okd.card import model_card
from okd.checkpoints import STUDENT
from okd.models import BASE
from okd.report import CONFIG, FIGURES

logger = logging.get_logger(__name__)


def api() -> HfApi:
    return HfApi(library_name="okd-kernels", library_version=okd_kernels.__version__)


def check_push_options(options: Any) -> None:
    """Raise ValueError for what is not pushed here, or not so."""
    if options.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise ValueError(
            f"expected hub_strategy end or every_save, as students are pushed; got {options.hub_strategy.value}: "
            "leave it out, and upload checkpoints by hf upload"
        )
    if options.hub_always_push:
        raise ValueError("expected no hub_always_push, as the run waits for each push; got it: leave it out")


def create_repository(options: Any, token: str | None = None, private: bool | None = None) -> str:
    """Its id; it may exist. Raises OSError where the hub does not let us."""
    name = options.hub_model_id or Path(options.output_dir).absolute().name
    token = token or options.hub_token
    try:
        private = options.hub_private_repo if private is None else private
        found = api().create_repo(name, token=token, private=private, exist_ok=True).repo_id
        if options.hub_revision is not None:
            api().create_branch(found, branch=options.hub_revision, token=token, exist_ok=True)
    except Exception as error:
        raise OSError(
            f"expected a repository {name} on the hub to push to; got {error}: log in (hf auth login), or leave out "
            "--push-to-hub and upload the student afterwards"
        ) from error
    return found


def check_student_to_push(student: Any) -> None:
    """Raise ValueError for an adapter over what nobody else has."""
    if not hasattr(student, "peft_config"):
        return
    base = student.active_peft_config.base_model_name_or_path
    if not base or Path(base).exists():
        raise ValueError(
            f"expected a student that others can load; got a LoRA over {base or 'a base without a name'}, which is on "
            "this machine alone: pass --student-save merged"
        )


class Hub:
    """A trainer's way there."""

    args: Any
    callback_handler: Any
    control: Any
    hub_model_id: Any
    is_world_process_zero: Any
    model: Any
    pair: Any
    save_model: Any
    state: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self.args.student_save != "merged":
            check_student_to_push(getattr(self, "pair", self.model).student)
        if self.is_world_process_zero():
            self.hub_model_id = create_repository(self.args, token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save the student in output_dir/student with a card, and push that. All processes call it.

        card: as `okd.card.model_card` takes it, such as license and tags. Raises OSError where the push fails.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        return self.upload_student(commit_message, blocking, token, revision)

    def create_model_card(self, model_name: str | None = None, **card: Any) -> None:
        """`student/README.md`, out of the run's config.yaml and metrics.json where there are any."""
        if not self.is_world_process_zero():
            return
        run = Path(str(self.args.output_dir))
        options, figures = run / CONFIG, run / FIGURES
        models = {"student": self.pair.student, "teacher": getattr(self.pair.teacher, "model", None)}
        named = {name: getattr(model, "name_or_path", "") for name, model in models.items()}
        written = model_card(
            self.args.resolved,
            yaml.safe_load(options.read_text()) if options.is_file() else {k: v for k, v in named.items() if v},
            model_name or self.hub_model_id or run.absolute().name,
            json.loads(figures.read_text()) if figures.is_file() else None,
            (run / STUDENT / "adapter_config.json").is_file(),
            **card,
        )
        (run / STUDENT / "README.md").write_text(written)

    def upload_student(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """By one process, what lies in output_dir/student."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        directory = Path(str(self.args.output_dir)) / STUDENT
        try:
            return api().upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=directory,
                commit_message=commit_message,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
                run_as_future=not blocking,  # type: ignore[call-overload]
                ignore_patterns=[f"{BASE}/*", ".*"],
            )
        except Exception as error:
            raise OSError(
                f"expected to push {directory} to {self.hub_model_id}; got {error}. Nothing is lost: "
                f"hf upload {self.hub_model_id} {directory} ."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not in the middle of a save: see `_save_checkpoint`."""

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if not self.args.push_to_hub or self.args.hub_strategy != HubStrategy.EVERY_SAVE:
            return
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self.create_model_card()
            try:
                self.upload_student(f"Step {self.state.global_step}")
            except OSError as error:
                logger.warning(f"{error} (the training goes on)")
