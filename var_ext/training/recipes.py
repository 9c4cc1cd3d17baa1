"""Everything that determines the result of a training, as two frozen dataclasses with documented fields.

Each field is an option of the command line. To add one: give it a default that keeps the previous
behaviour and read it in `tokenizer.py` or `var.py`; a checkpoint stores all fields except those
marked `free`, and a run with other values does not resume from it. One that belongs to a part which
may be off, a loss for example, stands in `recipe_parts.PARTS` too.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, get_args, get_origin

from var_ext.data import DECODES, GEOMETRIES
from var_ext.models.remedies import GRADIENTS
from var_ext.schedule import SCALES_256, SCALES_512
from var_ext.training.loss_weights import parse_weights
from var_ext.training.recipe_losses import CriticFields, LossFields
from var_ext.training.recipe_options import ANY, BELOW_ONE, COUNT, NATURAL, POSITIVE, SHARE, option
from var_ext.training.recipe_parts import ADAPTERS, check_used

if TYPE_CHECKING:
    from typing_extensions import Self

# depth -> (batch size, epochs, base lr, last weight decay, last lr, gamma init) of the published runs
PUBLISHED = {
    16: (768, 200, 1e-4, 0.05, 0.1, 1e-3),
    20: (768, 250, 1e-4, 0.05, 0.1, 1e-3),
    24: (768, 350, 8e-5, 0.05, 0.01, 1e-4),
    30: (1024, 350, 8e-5, 0.08, 0.01, 1e-5),
    36: (768, 350, 8e-5, 0.08, 0.01, 5e-6),
}


# Widths of levels, of one and more: those of the bundled and the published tokenizer, and what lies around them.
MULTIPLIERS = ((1,), (1, 2), (1, 2, 2), (1, 2, 2, 4), (1, 1, 2, 2, 4), (1, 1, 2, 2, 4, 4))
OPTIMIZERS = ("adamw", "muon")
SEEDED = 512  # images whose features become the first codes of a new tokenizer
LORA_TARGETS = ("blocks.*.attn.*", "blocks.*.ffn.*")  # where adapters are by default


@dataclass(frozen=True)
class Recipe:
    """What both trainers share."""

    seed: int = option(0, "seed of weights, batches, augmentation and dropout", "[0, 2e9]")
    epochs: int = option(100, "passes over the training images", COUNT)
    batch_size: int = option(64, "images a step; the first ones of an epoch fill up its last batch", COUNT)
    augment: float = option(
        0.0, "strength of the augmentation, 0 is none (folders: above 0 is a random crop)", NATURAL
    )
    geometry: str = option(
        "published", "how picture files are read: 'published', or 'upright' as viewers show them", GEOMETRIES
    )
    decode: str = option(
        "exact", "pixels of picture files: 'exact' as published, 'fast' near them in less time", DECODES
    )
    ema: float = option(0.0, "decay of the moving average of the weights that is kept, 0 is none", BELOW_ONE)
    select: str = option(
        "last",
        "which weights are kept: 'last', 'best' by validation loss, or 'best_last_scale' by that of the last scale",
        ("last", "best", "best_last_scale"),
    )
    validate_every: int = option(1, "epochs between two validations", COUNT)
    validate_steps: int = option(
        0, "steps between two validations, besides those by epochs; 0 is by epochs alone", NATURAL, free=True
    )
    checkpoint_every: int = option(200, "steps between two checkpoints", COUNT, free=True)
    checkpoint_minutes: float = option(
        0.0,
        "minutes between two checkpoints, besides those by steps; 0 is by steps alone",
        NATURAL,
        free=True,
    )
    keep: int = option(
        0, "older checkpoints that stay beside the last one, as step-STEP.ckpt", NATURAL, free=True
    )
    sample_every: int = option(
        0,
        "epochs between two pictures in samples/: drawn images, or reconstructions; 0 is none",
        NATURAL,
        free=True,
    )
    tensorboard: bool = option(False, "write the curves for TensorBoard too", free=True)
    on_divergence: str = option(
        "stop",
        "when the loss is no longer finite: 'stop', or 'halve' the rate at the last checkpoint, at most 3 times",
        ("stop", "halve"),
        free=True,
    )
    log_every: int = option(10, "steps between two lines of log.jsonl", COUNT, free=True)
    workers: int = option(0, "processes that read images, 0 reads in the trainer itself", NATURAL, free=True)
    micro_batch: int = option(
        0, "most images that a rank computes at once, 0 is its whole share of a step", NATURAL, free=True
    )
    shard: str = option(
        "none",
        "what ranks share out: 'none', the 'optimizer' and moving average, or in 'full' the weights too",
        ("none", "optimizer", "full"),
        free=True,
    )
    tf32: bool = option(True, "on GPUs round inputs of float32 matmuls to TF32", free=True)
    rank_timeout: float = option(
        25.0, "seconds of waiting in a step after which another rank counts as lost", POSITIVE, free=True
    )
    half: bool = option(False, "store the finished weights as fp16 instead of fp32", free=True)

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, allowed = getattr(self, spec.name), spec.metadata["allowed"]
            for entry in value if isinstance(value, tuple) else (value,):
                if allowed is not None and not _is_allowed(entry, allowed):
                    raise ValueError(f"{spec.name} must be {_wanted(allowed)}, got {entry!r}")

    def with_options(self, **options: Any) -> "Self":
        """A copy with some fields replaced; text is converted to the type of the field ("1,2,3" to a tuple).

        Raises:
            ValueError: unknown field, text that does not parse as its type, or a changed field is of a part that is
                off (`recipe_parts`), such as `restart_target` where `restart_every` is 0.
        """
        known = {f.name: f for f in fields(self)}
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"options of {type(self).__name__} are {', '.join(known)}; got {', '.join(unknown)}"
            )
        found = replace(self, **{name: _convert(known[name], value) for name, value in options.items()})
        check_used(found, [name for name in options if getattr(found, name) != getattr(self, name)])
        return found

    def pinned(self) -> dict[str, Any]:
        """Name -> value of every field that affects the weights; tuples as lists."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["free"]}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


