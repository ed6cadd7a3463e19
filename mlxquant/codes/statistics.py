"""What calibration says of one input: second moments, means and maxima."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass
class Statistics:
    """Means and maxima over the calibration tokens of one input x of width n.

    ``hessian`` is E[x xᵀ] (n, n), ``mean_magnitude`` E[|x|] and ``largest``
    max |x| (n,), all float32. ``cross`` is E[x̃ xᵀ] between the float model's
    input x̃ and the quantised model's x, where the two were run side by side.
    """

    count: int
    hessian: mx.array
    mean_magnitude: mx.array
    largest: mx.array
    cross: mx.array | None = None

    @classmethod
    def empty(cls, width: int) -> "Statistics":
        return cls(0, mx.zeros((width, width)), mx.zeros(width), mx.zeros(width))

    @classmethod
    def flat(cls, width: int) -> "Statistics":
        """Statistics of an input of which nothing is known: all channels alike and independent."""
        return cls(0, mx.eye(width), mx.ones(width), mx.ones(width))

    def sound(self) -> "Statistics":
        """These statistics with H scaled to a mean diagonal of 1, so that no method divides by
        nearly zero; for an input that is always zero, those of ``flat``."""
        mean = self.hessian.diagonal().mean().item()
        if not mean > 0:
            return Statistics.flat(len(self.largest))
        return Statistics(self.count, self.hessian / mean, self.mean_magnitude, self.largest,
                          None if self.cross is None else self.cross / mean)

    def add(self, x: mx.array, target: mx.array | None = None) -> None:
        """Add a batch of inputs ``x`` (…, n); ``target`` is the float model's input there."""
        x = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        if not len(x):
            return
        self.count += len(x)
        share = len(x) / self.count
        magnitude = mx.abs(x)
        # Fused products: at a width of 14336 each n × n temporary takes 0.8 GB.
        self.hessian = mx.addmm(self.hessian, x.T, x, alpha=1 / self.count, beta=1 - share)
        self.mean_magnitude += share * (magnitude.mean(0) - self.mean_magnitude)
        self.largest = mx.maximum(self.largest, magnitude.max(0))
        if target is not None:
            target = target.reshape(-1, x.shape[-1]).astype(mx.float32)
            cross = mx.zeros_like(self.hessian) if self.cross is None else self.cross
            self.cross = mx.addmm(cross, target.T, x, alpha=1 / self.count, beta=1 - share)

    def arrays(self) -> list[mx.array]:
        sums = (self.hessian, self.mean_magnitude, self.largest, self.cross)
        return [a for a in sums if a is not None]
