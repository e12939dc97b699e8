"""Save a trained model, and load it again."""

import json
import shutil
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from .asr_bases import cast_base, check_attention, is_trained, load_base, load_weights, shard_like
from .asr_config import AUTO_MAP, ASRConfig, check_keys
from .asr_ngram import NGram, load_arpa, save_arpa
from .asr_writing import Writing

WEIGHTS = "model.safetensors"
# Beside the weights: the n-gram of the training transcripts, and how they are written.
NGRAM, WRITING = "ngram.arpa.gz", "writing.json"
CODE = "asr_audio asr_bases asr_config asr_ctc asr_decoding asr_encoder asr_modeling".split()
CODE += "asr_ngram asr_packing asr_pipeline asr_processing asr_projector asr_saving".split()
CODE += ["asr_search", "asr_writing", "handler"]
HUB_KEYS = set("revision token cache_dir local_files_only force_download proxies subfolder".split())
# Arguments that transformers' Auto classes and pipelines add to those of the user.
AUTO_CLASS_KEYS = {"_from_pipeline", "_commit_hash", "_from_auto", "adapter_kwargs"}
AUTO_CLASS_KEYS |= {"trust_remote_code", "code_revision", "low_cpu_mem_usage", "use_safetensors"}


class SavedModel(PreTrainedModel):
    """The saving and loading of `ASRModel`.

    A checkpoint holds what is trained: projector, residual of the bridge, CTC heads and LoRA
    weights. A self-contained one also holds the base models.
    """

    config_class = ASRConfig
    config: ASRConfig
    encoder: Any
    decoder: Any
    characters: Any
    ngram: NGram | None
    writing: Writing | None

    def checkpoint_names(self, self_contained: bool) -> list[str]:
        """List the tensors that a checkpoint holds; of tied tensors, only the first."""
        names: dict[int, str] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if self_contained or is_trained(name):
                names.setdefault(id(tensor), name)
        return list(names.values())

    def checkpoint(self, self_contained: bool) -> dict[str, Tensor]:
        """Collect the tensors of a checkpoint by name.

        This gathers shards, so every process must call it.
        """
        state = self.state_dict()
        saved = {name: state[name] for name in self.checkpoint_names(self_contained)}
        full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in saved.items()}
        return {name: tensor.contiguous() for name, tensor in full.items()}

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, self_contained: bool | None = None,
        state_dict: dict[str, Tensor] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Write config, generation config, tensors, n-gram, writing, and the code that loads them.

        Args:
            save_directory: folder, created if missing.
            state_dict: result of `checkpoint`; None calls it.
            self_contained: also write the weights of the base models, so the folder needs nothing
                else. None does so if the model was loaded from such a folder, or if a base model is
                a local folder.
        """
        unused = {"is_main_process", "safe_serialization", "max_shard_size"}  # ignored: one file
        check_keys(kwargs, unused, "save_pretrained")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        bases = (self.config.encoder_name, self.config.decoder_name)
        if self_contained is None:
            self_contained = self.config.self_contained or any(Path(b).is_dir() for b in bases)
        tensors = self.checkpoint(self_contained) if state_dict is None else state_dict
        save_file(tensors, folder / (WEIGHTS + ".tmp"), metadata={"format": "pt"})
        (folder / (WEIGHTS + ".tmp")).replace(folder / WEIGHTS)
        self.config.ngram_file = NGRAM if self.ngram else None
        self.config.writing_file = WRITING if self.writing else None
        if self.ngram:
            save_arpa(self.ngram, folder / NGRAM)
        if self.writing:
            self.writing.save(folder / WRITING)
        config = self.config.to_dict()
        config.update(AUTO_MAP, architectures=["ASRModel"], self_contained=self_contained)
        if self_contained:  # leave local paths out of the saved model
            config.update(encoder_name=Path(bases[0]).name, decoder_name=Path(bases[1]).name)
        for part in (config, config["audio_config"], config["text_config"]):
            for key in ("dtype", "_name_or_path", "_attn_implementation", "attn_implementation"):
                part.pop(key, None)  # settings of the run
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        self.generation_config.save_pretrained(folder)
        for name in CODE:
            source = Path(__file__).with_name(f"{name}.py")
            if not source.exists():  # code from a model folder: unimported files are elsewhere
                source = Path(str(cached_file(str(self.config.name_or_path), source.name)))
            if source.resolve() != (folder / source.name).resolve():
                shutil.copyfile(source, folder / source.name)

    @classmethod
    def from_base(
        cls, config: ASRConfig, *, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Self:
        """Load the base models that `config` names and add the parts to train.

        The character head may start from the encoder's own CTC head.

        Args:
            config: this method sets its `audio_config`, `text_config`, commits of the base models,
                `projector_scale` and `ctc_direct`.
            dtype: dtype of the base weights; the trained parts stay in fp32.
            kwargs: `attn_implementation` of the encoder, `token`, `cache_dir`, `local_files_only`.

        Raises:
            OSError: if a base model is not found.
            ValueError: if a base model lacks weights.
        """
        encoder, own_head = load_base(config, "encoder", dtype, **kwargs)
        decoder, _ = load_base(config, "decoder", dtype, **kwargs)
        config.audio_config, config.text_config = encoder.config, decoder.config
        with torch.no_grad():  # of what the layer returns: Gemma's scales its weights
            embeddings = decoder.get_input_embeddings()(torch.arange(config.text_config.vocab_size))
        config.projector_scale = embeddings.float().pow(2).mean().sqrt().item()
        if config.ctc_direct is None:
            config.ctc_direct = own_head is not None
        model = cls(config, encoder, decoder)
        if own_head:
            model.characters.start_from(*own_head)
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name_or_path: str | Path, *, config: ASRConfig | None = None, **kwargs: Any
    ) -> Self:
        """Load a trained model from a folder or Hub id, and the base models that it names.

        Args:
            name_or_path: folder written by `save_pretrained`, or Hub id.
            config: replaces the saved config.
            kwargs: `dtype`, `attn_implementation` of the encoder, `device_map` ("auto" or a
                device), and Hub arguments (`revision`, `token`, `cache_dir`, ...).

        Raises:
            OSError: if the folder or its weights are missing.
            ValueError: if tensors are missing, unexpected or of another shape.
        """
        hub = {k: kwargs.pop(k) for k in HUB_KEYS if k in kwargs}
        kwargs = {k: v for k, v in kwargs.items() if k not in AUTO_CLASS_KEYS}
        dtype, device = kwargs.pop("dtype", None), kwargs.pop("device_map", None)
        if isinstance(device, dict) and len({*device.values()}) == 1:  # one device for all
            device = next(iter(device.values()))
        attention = kwargs.pop("attn_implementation", None)
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        check_keys(kwargs, {"dtype", "device_map", "attn_implementation", *HUB_KEYS}, cls.__name__)
        if cached_file(str(name_or_path), "config.json", **hub) is None:
            raise OSError(f"{name_or_path} has no config.json")
        config = config or ASRConfig.from_pretrained(name_or_path, **hub)
        tensors = load_weights(str(cached_file(str(name_or_path), WEIGHTS, **hub)))
        local = {k: v for k, v in hub.items() if k not in ("revision", "subfolder")}
        if config.self_contained:
            check_attention(attention)
            model = cls(config)
            if attention:
                model.encoder.set_attn_implementation(attention)
            for part in (model.encoder, model.decoder):
                cast_base(part, dtype)
        else:
            model = cls.from_base(config, dtype=dtype, attn_implementation=attention, **local)
        model.load_tensors(tensors, f"{name_or_path}/{WEIGHTS}")
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **hub)
        files = [file for file in (config.ngram_file, config.writing_file) if file]
        if folders := {Path(str(cached_file(name_or_path, f, **hub))).parent for f in files}:
            model.load_words(folders.pop())  # all files of a model are in one folder
        config.name_or_path = str(name_or_path)
        if device == "auto":
            device = torch.accelerator.current_accelerator(check_available=True)
        if device is not None:
            model.to(device)  # type: ignore[arg-type]
        return model.eval()

    def load_words(self, folder: Path) -> None:
        """Load the n-gram and the writing of the training transcripts, if the folder has them."""
        if (folder / NGRAM).exists():
            self.ngram = load_arpa(folder / NGRAM)
        if (folder / WRITING).exists():
            self.writing = Writing.load(folder / WRITING)

    def load_tensors(
        self, tensors: dict[str, Tensor], source: str, fresh_lora: bool = False
    ) -> None:
        """Load the tensors of a checkpoint; none may be missing or unexpected.

        Args:
            tensors: by name, as `checkpoint_names` lists them.
            source: file that they come from, for error messages.
            fresh_lora: keep the initial values of LoRA weights that the file lacks (a new stage).

        Raises:
            ValueError: naming the tensors that are missing, unexpected or of another shape.
        """
        expected = self.state_dict()
        names = set(self.checkpoint_names(self.config.self_contained))
        if fresh_lora:
            tensors = {n: t for n, t in tensors.items() if is_trained(n)}
            names = {n for n in names if n in tensors or ".lora_" not in n}
        common = names & set(tensors)
        found = {
            "missing": names - common,
            "unexpected": set(tensors) - common,
            "mis-shaped": {n for n in common if tensors[n].shape != expected[n].shape},
        }
        for kind, bad in found.items():
            if bad:
                raise ValueError(
                    f"{source}: {len(bad)} {kind} tensors, first {sorted(bad)[:3]}: it was saved "
                    "with another config or by other code"
                )
        with torch.no_grad():
            for name, tensor in tensors.items():
                expected[name].copy_(shard_like(tensor, expected[name]))
