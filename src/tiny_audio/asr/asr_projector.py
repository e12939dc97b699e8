"""The projector, which maps encoder frames to the space of the decoder's token embeddings.

Shapes: b clips, t encoder frames, f projected frames (f = ceil(t / stack)), d the decoder's hidden
size.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from .asr_config import ASRConfig


class AudioProjector(nn.Module):
    """Stack `stack` frames and project them with a SwiGLU (Shazeer 2020, arXiv 2002.05202).

    The output norm starts at `projector_scale`, the RMS of the decoder's token embeddings. The
    projected frames then have the same magnitude as the tokens around them.
    """

    def __init__(self, config: ASRConfig) -> None:
        super().__init__()
        self.stack = config.stack
        d_in = config.stack * config.audio_config.hidden_size
        d_out = config.text_config.hidden_size
        self.input_norm = nn.RMSNorm(d_in, eps=1e-6)
        self.gate_proj = nn.Linear(d_in, config.projector_hidden, bias=False)
        self.up_proj = nn.Linear(d_in, config.projector_hidden, bias=False)
        self.down_proj = nn.Linear(config.projector_hidden, d_out, bias=False)
        self.output_norm = nn.RMSNorm(d_out, eps=1e-6)
        nn.init.constant_(self.output_norm.weight, config.projector_scale)

    def forward(self, hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(b, t, d_encoder), zero beyond `lengths` (b,) -> (b, f, d), lengths (b,) in frames."""
        b, t, _ = hidden.shape
        hidden = F.pad(hidden.to(self.gate_proj.weight.dtype), (0, 0, 0, -t % self.stack))
        x = self.input_norm(hidden.view(b, -1, self.input_norm.normalized_shape[0]))
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (b, f, hidden)
        x = self.down_proj(x).to(self.output_norm.weight.dtype)  # autocast may return bf16
        return self.output_norm(x), (lengths + self.stack - 1) // self.stack
