"""The tokenizer that a recipe trains: new, or from the weights of a trained one, with parts that stay as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from var_ext.models import VQVAE
from var_ext.training.init_from import freeze, with_scales
from var_ext.training.recipes import TokenizerRecipe

# What `freeze` calls parts, and their parameters.
PARTS = {
    "encoder": ("encoder.*", "quant_conv.*"),
    "quantizer": ("quantize.*",),
    "decoder": ("decoder.*", "post_quant_conv.*"),
}
# Arguments of VQVAE that decide the sizes and the meaning of the weights, and which a recipe has.
FIXED = ("vocab_size", "z_channels", "ch", "ch_mult", "share_quant_resi", "using_znorm")


def build_tokenizer(recipe: TokenizerRecipe, source: VQVAE | None = None) -> VQVAE:
    """A VQVAE in training mode; draws from torch's generator where it is new.

    Args:
        source: a trained one, whose weights it gets; scales may differ.

    Raises:
        ValueError: the sizes of `source` differ, `freeze` names nothing, or what is frozen would have to change.
    """
    recipe = recipe.beginning(source is not None)
    sizes: dict[str, Any] = {name: getattr(recipe, name) for name in FIXED}
    if source is not None:
        _check_sizes(sizes, source)
        source = with_scales(source, recipe.patch_nums)
        sizes = {**source.config, **sizes}
        del sizes["v_patch_nums"]
    sizes |= {"dropout": recipe.dropout, "beta": recipe.beta}
    vae = VQVAE(**sizes, v_patch_nums=recipe.patch_nums, test_mode=False)
    if source is not None:
        vae.load_state_dict(source.state_dict())
    elif recipe.init_gain > 0:
        initialise(vae, recipe.init_gain)
    patterns = [pattern for name in recipe.freeze for pattern in PARTS.get(name, (name,))]
    if patterns:
        freeze(vae, patterns)
    _check_frozen(recipe, vae)
    vae.encoder.activation_checkpointing = vae.decoder.activation_checkpointing = (
        recipe.activation_checkpointing
    )
    if recipe.compile:
        vae.encoder.compile()
        vae.decoder.compile()
    return vae


def initialise(module: nn.Module, gain: float) -> None:
    """Xavier's normal weights for convolutions, and no biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_normal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def train_mode(vae: VQVAE) -> None:
    """Training mode, without dropout in an encoder that is not trained: its tokens stay those of the weights."""
    vae.train()
    if not any(p.requires_grad for p in vae.encoder.parameters()):
        vae.encoder.eval()


def last_layer(vae: VQVAE) -> nn.Parameter:
    """The weights at which gradients of losses are compared."""
    weight = vae.decoder.conv_out.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _check_sizes(sizes: dict[str, Any], source: VQVAE) -> None:
    differing = [
        f"{name} = {_plain(value)}, got {_plain(source.config[name])}"
        for name, value in sizes.items()
        if _plain(value) != _plain(source.config[name])
    ]
    if differing:
        raise ValueError(f"weights to begin with must be of a tokenizer with {'; '.join(differing)}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _check_frozen(recipe: TokenizerRecipe, vae: VQVAE) -> None:
    """One ValueError that names all that would change what is frozen."""
    wrong = []
    codes = vae.quantize.embedding.weight.requires_grad
    trained = {name.partition(".")[0] for name, p in vae.named_parameters() if p.requires_grad}
    features = not trained.isdisjoint({"encoder", "quant_conv"})
    changing = [name for name in ("codebook_init", "restart_every", "anchors") if getattr(recipe, name)]
    if changing and not codes:
        values = " and ".join(f"{name} = {getattr(recipe, name)}" for name in changing)
        wrong.append(
            f"frozen codes must stay as they are, got {values}: --codebook-init 0 --restart-every 0 --no-anchors"
        )
    if recipe.centre and not all(p.requires_grad for p in vae.quant_conv.parameters()):
        wrong.append(
            f"features must stay as they are where quant_conv is frozen, got centre = {recipe.centre:g}: --centre 0"
        )
    if recipe.gradient != "straight_through" and not features:
        wrong.append(
            f"gradient = {recipe.gradient} is of the encoder, which is frozen: leave out one of them"
        )
    if recipe.weight_entropy > 0 and not features and not codes:
        wrong.append(
            f"weight_entropy = {recipe.weight_entropy:g} is of encoder and codes, which are frozen: "
            "--weight-entropy 0, or train one of them"
        )
    if recipe.weight_adversarial > 0 and not last_layer(vae).requires_grad:
        wrong.append(
            "weight_adversarial must be 0 where decoder.conv_out is frozen: the adversarial loss trains the decoder"
        )
    if wrong:
        raise ValueError("; ".join(wrong))


def set_trainable(module: nn.Module, names: set[str]) -> None:
    """Parameters of these names are trained, all others not."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
