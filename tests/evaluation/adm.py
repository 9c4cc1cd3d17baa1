"""What ADM's evaluator and torch-fidelity compute, by brute force in NumPy from their definitions."""

from __future__ import annotations

import numpy as np
from scipy import linalg


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """ADM: unbiased covariances, sqrtm of their product."""
    (mu_a, cov_a), (mu_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = linalg.sqrtm(cov_a @ cov_b)
    root = root[0] if isinstance(root, tuple) else root
    return float((mu_a - mu_b) @ (mu_a - mu_b) + np.trace(cov_a + cov_b - 2 * root.real))


def frechet_by_eigenvalues(a: np.ndarray, b: np.ndarray) -> float:
    """torch-fidelity: the root's trace from eigenvalues of the product."""
    (mu_a, cov_a), (mu_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return float((mu_a - mu_b) @ (mu_a - mu_b) + np.trace(cov_a) + np.trace(cov_b) - 2 * trace)


def inception_score(logits: np.ndarray, chunk: int = 5000) -> float:
    """ADM: chunks in file order, softmax, KL to the chunk's mean."""
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(0, len(p), chunk):
        part = p[i : i + chunk]
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(kl.sum(1).mean()))
    return float(np.mean(scores))


def squared(u: np.ndarray, v: np.ndarray, half: bool) -> np.ndarray:
    """All squared distances, rounded to float16 after every step, or float32 throughout where one is not finite."""

    def by(dtype: type) -> np.ndarray:
        a, b = u.astype(dtype), v.astype(dtype)
        norm_a, norm_b = ((x * x).astype(np.float32).sum(1).astype(dtype) for x in (a, b))
        product = (a.astype(np.float32) @ b.astype(np.float32).T).astype(dtype)
        return np.maximum((norm_a[:, None] - dtype(2) * product) + norm_b, dtype(0)).astype(np.float32)

    with np.errstate(over="ignore", invalid="ignore"):
        found = by(np.float16) if half else by(np.float32)
    return found if np.isfinite(found).all() else by(np.float32)


def blocks(u: np.ndarray, v: np.ndarray, half: bool, block: int) -> np.ndarray:
    """The same, block by block."""
    rows = [
        np.concatenate(
            [squared(u[i : i + block], v[j : j + block], half) for j in range(0, len(v), block)], 1
        )
        for i in range(0, len(u), block)
    ]
    return np.concatenate(rows)


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, *, half: bool, block: int = 10_000
) -> tuple[float, float]:
    """k = 3: radii are the fourth smallest squared distance, itself among them."""
    radii = [np.sort(blocks(x, x, half, block), 1)[:, 3] for x in (samples, reference)]
    between = blocks(reference, samples, half, block)
    precision = (between <= radii[1][:, None]).any(0).mean()
    recall = (between <= radii[0][None]).any(1).mean()
    return float(precision), float(recall)


def kernel_distance(x: np.ndarray, y: np.ndarray, subsets: int, size: int) -> tuple[float, float]:
    """torch-fidelity: unbiased MMD of random subsets."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    random, found = np.random.RandomState(2020), []
    for _ in range(subsets):
        a = x[random.choice(len(x), size, replace=False)]
        b = y[random.choice(len(y), size, replace=False)]
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (kernel(a, a), kernel(b, b)))
        found.append(within - 2 * kernel(a, b).mean())
    return float(np.mean(found)), float(np.std(found))