@dataclass(frozen=True)
class TokenizerRecipe(CriticFields, LossFields, Recipe):
    """Training of the multi-scale VQVAE. The defaults are those of 256 px images (paper, section 3.2).

    Loss: l1 |x - y| + l2 (x - y)^2 + perceptual + semantic + quantizer loss + adversarial loss, see `recipe_losses`.
    """

    vocab_size: int = option(4096, "codes, V", COUNT)
    z_channels: int = option(32, "channels of a code", COUNT)
    ch: int = option(160, "base width of encoder and decoder", COUNT)
    ch_mult: tuple[int, ...] = option(
        (1, 1, 2, 2, 4), "width of each level over ch; n levels shrink by 2^(n-1)", COUNT
    )
    patch_nums: tuple[int, ...] = option(SCALES_256, "side of the token map of each scale", COUNT)
    share_quant_resi: int = option(4, "convolutions phi shared by the scales", NATURAL)
    using_znorm: bool = option(False, "pick codes by cosine instead of distance")
    beta: float = option(0.25, "weight of the commitment part of the quantizer loss", NATURAL)
    dropout: float = option(0.0, "dropout in encoder and decoder", BELOW_ONE)
    lr: float = option(3e-4, "peak learning rate", POSITIVE)
    lr_end: float = option(0.01, "last learning rate over the peak; cosine in between", SHARE)
    warmup: float = option(0.02, "share of the steps in which the learning rate rises", SHARE)
    clip: float = option(10.0, "largest norm of the gradient", POSITIVE)
    weight_decay: float = option(0.0, "weight decay", NATURAL)
    init_gain: float = option(
        0.0, "gain of Xavier's normal initial weights of convolutions, 0 is torch's own", NATURAL
    )
    freeze: tuple[str, ...] = option(
        (), "parts that are not trained: encoder, quantizer, decoder, or names such as decoder.up.*", None
    )
    autocast: str = option(
        "fp32", "precision of encoder, decoder and discriminator: 'fp32' or 'bf16'", ("fp32", "bf16")
    )
    codebook_init: int = option(
        -1,
        "images whose features become the first codes, 0 keeps the first codes as they are; "
        f"-1 is {SEEDED}, and with --init-from 0",
        "[-1, inf)",
    )
    restart_every: int = option(100, "steps between restarts of unused codes, 0 is never", NATURAL)
    restart_until: float = option(0.7, "share of the steps after which no code is restarted", SHARE)
    restart_target: float = option(
        0.0, "share of the codes that restarts want at every scale; 0 divides them among the scales", SHARE
    )
    scale_dropout: float = option(0.0, "share of the images that leave out their finest scales", BELOW_ONE)
    scale_dropout_start: int = option(3, "scales that no image leaves out", COUNT)
    gradient: str = option(
        "straight_through",
        "how the quantizer passes gradients on: 'straight_through' or 'rotation'",
        GRADIENTS,
    )
    anchors: bool = option(False, "in each step move rarely used codes towards features (CVQ)")
    centre: float = option(
        0.0,
        "share of the features' mean that each step takes off the bias of quant_conv: with cosine, 1x1 uses more codes",
        SHARE,
    )
    weight_entropy: float = option(0.0, "weight of the entropy loss of the codes", NATURAL)
    entropy_temperature: float = option(0.01, "temperature of the entropy loss", POSITIVE)
    perturb_rows: float = option(0.0, "share of the images whose codes the decoder sees perturbed", SHARE)
    perturb_tokens: float = option(1.0, "share of their tokens that are replaced at first", SHARE)
    perturb_codes: int = option(100, "nearest codes of which one replaces a token at first", COUNT)
    perturb_start: float = option(0.2, "share of the steps after which perturbation weakens", SHARE)
    perturb_stop: float = option(0.6, "share of the steps after which it stays as weak", SHARE)
    perturb_last: float = option(0.5, "last strength of perturbation over the first", SHARE)
    activation_checkpointing: bool = option(
        False, "keep the inputs of layers alone and compute them again for gradients", free=True
    )
    compile: bool = option(False, "compile encoder and decoder with torch.compile", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.adaptive_clamp) != 2 or self.adaptive_clamp[0] > self.adaptive_clamp[1]:
            raise ValueError(
                f"adaptive_clamp must be least,most such as 0.015,10000, got {','.join(map(str, self.adaptive_clamp))}"
            )
        if self.scale_dropout > 0 and self.scale_dropout_start > len(self.patch_nums):
            raise ValueError(
                f"scale_dropout_start must be at most {len(self.patch_nums)}, the scales of patch_nums, "
                f"got {self.scale_dropout_start}"
            )
        if self.perturb_stop < self.perturb_start:
            raise ValueError(
                f"perturb_stop must be at least perturb_start = {self.perturb_start:g}, got {self.perturb_stop:g}"
            )
        if self.select == "best_last_scale":
            raise ValueError(
                "select must be 'last' or 'best' for a tokenizer, whose loss has no scales, got 'best_last_scale'"
            )
        if self.shard == "full":
            raise ValueError(
                "shard must be 'none' or 'optimizer' for a tokenizer, whose weights fit a GPU, got 'full'"
            )

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.patch_nums[-1] * 2 ** (len(self.ch_mult) - 1)

    def beginning(self, from_source: bool) -> "TokenizerRecipe":
        """With what depends on the first weights decided: those of a trained tokenizer keep its codes."""
        return replace(self, codebook_init=0 if from_source else SEEDED) if self.codebook_init < 0 else self

    def sized(self, image_size: int) -> "TokenizerRecipe":
        """For images of this side: with the multipliers for as many levels as lead to the last of `patch_nums`.

        Raises:
            ValueError: no number of levels does.
        """
        known = {self.patch_nums[-1] * 2 ** (len(mult) - 1): mult for mult in MULTIPLIERS}
        if image_size not in known:
            raise ValueError(
                f"image_size must be one of {', '.join(map(str, known))} with a last map of {self.patch_nums[-1]} x "
                f"{self.patch_nums[-1]} tokens (patch_nums), got {image_size}"
            )
        return replace(self, ch_mult=known[image_size])

    @classmethod
    def digits(cls) -> "TokenizerRecipe":
        """32 px handwritten digits on two CPU cores in minutes."""
        return cls(
            epochs=30, batch_size=64, augment=1.0, ema=0.998, half=True, vocab_size=256, z_channels=16, ch=32,
            ch_mult=(1, 2, 2), patch_nums=(1, 2, 3, 4, 6, 8), lr=1e-3, weight_perceptual=0.0, restart_every=25,
            validate_every=5,
        )  # fmt: skip

    @classmethod
    def small(cls) -> "TokenizerRecipe":
        """Pictures of 64 px (32 to 128 by `sized`) on CPUs in hours, without anybody's weights."""
        return cls(
            epochs=40, batch_size=64, augment=1.0, ema=0.999, vocab_size=1024, z_channels=32, ch=32,
            ch_mult=(1, 2, 2, 4), patch_nums=(1, 2, 3, 4, 6, 8), lr=1e-3, lr_end=0.05, restart_every=50,
            using_znorm=True, centre=0.1, weight_entropy=0.02, perceptual="structural", validate_every=2,
        )  # fmt: skip

    @classmethod
    def paper(cls) -> "TokenizerRecipe":
        """The 256 px tokenizer, as its authors' later trainer (github.com/FoundationVision/vaex) does it.

        Theirs has heads over a DINO ViT-S/16 (`discriminator`) and LPIPS of VGG16 (`lpips`); both files are a user's.
        """
        return cls(
            epochs=250, batch_size=768, augment=1.0, ema=0.9999, dropout=0.05, init_gain=0.5, lr_end=0.3, warmup=0.01,
            weight_decay=0.005, weight_adversarial=0.4, adversarial_start=0.2, workers=8,
        )  # fmt: skip

    @classmethod
    def finetune(cls, source: Mapping[str, Any]) -> "TokenizerRecipe":
        """The decoder alone on new images, from a trained tokenizer with these constructor arguments.

        Codes and tokens stay as they are, so transformers trained on them stay in use.
        """
        sizes = {f.name: source[f.name] for f in fields(cls) if f.name in source}
        sizes |= {"patch_nums": tuple(source["v_patch_nums"]), "ch_mult": tuple(source["ch_mult"])}
        return cls(
            epochs=20, batch_size=64, augment=1.0, ema=0.99, lr_end=0.1, perceptual="structural",
            freeze=("encoder", "quantizer"), codebook_init=0, restart_every=0, **sizes,
        )  # fmt: skip


