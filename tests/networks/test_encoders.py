"""Encoders of single observations, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iql_torchrl import networks


def test_flatten_keeps_the_order_and_makes_floats():
    flat = networks.Flatten((2, 3))(torch.arange(24).reshape(2, 2, 2, 3))
    assert flat.shape == (2, 2, 6)
    assert flat.dtype == torch.float32
    np.testing.assert_array_equal(flat[1, 0].numpy(), np.arange(12, 18))
    assert networks.Flatten(())(torch.tensor([3.0, 4.0])).tolist() == [[3.0], [4.0]]


def test_categories_become_ones_and_zeros():
    out = networks.OneHots((2, 3))(torch.tensor([[1, 0], [0, 2]]))
    assert out.tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]
    square = networks.OneHots((2, 2, 2, 2), (2, 2))(torch.tensor([[[0, 1], [1, 0]]]))
    assert square.tolist() == [[1, 0, 0, 1, 0, 1, 1, 0]]


@pytest.mark.parametrize("kind", ["small", "residual"])
@pytest.mark.parametrize("shape", [(9, 12, 3), (40, 36, 1), (4, 84, 84)])
def test_images_of_bytes_and_of_fractions_give_the_same(kind, shape):
    encoder = networks.ImageEncoder(shape, 6, kind=kind)
    images = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    out = encoder(images)
    assert out.shape == (2, 3, 6)
    assert bool((out.abs() < 1).all())
    torch.testing.assert_close(out, encoder(images / 255))
    torch.testing.assert_close(out[1, 2], encoder(images[1, 2]), rtol=0, atol=1e-5)


def test_layouts_agree():
    last = networks.ImageEncoder((10, 12, 3), 5)
    first = networks.ImageEncoder((3, 10, 12), 5)
    first.load_state_dict(last.state_dict())
    images = torch.randint(0, 256, (4, 10, 12, 3), dtype=torch.uint8)
    torch.testing.assert_close(last(images), first(images.permute(0, 3, 1, 2)))
    assert (last.channels, first.channels) == ("last", "first")


@settings(deadline=None, max_examples=40)
@given(
    pixels=st.integers(1, 5),
    offset=st.tuples(*[st.floats(0, 1, exclude_max=True, width=32)] * 2),
    first=st.booleans(),
)
def test_the_shift_is_a_window_of_the_padded_image(pixels, offset, first):
    shape = (2, 9, 11) if first else (9, 11, 2)
    encoder = networks.ImageEncoder(shape, 4)
    image = torch.randint(0, 256, (1, *shape), dtype=torch.uint8)
    moved = encoder.shifted(image, torch.tensor([offset]), pixels)
    outer = ((0, 0), (pixels, pixels), (pixels, pixels))
    sides = outer if first else (*outer[1:], (0, 0))
    padded = np.pad(image[0].numpy(), sides, mode="edge")
    down, right = (int(np.float32(x) * np.float32(2 * pixels + 1)) for x in offset)
    rows, columns = slice(down, down + 9), slice(right, right + 11)
    window = padded[:, rows, columns] if first else padded[rows, columns]
    np.testing.assert_array_equal(moved[0].numpy(), window)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (84, 84)}, r"shape is \(84, 84\); expected that of one image"),
        ({"shape": (4, 20, 3)}, "at least 8 x 8"),
        ({"shape": (20, 20, 3), "kind": "large"}, "kind is 'large'; choose one of 'small'"),
        ({"shape": (20, 20, 3), "features": 0}, "features is 0; expected a whole number"),
    ],
)
def test_what_makes_no_encoder_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.ImageEncoder(**arguments)


def test_images_of_another_size_are_refused():
    encoder = networks.ImageEncoder((20, 24, 3))
    with pytest.raises(ValueError, match=r"\(5, 24, 20, 3\); expected .* \(20, 24, 3\)"):
        encoder(torch.zeros(5, 24, 20, 3))
