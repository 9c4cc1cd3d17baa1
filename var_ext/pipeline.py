"""`VARPipeline`: sampling in the manner of diffusers' `DiTPipeline`."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from var_ext.checkpoints import save_model
from var_ext.engine.call import Integers, as_int64
from var_ext.grid import to_pil
from var_ext.loading import load
from var_ext.sampling import Sampler

OUTPUTS = ("pil", "pt", "np")
Pictures = list[Image.Image] | Tensor | NDArray[np.float32]
Callback = Callable[["VARPipeline", int, int, dict[str, Any]], Any]


@dataclass(frozen=True)
class VARPipelineOutput:
    """What a call returns.

    Attributes:
        images: a list of N Pillow images ("pil"), (N, 3, S, S) float32 in [0, 1] ("pt"), or (N, S, S, 3) ("np").
    """

    images: Pictures


class VARPipeline:
    """A model behind the calls of diffusers' `DiTPipeline`; `sampler` is what draws.

    Args:
        sampler: of the model.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.labels = {name: label for label, name in enumerate(sampler.class_names)}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: str | torch.dtype | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
    ) -> VARPipeline:
        """Loads a model by the names that `var_ext.load` takes.

        Args:
            torch_dtype: torch.float32, torch.bfloat16 or torch.float16, or the name of a precision ("int8"); None: as
                `var_ext.load` decides.
            device: where to put it.
            revision: commit, tag or branch of a model on the hub.

        Raises:
            ValueError, CheckpointError: as `var_ext.load`.
        """
        return cls(load(name_or_path, device=device, precision=torch_dtype, revision=revision))

    def to(self, device: torch.device | str) -> VARPipeline:
        """Moves the model; returns self. A dtype is refused with TypeError: give it to `from_pretrained`."""
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"a pipeline is moved to devices; for another precision load it with torch_dtype={device}"
            )
        self.sampler.to(device)
        return self

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The classes of one name or several, upper or lower case alike.

        Raises:
            ValueError: there is no such class; close names are told.
        """
        known = {name.lower(): label for name, label in self.labels.items()}
        return [self._class_of(name, known) for name in ([label] if isinstance(label, str) else label)]

    def _class_of(self, name: str, known: dict[str, int]) -> int:
        if name.lower() not in known:
            close = difflib.get_close_matches(name.lower(), known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"classes are {', '.join(known)}"
            raise ValueError(f"there is no class {name!r}; {hint[:200]}")
        return known[name.lower()]

    def __call__(
        self,
        class_labels: Integers,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        seed: Integers | None = None,
        num_images_per_label: int = 1,
        top_k: int | None = None,
        top_p: float | None = None,
        callback_on_step_end: Callback | None = None,
    ) -> VARPipelineOutput | tuple[Pictures]:
        """Draws images.

        Args:
            class_labels: one class or several; the same may stand there twice.
            guidance_scale: `cfg` of VAR, of the last scale; 0: none. DiT counts from 1, so its s is s - 1 here. None:
                the model's recommended value.
            generator: of torch, from which seeds are drawn; not with `seed`.
            num_inference_steps: of a diffusion model. VAR has as many steps as scales, so any number is accepted and
                none changes anything.
            output_type: "pil", "pt" or "np".
            return_dict: False: a tuple of one.
            seed: one for each image, or one from which the others count up; not with `generator`. Neither: torch's
                global generator.
            num_images_per_label: images of each class; those of a class stand together.
            top_k, top_p: see `Sampler`.
            callback_on_step_end: called as f(pipe, step, side, {"images": (N, 3, S, S)}) after each scale; all images
                are then drawn as one batch.

        Raises:
            ValueError: an option is out of range, both `seed` and `generator` are given, or seeds are not one an image.
            TypeError: labels or seeds are not integers.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}")
        if isinstance(num_images_per_label, bool) or not isinstance(num_images_per_label, int):
            raise TypeError(f"num_images_per_label must be an integer, got {num_images_per_label!r}")
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label must be at least 1, got {num_images_per_label}")
        classes = as_int64("class_labels", class_labels).reshape(-1)
        labels = classes.repeat_interleave(num_images_per_label)
        options: dict[str, Any] = {"cfg": guidance_scale, "top_k": top_k, "top_p": top_p}
        seeds = self._seeds(len(labels), seed, generator)
        if callback_on_step_end is None:
            images = self.sampler(labels, seeds, **options)
        else:
            sides = self.sampler.var.patch_nums
            for step, images in enumerate(self.sampler.stages(labels, seeds, **options)):
                callback_on_step_end(self, step, sides[step], {"images": images})
        pictures = _as(images, output_type)
        return VARPipelineOutput(pictures) if return_dict else (pictures,)

    def _seeds(self, count: int, seed: Integers | None, generator: torch.Generator | None) -> Tensor | None:
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        if generator is not None:
            return torch.randint(2**63 - 1, (count,), generator=generator, device=generator.device).cpu()
        if seed is None:
            return None
        seeds = as_int64("seed", seed, bits=True)
        return seeds + torch.arange(count) if seeds.ndim == 0 else seeds  # beyond 2^63 - 1 they go round

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a model folder. Raises CheckpointError, ValueError: as `var_ext.save_model`."""
        own = self.sampler
        save_model(folder, own.vae, own.var, sampling=own.defaults, class_names=own.class_names)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Writes the model into a repository of the hub, created if it is not there; returns its address.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: no such right, or no connection.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        return f"https://huggingface.co/{repo_id}"

    def __repr__(self) -> str:
        own = self.sampler
        return f"VARPipeline({own.num_classes} classes, {own.image_size} px, {own.precision.name} on {own.device})"


def _as(images: Tensor, output_type: str) -> Pictures:
    """(N, 3, S, S) in [0, 1] as what was asked for."""
    if output_type == "pt":
        return images
    return to_pil(images) if output_type == "pil" else images.permute(0, 2, 3, 1).cpu().numpy()
