"""`python src/train.py +experiments=quickstart`: see tiny_audio/train.py."""

from tiny_audio.train import main

main()
