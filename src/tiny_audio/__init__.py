"""tiny-audio: train your own speech recogniser. docs/architecture.md says what to read first."""

from importlib.metadata import PackageNotFoundError, version

from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor

from .asr.asr_audio import load_audio
from .asr.asr_config import ASRConfig
from .asr.asr_modeling import ASRModel
from .asr.asr_pipeline import ASRPipeline
from .asr.asr_processing import ASRProcessor
from .asr.asr_projector import AudioProjector

# With the package installed, folders of ours load through it instead of through their own code.
AutoConfig.register(ASRConfig.model_type, ASRConfig)
AutoModelForSpeechSeq2Seq.register(ASRConfig, ASRModel)
AutoProcessor.register(ASRConfig, ASRProcessor)

try:
    __version__ = version("tiny-audio")
except PackageNotFoundError:  # run from the source tree
    __version__ = "unknown"
__all__ = ["ASRConfig", "ASRModel", "ASRPipeline", "ASRProcessor", "AudioProjector", "load_audio"]
