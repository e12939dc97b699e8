"""Model cards, and pushes to the Hugging Face Hub that never harm the local copy."""

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import httpx2 as httpx
from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainerCallback

from .asr.asr_config import ASRConfig
from .errors import UserError, one_line

logger = logging.getLogger(__name__)
# Files of a model folder that users need; checkpoints, caches and the optimizer stay local.
PUSH_PATTERNS = ["*.json", "*.py", "*.jinja", "*.md", "merges.txt", "*.model", "model.safetensors"]
PUSH_PATTERNS += ["*.arpa.gz", "training_config.yaml"]
IGNORE_PATTERNS = ["*/*", "trainer_state.json", "summary.json", "finished.json", "stream-*.json"]


class PushError(UserError):
    """A failed push; the message gives the reason and says that the local copy is intact."""


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


def hub_target(repo_id: str | None) -> str:
    """Return the repository to push to, by default <user>/tiny-audio.

    Call this before the training, which then fails early.

    Raises:
        ValueError: if nobody is logged in to the Hub.
        PushError: if the Hub does not return the token's user.
    """
    if not get_token():
        raise ValueError(
            "a push needs a token with write access (https://huggingface.co/settings/tokens): set "
            "HF_TOKEN, or run `hf auth login`"
        )
    if repo_id:
        return repo_id
    try:
        return f"{HfApi().whoami()['name']}/tiny-audio"
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise PushError(
            f"the Hub did not return the token's user ({one_line(error)}): name the repository "
            "(`tiny-audio push FOLDER REPO`, or training.hub_model_id=<user>/<name>)"
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
    ours = ["git", "ls-files", "--error-unmatch", __file__]  # not a repository around site-packages
    run = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    options: Any = {"capture_output": True, "text": True, "cwd": Path(__file__).parent}
    try:
        known = subprocess.run(ours, **options).returncode == 0
        return (known and subprocess.run(run, **options).stdout.strip()) or "unknown"
    except OSError:
        return "unknown"


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
