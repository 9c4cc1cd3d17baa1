"""From a name to a `ModelFolder`: bundled, published, on this disk, or in a repository on the hub."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from importlib import resources
from pathlib import Path

from var_ext.checkpoints.adapter import ADAPTER_CONFIG, is_of_adapters, open_adapter
from var_ext.checkpoints.atomic import CheckpointError, read_json
from var_ext.checkpoints.hub import address, fetch, pinned
from var_ext.checkpoints.model_folder import CONFIG, ModelFolder, Weights, open_folder, parse
from var_ext.checkpoints.pth import read_pth
from var_ext.checkpoints.released import (
    EVALUATION,
    MODELS,
    REPOSITORY,
    TOKENIZER_FILE,
    published_config,
    transformer_file,
)
from var_ext.checkpoints.tensors import Entries
from var_ext.models import VQVAE
from var_ext.paths import user_path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def bundled_models() -> dict[str, Path]:
    """The models inside the package: name -> folder."""
    weights = Path(str(resources.files("var_ext") / "weights"))
    return {path.parent.name: path.parent for path in sorted(weights.glob(f"*/{CONFIG}"))}


def find_model(name_or_path: str | os.PathLike[str], revision: str | None = None) -> ModelFolder:
    """The folder of a model, with its config read; no weights are read or fetched.

    Args:
        name_or_path: see `var_ext.load`. A str may be a name or a path, anything else is a path.
        revision: of a hub repository; "NAME@REVISION" says the same.

    Raises:
        ValueError: unknown model; the message suggests similar names.
        CheckpointError: the config cannot be fetched, read, or used.
    """
    return _find(name_or_path, revision, ())


def _find(name_or_path: str | os.PathLike[str], revision: str | None, above: tuple[str, ...]) -> ModelFolder:
    """`find_model` of a base, whose adapters are those of `above`, the outermost first."""
    name = os.fspath(name_or_path)
    is_name = isinstance(name_or_path, str)

    def base(of: str) -> ModelFolder:
        own = (*above, lasting_name(name))
        if lasting_name(of) in own:
            raise CheckpointError(
                f"{name} holds adapters of another model, which is itself: {' of '.join((*own, of))}"
            )
        return _find(of, None, own)

    if revision is not None:
        if not is_name or name in bundled_models() or os.path.isdir(user_path(name)):
            raise ValueError(f"a revision is of a model on the hub, got {revision!r} for {name!r}")
        name = pinned(name, revision)
    published, at, pin = name.partition("@")
    if is_name and published in MODELS:
        return _released(published, f"{REPOSITORY}{at}{pin}")
    if is_name and name in bundled_models():
        return open_folder(bundled_models()[name])
    path = user_path(name)
    if name and os.path.isdir(path):  # of pathlib, this and the like raise for a name too long
        if not os.path.exists(path / ADAPTER_CONFIG):
            return open_folder(path)
        own = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
        return open_adapter(str(path), lambda file: path / file, own, base)
    if os.path.isfile(path):
        raise ValueError(f"the model must be a name or a folder, got a file: {_use_of(path)}")
    if is_name and HUB_NAME.fullmatch(name) and not _is_publishers(name):
        hint = f" Nor is there a folder {name!r} here."
        config = read_json(fetch(name, CONFIG, hint))
        if is_of_adapters(config):
            return open_adapter(address(name), lambda file: fetch(name, file), config, base)
        return parse(config, address(name), lambda file: fetch(name, file))
    known = ", ".join([*bundled_models(), *MODELS])
    shown = reprlib.repr(name) if len(name) > 200 else repr(name)
    came = f"{shown}{_meant(name)}" if is_name else f"the path {shown}, where there is none"
    raise ValueError(
        f"the model must be one of {known}, an existing model folder, or 'owner/name' on the Hugging Face "
        f"hub, got {came}"
    )


def lasting_name(name_or_path: str | os.PathLike[str]) -> str:
    """A model's name that means the same in every working folder."""
    name = os.fspath(name_or_path)
    path = user_path(name)
    published = name.partition("@")[0] in MODELS
    is_name = isinstance(name_or_path, str) and (published or name in bundled_models())
    return str(path.resolve()) if path.is_dir() and not is_name else name


def check_apart(out: Path, **sources: str | os.PathLike[str] | None) -> None:
    """Refuse to write a model into the folder of one that is read, whose weights would be lost.

    Args:
        out: the folder to be written.
        sources: names or paths of models by the option that names them; that of adapters stands for their base too.

    Raises:
        ValueError: one of them is in `out`, by whatever path.
        CheckpointError: a folder of adapters does not tell its base.
    """
    for option, given in sources.items():
        seen = set[str]()
        name: str | None = None if given is None else lasting_name(given)
        while name is not None and name not in seen:
            seen.add(name)
            folder = bundled_models().get(name) or Path(name)
            if name.partition("@")[0] in MODELS or not folder.is_dir():  # on the hub
                break
            if out.exists() and os.path.samefile(out, folder):
                raise ValueError(
                    f"out must be another folder than that of {option}, whose weights it would replace, got {out} for "
                    "both: name a new one with --out"
                )
            config = folder / ADAPTER_CONFIG
            base = read_json(config).get("base_model_name_or_path") if config.exists() else None
            name = lasting_name(base) if isinstance(base, str) else None


def load_tokenizer(name_or_path: str | os.PathLike[str] = "digits") -> VQVAE:
    """Loads only the tokenizer, on the CPU in fp32.

    Takes the same names as `var_ext.load` and raises the same errors.
    """
    return find_model(name_or_path).tokenizer()


def _released(name: str, repository: str) -> ModelFolder:
    config = published_config(MODELS[name])
    return ModelFolder(
        address(repository),
        name,
        vae_config=config["vae"],
        vae_weights=_pth_weights(TOKENIZER_FILE, 0, repository),
        var_config=config["var"],
        var_weights=_pth_weights(transformer_file(name), 1, repository),
        sampling=EVALUATION,
    )


def _pth_weights(file: str, which: int, repository: str) -> Weights:
    """The tokenizer's (0) or the transformer's (1) entries in a published file."""

    def read() -> Entries:
        hint = (
            " If you have the .pth files, make a folder that load() takes: "
            f"`var-ext convert {TOKENIZER_FILE} var_dN.pth --out FOLDER`."
        )
        path = fetch(repository, file, hint)
        entries = read_pth(path)[which]
        if entries is None:
            raise CheckpointError(f"{path} must hold a {('tokenizer', 'transformer')[which]}, but has none")
        return entries

    return Weights(file, read)


def _use_of(file: Path) -> str:
    """What to do with a file that was given as a model."""
    if (file.parent / CONFIG).is_file():
        return f"give its folder, {file.parent}"
    return (
        f"`var-ext convert TOKENIZER TRANSFORMER --out FOLDER` makes a model folder of such files as {file}"
    )


def _is_publishers(name: str) -> bool:
    """Whether a repository is one of the authors', which hold no model folders."""
    return name.partition("/")[0].lower() == REPOSITORY.partition("/")[0].lower()


def _meant(name: str) -> str:
    known = [*bundled_models(), *MODELS]
    if name.lower() == REPOSITORY.lower():
        close = list(MODELS)
    else:
        last = re.sub(r"[\s_]+", "-", name.lower().rpartition("/")[2]).removesuffix(".pth")
        close = difflib.get_close_matches(last, known, n=3)
    return f": did you mean {' or '.join(filter(None, (', '.join(close[:-1]), close[-1])))}?" if close else ""
