"""Image metrics, compared with closed forms."""

import math

import numpy as np
import pytest
import torch

from dq_runtime.evaluation.metrics import frechet_distance, pooled_psnr, psnr, ssim


def random_images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_each_image_and_of_all_follow_the_formula():
    images, reference = random_images(5, 3, 8, 9), random_images(5, 3, 8, 9, seed=1)
    images[1] = 0.9 * reference[1] + 0.1 * images[1]

    squared_error = (images.double() - reference.double()).square().flatten(1).mean(1)
    np.testing.assert_allclose(psnr(images, reference), 10 * np.log10(2.0**2 / squared_error.numpy()), rtol=1e-12)
    expected = 10 * math.log10(2.0**2 / squared_error.mean().item())
    assert pooled_psnr(images, reference) == pytest.approx(expected, rel=1e-12)


def test_psnr_of_a_known_difference():
    reference = torch.zeros(2, 1, 8, 8)

    np.testing.assert_allclose(psnr(reference + 0.5, reference), 20 * math.log10(2 / 0.5), rtol=1e-12)
    assert (psnr(reference + 0.5, reference) == psnr(reference, reference + 0.5)).all()


@pytest.mark.filterwarnings("error")
def test_psnr_of_an_equal_image_is_100_db():
    images, reference = random_images(2, 1, 8, 8), random_images(2, 1, 8, 8)
    images[1] += 0.2

    equal, other = psnr(images, reference)
    assert (equal, other) == (100, pytest.approx(20))
    assert pooled_psnr(images, reference) == pytest.approx(20 + 10 * math.log10(2))


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (2, 3, 16, 7)], ids=str)
def test_ssim_of_equal_images_is_one(shape):
    images = random_images(*shape)

    assert ssim(images, images.clone()) == pytest.approx(1.0, abs=1e-12)


def ssim_by_hand(a, b):
    """The mean over all 7x7 windows of one channel, with sample variances as in scikit-image."""
    values, c1, c2 = [], (0.01 * 2) ** 2, (0.03 * 2) ** 2
    for top in range(a.shape[0] - 6):
        for left in range(a.shape[1] - 6):
            x = a[top : top + 7, left : left + 7].flatten()
            y = b[top : top + 7, left : left + 7].flatten()
            covariance = np.cov(x, y)
            means = 2 * x.mean() * y.mean() + c1, x.mean() ** 2 + y.mean() ** 2 + c1
            spreads = 2 * covariance[0, 1] + c2, covariance[0, 0] + covariance[1, 1] + c2
            values.append(means[0] * spreads[0] / (means[1] * spreads[1]))
    return np.mean(values)


def test_ssim_follows_the_formula_averaged_over_channels_and_images():
    images, reference = random_images(3, 2, 8, 9), random_images(3, 2, 8, 9, seed=1)
    images = 0.7 * reference + 0.3 * images

    expected = np.mean(
        [
            ssim_by_hand(image.double().numpy(), other.double().numpy())
            for image, other in zip(images.flatten(0, 1), reference.flatten(0, 1), strict=True)
        ]
    )
    assert 0.5 < expected < 0.99
    assert ssim(images, reference) == pytest.approx(expected, rel=1e-9)


def test_ssim_of_different_numbers_of_images_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        ssim(random_images(3, 1, 8, 8), random_images(2, 1, 8, 8))


def features_with(mean, standard_deviation, count=64, seed=0):
    """Features with exactly this sample mean and diagonal covariance, from orthogonal columns of zero mean."""
    channels = len(mean)
    noise = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    columns = torch.linalg.qr(noise - noise.mean(0)).Q * math.sqrt(count - 1)
    return columns * torch.tensor(standard_deviation, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))

    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_gaussians_with_diagonal_covariance_has_its_closed_form():
    mean, deviation = [0.0, 1.0, -2.0, 5.0], [1.0, 0.5, 3.0, 0.1]
    other_mean, other_deviation = [1.0, 1.0, 2.0, 5.5], [2.0, 0.5, 0.3, 4.0]

    distance = frechet_distance(features_with(mean, deviation), features_with(other_mean, other_deviation, 90, seed=1))

    expected = sum((a - b) ** 2 for a, b in zip(mean, other_mean, strict=True))
    expected += sum((a - b) ** 2 for a, b in zip(deviation, other_deviation, strict=True))
    assert distance == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_does_not_depend_on_the_axes():
    features, other = features_with([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]), features_with([1.0, 1.0, 0.0], [2.0, 0.5, 1.0])
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q

    expected = (1 + 0 + 4) + (1 + 2.25 + 4)
    assert frechet_distance(features @ rotation, other @ rotation) == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("error")
def test_frechet_distance_accepts_features_that_are_always_zero():
    features = features_with([0.0, 1.0, 2.0, 0.0], [1.0, 2.0, 3.0, 0.0])
    other = features_with([1.0, 1.0, 2.0, 0.0], [1.0, 2.0, 5.0, 0.0])

    assert frechet_distance(features, other) == pytest.approx(1 + 4, rel=1e-6)


def test_half_precision_images_are_measured_in_fp64():
    images, reference = random_images(2, 1, 8, 8).bfloat16(), random_images(2, 1, 8, 8, seed=1).bfloat16()

    assert (psnr(images, reference) == psnr(images.double(), reference.double())).all()
    assert ssim(images, reference) == ssim(images.double(), reference.double())
