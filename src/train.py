"""Train with `python src/train.py +experiments=quickstart`; see tiny_audio/training/train.py."""

from tiny_audio.training.train import main

main()
