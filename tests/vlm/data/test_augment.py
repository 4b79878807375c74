import pytest
import torch
from torch.testing import assert_close

from vlm.data.augment import AugmentConfig, augment_images, draw_uniform


def images(batch: int = 3, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)


def draws(batch: int = 3, step: int = 0) -> torch.Tensor:
    return draw_uniform(seed=0, step=step, global_batch=batch)


def test_the_default_changes_nothing_at_equal_size() -> None:
    before = images()
    after = augment_images(before, draws(), AugmentConfig(), size=16)
    assert_close(after, before.float(), atol=2e-2, rtol=0)


def test_a_certain_flip_mirrors_every_image() -> None:
    before = images()
    after = augment_images(before, draws(), AugmentConfig(flip_probability=1.0), size=16)
    assert_close(after, before.flip(-1).float(), atol=2e-2, rtol=0)


def test_certain_gray_leaves_three_equal_channels_of_the_same_luma() -> None:
    before = images()
    after = augment_images(before, draws(), AugmentConfig(gray_probability=1.0), size=16)
    luma = torch.tensor([0.299, 0.587, 0.114])
    expected = torch.einsum("c,bchw->bhw", luma, before.float())
    # The YIQ constants are given to three places.
    assert_close(after, expected[:, None].expand(-1, 3, -1, -1), atol=0.6, rtol=0)


def test_hue_turns_colours_and_keeps_grays() -> None:
    gray = torch.full((1, 3, 8, 8), 90, dtype=torch.uint8)
    red = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 200
    config = AugmentConfig(hue_degrees=180)
    assert_close(augment_images(gray, draws(1), config, size=8), gray.float(), atol=0.2, rtol=0)
    assert (augment_images(red, draws(1), config, size=8) - red.float()).abs().max() > 20


def test_shrinking_surrounds_the_image_with_the_fill() -> None:
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    config = AugmentConfig(min_scale=1.0, max_scale=2.0, fill=200)
    wide = torch.ones_like(draws(1))
    after = augment_images(black, wide, config, size=16)
    assert_close(after[0, :, 0, 0], torch.full((3,), 200.0), atol=0.1, rtol=0)
    assert_close(after[0, :, 8, 8], torch.zeros(3), atol=0.1, rtol=0)


def test_results_stay_gray_levels_whatever_is_drawn() -> None:
    config = AugmentConfig(brightness=1, contrast=0.9, saturation=1, hue_degrees=180, shear=0.5)
    after = augment_images(images(64), draws(64), config, size=12)
    assert after.shape == (64, 3, 12, 12)
    assert 0 <= float(after.min()) <= float(after.max()) <= 255


def test_ranks_see_the_rows_of_the_global_draw() -> None:
    config = AugmentConfig(min_scale=0.5, rotation_degrees=30, contrast=0.3)
    batch = images(6)
    whole = augment_images(batch, draws(6), config, size=12)
    parts = [
        augment_images(batch[i : i + 2], draws(6)[i : i + 2], config, size=12) for i in (0, 2, 4)
    ]
    assert_close(torch.cat(parts), whole)


def test_draws_depend_on_the_step_alone() -> None:
    assert_close(draws(step=5), draws(step=5))
    assert not torch.equal(draws(step=5), draws(step=6))


def test_an_impossible_range_is_refused() -> None:
    with pytest.raises(ValueError, match="min_scale"):
        AugmentConfig(min_scale=0)
