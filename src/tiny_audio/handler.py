"""Handler for Hugging Face inference endpoints.

The inference toolkit loads this file by its path, from the model's folder, so it imports nothing
of ours: it builds the pipeline that the folder itself describes.
"""

from typing import Any

from transformers import pipeline


class EndpointHandler:
    """Answers `{"inputs": <bytes of an audio file>, "parameters": {...}}` with `{"text": ...}`."""

    def __init__(self, path: str = "") -> None:
        self.pipeline = pipeline("automatic-speech-recognition", model=path, trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> Any:
        """Transcribe `data["inputs"]`; `data["parameters"]` are the pipeline's call arguments."""
        return self.pipeline(data["inputs"], **(data.get("parameters") or {}))
