"""TensorFlow 1's bilinear resize: values by hand, and a whole factor."""

from __future__ import annotations

import torch

from dexport.validate.features.resize import resize_tf1


def test_first_corners_coincide_and_the_last_pixel_repeats() -> None:
    row = torch.tensor([0.0, 10.0, 40.0])
    resized = resize_tf1(row.expand(1, 1, 3, 3), 6)
    assert torch.equal(resized[0, 0, 0], torch.tensor([0.0, 5.0, 10.0, 25.0, 40.0, 40.0]))
    assert torch.equal(resized, resized[:, :, :1].expand_as(resized))


def test_rows_and_columns_are_treated_alike() -> None:
    images = torch.rand(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    turned = resize_tf1(images.transpose(2, 3), 11).transpose(2, 3)
    torch.testing.assert_close(resize_tf1(images, 11), turned)


def test_shrinking_by_a_whole_factor_picks_pixels() -> None:
    images = torch.rand(1, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_tf1(images, 4), images[:, :, ::3, ::2])