@dataclass(frozen=True)
class VARRecipe(Recipe):
    """Training of the transformer on the tokens of a trained tokenizer. The defaults are those of VAR-d16."""

    depth: int = option(16, "transformer blocks", COUNT)
    embed_dim: int = option(1024, "width", COUNT)
    num_heads: int = option(16, "heads", COUNT)
    mlp_ratio: float = option(4.0, "width of the MLP over the width", POSITIVE)
    drop_rate: float = option(0.0, "dropout after attention and MLP", BELOW_ONE)
    drop_path_rate: float = option(
        0.1 * 16 / 24, "share of dropped residual branches in the last block", BELOW_ONE
    )
    shared_aln: bool = option(False, "one AdaLN projection for all blocks")
    attn_l2_norm: bool = option(True, "normalize queries and keys")
    cond_drop_rate: float = option(0.1, "share of labels replaced by 'no class' in training", SHARE)
    init_adaln: float = option(0.5, "factor on the initial AdaLN rows for scale and shift", ANY)
    init_adaln_gamma: float = option(1e-3, "factor on the initial AdaLN rows for the gates", ANY)
    init_head: float = option(0.02, "factor on the initial head", ANY)
    base_lr: float = option(
        1e-4, "peak learning rate for 256 images a step; it grows with the batch", POSITIVE
    )
    lr_end: float = option(0.1, "last learning rate over the peak", SHARE)
    warmup: float = option(0.02, "share of the steps in which the learning rate rises", SHARE)
    weight_decay: float = option(0.05, "weight decay at the start", NATURAL)
    weight_decay_end: float = option(0.05, "weight decay at the end; cosine in between", NATURAL)
    clip: float = option(2.0, "largest norm of the gradient", POSITIVE)
    label_smoothing: float = option(0.0, "label smoothing of the training loss", SHARE)
    tokens: str = option(
        "cached",
        "'cached': of some copies, made once; 'online': of fresh crops in each epoch",
        ("cached", "online"),
    )
    copies: int = option(1, "augmented versions of each training image whose tokens are cached", COUNT)
    patch_nums: tuple[int, ...] = option(
        (), "side of the token map of each scale, if not those of the tokenizer", COUNT
    )
    freeze: tuple[str, ...] = option(
        (), "parameters that are not trained: names such as blocks.{0-7}.*,*emb*", None
    )
    lora: int = option(
        0,
        "rank of adapters (LoRA) that are trained in place of the weights of --init-from, 0 is none",
        NATURAL,
    )
    lora_alpha: float = option(0.0, "adapters are scaled by this over their rank, 0 is the rank", NATURAL)
    lora_targets: tuple[str, ...] = option(
        LORA_TARGETS, "linear layers that get adapters, named as those of --freeze", None
    )
    lora_dropout: float = option(0.0, "dropout of what adapters read", BELOW_ONE)
    lora_save: str = option(
        "merged",
        "the finished adapters: 'merged' into a whole model, or the 'adapter' alone in the format of peft",
        ("merged", "adapter"),
        free=True,
    )
    optimizer: str = option(
        "adamw", "'adamw', or 'muon' for the matrices of attention and MLP and AdamW for the rest", OPTIMIZERS
    )
    loss_weights: tuple[str, ...] = option(
        (),
        "weight of a token by its scale: one number a scale, or 'lognormal'; none weighs all tokens alike",
        None,
    )
    pg: float = option(0.0, "share of the steps of progressive training, 0 is none", SHARE)
    pg0: int = option(4, "scale index that progressive training starts from", NATURAL)
    autocast: str = option(
        "fp32", "precision of the forward pass: 'fp32', 'bf16' or 'fp16'", ("fp32", "bf16", "fp16")
    )
    fp8: str = option(
        "none",
        "experiment: 8-bit products in the blocks, 'native' on GPUs of capability 8.9, or 'emulated' anywhere, slowly",
        ("none", "native", "emulated"),
    )
    activation_checkpointing: bool = option(
        False, "keep the inputs of blocks alone and compute them again for gradients", free=True
    )
    peak_tflops: float = option(
        0.0,
        "peak TFLOP/s of a chip, of which the log tells the share in use; 0 is that of known GPUs",
        NATURAL,
        free=True,
    )
    compile: bool = option(False, "compile the blocks with torch.compile", free=True)
    cfg: float = option(1.5, "guidance that the finished model recommends", ANY, free=True)
    top_k: int = option(900, "top-k that the finished model recommends", NATURAL, free=True)
    top_p: float = option(0.96, "top-p that the finished model recommends", SHARE, free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_weights(self.loss_weights)
        others = {"freeze": self.freeze, "fp8": self.fp8 != "none", "optimizer": self.optimizer != "adamw"}
        for name in others if self.lora else ():
            if others[name]:
                raise ValueError(
                    f"{name} does not go with lora, which trains adapters alone, by AdamW: leave out one of them"
                )
        defaults = {f.name: f.default for f in fields(self)}  # which no preset changes
        check_used(self, [name for name in ADAPTERS if getattr(self, name) != defaults[name]])
        if self.optimizer == "muon" and self.shard == "full":
            raise ValueError(
                "optimizer = muon needs whole matrices, which shard = full takes apart: take shard = optimizer"
            )

    @classmethod
    def digits(cls) -> "VARRecipe":
        """A small transformer for the digits on two CPU cores in minutes."""
        return cls(
            epochs=60, batch_size=64, augment=1.0, copies=20, half=True, select="best", validate_every=5,
            depth=4, embed_dim=128, num_heads=2, drop_rate=0.1, drop_path_rate=0.05, base_lr=4e-3,
            warmup=0.05, ema=0.995, init_adaln_gamma=1e-2, cfg=1.5, top_k=0, top_p=0.96,
        )  # fmt: skip

    @classmethod
    def paper(cls, depth: int = 16) -> "VARRecipe":
        """The published recipe of a depth: 16, 20, 24, 30 (256 px) or 36 (512 px, with a shared AdaLN).

        Any other depth d has width 64 d, d heads and drop path 0.1 d / 24 too (paper, section 5.2), and takes the rest
        from the next smaller published depth, below 16 from 16.
        """
        known = max((d for d in PUBLISHED if d <= depth), default=min(PUBLISHED))
        batch, epochs, base_lr, decay_end, lr_end, gamma = PUBLISHED[known]
        return cls(
            epochs=epochs, batch_size=batch, augment=1.0, autocast="fp16", workers=8, tokens="online", depth=depth,
            embed_dim=64 * depth, num_heads=depth, drop_path_rate=0.1 * depth / 24, shared_aln=known == 36,
            base_lr=base_lr, weight_decay_end=decay_end, lr_end=lr_end, init_adaln_gamma=gamma, validate_every=10,
            patch_nums=SCALES_512 if known == 36 else (),
        )  # fmt: skip

    @classmethod
    def finetune(cls, source: Mapping[str, Any], *, adapters: bool = False) -> "VARRecipe":
        """Few images, from the weights of a trained transformer with these constructor arguments.

        The learning rate goes through those of the recipes here: 1e-4 from a width of 1024 on, 4e-3 at 128. Adapters
        take ten times that.
        """
        sizes = {f.name: source[f.name] for f in fields(cls) if f.name in source and f.name != "patch_nums"}
        return cls(
            epochs=20, batch_size=64, augment=1.0, copies=10, select="best", warmup=0.05, ema=0.99,
            base_lr=(10 if adapters else 1) * 1e-4 * max(1.0, 1024 / source["embed_dim"]) ** 1.77,
            **sizes,
        )  # fmt: skip


def _is_allowed(value: Any, allowed: str | tuple[str, ...]) -> bool:
    if isinstance(allowed, tuple):
        return value in allowed
    low, high = map(float, allowed[1:-1].split(","))
    # written so that nan is out of every range
    return (low <= value if allowed[0] == "[" else low < value) and (
        value <= high if allowed[-1] == "]" else value < high
    )


def _wanted(allowed: str | tuple[str, ...]) -> str:
    if isinstance(allowed, tuple):
        return " or ".join(map(repr, allowed))
    return (
        f"at least {allowed[1:-6]}" if allowed[0] == "[" and allowed.endswith(", inf)") else f"in {allowed}"
    )


def _convert(spec: "Field[Any]", value: Any) -> Any:
    """`value` as the type of the field; text is parsed."""
    wanted: Any = spec.type
    try:
        if get_origin(wanted) is tuple:
            parts = value.split(",") if isinstance(value, str) and value else value
            return tuple(get_args(wanted)[0](part) for part in parts)
        if wanted is bool and isinstance(value, str):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                value.lower()
            ]
        return wanted(value)
    except (KeyError, ValueError, TypeError) as error:
        came = f"got {value!r}"
        default = "" if spec.default is MISSING else f" such as {spec.default!r}"
        raise ValueError(
            f"{spec.name} must be a {getattr(wanted, '__name__', wanted)}{default}, {came}"
        ) from error
