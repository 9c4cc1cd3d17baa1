"""What one request, and all of them, may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of the page.

    Attributes:
        waiting: requests that may wait while one is drawn.
        images: of one batch.
        cfg, temperature: ranges.
        body_seconds: until the whole request must have come.
        connections: open at once.
    """

    waiting: int = 32
    images: int = 64
    cfg: tuple[float, float] = (0.0, 20.0)
    temperature: tuple[float, float] = (0.05, 10.0)
    body_seconds: float = 30.0
    connections: int = 256

    def __post_init__(self) -> None:
        for name in ("waiting", "images", "connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @staticmethod
    def picture_bytes(side: int) -> int:
        """Of a PNG of `side` pixels: 4 bytes a pixel if nothing is compressed, and its frame."""
        return 4 * side * side + side + 65536

    def body_bytes(self, side: int) -> int:
        """Of a request: a picture and a mask in base64, and the numbers."""
        return 2 * (4 * self.picture_bytes(side) // 3) + 16384
