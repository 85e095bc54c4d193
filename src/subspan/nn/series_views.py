"""Views of a series that no choice of an augmentation goes into: its spectrum and its Morlet scalogram."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.geometry import response_bounds

# Below this share of a series' largest amplitude a phase is that of rounding.
_NO_PHASE = 1e-6
# PyWavelets cuts its Morlet off here, in units of the scale.
_CUT = 8
# So many scales from its centre a wavelet is below 1e-5 of its height.
_REACH = 3.5
# Lengths of transforms are multiples of this, so that the usual strides divide them.
_MULTIPLE = 8
# Up to this length a product with the matrix of the transform is several times as fast as the frequency domain.
_MATRIX_LENGTH = 256
# Scales whose circle is as long as the largest of them needs.
_TOGETHER = 8
# Copies of the spectrum on either side that are folded back by sampling; the next ones are below 1e-20.
_FOLDS = 3


class FrameView(nn.Module):
    """Base of views: what a batch of series (b, c, l) looks like in an orthonormal basis or in a frame.

    A view of one's own (cosines, short-time spectra, Haar) subclasses it, says in `dims` how many axes there are behind
    the channels, and gives (b, k, c, f) for one or (b, c, s, t) for two.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import FrameView
    >>> class Differences(FrameView):
    ...     def forward(self, x):
    ...         return x.diff(dim=-1).unsqueeze(1)
    >>> Differences()(torch.randn(2, 3, 16)).shape
    torch.Size([2, 1, 3, 15])
    """

    dims: int = 1

    def __init__(self) -> None:
        super().__init__()

    def frame_bounds(self, length: int) -> tuple[float, float]:
        """The largest A and the least B with A |x|^2 <= |view of x|^2 <= B |x|^2, before anything is dropped of it."""
        raise NotImplementedError(f"{type(self).__name__} states no frame bounds")


class FourierView(FrameView):
    """Amplitudes and phases of the orthonormal discrete Fourier transform: (b, c, l) → (b, 2, c, l // 2 + 1).

    It is computed in single precision at least. Where a series has no amplitude its phase is 0, and not that of
    rounding errors.

    Parameters
    ----------
    phase
        "angle" in (-pi, pi]; "parts" gives real and imaginary part, cosine and sine weighted by the amplitude, in its
        place: (b, 3, c, l // 2 + 1), without the jump at pi.

    Raises
    ------
    ValueError
        For another word, and in use for what is not (b, c, l).

    References
    ----------
    Demirel & Holz (2025), arXiv 2510.22655; the parts are ours.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import FourierView
    >>> view, x = FourierView(), torch.randn(2, 3, 31)
    >>> seen = view(x)
    >>> seen.shape, bool(torch.allclose(view.inverse(seen, 31), x, atol=1e-5)), view.frame_bounds(31)
    (torch.Size([2, 2, 3, 16]), True, (1.0, 1.0))
    """

    def __init__(self, phase: Literal["angle", "parts"] = "angle") -> None:
        super().__init__()
        if phase not in ("angle", "parts"):
            raise ValueError(f"phase: expected 'angle' or 'parts', got {phase!r}")
        self.phase = phase

    def coefficients(self, x: Float[Tensor, "*b l"]) -> Complex[Tensor, "*b f"]:
        """Those of frequencies 0 to a half; of a real series the others are their conjugates."""
        return torch.fft.rfft(_wide(x), norm="ortho")

    def forward(self, x: Float[Tensor, "b c l"]) -> Float[Tensor, "b k c f"]:
        """Amplitude, then phase."""
        found = self.coefficients(_series(x))
        amplitude = found.abs()
        if self.phase == "parts":
            return torch.stack([amplitude, found.real, found.imag], 1).to(x.dtype)
        silent = amplitude <= _NO_PHASE * amplitude.amax(-1, keepdim=True)
        return torch.stack([amplitude, found.angle().masked_fill(silent, 0)], 1).to(x.dtype)

    def inverse(self, view: Float[Tensor, "b k c f"], length: int) -> Float[Tensor, "b c l"]:
        """The series of `length` that a view is of."""
        wide = _wide(view)
        if self.phase == "parts":
            found = torch.complex(wide[:, 1].contiguous(), wide[:, 2].contiguous())
        else:
            found = torch.polar(wide[:, 0].contiguous(), wide[:, 1].contiguous())
        return torch.fft.irfft(found, n=length, norm="ortho").to(view.dtype)

    def frame_bounds(self, length: int) -> tuple[float, float]:
        """1 and 1: an orthonormal basis, once amplitudes between frequency 0 and a half count twice."""
        return 1.0, 1.0

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"phase={self.phase!r}"


class MorletView(FrameView):
    """Scalogram by complex Morlet wavelets: (b, c, l) → (b, c, scales, ceil(l / time_stride)).

    At scale s the wavelet is exp(-(t/s)^2 / B) exp(2 pi i C t/s) / sqrt(pi B), centred at C / s cycles a sample. All
    series, channels and scales are multiplied in the frequency domain at once, in single precision at least.

    Parameters
    ----------
    n_scales, scales
        So many, from the first to the last in equal ratios. The last is at most half the length of what comes in; a
        warning says so, once for each length.
    bandwidth, center
        B and C; with 1 and 1 it is PyWavelets' "cmor1-1".
    norm
        "l1" divides by s: a tone of frequency f then has its ridge at s = C / f, and over the frequencies that the
        scales cover the frame is tight. "l2" divides by sqrt(s), as PyWavelets does and the authors' code with it: low
        frequencies weigh more, and bounds are as far apart as the scales.
    magnitude
        False gives complex coefficients.
    time_stride
        Keep every so many-th place.
    boundary
        "zero": nothing outside the series; "periodic": the series repeats, and coefficients are those of the frame that
        `frame_bounds` is of.
    sampling
        "band": the wavelet's spectrum up to half a cycle a sample; "pywavelets": its means over unit cells on the grid
        of that library, whose values they are. Below scale 4 they differ: a sampled wavelet has copies there.

    Raises
    ------
    ValueError
        For sizes that are not positive and words that there are not; in use for what is not (b, c, l).

    References
    ----------
    Demirel & Holz (2025), arXiv 2510.22655: 48 scales from 1 to 128. Norms, bounds and clipping are ours.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import MorletView
    >>> view = MorletView(24, (1, 32), time_stride=4)
    >>> tone = torch.cos(2 * torch.pi * 0.1 * torch.arange(128.0))
    >>> seen = view(tone.expand(1, 1, -1))
    >>> seen.shape, round(float(view.scales_of(128)[seen[0, 0, :, 16].argmax()]), 1)
    (torch.Size([1, 1, 24, 32]), 9.6)
    >>> lower, upper = view.frame_bounds(128)
    >>> round(upper / lower, 2)
    1.0
    """

    dims = 2

    def __init__(
        self,
        n_scales: int = 48,
        scales: tuple[float, float] = (1.0, 128.0),
        *,
        bandwidth: float = 1.0,
        center: float = 1.0,
        norm: Literal["l1", "l2"] = "l1",
        magnitude: bool = True,
        time_stride: int = 1,
        boundary: Literal["zero", "periodic"] = "zero",
        sampling: Literal["band", "pywavelets"] = "band",
    ) -> None:
        super().__init__()
        words = {"norm": (norm, ("l1", "l2")), "boundary": (boundary, ("zero", "periodic"))}
        words["sampling"] = (sampling, ("band", "pywavelets"))
        for name, (word, known) in words.items():
            if word not in known:
                raise ValueError(f"{name}: expected {known[0]!r} or {known[1]!r}, got {word!r}")
        if n_scales < 1 or time_stride < 1:
            raise ValueError(f"n_scales, time_stride: at least 1, got {n_scales} and {time_stride}")
        if len(scales) != 2 or not 0 < scales[0] <= scales[1] < math.inf:
            raise ValueError(f"scales: expected the least and the largest, positive, got {scales}")
        if not 0 < bandwidth < math.inf or not 0 < center < math.inf:
            raise ValueError(f"bandwidth, center: must be positive, got {bandwidth} and {center}")
        self.n_scales, self.scales, self.time_stride = n_scales, (float(scales[0]), float(scales[1])), time_stride
        self.bandwidth, self.center, self.norm = bandwidth, center, norm
        self.magnitude, self.boundary, self.sampling = magnitude, boundary, sampling
        self._warned: set[int] = set()
        self._matrices: dict[tuple[int, str, str], Tensor] = {}

    def scales_of(self, length: int) -> Float[Tensor, " s"]:
        """The scales of a series of this length, in double precision."""
        least, most = self.scales
        if most > length / 2:
            if length not in self._warned:
                warnings.warn(
                    f"scales: {least:g} to {most:g} were asked for; of series of {length} samples they end at "
                    f"{length / 2:g}",
                    stacklevel=3,
                )
                self._warned.add(length)
            least, most = min(least, length / 2), length / 2
        return torch.logspace(math.log10(least), math.log10(most), self.n_scales, dtype=torch.float64)

    def responses(self, length: int, scales: Float[Tensor, " s"]) -> Complex[Tensor, "s n"]:
        """What each wavelet makes of each frequency of a circle of `length` samples."""
        frequency = torch.fft.fftfreq(length, dtype=torch.float64)
        s = scales[:, None]
        size = torch.ones_like(s) if self.norm == "l1" else s.sqrt()
        if self.sampling == "band":
            found = self._spectrum(s * frequency.where(frequency > -0.5, 0.5))
            if length % 2 == 0:
                # Half a cycle a sample is both ends of the band: half of its energy is in each.
                found[:, length // 2] /= math.sqrt(2)
            return (size * found).to(torch.complex128)
        # Means over cells are a multiplication by sinc, and sampling folds the spectrum. The grid of cells starts 8
        # scales before the wavelet's centre, and its middle is taken to the next sample: a shift below one.
        shift = ((2 * _CUT * s + 1e-9).floor() - 1).div(2).ceil() + 0.5 - _CUT * s
        found = torch.zeros(len(scales), length, dtype=torch.complex128)
        for fold in range(-_FOLDS, _FOLDS + 1):
            folded = frequency + fold
            turned = torch.polar(torch.ones_like(s * folded), 2 * torch.pi * folded * shift)
            found += self._spectrum(s * folded) * torch.sinc(folded) * turned
        return size * found

    def _spectrum(self, cycles: Tensor) -> Tensor:
        """The Fourier transform of the wavelet of scale 1."""
        return (-(math.pi**2) * self.bandwidth * (cycles - self.center).square()).exp()

    def forward(self, x: Float[Tensor, "b c l"]) -> Tensor:
        """Coefficients' magnitudes, or coefficients."""
        wide = _wide(_series(x))
        with torch.autocast(x.device.type, enabled=False):
            parts = iter([self._multiplied(wide)]) if x.shape[-1] <= _MATRIX_LENGTH else self._parts(wide)
            found = torch.cat([part.abs() if self.magnitude else part for part in parts], -2)
        return found.to(x.dtype) if self.magnitude else found

    def _multiplied(self, x: Float[Tensor, "*b l"]) -> Complex[Tensor, "*b s t"]:
        """Coefficients by the matrix of the transform."""
        key = (x.shape[-1], str(x.dtype), str(x.device))
        if key not in self._matrices:
            with torch.inference_mode(False), torch.no_grad():
                self._matrices[key] = self._transform(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
        matrix = self._matrices[key]
        both = x @ torch.view_as_real(matrix).flatten(1)
        return torch.view_as_complex(both.unflatten(-1, (*matrix.shape[1:], 2)))

    def _transform(self, x: Float[Tensor, "*b l"]) -> Complex[Tensor, "*b s t"]:
        """Coefficients of all scales."""
        return torch.cat(list(self._parts(x)), -2)

    def _parts(self, x: Float[Tensor, "*b l"]) -> Iterator[Tensor]:
        """Coefficients (…, s, t) of some scales after the others, by the frequency domain."""
        length, stride = x.shape[-1], self.time_stride
        for scales in self.scales_of(length).split(_TOGETHER):
            reach = math.ceil(_REACH * math.sqrt(self.bandwidth) * float(scales[-1]))
            circle = length if self.boundary == "periodic" else _fast_length(length + reach)
            spectrum = torch.fft.fft(F.pad(x, (0, circle - length)))
            response = self.responses(circle, scales).conj().to(device=x.device, dtype=spectrum.dtype)
            product = spectrum.unsqueeze(-2) * response
            if circle % stride:
                found = torch.fft.ifft(product)[..., ::stride]
            else:
                # Every stride-th place of a transform is the transform of its folded spectrum.
                found = torch.fft.ifft(product.unflatten(-1, (stride, -1)).mean(-2) if stride > 1 else product)
            yield found[..., : math.ceil(length / stride)]

    def frame_bounds(self, length: int, band: tuple[float, float] | None = None) -> tuple[float, float]:
        """Bounds for real series of `length` samples that repeat and have frequencies of a band only.

        Of complex coefficients at all places. band: least and largest frequency, in cycles a sample; None: from two
        centres of the largest scale, below which there is no scale on one side, to a half.
        """
        scales = self.scales_of(length)
        low, high = band if band is not None else (2 * self.center / float(scales[-1]), 0.5)
        frequency = torch.fft.fftfreq(length, dtype=torch.float64).abs()
        # A tolerance, as 0.1 is no sum of powers of a half.
        inside = (frequency >= low - 1e-12) & (frequency <= high + 1e-12)
        if not 0 <= low <= high or not bool(inside.any()):
            raise ValueError(f"band: holds no frequency of a series of {length} samples, got {low:g} to {high:g}")
        response = self.responses(length, scales)
        # A real series has as much of each frequency as of its negative one.
        mirrored = torch.cat([response, response.roll(-1, 1).flip(1)]) / math.sqrt(2)
        lower, upper = response_bounds(mirrored[:, inside])
        return float(lower), float(upper)

    def extra_repr(self) -> str:
        """Shown by print."""
        least, most = self.scales
        return f"{self.n_scales} scales {least:g} to {most:g}, norm={self.norm!r}, time_stride={self.time_stride}"


def _series(x: Tensor) -> Tensor:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected real series (b, c, l), got {x.dtype} of shape {tuple(x.shape)}")
    return x


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fast_length(least: int) -> int:
    """The next multiple of 8 without a prime factor above 5."""
    length = math.ceil(least / _MULTIPLE)
    while any(prime > 5 for prime in _prime_factors(length)):
        length += 1
    return length * _MULTIPLE


def _prime_factors(n: int) -> list[int]:
    found, prime = [], 2
    while prime * prime <= n:
        while n % prime == 0:
            found.append(prime)
            n //= prime
        prime += 1
    return [*found, n]
