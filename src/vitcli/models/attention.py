"""Multi-head attention: among all tokens, along the rows or columns of their grid, and of one learned query (MAP).

ViT (2010.11929) appendix A, with relative positions (D.4) and Axial attention (D.6) as options.

B batch, h w grid sides, P = h w patches, N tokens, Q those that ask, D width, M mlp_dim, A attention heads.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "AttentionPool", "AxialAttention", "Mlp", "attend", "reset_mlp"]


def attend(q: Tensor, k: Tensor, v: Tensor, *, dropout: float, bias: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D/A) + bias) v, (B, A, Q, D/A), for Q queries and N keys and values.

    Through `scaled_dot_product_attention`, which keeps no (Q, N) weights, but for 16-bit numbers on a CPU: its kernel there is
    3 to 6 times slower backward than the products written out, where the CPU multiplies bf16 by itself.
    """
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    with torch.autocast("cpu", enabled=False):  # which would take the softmax through float32
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, A, Q, N)
        weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        return F.dropout(weights, dropout) @ v


class Attention(nn.Module):
    """Multi-head self-attention (Eq. 5-8 in the paper's appendix A).

    Args:
        attention_dropout: on the softmax's weights.
        qk_norm_eps: epsilon of a LayerNorm on each head's queries and keys (2302.05442); None for no norm.
        relative_tokens: N, for learned relative positions (D.4) between N tokens; None for none.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        attention_dropout: float,
        qk_norm_eps: float | None = None,
        relative_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        head = width // num_heads
        self.q_norm = None if qk_norm_eps is None else nn.LayerNorm(head, eps=qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else nn.LayerNorm(head, eps=qk_norm_eps)
        self.relative = nn.Parameter(torch.empty(2 * relative_tokens - 1, head)) if relative_tokens else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, only_first: int = 0) -> Tensor:
        """Map (B, N, D) to (B, N, D); with `only_first` n to the first n tokens, (B, n, D): they alone ask, all answer."""
        q, k, v, bias = self.heads(x, only_first)
        y = attend(q, k, v, dropout=self.attention_dropout if self.training else 0.0, bias=bias)  # (B, A, Q, D/A)
        output: Tensor = self.proj(y.transpose(1, 2).reshape(x.shape[0], -1, x.shape[2]))
        return output

    def weights(self, x: Tensor) -> Tensor:
        """Return the softmax's weights for (B, N, D), (B, A, N, N): from each token (row) to each, 1 in sum."""
        return torch.cat(list(self.weight_rows(x, most=x.shape[1])), dim=2)

    def weight_rows(self, x: Tensor, *, most: int) -> Iterator[Tensor]:
        """Yield `weights` a part at a time, (B, A, Q, N) with Q at most `most`, from the first token on.

        So they can be looked at where N x N of them are too many to hold.
        """
        q, k, _ = self.project(x)
        for first in range(0, x.shape[1], most):
            asking = q[:, :, first : first + most]
            logits = (asking * q.shape[-1] ** -0.5) @ k.mT
            if self.relative is not None:
                logits = logits + self.relative_logits(asking, self.relative, first=first)
            yield torch.softmax(logits, dim=-1)

    def heads(self, x: Tensor, only_first: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries (B, A, Q, D/A), keys and values (B, A, N, D/A), and what to add to the logits."""
        q, k, v = self.project(x, only_first)
        return q, k, v, None if self.relative is None else self.relative_logits(q, self.relative)

    def project(self, x: Tensor, only_first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, A, Q, D/A), keys and values (B, A, N, D/A)."""
        batch, tokens, width = x.shape
        if only_first:
            q = F.linear(x[:, :only_first], self.qkv.weight[:width], self.qkv.bias[:width])
            q = q.reshape(batch, only_first, 1, self.num_heads, -1)
            kv = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:]).reshape(batch, tokens, 2, self.num_heads, -1)
            parts = [*q.unbind(2), *kv.unbind(2)]
        else:
            # Taken apart on axis 2, the gradient is put together in the order `qkv` lies in memory: no transposing copy.
            parts = list(self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).unbind(2))
        q, k, v = (part.transpose(1, 2) for part in parts)  # (B, A, N, D/A) each
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def relative_logits(self, q: Tensor, relative: Tensor, *, first: int = 0) -> Tensor:
        """Attend once more, (B, A, Q, N): the same queries, and as keys the embeddings of the offsets p_q - p_k (D.4).

        The queries are those of the tokens from `first` on.
        """
        tokens = (len(relative) + 1) // 2
        place = torch.arange(tokens, device=q.device)
        offsets = place[first : first + q.shape[2], None] - place + tokens - 1  # (Q, N), from 0
        keys = F.embedding(offsets, relative)  # (Q, N, D/A)
        return torch.einsum("baqd,qnd->baqn", q * q.shape[-1] ** -0.5, keys.to(q.dtype))


