"""Fields of a tokenizer's recipe: its losses, each with weight, start and warm-up, and the discriminator's training.

Starts and warm-ups are shares of the steps: a loss is left out before its start, and its weight then rises to the full
one. Files are named by `free` fields, since they may move; what is in them is pinned by digests.
"""

from dataclasses import dataclass

from var_ext.training.recipe_options import COUNT, NATURAL, POSITIVE, SHARE, option

START, WARMUP = "share of the steps after which it counts", "share of the steps in which its weight rises"


@dataclass(frozen=True)
class LossFields:
    """Losses between a reconstruction and its image, and the quantizer's."""

    weight_l1: float = option(0.2, "weight of |x - y|", NATURAL)
    l1_start: float = option(0.0, START, SHARE)
    l1_warmup: float = option(0.0, WARMUP, SHARE)
    weight_l2: float = option(1.0, "weight of (x - y)^2", NATURAL)
    l2_start: float = option(0.0, START, SHARE)
    l2_warmup: float = option(0.0, WARMUP, SHARE)
    weight_perceptual: float = option(
        1.0, "weight of the perceptual loss: LPIPS from --lpips, or --perceptual structural", NATURAL
    )
    perceptual_start: float = option(0.0, START, SHARE)
    perceptual_warmup: float = option(0.0, WARMUP, SHARE)
    perceptual: str = option(
        "lpips",
        "'lpips' of the weights in --lpips, or 'structural', which needs none",
        ("lpips", "structural"),
    )
    lpips: tuple[str, ...] = option(
        (),
        "weights of LPIPS (VGG16 or AlexNet): a file, or heads,trunk; or stlpips, stlpips-alex of the extra stlpips",
        free=True,
    )
    weight_semantic: float = option(
        0.0, "weight of 1 - cosine between features of the frozen ViT in --semantic", NATURAL
    )
    semantic_start: float = option(0.0, START, SHARE)
    semantic_warmup: float = option(0.0, WARMUP, SHARE)
    semantic: str = option("", "weights of a frozen ViT (DINO, DINOv2) for the semantic loss", free=True)
    semantic_size: int = option(224, "side to which that ViT's input is resized", COUNT)
    weight_vq: float = option(1.0, "weight of the quantizer loss", NATURAL)
    vq_start: float = option(0.0, START, SHARE)
    vq_warmup: float = option(0.0, WARMUP, SHARE)


@dataclass(frozen=True)
class CriticFields:
    """The adversarial loss, and the training of its discriminator (the critic)."""

    weight_adversarial: float = option(
        0.0, "weight of the adversarial loss, 0 builds no discriminator", NATURAL
    )
    adversarial_start: float = option(0.22, "share of the steps after which the discriminator begins", SHARE)
    adversarial_warmup: float = option(0.02, "share of the steps in which its weight rises", SHARE)
    adaptive_clamp: tuple[float, ...] = option(
        (0.015, 1e4),
        "least and most of the adaptive factor on its weight, the ratio of gradients; 1,1 is none",
        NATURAL,
    )
    discriminator: str = option(
        "patch",
        "'patch', a convolutional one, or a file with weights of a frozen ViT (DINO, DINOv2) for heads over it",
        free=True,
    )
    discriminator_size: int = option(224, "side to which the ViT's input is resized", COUNT)
    critic_spectral_norm: bool = option(True, "spectral normalisation of the discriminator")
    critic_lr: float = option(
        3e-4, "peak learning rate of the discriminator; its end is that of --lr-end", POSITIVE
    )
    critic_warmup: float = option(
        0.02, "share of the steps, from its start, in which the discriminator's learning rate rises", SHARE
    )
    critic_weight_decay: float = option(0.0005, "weight decay of the discriminator", NATURAL)
    critic_augment: float = option(
        1.0,
        "probability of moved, recoloured and cut out input of the discriminator (DiffAugment), each",
        SHARE,
    )
    critic_cutout: float = option(0.2, "side of what is cut out, over that of the image", SHARE)
    critic_blur: float = option(
        0.04, "share of the steps over which a blur of its input fades, from its start; 0 is none", SHARE
    )
    bcr: float = option(4.0, "weight of balanced consistency: the same logits for augmented input", NATURAL)
    lecam: float = option(
        0.0, "weight of LeCAM: logits near the averages of the other kind of image", NATURAL
    )
    critic_throttle: float = option(
        0.1,
        "hinge loss below which, for 1% of the steps, the discriminator has won and waits; 0 is never",
        NATURAL,
    )
