"""The VAR transformer: predicts all tokens of a scale at once from all coarser scales (paper, section 3).

Names of parameters and methods are those of the published checkpoints and code. Shape letters: B batch, L tokens,
C width, H heads, D channels of a head, K scales, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from var_ext import ops
from var_ext.models.compatibility import PublishedAttention, PublishedBlock, PublishedVAR

# published scripts import these from here
from var_ext.models.compatibility import gumbel_softmax_with_rng as gumbel_softmax_with_rng
from var_ext.models.compatibility import sample_with_top_k_top_p_ as sample_with_top_k_top_p_
from var_ext.models.keyed import Draws, Rows, key_rows
from var_ext.models.modules import Dropout, DropPath, Part, dtype_of, linear, linear_float32, linear_gelu
from var_ext.models.vqvae import VQVAE
from var_ext.reference.block_causal_attention import block_causal_mask
from var_ext.schedule import SCALES_256, ScaleSchedule

Modulation = tuple[Tensor, ...]  # vectors of (B, C)


class Stream(NamedTuple):
    """The residual stream x (B, L, C), with the last branch (B, L, C) and its gate (B, C) still to be added.

    The next reader adds them: one pass over memory for the sum and the norm that follows.
    """

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Stream:
        """The stream in another dtype."""
        branch = None if self.branch is None else self.branch.to(dtype)
        return Stream(self.x.to(dtype), branch, None if self.gate is None else self.gate.to(dtype))

    def sum(self) -> Tensor:
        """x with the branch added."""
        if self.branch is None or self.gate is None:
            return self.x
        return self.x + self.gate[:, None] * self.branch

    def normed(self, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The sum, and its modulated norm."""
        if self.branch is None or self.gate is None:
            return self.x, ops.adaln(self.x, scale, shift, eps=eps)
        return ops.adaln(self.x, scale, shift, branch=self.branch, gate=self.gate, eps=eps)


@dataclass(frozen=True)
class Whole:
    """Attention over a whole sequence, as in training: every token sees its own scale and all coarser ones."""

    schedule: ScaleSchedule

    def __call__(
        self, qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None, scale: float
    ) -> Tensor:
        """(B, L, 3, H, D) -> (B, L, H, D)."""
        q, k, v = ops.qk_norm(qkv, q_bias, v_bias, log_scale)
        return ops.block_causal_attention(q, k, v, self.schedule, scale=scale)


@dataclass(frozen=True)
class Cached:
    """Attention of one scale to itself and to the cached keys and values of earlier ones, as in sampling.

    Attributes:
        k, v: (B, L, H, D), with `offset` tokens filled; the scale's own are appended.
    """

    k: Tensor
    v: Tensor
    offset: int

    def __call__(
        self, qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None, scale: float
    ) -> Tensor:
        """(B, l, 3, H, D) -> (B, l, H, D)."""
        dtype = self.k.dtype  # may differ from qkv's if an engine left a module in its own precision
        log_scale = None if log_scale is None else log_scale.to(dtype)
        out = ops.cached_attention(
            qkv.to(dtype),
            q_bias.to(dtype),
            v_bias.to(dtype),
            log_scale,
            self.k,
            self.v,
            self.offset,
            scale=scale,
        )
        return out.to(qkv.dtype)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]  # `Whole` or `Cached`


class SelfAttention(Part, PublishedAttention):
    """Multi-head self-attention over the scales that `attend` makes visible."""

    quantizable = True

    def __init__(self, embed_dim: int, num_heads: int, proj_drop: float, attn_l2_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        if attn_l2_norm:
            self.scale = 1.0
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        else:
            self.scale = 0.25 / math.sqrt(self.head_dim)
        self.attn_l2_norm = attn_l2_norm
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(embed_dim))
        self.v_bias = nn.Parameter(torch.zeros(embed_dim))
        # in every published checkpoint; never used
        self.register_buffer("zero_k_bias", torch.zeros(embed_dim))
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = Dropout(proj_drop)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        qkv = linear(self.mat_qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, L, 3, H, D)
        q_bias, v_bias = (bias.to(qkv.dtype).view(self.num_heads, -1) for bias in (self.q_bias, self.v_bias))
        log_scale = self.scale_mul_1H11.to(qkv.dtype).flatten() if self.attn_l2_norm else None
        out = attend(qkv, q_bias, v_bias, log_scale, self.scale)  # (B, L, H, D)
        return self.proj_drop(linear(self.proj, out.flatten(2)))  # (B, L, C)


