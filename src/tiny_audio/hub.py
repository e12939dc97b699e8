"""Models on the Hugging Face Hub: the model card, and pushes that never cost the local copy."""

import json
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx2 as httpx
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import TrainerCallback

from .asr.asr_config import ASRConfig

logger = logging.getLogger(__name__)
# What a model folder holds for its users; checkpoints, caches and the optimizer stay at home.
PUSHED = ["*.json", "*.py", "*.jinja", "*.md", "merges.txt", "*.model", "model.safetensors"]
PUSHED += ["*.arpa.gz"]
PUSHED += ["training_config.yaml"]
KEPT = ["*/*", "trainer_state.json", "summary.json", "finished.json"]


class PushError(RuntimeError):
    """A push that failed; the message says why and that the local copy is whole."""


def one_line(error: Exception) -> str:
    """The first line of an error's message; its name where it has none, as timeouts often do."""
    if isinstance(error.__cause__, HFValidationError):  # of a path that is not there
        return "no such folder; `make quickstart` fetches those of its recipe"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def push_folder(folder: Path, repo_id: str, message: str, private: bool | None = None) -> str:
    """Upload a model folder's own files as one commit; returns the model's address.

    Args:
        folder: as `save_pretrained` wrote it.
        repo_id: "user/name"; made where it does not exist.
        private: of a repository that is made now.

    Raises:
        PushError: when the Hub refuses or cannot be reached.
    """
    try:
        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            allow_patterns=PUSHED,
            ignore_patterns=KEPT,
        )
        return str(url)
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise PushError(
            f"push to {repo_id} failed ({one_line(error)}); nothing is lost: "
            f"`tiny-audio push {folder} {repo_id}` tries again"
        ) from error


def hub_target(push: bool | None, repo_id: str | None) -> str | None:
    """Where a run pushes: `repo_id`, or <user>/tiny-audio; None where it does not.

    `push` None means: where there is a token. Asked before the training, not after it.

    Raises:
        ValueError: when pushing is asked for and there is no token.
        PushError: when the Hub does not say whose token it is.
    """
    token = os.environ.get("HF_TOKEN")
    if push is False or (push is None and not token):
        return None
    if not token:
        raise ValueError(
            "training.push_to_hub=true needs HF_TOKEN in the environment: make a token with write "
            "access at https://huggingface.co/settings/tokens, or set training.push_to_hub=false"
        )
    if repo_id:
        return repo_id
    try:
        return f"{HfApi().whoami()['name']}/tiny-audio"
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise PushError(
            f"the Hub does not say whose HF_TOKEN this is ({one_line(error)}): set "
            "training.hub_model_id=<user>/<name>, or training.push_to_hub=false"
        ) from error


class HubPusher(TrainerCallback):
    """Pushes every checkpoint; a failure is a warning, and the run goes on."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Push the checkpoint that was just written."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        try:
            push_folder(folder, self.repo_id, f"step {state.global_step}")
        except PushError as error:
            logger.warning("%s; tried again at the next checkpoint and at the end", error)


def git_hash() -> str:
    """Commit of the working tree, with + when it was changed, or "unknown" outside git."""
    run = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        out = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return out.stdout.strip() or "unknown"


def model_card(folder: Path, known: dict[str, Any] | None = None) -> str:
    """README.md of a model folder, filled from what lies in it: nothing is made up.

    Reads `config.json`, and where they exist `training_config.yaml`, `finished.json` (steps, clips,
    hours, parameters) and `summary.json` (the evaluation).
    """
    config = ASRConfig.from_pretrained(folder)
    facts: dict[str, Any] = dict(known or {})
    for name in ("finished.json", "summary.json"):
        if (folder / name).exists():
            facts |= json.loads((folder / name).read_text())
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="automatic-speech-recognition",
            tags=["tiny-audio", "speech"],
            base_model=[n for n in (config.encoder_name, config.decoder_name) if "/" in n] or None,
        ),
        template_path=str(Path(__file__).with_name("model_card.md")),
        name=folder.resolve().name,
        config=config,
        whole=(folder / "training_config.yaml").exists(),
        facts=facts,
    )
    return str(card)
