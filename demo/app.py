"""The page as a Hugging Face Space runs it: TINY_AUDIO_MODEL names the model.

Beside it lies a `requirements.txt` that installs this package with its extra `demo`.
"""

import os
import sys

from tiny_audio.commands.demo import main

sys.exit(main([os.environ.get("TINY_AUDIO_MODEL", "outputs/quickstart"), "--host", "0.0.0.0"]))