def _last_weight(layers: nn.Sequential) -> Tensor:
    return cast(nn.Linear, layers[-1]).weight


class FFN(Part):
    """Linear, GELU (tanh), Linear: (B, L, C) -> (B, L, C)."""

    quantizable = True

    def __init__(self, embed_dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, embed_dim)
        self.drop = Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(linear(self.fc2, linear_gelu(self.fc1, x)))


class AdaLNSelfAttn(Part, PublishedBlock):
    """Transformer block whose norms and residuals are modulated by the class."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        norm_eps: float,
        shared_aln: bool,
        attn_l2_norm: bool,
    ) -> None:
        super().__init__()
        self.norm_eps, self.shared_aln = norm_eps, shared_aln
        self.attn = SelfAttention(embed_dim, num_heads, drop, attn_l2_norm)
        self.ffn = FFN(embed_dim, round(embed_dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, embed_dim) / embed_dim**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 6 * embed_dim))

    def modulation(self, cond: Tensor, dtype: torch.dtype) -> Modulation:
        """gamma1, gamma2, scale1, scale2, shift1, shift2, (B, C) each; they depend only on the class.

        Args:
            cond: class embedding (B, C), or with a shared AdaLN its projection, (B, 6C).
        """
        six = cond if self.shared_aln else self.ada_lin(cond)
        six = six.unflatten(-1, (6, -1))  # (B, 6, C)
        return (six + self.ada_gss[0] if self.shared_aln else six).to(dtype).unbind(1)

    def __call__(self, *given: Any, **published: Any) -> Any:
        """A call of `forward`, or with x, cond_BD and attn_bias one of the published code."""
        return self.published_call(**published) if published else super().__call__(*given)

    def forward(self, stream: Stream, modulation: Modulation, attend: Attend) -> Stream:
        stream = Stream(*stream)  # checkpointing hands over a plain tuple
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        x, h = stream.normed(scale1, shift1, self.norm_eps)
        stream = Stream(x, self.attn(h, attend), self.drop_path(gamma1))
        x, h = stream.normed(scale2, shift2, self.norm_eps)
        return Stream(x, self.ffn(h), self.drop_path(gamma2))


class AdaLNBeforeHead(Part):
    """The modulated norm before the classifier head."""

    def __init__(self, embed_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 2 * embed_dim))

    def modulation(self, cond: Tensor, dtype: torch.dtype) -> Modulation:
        """scale, shift, (B, C) each."""
        return self.ada_lin(cond).unflatten(-1, (2, -1)).to(dtype).unbind(1)

    def forward(self, stream: Stream, modulation: Modulation) -> Tensor:
        scale, shift = modulation
        return stream.normed(scale, shift, self.norm_eps)[1]


class VAR(Part, PublishedVAR):
    """Class-conditional next-scale transformer. Arguments are the published ones.

    Args:
        vae_local: the tokenizer; not registered as a submodule; sampling uses its codebook and phi.
        num_classes: classes; label `num_classes` means "no class".
        depth, embed_dim, num_heads, mlp_ratio: size; published models have embed_dim = 64 depth, num_heads = depth.
        drop_rate, drop_path_rate: dropout of projections; stochastic depth, linear over blocks.
        attn_drop_rate: must be 0: attention here has no dropout, and no published recipe uses it.
        norm_eps: of every LayerNorm.
        shared_aln: one AdaLN projection for all blocks.
        cond_drop_rate: share of labels replaced by "no class" in training.
        attn_l2_norm: L2-normalize queries and keys.
        patch_nums: sides of the token maps.
        flash_if_available, fused_if_available: accepted for compatibility; `var_ext.backend` decides.

    Raises:
        ValueError: a size is below 1, embed_dim is not a multiple of num_heads, patch_nums are not the
            tokenizer's, or attn_drop_rate > 0.
    """

    lvl_1L: Tensor
    blocks: Sequence[AdaLNSelfAttn]

    # What an engine runs in its precision. The rest has few channels or runs once per image, and keeps that of its
    # weights: embeddings, and what a subclass adds.
    in_engines_precision = frozenset(("shared_ada_lin", "blocks", "head_nm", "head"))
    # The sampler of `autoregressive_infer_cfg`: set by `var_ext.engine`, which is one layer above.
    sample_published: ClassVar[Callable[..., tuple[Tensor, Tensor]]]
    kept_engine: Any
    draws: Draws | None = None
    activation_checkpointing = (
        False  # in training keep the inputs of blocks alone, and run each again for its gradient
    )

    def __init__(
        self,
        vae_local: VQVAE,
        num_classes: int = 1000,
        depth: int = 16,
        embed_dim: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        cond_drop_rate: float = 0.1,
        attn_l2_norm: bool = False,
        patch_nums: Sequence[int] = SCALES_256,
        flash_if_available: bool = True,
        fused_if_available: bool = True,
    ) -> None:
        super().__init__()
        schedule = ScaleSchedule(patch_nums)
        if min(num_classes, depth, embed_dim, num_heads) < 1:
            sizes = f"{num_classes}, {depth}, {embed_dim}, {num_heads}"
            raise ValueError(f"num_classes, depth, embed_dim, num_heads must be at least 1, got {sizes}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if schedule != vae_local.schedule:
            raise ValueError(
                f"patch_nums must be the tokenizer's {vae_local.schedule.patch_nums}, got {schedule.patch_nums}"
            )
        if attn_drop_rate:
            raise ValueError(f"attn_drop_rate must be 0, got {attn_drop_rate}: attention has no dropout here")
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "depth": depth,
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "drop_rate": drop_rate,
            "drop_path_rate": drop_path_rate,
            "norm_eps": norm_eps,
            "shared_aln": shared_aln,
            "cond_drop_rate": cond_drop_rate,
            "attn_l2_norm": attn_l2_norm,
            "patch_nums": list(patch_nums),
        }
        self.schedule, self.num_classes, self.cond_drop_rate = schedule, num_classes, cond_drop_rate
        self.depth, self.C, self.num_heads = depth, embed_dim, num_heads
        self.vae_proxy = (vae_local,)  # in a tuple: shared, not owned
        self.Cvae, self.V = vae_local.Cvae, vae_local.vocab_size
        self.L, self.first_l = schedule.num_tokens, schedule.lengths[0]
        self.kept_engine = None

        # 1. embeddings
        self.word_embed = nn.Linear(self.Cvae, embed_dim)
        self.class_emb = nn.Embedding(num_classes + 1, embed_dim)
        self.pos_start = nn.Parameter(torch.empty(1, self.first_l, embed_dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.L, embed_dim))
        self.lvl_embed = nn.Embedding(len(schedule), embed_dim)
        for weight in (self.class_emb.weight, self.pos_start, self.pos_1LC, self.lvl_embed.weight):
            nn.init.trunc_normal_(weight, std=math.sqrt(1 / (3 * embed_dim)))

        # 2. blocks
        shared = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 6 * embed_dim))
        self.shared_ada_lin = shared if shared_aln else nn.Identity()
        rates = [drop_path_rate * n / max(depth - 1, 1) for n in range(depth)]
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            AdaLNSelfAttn(
                embed_dim, num_heads, mlp_ratio, drop_rate, rate, norm_eps, shared_aln, attn_l2_norm
            )
            for rate in rates
        )

        # 3. head
        self.head_nm = AdaLNBeforeHead(embed_dim, norm_eps)
        self.head = nn.Linear(embed_dim, self.V)

        # 4. buffers of the published checkpoints
        levels = torch.cat([torch.full((n,), k) for k, n in enumerate(schedule.lengths)])
        self.register_buffer("lvl_1L", levels[None])  # (1, L) scale of each token
        mask = block_causal_mask(schedule, levels.device)
        bias = torch.zeros(self.L, self.L).masked_fill(~mask, -torch.inf)
        # never used: attention knows the schedule
        self.register_buffer("attn_bias_for_masking", bias[None, None])

    # ------------------------------------------------------------------ the network, part by part

    def condition(self, labels: Tensor) -> Tensor:
        """What modulates all blocks and begins the sequence: (B,) int64 -> (B, C).

        A subclass may take more: keyword conditions of `forward` and `Sampler` are passed on to it. In sampling, the
        unconditional half has the label `num_classes` and the same other values.
        """
        return self.class_emb(labels)

    def modulations(self, cond: Tensor, dtype: torch.dtype) -> tuple[list[Modulation], Modulation]:
        """Modulations of each block and of the norm before the head. They depend only on the class: once per image.

        Args:
            cond: (B, C), of `condition`.
            dtype: of the residual stream.
        """
        shared = self.shared_ada_lin(cond)
        with torch.autocast(cond.device.type, enabled=False):  # the head keeps its own precision
            head = self.head_nm.modulation(cond, dtype_of(self.head))
        return [block.modulation(shared, dtype) for block in self.blocks], head

    def readers_of_condition(self) -> list[Any]:
        """The modules `modulations` calls with the condition: an engine may fuse their linear layers."""
        blocks = [getattr(block, "ada_lin", None) for block in self.blocks]
        return [self.shared_ada_lin, *blocks, getattr(self.head_nm, "ada_lin", None)]

    def positions(self) -> Tensor:
        """Position and level of every token: (1, L, C)."""
        levels = self.lvl_1L.to(self.pos_1LC.device)
        return self.lvl_embed(levels) + self.pos_1LC

    def words(self, x: Tensor) -> Tensor:
        """Sums of codes (B, l, Cvae) -> (B, l, C), in the precision of the weights."""
        with torch.autocast(x.device.type, enabled=False):
            return self.word_embed(x.to(dtype_of(self.word_embed)))

    def transform(self, x: Tensor, modulations: Sequence[Modulation], attends: Iterable[Attend]) -> Stream:
        """(B, L, C) through all blocks."""
        stream = Stream(x)
        again = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block, modulation, attend in zip(self.blocks, modulations, attends, strict=True):
            if again:
                stream = Stream(*checkpoint(block, stream, modulation, attend, use_reentrant=False))
            else:
                stream = block(stream, modulation, attend)
        return stream

    def before_head(self, stream: Stream, modulation: Modulation) -> Tensor:
        """The norm before the head: (B, L, C) in the head's precision."""
        return self.head_nm(stream.to(dtype_of(self.head)), modulation)

    def get_logits(self, h_or_h_and_residual: Tensor | tuple[Tensor, Tensor], cond_BD: Tensor) -> Tensor:
        """Head of the published code: (B, L, C), or a last branch and the residual it is added to, -> (B, L, V)."""
        h = h_or_h_and_residual
        if not isinstance(h, Tensor):
            h = h[1] + self.blocks[-1].drop_path(h[0])
        with torch.autocast(h.device.type, enabled=False):
            modulation = self.head_nm.modulation(cond_BD, dtype_of(self.head))
            return linear_float32(self.head, self.before_head(Stream(h), modulation))

    @property
    def has_own_logits(self) -> bool:
        """Whether a subclass or a patch overrides the logits as a whole."""
        return type(self).get_logits is not VAR.get_logits or "get_logits" in self.__dict__

    # ------------------------------------------------------------------ training

    def forward(self, label_B: Tensor, x_BLCv_wo_first_l: Tensor | None, **conditions: Tensor) -> Tensor:
        """Logits of every token under teacher forcing.

        Args:
            label_B: (B,) int64 in 0..num_classes; in training mode a share `cond_drop_rate` of them is dropped.
            x_BLCv_wo_first_l: (B, L' - p_0^2, Cvae) float32 from `idxBl_to_var_input`; may cover only the first scales
                (progressive training); None: only the first.
            conditions: further arguments of a subclass's `condition`, (B, ...) each.

        Returns:
            (B, L', V) float32.

        Raises:
            ValueError: shapes or dtypes are wrong, a label is out of range, or L' does not end with a scale.
        """
        self._check_inputs(label_B, x_BLCv_wo_first_l)
        if self.training:
            label_B = label_B.masked_fill(self.dropped_labels(label_B), self.num_classes)
        cond = self.condition(label_B, **conditions)  # (B, C)
        x = cond[:, None] + self.pos_start  # (B, p_0^2, C)
        if x_BLCv_wo_first_l is not None:
            x = torch.cat((x, self.words(x_BLCv_wo_first_l)), dim=1)  # (B, L', C)
        schedule = self.schedule if x.shape[1] == self.L else self.schedule.prefix(x.shape[1])
        x = x + self.positions()[:, : x.shape[1]]

        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        modulations, head = self.modulations(cond, dtype)
        if self.training and self.draws is not None:
            modulations = self.drop_paths(modulations, self.draws)
        stream = self.transform(x.to(dtype), modulations, [Whole(schedule)] * len(self.blocks))
        if self.has_own_logits:
            return self.get_logits(stream.sum(), cond)
        with torch.autocast(device, enabled=False):
            hidden = self.before_head(stream, head)
        return linear_float32(self.head, hidden)  # in the precision of autocast, as published

    def key_rows(self, device: torch.device) -> Rows:
        """From now on what is dropped in training depends on the keys of the rows alone: the caller sets `Rows.keys`
        before each pass."""
        for block in self.blocks:
            block.drop_path.keyed = True
        return key_rows(self, device)

    def dropped_labels(self, labels: Tensor) -> Tensor:
        """Which labels (B,) training replaces by "no class": (B,) bool."""
        if self.draws is not None:
            return self.draws.uniform(1)[:, 0] < self.cond_drop_rate
        return torch.rand(labels.shape, device=labels.device) < self.cond_drop_rate

    def drop_paths(self, modulations: list[Modulation], draws: Draws) -> list[Modulation]:
        """Stochastic depth of all blocks: the gates with those of dropped branches zeroed, the others scaled."""
        rates = torch.tensor([block.drop_path.rate for block in self.blocks], device=draws.counter.device)
        # a row's first number is its label's
        uniform = draws.uniform(1 + 2 * len(rates))[:, 1:].unflatten(1, (-1, 2))  # (B, depth, 2)
        scales = ((uniform >= rates[:, None]) / (1 - rates[:, None])).to(modulations[0][0].dtype)
        found = []
        for block, scale, modulation in zip(self.blocks, scales.unbind(1), modulations, strict=True):
            gamma1, gamma2, *rest = modulation
            if block.drop_path.rate:
                modulation = (gamma1 * scale[:, :1], gamma2 * scale[:, 1:], *rest)
            found.append(modulation)
        return found

    def _check_inputs(self, labels: Tensor, x: Tensor | None) -> None:
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise ValueError(f"label_B must be (B,) int64, got {tuple(labels.shape)} {labels.dtype}")
        if x is not None and (x.ndim != 3 or x.shape[0] != len(labels) or x.shape[2] != self.Cvae):
            wanted = f"(B, L, Cvae) = ({len(labels)}, *, {self.Cvae})"
            raise ValueError(f"x_BLCv_wo_first_l must have shape {wanted}, got {tuple(x.shape)}")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would sync
            self.checked_labels(labels)

    # ------------------------------------------------------------------ sampling

    def checked_labels(self, labels: Tensor) -> Tensor:
        """`labels` if all are in 0..num_classes, else ValueError; host sync on a GPU."""
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= self.num_classes:
            bad = labels[(labels < 0) | (labels > self.num_classes)].tolist()
            raise ValueError(
                f"labels must be in 0..{self.num_classes} ({self.num_classes}: no class), got {bad}"
            )
        return labels

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: int | Sequence[int] | Tensor | None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
        *,
        return_tokens: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Sample images as the published code does, with its random stream: one generator for the batch.

        Args:
            B: batch.
            label_B: (B,) integers, one label for all (negative: no class), or None for random ones.
            g_seed: seed of the generator, 64 bits, signed or unsigned; None uses torch's global one.
            cfg: guidance; grows linearly over the scales up to this.
            top_k, top_p: see `ops.sample_tokens`; 0 keeps all.
            more_smooth: mix codes by a Gumbel-softmax instead of drawing one; for show, not for evaluation.
            return_tokens: also return the drawn tokens.

        Returns:
            images (B, 3, S, S) float32 in [0, 1]; with `return_tokens` also tokens (B, L) int64.

        Raises:
            ValueError: a label, the seed or an option is out of range, or labels are not (B,).
            TypeError: labels or the seed are not integers; bools and floats are not.
        """
        images, tokens = VAR.sample_published(
            self, B, label_B, g_seed, cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth
        )
        return (images, tokens) if return_tokens else images

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which create their own engine."""
        state: Any = super().__getstate__()
        return {**state, "kept_engine": None, "_rng": None}

    # ------------------------------------------------------------------ initialisation

    @torch.no_grad()
    def init_weights(
        self,
        init_adaln: float = 0.5,
        init_adaln_gamma: float = 1e-5,
        init_head: float = 0.02,
        init_std: float = 0.02,
    ) -> None:
        """Initialise for training as published.

        Args:
            init_adaln: factor on AdaLN's scale and shift rows.
            init_adaln_gamma: factor on AdaLN's gate rows.
            init_head: factor on the head's weight; negative leaves it.
            init_std: of the truncated normal; negative takes sqrt(1 / (3 C)).
        """
        std = init_std if init_std >= 0 else math.sqrt(1 / (3 * self.C))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if init_head >= 0:
            self.head.weight.mul_(init_head)
        _last_weight(self.head_nm.ada_lin).mul_(init_adaln)
        for block in self.blocks:
            block.attn.proj.weight.div_(math.sqrt(2 * self.depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * self.depth))
            six = (
                block.ada_gss[0, 0] if block.shared_aln else _last_weight(block.ada_lin).unflatten(0, (6, -1))
            )
            six[:2].mul_(init_adaln_gamma)
            six[2:].mul_(init_adaln)
