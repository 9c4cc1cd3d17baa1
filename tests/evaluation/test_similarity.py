"""PSNR and SSIM against their definitions, place by place."""

from __future__ import annotations

import math

import pytest
import torch

from var_ext.evaluation import psnr, ssim


def test_psnr_by_hand() -> None:
    a = torch.zeros(2, 3, 4, 4)
    b = a.clone()
    b[0] += 0.1
    found = psnr(a, b)
    assert found[0].item() == pytest.approx(20, abs=1e-5) and found[1].item() == pytest.approx(100)


def test_ssim_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 2, 13, 12, generator=generator, dtype=torch.float64)
    b = (a + 0.3 * torch.rand(2, 2, 13, 12, generator=generator, dtype=torch.float64)).clamp(0, 1)
    weights = [[math.exp(-(y * y + x * x) / 4.5) for x in range(-5, 6)] for y in range(-5, 6)]
    w = torch.tensor(weights, dtype=torch.float64)
    w = w / w.sum()
    for i in range(2):
        total = []
        for c in range(2):
            for y in range(13 - 10):
                for x in range(12 - 10):
                    p, q = (each[i, c, y : y + 11, x : x + 11] for each in (a, b))
                    mp, mq = (w * p).sum(), (w * q).sum()
                    vp, vq, vpq = (
                        (w * (p - mp) ** 2).sum(),
                        (w * (q - mq) ** 2).sum(),
                        (w * (p - mp) * (q - mq)).sum(),
                    )
                    above = (2 * mp * mq + 1e-4) * (2 * vpq + 9e-4)
                    total.append(above / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        torch.testing.assert_close(ssim(a, b)[i], torch.stack(total).mean())
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    assert (ssim(a, 1 - a) < 0).all()


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sides of at least 11, got \(1, 3, 10, 11\)"):
        ssim(torch.zeros(1, 3, 10, 11), torch.zeros(1, 3, 10, 11))
    with pytest.raises(ValueError, match=r"got \(1, 3, 4, 4\) and \(2, 3, 4, 4\)"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))
