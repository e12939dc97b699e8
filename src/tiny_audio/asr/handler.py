"""Handler for Hugging Face inference endpoints.

The inference toolkit loads this file by its path in the model's folder. Therefore the file does not
import the package; it builds the pipeline that the folder describes. To try it in such a folder:
`python handler.py talk.mp3`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from transformers import pipeline


class EndpointHandler:
    """Answer `{"inputs": <bytes of an audio file>, "parameters": {...}}` with `{"text": ...}`."""

    def __init__(self, path: str = "") -> None:
        model = path or str(Path(__file__).parent)
        self.pipeline = pipeline("automatic-speech-recognition", model, trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> Any:
        """Transcribe `data["inputs"]`; `data["parameters"]` are the pipeline's call arguments.

        Raises:
            ValueError: if the inputs are not bytes. The handler never opens a path or URL that the
                caller chooses.
        """
        if not isinstance(data["inputs"], bytes):
            raise ValueError("inputs must be the bytes of an audio file")
        return self.pipeline(data["inputs"], **(data.get("parameters") or {}))


if __name__ == "__main__":
    handler = EndpointHandler()
    for file in sys.argv[1:]:
        print(json.dumps(handler({"inputs": Path(file).read_bytes()}), ensure_ascii=False))