class AxialAttention(Attention):
    """Attention among the patches of each row, or of each column, of their grid (paper D.6).

    Args:
        axis: what the patches that see one another have in common.
        grid_size: (rows, columns) of patches.
        sizes: as for `Attention`.
    """

    def __init__(self, *, axis: Literal["rows", "columns"], grid_size: tuple[int, int], **sizes: Any) -> None:
        super().__init__(**sizes)
        self.axis = axis
        self.grid_size = grid_size

    def forward(self, x: Tensor, only_first: int = 0) -> Tensor:
        """Map (B, P, D) to (B, P, D), row by row; there is no class token to be the `only_first`."""
        assert not only_first
        lines = self.lines(x)  # (B, lines, places, D)
        y = super().forward(lines.flatten(0, 1)).view_as(lines)
        return (y if self.axis == "rows" else y.transpose(1, 2)).flatten(1, 2)

    def weight_rows(self, x: Tensor, *, most: int) -> Iterator[Tensor]:
        """Yield the weights among all patches of (B, P, D), (B, A, Q, P), with 0 between lines, as `Attention.weight_rows`."""
        lines = self.lines(x)
        batch, count, places, _ = lines.shape
        q, k, _ = self.project(lines.flatten(0, 1))
        inside = torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1)  # (B lines, A, places, places)
        inside = inside.unflatten(0, (batch, count)).permute(0, 2, 1, 3, 4)  # (B, A, lines, places, places)
        patches = torch.arange(x.shape[1], device=x.device).unflatten(0, self.grid_size)
        patches = patches if self.axis == "rows" else patches.T  # (lines, places)
        order = patches.flatten().argsort()
        line, place = order // places, order % places  # (P,) of each patch
        for first in range(0, x.shape[1], most):
            lines_of, places_of = line[first : first + most], place[first : first + most]
            some = inside[:, :, lines_of, places_of]  # (B, A, Q, places)
            every = x.new_zeros(*some.shape[:3], x.shape[1])
            yield every.scatter_(3, patches[lines_of].expand_as(some), some)

    def lines(self, x: Tensor) -> Tensor:
        """Return (B, P, D) as rows (B, h, w, D) or columns (B, w, h, D)."""
        grid = x.unflatten(1, self.grid_size)
        return grid if self.axis == "rows" else grid.transpose(1, 2)


class Mlp(nn.Module):
    """Two dense layers with GELU between them; dropout after each (appendix B.1)."""

    def __init__(self, *, width: int, mlp_dim: int, dropout: float, gelu: Literal["tanh", "exact"]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_dim)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = nn.Linear(mlp_dim, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        x = self.drop(self.act(self.fc1(x)))  # (B, N, M)
        output: Tensor = self.drop(self.fc2(x))
        return output


def reset_mlp(mlp: Mlp) -> None:
    """Draw Xavier-uniform weights and biases of almost zero."""
    for dense in (mlp.fc1, mlp.fc2):
        nn.init.xavier_uniform_(dense.weight)
        nn.init.normal_(dense.bias, std=1e-6)


class AttentionPool(nn.Module):
    """Ask the patches with one learned query, then an MLP: the MAP head (Set Transformer, 1810.00825; 2106.04560).

    Without dropout, as big_vision's `MAPHead`.
    """

    def __init__(
        self, *, width: int, mlp_dim: int, num_heads: int, gelu: Literal["tanh", "exact"], layer_norm_eps: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.mlp = Mlp(width=width, mlp_dim=mlp_dim, dropout=0.0, gelu=gelu)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, P, D) to (B, D)."""
        q, k, v = self.heads(x)
        # one query, so (A, 1, D/A) lies as D; x.shape[0], since len(x) would fix the batch in an exported graph
        y = self.proj(attend(q, k, v, dropout=0.0).reshape(x.shape[0], -1))
        output: Tensor = y + self.mlp(self.norm(y))
        return output

    def weights(self, x: Tensor) -> Tensor:
        """Return the weights for (B, P, D), (B, A, P): how much the query takes of each patch, 1 in sum."""
        q, k, _ = self.heads(x)
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1)[:, :, 0]

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query (B, A, 1, D/A), and keys and values (B, A, P, D/A)."""
        batch, tokens, _ = x.shape
        q = self.q(self.latent).reshape(1, 1, self.num_heads, -1).transpose(1, 2).expand(batch, -1, -1, -1)
        k, v = (part.transpose(1, 2) for part in self.kv(x).reshape(batch, tokens, 2, self.num_heads, -1).unbind(2))
        return q, k, v
