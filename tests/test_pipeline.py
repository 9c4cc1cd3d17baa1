"""`VARPipeline` draws what `Sampler` draws, and takes the calls of a DiT script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import var_ext
from tests.tiny import tiny
from var_ext import VARPipeline


@pytest.fixture(scope="module")
def pipe() -> VARPipeline:
    return VARPipeline(var_ext.Sampler(*tiny()))


def test_it_draws_what_the_sampler_draws(pipe: VARPipeline) -> None:
    out = pipe(
        [1, 0], seed=5, num_images_per_label=2, guidance_scale=2.0, top_k=3, top_p=0.9, output_type="pt"
    )
    wanted = pipe.sampler([1, 1, 0, 0], [5, 6, 7, 8], cfg=2.0, top_k=3, top_p=0.9)
    assert torch.equal(out.images, wanted)
    assert torch.equal(pipe([1], seed=[9], output_type="pt").images, pipe.sampler([1], [9]))


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, torch.tensor])
def test_one_seed_counts_up_of_whatever_kind(pipe: VARPipeline, kind: Any) -> None:
    wanted = pipe.sampler([1, 1, 1], [5, 6, 7])
    assert torch.equal(pipe(kind(1), seed=kind(5), num_images_per_label=3, output_type="pt").images, wanted)
    labels = torch.tensor([1, 1, 1])
    assert torch.equal(pipe(labels, seed=np.arange(5, 8), output_type="pt").images, wanted)


def test_the_kinds_of_output(pipe: VARPipeline) -> None:
    as_torch = pipe(1, seed=3, output_type="pt").images
    as_numpy = pipe(1, seed=3, output_type="np").images
    (pictures,) = pipe(1, seed=3, return_dict=False)
    assert np.array_equal(as_numpy, as_torch.permute(0, 2, 3, 1).numpy()) and as_numpy.dtype == np.float32
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(var_ext.to_pil(as_torch)[0]))


def test_seeds_come_from_a_generator(pipe: VARPipeline) -> None:
    def drawn(start: int) -> torch.Tensor:
        return pipe([0, 1], generator=torch.Generator().manual_seed(start), output_type="pt").images

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


def test_the_callback_sees_each_scale(pipe: VARPipeline) -> None:
    seen: list[tuple[int, int, torch.Tensor]] = []

    def look(own: VARPipeline, step: int, side: int, kwargs: dict[str, Any]) -> None:
        assert own is pipe
        seen.append((step, side, kwargs["images"]))

    out = pipe([0, 1], seed=1, output_type="pt", callback_on_step_end=look)
    assert [side for _, side, _ in seen] == list(pipe.sampler.var.patch_nums)
    assert [step for step, _, _ in seen] == list(range(len(seen))) and torch.equal(seen[-1][2], out.images)
    assert torch.equal(out.images, pipe([0, 1], seed=1, output_type="pt").images)


def test_names_of_classes() -> None:
    sampler = var_ext.Sampler(*tiny())
    sampler.class_names = ["Tabby cat", "beagle", *map(str, range(2, sampler.num_classes))]
    pipe = VARPipeline(sampler)
    assert pipe.get_label_ids("beagle") == [1] and pipe.get_label_ids(["tabby CAT", "2"]) == [0, 2]
    with pytest.raises(ValueError, match="'beagel'; did you mean beagle"):
        pipe.get_label_ids("beagel")


def test_a_script_of_dit_runs(pipe: VARPipeline, tmp_path: Path) -> None:
    """Its calls as diffusers documents them; the import and the model's name are what changes."""
    pipe.save_pretrained(tmp_path / "model")
    script = (
        "pipe = Pipeline.from_pretrained(MODEL, torch_dtype=torch.float32)\n"
        "pipe = pipe.to('cpu')\n"
        "words = ['0', '1']\n"
        "class_ids = pipe.get_label_ids(words)\n"
        "generator = torch.manual_seed(33)\n"
        "output = pipe(class_labels=class_ids, num_inference_steps=25, generator=generator)\n"
        "image = output.images[0]\n"
    )
    names: dict[str, Any] = {"Pipeline": VARPipeline, "MODEL": tmp_path / "model", "torch": torch}
    exec(script, names)
    assert names["image"].size == (pipe.sampler.image_size,) * 2 and len(names["output"].images) == 2


def test_it_goes_to_the_hub(pipe: VARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            assert token == "t"

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str | None) -> None:
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert pipe.push_to_hub("me/mine", token="t", private=True) == "https://huggingface.co/me/mine"
    assert calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert {"config.json", "vae.safetensors", "var.safetensors"} <= set(calls[1][1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1, "generator": torch.Generator()}, "seed or generator, not both"),
        ({"output_type": "latent"}, "output_type must be one of pil, pt, np, got 'latent'"),
        ({"num_images_per_label": 0}, "num_images_per_label must be at least 1, got 0"),
        ({"seed": [1, 2]}, "seeds"),
        ({"guidance_scale": float("nan")}, "cfg"),
    ],
)
def test_bad_input(pipe: VARPipeline, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pipe([0, 1, 2], **options)


@pytest.mark.parametrize(
    "options", [{"seed": 1.5}, {"seed": True}, {"class_labels": [0.5]}, {"class_labels": True}]
)
def test_what_is_no_integer_is_refused(pipe: VARPipeline, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be integers"):
        pipe(**{"class_labels": [0, 1], **options})


def test_a_dtype_is_no_device(pipe: VARPipeline) -> None:
    with pytest.raises(TypeError, match="load it with torch_dtype"):
        pipe.to(torch.bfloat16)  # type: ignore[arg-type]
