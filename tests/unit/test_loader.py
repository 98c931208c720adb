"""The batch of a step is the same for any number of workers, after any restart, at any world size."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from quietvit.contracts import BadSample, Batch
from quietvit.data.crops import MultiCrop
from quietvit.data.decode import UnreadableImage
from quietvit.data.loader import MAX_ATTEMPTS, MultiCropBatches, make_loader
from quietvit.data.quarantine import TooManyUnreadable
from quietvit.data.sampler import SampleOrder


class Noise:
    """Images in memory, some of which cannot be read. Image i is noise whose top left red is i."""

    name = "noise"

    def __init__(self, num_images: int, unreadable: Iterable[int] = ()) -> None:
        self.num_images, self.unreadable = num_images, frozenset(unreadable)
        self.labels: dict[str, np.ndarray] = {}
        self.classes: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return self.num_images

    def load(self, index: int, *, min_side: int | None = None) -> np.ndarray:
        if index in self.unreadable:
            raise UnreadableImage(self.item_name(index), "broken on purpose")
        image = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        image[0, 0] = index
        return image

    def item_name(self, index: int) -> str:
        return f"{index}.jpg"

    def fingerprint(self) -> str:
        return hashlib.sha256(b"noise").hexdigest()


class Corners:
    """Crops that show which image and which random numbers they got."""

    min_side = None

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
        views = [image[:8, :8].copy() for _ in range(2)]
        for view in views:
            view[1, 1] = rng.integers(0, 256, 3)
        return views, [image[:4, :4].copy()]


class Threads(MultiCropBatches):
    """Reports the threads of the process that makes the batch."""

    def __getitem__(self, step: int) -> Batch:
        batch = super().__getitem__(step)
        return dataclasses.replace(batch, indices=torch.tensor([torch.get_num_threads(), cv2.getNumThreads()]))


MULTI_CROP = MultiCrop(global_size=16, local_size=8, num_local=3, blur_kernel=3)


def real(num_images: int = 10, batch_size: int = 4, **changes: object) -> MultiCropBatches:
    options = {"seed": 5, "batch_size": batch_size, "patch_grid": (4, 4)} | changes
    return MultiCropBatches(Noise(num_images, unreadable=[3]), MULTI_CROP, **options)  # type: ignore[arg-type]


def fake(source: Noise, batch_size: int = 4, **changes: object) -> MultiCropBatches:
    options = {"seed": 5, "batch_size": batch_size, "patch_grid": (2, 2)} | changes
    return MultiCropBatches(source, Corners(), **options)  # type: ignore[arg-type]


def assert_equal(a: Batch, b: Batch) -> None:
    for field in dataclasses.fields(Batch):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Tensor):
            assert torch.equal(left, right), field.name
        else:
            assert left == right, field.name


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on two cores
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start_step", [0, 4])
def test_workers_and_restarts_change_nothing(workers: int, start_step: int) -> None:
    batches = real()
    found = list(make_loader(batches, start_step=start_step, total_steps=7, workers=workers))
    assert len(found) == 7 - start_step
    for step, batch in enumerate(found, start_step):
        assert_equal(batch, real()[step])
    assert any(batch.bad for batch in found)  # replacements are part of what must not change


def test_a_batch_is_in_the_order_of_the_sampler() -> None:
    batches, order = fake(Noise(10)), SampleOrder(10, 5)
    for step in (0, 2, 13):  # step 2 runs over the end of the first pass
        batch = batches[step]
        wanted = [order.sample_at(step * 4 + row)[0] for row in range(4)]
        assert batch.indices.tolist() == wanted
        assert batch.num_images == 4
        assert batch.global_crops.shape == (8, 3, 8, 8)
        assert batch.global_crops[:, 0, 0, 0].tolist() == wanted * 2  # crop-major
        assert batch.local_crops[:, 0, 0, 0].tolist() == wanted
        assert batch.bad == ()


def test_augmentation_depends_on_seed_sample_and_pass_only() -> None:
    def draws(batches: MultiCropBatches, steps: Iterable[int]) -> dict[int, list[int]]:
        seen: dict[int, list[int]] = {}
        for step in steps:
            batch = batches[step]
            for row, index in enumerate(batch.indices.tolist()):
                seen[index] = batch.global_crops[row, :, 1, 1].tolist()
        return seen

    one, other = fake(Noise(12), batch_size=4), fake(Noise(12), batch_size=6)
    assert draws(one, range(3)) == draws(other, range(2))
    assert draws(one, range(3)) != draws(one, range(3, 6))
    assert draws(one, range(3)) != draws(fake(Noise(12), seed=6), range(3))


def test_masks_depend_on_seed_and_step_only() -> None:
    assert torch.equal(real()[2].masks, real(num_images=99)[2].masks)
    assert not torch.equal(real()[2].masks, real()[3].masks)
    assert not torch.equal(real()[2].masks, real(seed=6)[2].masks)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(world_size: int) -> None:
    whole = real(batch_size=8)[3]
    parts = [real(batch_size=8, rank=rank, world_size=world_size)[3] for rank in range(world_size)]
    assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
    for name in ("global_crops", "local_crops", "masks"):
        views = len(getattr(whole, name)) // 8
        joined = torch.cat([getattr(part, name).unflatten(0, (views, -1)) for part in parts], dim=1)
        assert torch.equal(joined.flatten(0, 1), getattr(whole, name)), name
    assert sum(len(part.mask_indices) for part in parts) == len(whole.mask_indices)


def test_an_unreadable_image_is_replaced_and_named() -> None:
    source = Noise(10, unreadable=[3, 4])
    sound, broken = fake(Noise(10)), fake(source)
    met: set[str] = set()
    for step in range(5):
        before, after = sound[step], broken[step]
        for row, (index, found) in enumerate(zip(before.indices.tolist(), after.indices.tolist(), strict=True)):
            assert found not in source.unreadable
            assert after.global_crops[row, 0, 0, 0] == found
            # The random numbers stay those of the place, whoever fills it: no crop appears twice.
            assert torch.equal(before.global_crops[row, :, 1, 1], after.global_crops[row, :, 1, 1])
            assert index == found or index in source.unreadable
        num_hit = sum(i in source.unreadable for i in before.indices.tolist())
        assert len(after.bad) >= num_hit
        assert all(bad.reason == "broken on purpose" for bad in after.bad)
        met |= {bad.name for bad in after.bad}
        assert_equal(after, fake(source)[step])
    assert met == {"3.jpg", "4.jpg"}


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_an_end_with_a_reason(workers: int) -> None:
    loader = make_loader(fake(Noise(10, unreadable=range(10))), start_step=0, total_steps=1, workers=workers)
    iterator: Any = iter(loader)
    with pytest.raises(TooManyUnreadable, match=rf"{MAX_ATTEMPTS + 1} images in a row .*\(noise\).*broken on purpose"):
        next(iterator)
    if workers:  # the error's traceback keeps it alive, and left to the garbage collector its end takes 5 seconds
        iterator._shutdown_workers()


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(ValueError, match="has 3 images, fewer than a batch of 4: lower the batch size or add images"):
        fake(Noise(3))
    assert len(fake(Noise(4))[0].indices) == 4


def test_a_batch_that_cannot_be_shared_evenly() -> None:
    with pytest.raises(ValueError, match="a batch of 4 images cannot be shared evenly by 3 processes"):
        fake(Noise(9), world_size=3)


def test_workers_use_one_thread_each() -> None:
    before = (torch.get_num_threads(), cv2.getNumThreads())
    batches = Threads(Noise(10), Corners(), seed=5, batch_size=4, patch_grid=(2, 2))
    (batch,) = make_loader(batches, start_step=0, total_steps=1, workers=1)
    assert batch.indices.tolist() == [1, 1]
    assert (torch.get_num_threads(), cv2.getNumThreads()) == before


def test_bad_samples_survive_the_way_from_a_worker() -> None:
    found = list(make_loader(real(), start_step=0, total_steps=5, workers=1))
    assert {bad for batch in found for bad in batch.bad} == {BadSample("3.jpg", "broken on purpose")}
