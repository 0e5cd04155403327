"""A small GPT: the model of the demo and of the benchmarks."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02


class Block(nn.Module):
    """One pre-norm transformer block: causal attention, then a GELU feed-forward of ``ff`` units."""

    def __init__(self, width: int, heads: int, ff: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width!r} and heads={heads!r}")
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, ff)
        self.down = nn.Linear(ff, width)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream ``x [B, T, width]`` after this block."""
        x = x + self._drop(self.out(self._attend(self.norm1(x))))
        return x + self._drop(self.down(F.gelu(self.up(self.norm2(x)))))

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return y.transpose(1, 2).reshape(batch, tokens, width)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """A decoder of ``layers`` blocks that returns its own loss.

    Args:
        layers: Number of blocks.
        width: Hidden units; a multiple of ``heads``.
        heads: Attention heads.
        vocabulary: Number of token ids.
        tokens: The longest sequence.
        ff: Units of the feed-forward; 4 times ``width`` when left out.
        dropout: Share of attention weights and residual branches that is dropped in training.
        checkpointed: Whether each block is recomputed in the backward (``torch.utils.checkpoint``).
    """

    def __init__(
        self,
        *,
        layers: int = 4,
        width: int = 256,
        heads: int = 4,
        vocabulary: int = 256,
        tokens: int = 256,
        ff: int | None = None,
        dropout: float = 0.0,
        checkpointed: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, ff or 4 * width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._initialize(layers)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy, in nats per token, of ``targets [B, T]`` given ``tokens [B, T]``, both int64."""
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _initialize(self, layers: int) -> None:
        """GPT-2's: normal weights, those that write to the residual stream smaller the more there are."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                continue
            is_residual = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * layers) if is_residual else INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
