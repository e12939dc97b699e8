"""Model cards, and pushes to the Hugging Face Hub that never harm the local copy."""

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
from .errors import UserError

logger = logging.getLogger(__name__)
# Files of a model folder that users need; checkpoints, caches and the optimizer stay local.
PUSH_PATTERNS = ["*.json", "*.py", "*.jinja", "*.md", "merges.txt", "*.model", "model.safetensors"]
PUSH_PATTERNS += ["*.arpa.gz", "training_config.yaml"]
IGNORE_PATTERNS = ["*/*", "trainer_state.json", "summary.json", "finished.json"]


class PushError(UserError):
    """A failed push; the message gives the reason and says that the local copy is intact."""


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class name if there is none."""
    if isinstance(error.__cause__, HFValidationError):  # the path does not exist
        return "no such folder; `make quickstart` fetches the models of its recipe"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def push_folder(folder: Path, repo_id: str, message: str, private: bool | None = None) -> str:
    """Upload the files of a model folder as one commit and return the model's URL.

    Args:
        folder: folder written by `save_pretrained`.
        repo_id: "user/name", created if missing.
        message: commit message.
        private: visibility of a newly created repository.

    Raises:
        PushError: if the Hub refuses or cannot be reached.
    """
    try:
        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            allow_patterns=PUSH_PATTERNS,
            ignore_patterns=IGNORE_PATTERNS,
        )
        return str(url)
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise PushError(
            f"push to {repo_id} failed ({one_line(error)}); the local copy is intact: "
            f"`tiny-audio push {folder} {repo_id}` tries again"
        ) from error


def hub_target(push: bool | None, repo_id: str | None) -> str | None:
    """Return the repository that a run pushes to, or None if it does not push.

    The default is <user>/tiny-audio. If `push` is None, a run pushes if HF_TOKEN is set. Call this
    before the training, which then fails early.

    Raises:
        ValueError: if `push` is True and HF_TOKEN is not set.
        PushError: if the Hub does not return the user of HF_TOKEN.
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
            f"the Hub did not return the user of HF_TOKEN ({one_line(error)}): set "
            "training.hub_model_id=<user>/<name>, or training.push_to_hub=false"
        ) from error


class HubPusher(TrainerCallback):
    """Push every checkpoint; after a failure, log a warning and continue the run."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Push the checkpoint that was just saved."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        try:
            push_folder(folder, self.repo_id, f"step {state.global_step}")
        except PushError as error:
            logger.warning("%s; will retry at the next checkpoint and at the end", error)


def git_hash() -> str:
    """Return the commit of the working tree, with + for changes; "unknown" outside git."""
    run = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        out = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return out.stdout.strip() or "unknown"


def model_card(folder: Path, known: dict[str, Any] | None = None) -> str:
    """Render the README.md of a model folder from the files in it.

    Reads `config.json` and, if present, `training_config.yaml`, `finished.json` (steps, clips,
    hours, parameters) and `summary.json` (the evaluation). `known` adds further facts.
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
        has_training_config=(folder / "training_config.yaml").exists(),
        facts=facts,
    )
    return str(card)
