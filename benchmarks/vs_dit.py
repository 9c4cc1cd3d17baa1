"""var_ext beside DiT-XL/2 as the diffusers library runs it, its decoder included: same machine, process and dtype.

    python benchmarks/vs_dit.py                                        # needs diffusers: pip install 'var_ext[versus]'
    python benchmarks/vs_dit.py --tiny --batch-sizes 1 --json /tmp/tiny.json                # seconds on a CPU

Both have random weights: speed does not depend on them. DiT runs in its own pipeline (`DiTPipeline`, DDIM, guidance 4
on a doubled batch, the decoder of Stable Diffusion). All its steps cost the same, so only a few are timed, and the
seconds of an image are 250, 50 or 20 times the median step plus the decoder; runs of 4 and of 8 steps check how well
that holds. var_ext draws complete images with the settings of the published evaluation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from harness.clock import Clock, Watch, in_turn
from harness.comparison import Comparison, chosen, numbers, parser_of
from harness.memory import memory_of
from harness.report import facts
from samplers import DTYPES, drawer, drawn, our_model

XL2 = dict(num_attention_heads=16, attention_head_dim=72, num_layers=28, sample_size=32)
TINY = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8)
WIDTHS, TINY_WIDTHS = (128, 256, 512, 512), (32, 32)
GUIDANCE = 4.0
CHECKED = (4, 8)  # steps of the two runs that check whether steps add up


def library() -> Any:
    """diffusers, which fetches nothing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import diffusers
    except ImportError as error:
        raise SystemExit(
            f"diffusers is needed beside var_ext: pip install 'var_ext[versus]' ({error})"
        ) from error
    return diffusers


def pipeline(precision: str, device: torch.device, tiny: bool) -> Any:
    """diffusers' pipeline as published for 256 px, with random weights."""
    diffusers = library()
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


def linearity(pipe: Any, parts: dict[str, list[float]], clock: Clock) -> dict[str, float]:
    """Steps -> measured over predicted seconds."""
    results = in_turn({str(steps): partial(draw, pipe, 1, steps) for steps in CHECKED}, 1, clock)
    return {steps: timed.seconds[0] / seconds_of(parts, int(steps)) for steps, timed in results.items()}


def main() -> None:
    parser = parser_of(__doc__, laps=2, batch_sizes=[1, 8], memory=True)
    parser.add_argument("--steps", type=numbers, default=[250, 50, 20], help="sampling lengths to tell of")
    parser.add_argument("--timed-steps", type=int, default=3, help="steps of a lap")
    parser.set_defaults(precisions=["bf16"])
    options = chosen(parser, dict.fromkeys(("cpu", "cuda"), ("fp32", *DTYPES)))
    device, tiny = options.device, options.tiny
    if options.memory_of:
        who, precision, batch = options.memory_of[0], options.memory_of[1], int(options.memory_of[2])
        if who == "var_ext":
            call = partial(drawn, drawer(our_model(options.depth, device, tiny), precision), batch, device)
        else:
            call = partial(draw, pipeline(precision, device, tiny), batch, 2)
        print(json.dumps(memory_of(call, device)))
        return
    checks: dict[str, dict[str, float]] = {}
    model = dict(depth=options.depth, tiny=tiny, timed_steps=options.timed_steps, guidance=GUIDANCE)
    about = facts(device, diffusers=library().__version__)
    comparison = Comparison("dit", __file__, options, about=about, model=model, linearity=checks)
    for precision in options.precisions:
        pipe = pipeline(precision, device, tiny)
        draw_ours = drawer(our_model(options.depth, device, tiny), precision)
        for batch in options.batch_sizes:
            calls: dict[str, Callable[[Watch], Any]] = {
                "DiT": partial(draw, pipe, batch, options.timed_steps),
                "var_ext": lambda _, batch=batch, ours=draw_ours: drawn(ours, batch, device),
            }
            for who, result in in_turn(calls, options.laps, comparison.clock).items():
                more: dict[str, Any] = {}
                if who == "DiT" and result.seconds:
                    parts = result.parts()
                    more["of_steps"] = {str(n): seconds_of(parts, n) for n in options.steps}
                    if precision not in checks:
                        checks[precision] = linearity(pipe, parts, comparison.clock) if batch == 1 else {}
                comparison.add(result, who=who, precision=precision, batch=batch, **more)
        del pipe, draw_ours, calls
        comparison.clock.release()
    for row in comparison.rows if not options.no_memory else []:
        row["memory"] = comparison.memory(row["who"], row)
        comparison.save()
    comparison.save(finished=True)


if __name__ == "__main__":
    main()
