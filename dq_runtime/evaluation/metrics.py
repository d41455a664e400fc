"""Image metrics: how far quantized samples are from full-precision ones, and from real images.

PSNR and SSIM are scikit-image's, which the extra ``evaluation`` installs.
"""

from __future__ import annotations

import numpy as np
import torch


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio, in dB, of the mean squared error over all images.

    Args:
        images, reference: [B, C, H, W] in [-1, 1].
    """
    from skimage.metrics import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(_array(reference), _array(images), data_range=2.0))


def ssim(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity (1 = equal), averaged over the images; windows of 7x7 pixels.

    Args:
        images, reference: [B, C, H, W] in [-1, 1], H and W at least 7.
    """
    from skimage.metrics import structural_similarity

    pairs = zip(_array(reference), _array(images), strict=True)
    return float(np.mean([structural_similarity(a, b, data_range=2.0, channel_axis=0) for a, b in pairs]))


def frechet_distance(features: torch.Tensor, reference_features: torch.Tensor) -> float:
    """Fréchet distance between two sets of features, each taken as a Gaussian (the F in FID).

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), with means m and covariances C.

    Args:
        features, reference_features: [B, D] and [B', D], B and B' well above D.
    """
    a, b = _array(features), _array(reference_features)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The product of two covariances has real eigenvalues >= 0; the trace of its root is the sum of their roots.
    eigenvalues = np.linalg.eigvals(covariance_a @ covariance_b).real.clip(min=0)
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariance_a + covariance_b)
    return float(distance - 2 * np.sqrt(eigenvalues).sum())


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
