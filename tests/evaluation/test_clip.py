"""CLIP's image tower beside transformers' with random weights, both layouts of files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from var_ext.checkpoints import CheckpointError
from var_ext.evaluation import features
from var_ext.evaluation.clip import MEAN, STD, load_clip

SIDE, PATCH = 24, 8


@pytest.fixture(scope="module")
def theirs() -> CLIPVisionModelWithProjection:
    """Two blocks of 128 channels, 3 x 3 patches, with weights and biases that all matter."""
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=128, intermediate_size=512, projection_dim=40, num_hidden_layers=2, num_attention_heads=2,
            image_size=SIDE, patch_size=PATCH, hidden_act="quick_gelu", attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def openai(model: CLIPVisionModelWithProjection) -> dict[str, torch.Tensor]:
    """The entries under OpenAI's names, written out beside those of the text tower."""
    own, found = model.state_dict(), {"text_projection": torch.zeros(4, 4), "logit_scale": torch.zeros(())}
    top = "vision_model."
    found["visual.class_embedding"] = own[f"{top}embeddings.class_embedding"]
    found["visual.conv1.weight"] = own[f"{top}embeddings.patch_embedding.weight"]
    found["visual.positional_embedding"] = own[f"{top}embeddings.position_embedding.weight"]
    found["visual.proj"] = own["visual_projection.weight"].T.contiguous()
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = own[f"{top}pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = own[f"{top}post_layernorm.{kind}"]
        for n in range(2):
            at, to = f"{top}encoder.layers.{n}.", f"visual.transformer.resblocks.{n}."
            found[f"{to}attn.in_proj_{kind}"] = torch.cat(
                [own[f"{at}self_attn.{each}_proj.{kind}"] for each in "qkv"]
            )
            found[f"{to}attn.out_proj.{kind}"] = own[f"{at}self_attn.out_proj.{kind}"]
            found[f"{to}ln_1.{kind}"] = own[f"{at}layer_norm1.{kind}"]
            found[f"{to}ln_2.{kind}"] = own[f"{at}layer_norm2.{kind}"]
            found[f"{to}mlp.c_fc.{kind}"] = own[f"{at}mlp.fc1.{kind}"]
            found[f"{to}mlp.c_proj.{kind}"] = own[f"{at}mlp.fc2.{kind}"]
    return found


@pytest.mark.parametrize("layout", ["openai", "openai in half precision", "transformers"])
def test_embeddings_are_transformers(
    theirs: CLIPVisionModelWithProjection, tmp_path: Path, layout: str
) -> None:
    entries = theirs.state_dict() if layout == "transformers" else openai(theirs)
    half = "half" in layout
    torch.save(
        {name: entry.half() if half else entry for name, entry in entries.items()}, tmp_path / "clip.pth"
    )
    ours = load_clip(str(tmp_path / "clip.pth"))
    assert (ours.name, ours.size, ours.embedding) == ("clip-128/8", SIDE, 40)
    images = torch.rand(3, 3, SIDE, SIDE)
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    with torch.no_grad():
        wanted = theirs((images - mean) / std).image_embeds
    # float32 sums in another order; half precision rounds weights by 5e-4
    bound = (2e-2 if half else 2e-5) * float(wanted.abs().max())
    torch.testing.assert_close(ours(images), wanted, rtol=0, atol=bound)


def test_the_space(theirs: CLIPVisionModelWithProjection, tmp_path: Path) -> None:
    torch.save(theirs.state_dict(), tmp_path / "clip.pth")
    extractor = features.clip(tmp_path / "clip.pth")
    pixels = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    found = extractor.compute(pixels)["pool"]
    assert extractor.titles == {"pool": "FD-clip-128/8"} and extractor.fields == {"pool": 40}
    torch.testing.assert_close(found, load_clip(str(tmp_path / "clip.pth"))(pixels.float() / 255))
    assert extractor.compute(torch.zeros(1, 3, 50, 50, dtype=torch.uint8))["pool"].shape == (1, 40)


def test_refuses_other_files(theirs: CLIPVisionModelWithProjection, tmp_path: Path) -> None:
    whole = openai(theirs)
    lacking = {name: entry for name, entry in whole.items() if name != "visual.ln_post.bias"}
    narrow = {**whole, "visual.proj": torch.zeros(64, 40)}
    text = {"text_projection": torch.zeros(4, 4)}
    for entries in (lacking, narrow, text):
        torch.save(entries, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=r"other\.pth must hold the image tower of CLIP"):
            load_clip(str(tmp_path / "other.pth"))
