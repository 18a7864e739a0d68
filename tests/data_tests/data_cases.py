"""What several tests of the data package share: a small data module and comparing batches."""

import torch

from hybridvl.data import ChatDataModule, DigitPages, ImageConfig

SMALL_IMAGES = ImageConfig(patch_size=8, temporal_patch_size=1, mean=(0.8,), std=(0.3,))


def small_module(task=None, **options):
    """A data module over small pages, with 8-pixel patches."""
    task = task or DigitPages(rows=(1, 3), columns=(1, 4), turns=2, train_pages=24, val_pages=10, test_pages=10)
    return ChatDataModule(task, images=SMALL_IMAGES, **{"batch_size": 4, "seed": 5, **options})


def assert_same_batches(left, right):
    """Fail unless two lists of batches hold the same values."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if torch.is_tensor(value):
                assert torch.equal(value, other[name]), name
            else:
                assert value == other[name], name


def take(loader, count):
    """The next batches of one pass."""
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]
