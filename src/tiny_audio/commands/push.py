"""`tiny-audio push FOLDER [REPO]`: upload a trained model to the Hugging Face Hub.

Needs HF_TOKEN, or `hf auth login`. Uploads the config, trained tensors, processor, code and a model
card. With --merged, also uploads the weights of the base models, so the model does not depend on
them.
"""

import shutil
import tempfile
from pathlib import Path

from ..asr.asr_modeling import ASRModel
from ..asr.asr_processing import ASRProcessor
from ..hub import hub_target, model_card, push_folder
from . import parser_of


def main(argv: list[str] | None = None) -> int:
    """Push the model; changes no local file except the model card."""
    parser = parser_of("tiny-audio push", __doc__)
    parser.add_argument("folder", type=Path, help="finished model, e.g. outputs/stage1")
    parser.add_argument("repo", nargs="?", help="user/name; default: <user>/tiny-audio")
    parser.add_argument("--merged", action="store_true", help="include the base models' weights")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args(argv)
    if not (args.folder / "config.json").is_file():
        raise ValueError(f"{args.folder} has no config.json: it is not a finished model")
    repo = hub_target(args.repo)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder
        if args.merged:
            folder = Path(scratch) / args.folder.resolve().name
            ASRModel.from_pretrained(args.folder).save_pretrained(folder, self_contained=True)
            ASRProcessor.from_pretrained(args.folder).save_pretrained(folder)
            if (recipe := args.folder / "training_config.yaml").is_file():
                shutil.copy(recipe, folder)
        (folder / "README.md").write_text(model_card(args.folder))
        print(push_folder(folder, repo, "tiny-audio push", private=args.private or None))
    return 0
