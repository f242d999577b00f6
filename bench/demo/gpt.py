"""A small byte-level GPT: learned positions, pre-norm blocks, one matrix for embedding and output."""

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256


class Block(nn.Module):
    """Causal self-attention and a GELU MLP, each behind a LayerNorm and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] -> the same shape."""
        batch, time, width = x.shape
        packed = self.query_key_value(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, time, width))
        hidden: Tensor = self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + hidden


class GPT(nn.Module):
    """Next-byte prediction.

    Initialised from torch's global generator: normal with standard deviation 0.02, and the two matrices that
    write into the residual stream of each block scaled down by sqrt(2 * layers) (Radford et al. 2019, GPT-2).
    """

    def __init__(self, *, layers: int, heads: int, width: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)

    def forward(self, windows: Tensor) -> Tensor:
        """int64 [batch, time + 1] -> mean cross-entropy (nats per byte) of predicting each byte from those before."""
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.embedding(inputs) + self.position(
            torch.arange(inputs.shape[1], dtype=torch.int64, device=windows.device)
        )
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.embedding.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def parameter_count(model: nn.Module) -> int:
    """Elements of all parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
