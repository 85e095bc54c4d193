"""Losses on self-expression coefficients: the kernel identity, gradients, zeros, and the padding of the encoders."""

import pytest
import torch
from torch.nn import functional as F

from subspan.nn.autoencoders import ConvAutoencoder, LinearAutoencoder, SameConv2d, SameConvTranspose2d, same_padding
from subspan.nn.self_expression import SelfExpression, SubspaceStructured
from subspan.solvers.self_expression import joint_factor, ridge_self_expression


def layers(n=12, widths=(30, 7, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for width in widths]


def coefficients(n=12, seed=1):
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scaled", [False, True])
def test_all_layers_are_one_kernel(scaled):
    z, c = layers(), coefficients()
    scales = [1 / layer.square().sum() if scaled else torch.tensor(1.0) for layer in z]
    kernel = sum(scale * layer @ layer.mT for scale, layer in zip(scales, z))
    left = torch.eye(12) - c + torch.diag(c.diagonal())
    expected = torch.trace(left @ kernel @ left.mT)
    torch.testing.assert_close(SelfExpression(per_layer_scale=scaled)(c, z), expected)
    factor = joint_factor([layer * scale**0.5 for scale, layer in zip(scales, z)])
    assert factor.shape == (12, 12)
    torch.testing.assert_close(factor @ factor.mT, kernel)
    torch.testing.assert_close(SelfExpression(per_layer_scale=False)(c, [factor]), expected)


def test_the_ridge_on_the_kernel_is_the_minimum_of_the_joint_loss():
    z = layers()
    best = ridge_self_expression(joint_factor(z), 0.3)
    c = best.clone().requires_grad_(True)
    loss = SelfExpression(per_layer_scale=False)(c, z) + 0.3 * c.square().sum()
    (gradient,) = torch.autograd.grad(loss, c)
    off = ~torch.eye(12, dtype=torch.bool)
    assert float(gradient[off].abs().max()) < 1e-9
    worse = SelfExpression(per_layer_scale=False)(1.01 * best, z) + 0.3 * (1.01 * best).square().sum()
    assert float(worse) > float(loss.detach())


def test_gradients_of_the_joint_coefficients_and_of_the_layers():
    z = [layer.requires_grad_(True) for layer in layers(5, (6, 3))]
    loss = SelfExpression()
    assert torch.autograd.gradcheck(lambda c, a, b: loss(c, [a, b]), (coefficients(5).requires_grad_(True), *z))


def test_scale_of_a_layer_does_not_matter():
    z, c = layers(), coefficients()
    torch.testing.assert_close(SelfExpression()(c, z), SelfExpression()(c, [z[0] * 255, *z[1:]]))
    zeros = SelfExpression()(c, [torch.zeros(12, 3, dtype=torch.float64), *z])
    torch.testing.assert_close(zeros, SelfExpression()(c, z))
    with pytest.raises(ValueError, match="expected 12 items"):
        SelfExpression()(c, [z[0][:5]])


def test_images_are_flattened_and_the_diagonal_is_left_out():
    c = coefficients(4)
    images = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(SelfExpression()(c, [images]), SelfExpression()(c, [images.flatten(1)]))
    torch.testing.assert_close(
        SelfExpression()(c, [images]), SelfExpression()(c + torch.diag(torch.ones(4, dtype=torch.float64)), [images])
    )
    free = SelfExpression(zero_diag=False)(torch.eye(4, dtype=torch.float64), [images])
    assert float(free) == 0


def test_structure_is_the_trace_with_the_laplacian():
    c, labels = coefficients(9), torch.arange(9) % 3
    affinity = (c.abs() + c.abs().mT + 1e-8) ** 0.5
    laplacian = torch.diag(affinity.sum(1)) - affinity
    one_hot = F.one_hot(labels).double()
    torch.testing.assert_close(SubspaceStructured()(c, labels), torch.trace(one_hot.mT @ laplacian @ one_hot))


def test_structure_has_finite_gradients_at_zeros_and_none_within_clusters():
    c = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    c[0], c[:, 4] = 0, 0
    c.requires_grad_(True)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    SubspaceStructured()(c, labels).backward()
    assert c.grad is not None
    assert torch.isfinite(c.grad).all()
    within = labels.unsqueeze(1) == labels
    assert (c.grad[within] == 0).all()
    assert (c.grad[~within & (c.detach() != 0)] != 0).all()
    for options in ({"power": 0.0}, {"power": 1.5}, {"epsilon": 0.0}):
        with pytest.raises(ValueError, match="power, epsilon"):
            SubspaceStructured(**options)


# ---------------------------------------------------------------------- encoders


@pytest.mark.parametrize(("size", "kernel", "stride"), [(32, 3, 2), (32, 15, 2), (7, 5, 2), (5, 2, 3), (8, 1, 2)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    # By its rule: ceil(size / stride) windows, the first starting `before` left of the image, the last within `after`.
    positions, before, after = same_padding(size, kernel, stride)
    assert positions == -(-size // stride)
    over = max(kernel - stride, 0) if size % stride == 0 else max(kernel - size % stride, 0)
    assert (before, after) == (over // 2, over - over // 2)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, size, size + 1, generator=generator)
    layer = SameConv2d(3, 4, kernel, stride)
    _, left, right = same_padding(size + 1, kernel, stride)
    naive = F.conv2d(F.pad(image, (left, right, before, after)), layer.weight, layer.bias, stride=stride)
    torch.testing.assert_close(layer(image), naive, rtol=1e-4, atol=1e-5)
    assert layer(image).shape[2:] == (positions, -(-(size + 1) // stride))


@pytest.mark.parametrize(("size", "kernel"), [((32, 32), 3), ((9, 6), 5), ((8, 8), 15), ((5, 7), 2)])
def test_the_decoder_is_the_adjoint_of_the_encoder(size, kernel):
    forward = SameConv2d(3, 4, kernel).double()
    back = SameConvTranspose2d(4, 3, kernel, size).double()
    assert forward.bias is not None
    assert back.bias is not None
    with torch.no_grad():
        back.weight.copy_(forward.weight)
        forward.bias.zero_()
        back.bias.zero_()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    found = forward(image)
    code = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    assert back(code).shape == image.shape
    torch.testing.assert_close((found * code).sum(), (image * back(code)).sum())


def test_auto_encoders_give_their_layers():
    torch.manual_seed(0)
    network = ConvAutoencoder((1, 10, 7), (3, 5), (3, 3))
    found = network.encode(torch.rand(2, 1, 10, 7))
    assert [tuple(layer.shape[1:]) for layer in found] == [(3, 5, 4), (5, 3, 2)]
    assert network.decode(found[-1]).shape == (2, 1, 10, 7)
    assert all(float(layer.detach().min()) >= 0 for layer in found)
    linear = LinearAutoencoder([6, 4, 2])
    assert [layer.shape[1] for layer in linear.encode(torch.rand(3, 6))] == [4, 2]
    assert linear.decode(torch.rand(3, 2)).shape == (3, 6)
    with pytest.raises(ValueError, match="channels, kernels"):
        ConvAutoencoder((1, 8, 8), (3, 5), (3,))
    with pytest.raises(ValueError, match="sizes"):
        LinearAutoencoder([4])
