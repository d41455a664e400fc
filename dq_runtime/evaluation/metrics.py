"""Image metrics that compare quantized samples with full-precision samples and with real images.

PSNR and SSIM come from scikit-image, which the extra ``evaluation`` installs.
"""

from __future__ import annotations

import numpy as np
import torch

from dq_runtime.validation import floats

PEAK = 2.0  # images lie in [-1, 1]
LARGEST_PSNR = 100.0
SSIM_WINDOW = 7  # pixels


def psnr(images: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    """Peak signal-to-noise ratio of each image, in dB. It is limited to 100, the value of equal images.

    Results usually state the mean over the images. A sampler can draw a different picture from nearly the same noise,
    and one such image in a hundred dominates ``pooled_psnr``.

    Args:
        images, reference: [B, C, H, W] in [-1, 1].

    Returns:
        [B] fp64.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if the images are not finite, or the shapes differ.
    """
    _check_images(images, reference)
    from skimage.metrics import peak_signal_noise_ratio

    pairs = zip(_array(reference), _array(images), strict=True)
    with np.errstate(divide="ignore"):
        values = [peak_signal_noise_ratio(a, b, data_range=PEAK) for a, b in pairs]
    return np.minimum(values, LARGEST_PSNR)


def pooled_psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio, in dB, of the mean squared error over all images (see ``psnr``)."""
    return float(-10 * np.log10(np.mean(10 ** (-psnr(images, reference) / 10))))


def ssim(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity in windows of 7x7 pixels, averaged over the images; 1 for equal images.

    Args:
        images, reference: [B, C, H, W] in [-1, 1], H and W at least 7.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if the images are not finite or too small, or the shapes differ.
    """
    _check_images(images, reference, SSIM_WINDOW)
    from skimage.metrics import structural_similarity

    pairs = zip(_array(reference), _array(images), strict=True)
    return float(np.mean([structural_similarity(a, b, data_range=PEAK, channel_axis=0) for a, b in pairs]))


def frechet_distance(features: torch.Tensor, reference_features: torch.Tensor) -> float:
    """Fréchet distance between two sets of features, each modelled as a Gaussian (as in FID).

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), with means m and covariances C.

    Args:
        features, reference_features: [B, D] and [B', D], B and B' much larger than D.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if the features are not finite or fewer than two, or D differs.
    """
    for name, value in (("features", features), ("reference_features", reference_features)):
        floats(name, value, 2)
        if len(value) < 2 or value.shape[1] != features.shape[1]:
            raise ValueError(
                f"{name} must be [2 or more, {features.shape[1]}], as wide as features, got {list(value.shape)}"
            )
    a, b = _array(features), _array(reference_features)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The product of two covariances has real eigenvalues >= 0; the trace of its root is the sum of theirs.
    eigenvalues = np.linalg.eigvals(covariance_a @ covariance_b).real.clip(min=0)
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariance_a + covariance_b)
    return float(distance - 2 * np.sqrt(eigenvalues).sum())


def _check_images(images: torch.Tensor, reference: torch.Tensor, smallest: int = 1) -> None:
    """Images of equal shapes, whose sides have at least so many pixels."""
    floats("images", images, 4)
    floats("reference", reference, 4)
    if images.shape != reference.shape or min(images.shape[2:]) < smallest:
        raise ValueError(
            f"images and reference must have one shape, with sides of at least {smallest}, got {list(images.shape)} "
            f"and {list(reference.shape)}"
        )


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
