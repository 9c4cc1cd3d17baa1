"""var_ext beside DiT-XL/2 as the diffusers library runs it, its decoder included: same machine, process and dtype.

    python benchmarks/vs_dit.py                                        # needs diffusers: pip install 'var_ext[versus]'
    python benchmarks/vs_dit.py --tiny --batch-sizes 1 --json /tmp/tiny.json                # seconds on a CPU

Both have random weights: speed does not depend on them. DiT runs in its own pipeline (`DiTPipeline`, DDIM, guidance 4
on a doubled batch, the decoder of Stable Diffusion). All its steps cost the same, so only a few are timed, and the
seconds of an image are 250, 50 or 20 times the median step plus the decoder; runs of 4 and of 8 steps check how well
that holds. var_ext draws complete images with the settings of the published evaluation.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from samplers import DTYPES, drawer, drawn, our_model
from tables import duration
from versus import (
    Watch,
    about,
    add_file_options,
    in_fresh_process,
    memory_of,
    numbers,
    time_in_turn,
    words,
    write,
)

from var_ext.engine.memory import out_of_memory

XL2 = dict(num_attention_heads=16, attention_head_dim=72, num_layers=28, sample_size=32)
TINY = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8)
WIDTHS, TINY_WIDTHS = (128, 256, 512, 512), (32, 32)
GUIDANCE = 4.0
CHECKED = (4, 8)  # steps of the two runs that check whether steps add up


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=16, help="of the VAR model beside it")
    parser.add_argument("--steps", type=numbers, default=[250, 50, 20], help="sampling lengths to tell of")
    parser.add_argument("--timed-steps", type=int, default=3, help="steps of a lap")
    parser.add_argument("--batch-sizes", type=numbers, default=[1, 8])
    parser.add_argument("--precisions", type=words, default=["bf16"], help="of fp32, bf16, fp16 (GPU)")
    parser.add_argument("--laps", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tiny", action="store_true", help="toys of both; takes --depth 2")
    parser.add_argument("--no-memory", action="store_true", help="start no processes to measure memory")
    add_file_options(parser)
    parser.add_argument("--memory-of", nargs=3, metavar=("WHO", "PRECISION", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.depth = 2
    if unknown := set(options.precisions) - {"fp32", *DTYPES}:
        parser.error(f"--precisions may be fp32, {', '.join(DTYPES)}, got {', '.join(sorted(unknown))}")
    return options


def pipeline(precision: str, device: torch.device, tiny: bool) -> Any:
    """diffusers' pipeline as published for 256 px, with random weights and nothing fetched."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import diffusers
    except ImportError as error:
        raise SystemExit(
            f"diffusers is needed beside var_ext: pip install 'var_ext[versus]' ({error})"
        ) from error
    torch.manual_seed(0)
    widths = TINY_WIDTHS if tiny else WIDTHS
    transformer = diffusers.DiTTransformer2DModel(
        out_channels=8, norm_type="ada_norm_zero", **(TINY if tiny else XL2)
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    pipe = diffusers.DiTPipeline(transformer.eval(), vae.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, DTYPES.get(precision, torch.float32))


def draw(pipe: Any, batch: int, steps: int, watch: Watch | None = None) -> torch.Tensor:
    """Images (B, 3, S, S) in [0, 1]; `watch` marks "start", every "step" and the "decoder"."""
    begun: list[bool] = []

    def step_begins(*_: Any) -> None:
        if watch:
            watch("step" if begun else "start")
        begun.append(True)

    decode = pipe.vae.decode

    def decoded(*args: Any, **kwargs: Any) -> Any:
        if watch:
            watch("step")
        result = decode(*args, **kwargs)
        if watch:
            watch("decoder")
        return result

    hook = pipe.transformer.register_forward_pre_hook(step_begins)
    pipe.vae.decode = decoded
    try:
        generator = torch.Generator(pipe.device).manual_seed(0)
        labels = [n * 37 % 1000 for n in range(batch)]
        return pipe(
            labels, guidance_scale=GUIDANCE, num_inference_steps=steps, generator=generator, output_type="pt"
        ).images
    finally:
        del pipe.vae.decode
        hook.remove()


def seconds_of(parts: dict[str, list[float]], steps: int) -> float:
    """Seconds of a call with so many steps, from the parts of a shorter one."""
    return sum(parts["start"]) + steps * median(parts["step"]) + sum(parts["decoder"])


def linearity(pipe: Any, parts: dict[str, list[float]], device: torch.device) -> dict[str, float]:
    """Steps -> measured over predicted seconds."""
    runs: dict[str, Callable[[Watch], Any]] = {
        str(steps): functools.partial(draw, pipe, 1, steps) for steps in CHECKED
    }
    results = time_in_turn(runs, 1, device)
    return {steps: timed.seconds[0] / seconds_of(parts, int(steps)) for steps, timed in results.items()}


def memory_worker(options: argparse.Namespace) -> None:
    """Prints the memory of one of the two, alone in this process."""
    who, precision, batch = options.memory_of
    if who == "var_ext":
        draw_ours = drawer(our_model(options.depth, options.device, options.tiny), precision)
        call = functools.partial(drawn, draw_ours, int(batch), options.device)
    else:
        call = functools.partial(draw, pipeline(precision, options.device, options.tiny), int(batch), 2)
    try:
        print(json.dumps(memory_of(call, options.device)))
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(json.dumps(dict(error="out of memory")))


def main() -> None:
    options = arguments()
    if options.memory_of:
        memory_worker(options)
        return
    device = options.device
    rows: list[dict[str, Any]] = []
    checks: dict[str, dict[str, float]] = {}
    report: dict[str, Any] = {}

    def keep(finished: bool = False) -> None:
        write("dit", report, options, finished=finished)

    for precision in options.precisions:
        pipe = pipeline(precision, device, options.tiny)
        draw_ours = drawer(our_model(options.depth, device, options.tiny), precision)
        report = report or begun(options, checks, rows)
        for batch in options.batch_sizes:
            calls: dict[str, Callable[[Watch], Any]] = {
                "DiT": functools.partial(draw, pipe, batch, options.timed_steps),
                "var_ext": lambda _, batch=batch, ours=draw_ours: drawn(ours, batch, device),
            }
            for who, result in time_in_turn(calls, options.laps, device).items():
                row = dict(who=who, precision=precision, batch=batch, **result.as_dict())
                if who == "DiT" and result.seconds:
                    row["of_steps"] = {str(n): seconds_of(row["parts"], n) for n in options.steps}
                    if precision not in checks:
                        checks[precision] = linearity(pipe, row["parts"], device) if batch == 1 else {}
                rows.append(row)
                print(f"batch {batch}, {who} {precision}: {told(row)}", flush=True)
            keep()
        del pipe, draw_ours
    passed = ["--depth", str(options.depth), "--device", str(device), *(["--tiny"] if options.tiny else [])]
    for row in rows if not options.no_memory else []:
        worker = ["--memory-of", row["who"], row["precision"], str(row["batch"])]
        row["memory"] = in_fresh_process(__file__, [*passed, *worker])
        keep()
    keep(finished=True)


def begun(
    options: argparse.Namespace, checks: dict[str, dict[str, float]], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The report, with checks and rows to be filled in."""
    import diffusers

    model = dict(depth=options.depth, tiny=options.tiny, timed_steps=options.timed_steps, guidance=GUIDANCE)
    known = about(options.device, diffusers=diffusers.__version__)
    return dict(about=known, model=model, laps=options.laps, linearity=checks, rows=rows)


def told(row: dict[str, Any]) -> str:
    if row["error"]:
        return row["error"]
    if row["who"] == "var_ext":
        return duration(median(row["seconds"]))
    return ", ".join(f"{steps} steps {duration(seconds)}" for steps, seconds in row["of_steps"].items())


if __name__ == "__main__":
    main()
