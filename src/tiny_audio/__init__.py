"""tiny-audio: train your own speech recogniser. Read asr_config, asr_modeling, asr_processing,
asr_pipeline, handler, data, train, in this order."""

from .asr_config import ASRConfig
from .asr_modeling import ASRModel, AudioProjector
from .asr_pipeline import ASRPipeline
from .asr_processing import ASRProcessor, load_audio

__version__ = "0.1.0"
__all__ = ["ASRConfig", "ASRModel", "ASRPipeline", "ASRProcessor", "AudioProjector", "load_audio"]
