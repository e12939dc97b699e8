"""Run the web page as a Hugging Face Space; TINY_AUDIO_MODEL names the model.

A Space also needs a `requirements.txt` that installs the package with its `demo` extra.
"""

import os
import sys

from tiny_audio.commands.cli import main

model = os.environ.get("TINY_AUDIO_MODEL", "outputs/quickstart")
sys.exit(main(["demo", model, "--host", "0.0.0.0"]))
