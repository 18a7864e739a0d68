"""Tests of hybridvl.data.order and hybridvl.data.loader: order, workers, packing, exact resume, errors."""

import gc
import itertools
import json
import os

import pytest
import torch
from data_cases import assert_same_batches, small_module, take
from hypothesis import given
from hypothesis import strategies as st

from hybridvl.data.order import NumberOrder, StreamOrder
from hybridvl.data.task import Source, StreamSource, Task
from hybridvl.layers import ConfigError


class Words(Source):
    """Samples whose text says their number and epoch; some of them broken."""

    def __init__(self, size, broken=()):
        self.size, self.broken = size, broken

    def __len__(self):
        return self.size

    def sample(self, index, epoch):
        answer = 3 if index in self.broken else f"{index} in {epoch}"
        return {"messages": [{"role": "user", "content": "which?"}, {"role": "assistant", "content": answer}]}


class CountingStream(StreamSource):
    """A stream of numbers that counts what is read from it."""

    def __init__(self, size):
        self.size, self.place = size, 0

    def rows(self, epoch, state):
        self.place = 0 if state is None else state["place"]
        while self.place < self.size:
            self.place += 1
            yield (epoch, self.place - 1)

    def state_dict(self):
        return {"place": self.place}

    def decode(self, row):
        return Words(self.size).sample(row[1], row[0])


class Given(Task):
    """A task of one given source."""

    def __init__(self, source):
        self.given = source

    def source(self, split, seed):
        return self.given


def answers(module, batches):
    """The answer of every sample in the batches, as text."""
    decoded = []
    for batch in batches:
        for text in module.chat.tokenizer.batch_decode(batch["input_ids"]):
            decoded += [part.split("<|im_end|>")[0] for part in text.split("assistant\n")[1:]]
    return decoded


@given(st.integers(1, 20), st.integers(0, 60), st.integers(1, 3))
def test_numbers_resume_anywhere(size, consumed, world):
    for rank in range(world):
        options = {"seed": 1, "shuffle": True, "endless": True, "rank": rank, "world": world}
        whole = list(itertools.islice(NumberOrder(size, **options), consumed + 10))
        resumed = NumberOrder(size, **options)
        resumed.load_state_dict(NumberOrder(size, **options).state_dict(consumed))
        assert list(itertools.islice(resumed, 10)) == whole[consumed:]


@given(st.integers(1, 20), st.integers(1, 4))
def test_every_sample_once_an_epoch(size, world):
    parts = [list(NumberOrder(size, rank=rank, world=world)) for rank in range(world)]
    assert sorted(number for part in parts for _, number in part) == list(range(size))
    assert [NumberOrder(size, rank=rank, world=world).share for rank in range(world)] == [len(part) for part in parts]
    shuffled = NumberOrder(size, seed=2, shuffle=True, endless=True)
    for epoch in range(3):
        keys = list(itertools.islice(shuffled, epoch * size, (epoch + 1) * size))
        assert sorted(keys) == [(epoch, number) for number in range(size)]


@given(st.integers(1, 17), st.integers(1, 6), st.integers(0, 40), st.integers(0, 8))
def test_streams_resume_anywhere(size, block, consumed, ahead):
    """The state after `consumed` rows is right although the stream was read further ahead."""

    def order():
        return StreamOrder(CountingStream(size), seed=3, block=block, endless=True)

    whole = list(itertools.islice(order(), consumed + 50))
    first = order()
    list(itertools.islice(first, consumed + ahead))
    state = json.loads(json.dumps(first.state_dict(consumed)))
    resumed = order()
    assert resumed.load_state_dict(state) == consumed
    assert list(itertools.islice(resumed, 30)) == whole[consumed : consumed + 30]
    rows = [row for _, row in whole]
    for epoch in range(len(rows) // size):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == [(epoch, number) for number in range(size)]


def test_streams_are_shared_out():
    parts = [[row for _, row in StreamOrder(CountingStream(11), block=2, rank=rank, world=2)] for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == [(0, number) for number in range(11)]


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_tokens": 300}])
def test_batches_do_not_depend_on_workers(options):
    def batches(workers):
        loader = small_module(workers=workers, **options).train_dataloader()
        return list(itertools.islice(itertools.chain(loader, loader), 8))

    expected = batches(0)
    for workers in (1, 2):
        assert_same_batches(batches(workers), expected)


def test_evaluation_is_the_same_in_every_pass_and_without_workers():
    loader = small_module(workers=2).val_dataloader()
    first = list(loader)
    assert len(first) == len(loader) == 3
    assert [len(batch["input_ids"]) for batch in first] == [4, 4, 2]
    assert_same_batches(list(loader), first)
    assert_same_batches(list(small_module().val_dataloader()), first)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"packing": True, "max_tokens": 300, "epoch_batches": 5}])
def test_resume_is_the_next_batch(workers, options):
    """Interrupted after 8 batches, in the second pass over 6 (or 5): the state makes the next ones."""
    loader = small_module(workers=workers, **options).train_dataloader()
    iterator = itertools.chain(loader, loader, loader)
    for _ in range(8):
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [next(iterator) for _ in range(6)]
    resumed = small_module(workers=0, **options).train_dataloader()
    resumed.load_state_dict(state)
    assert_same_batches(list(itertools.islice(itertools.chain(resumed, resumed), 6)), expected)


def test_a_resumed_pass_is_its_remainder():
    loader = small_module().train_dataloader()
    assert len(loader) == 6
    take(loader, 4)
    resumed = small_module().train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert [len(list(resumed)), len(list(resumed))] == [2, 6]


@pytest.mark.parametrize("packing", [False, True])
def test_streams_through_the_loader(packing):
    options = {"shuffle_block": 4, "epoch_batches": 6, "packing": packing, "max_tokens": 128}

    def module(workers):
        return small_module(Given(CountingStream(10)), workers=workers, **options)

    loader = module(2).train_dataloader()
    iterator = iter(loader)
    first = [next(iterator) for _ in range(3)]
    state = loader.state_dict()
    rest = [next(iterator) for _ in range(3)]
    seen = answers(module(0), first + rest)
    assert sorted(seen[:10]) == [f"{number} in 0" for number in range(10)]
    resumed = module(0).train_dataloader()
    resumed.load_state_dict(state)
    assert_same_batches(list(resumed), rest)


def test_packed_rows_are_full_but_never_too_long():
    module = small_module(packing=True, max_tokens=300)
    batches = take(module.train_dataloader(), 10)
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert max(lengths) <= 300
    for batch, following in itertools.pairwise(batches):
        assert batch["input_ids"].shape[1] + int(following["cu_seqlens"][1]) > 300


def test_packing_keeps_the_samples_in_order():
    padded = take(small_module(Given(Words(12))).train_dataloader(), 3)
    packed_module = small_module(Given(Words(12)), packing=True, max_tokens=150)
    packed = take(packed_module.train_dataloader(), 5)
    text = answers(packed_module, packed)
    assert text[:12] == answers(packed_module, padded)
    assert sorted(text[:12]) == sorted(f"{number} in 0" for number in range(12))


def test_the_same_first_samples_in_every_epoch():
    module = small_module(train_samples=4)
    loader = module.train_dataloader()
    assert len(loader) == 1
    (first,), (second,) = list(loader), list(loader)

    def rows(batch):
        return sorted(map(tuple, batch["input_ids"].tolist()))

    assert rows(first) == rows(second)


def test_loading_does_not_touch_the_global_random_state():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    take(small_module(workers=1).train_dataloader(), 2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_errors_in_workers_are_shown_as_they_are(workers, packing):
    module = small_module(Given(Words(8, broken=[5])), workers=workers, packing=packing)
    with pytest.raises(ConfigError) as caught:
        list(module.train_dataloader())
    assert str(caught.value) == "train sample 5[1].content: int; expected text or a list of parts"


class Collecting(Words):
    """Words whose reader has freed what nobody holds any more."""

    def sample(self, index, epoch):
        gc.collect()
        return super().sample(index, epoch)


class Cycle:
    """Writes down in which process it is freed."""

    def __init__(self, path):
        self.path, self.itself = path, self

    def __del__(self):
        with self.path.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_workers_free_nothing_that_their_parent_left(tmp_path):
    """It may wait for threads, which no fork has: a worker would wait for ever, and so would everybody else."""
    freed = tmp_path / "freed"
    gc.disable()
    try:
        Cycle(freed)
        take(small_module(Given(Collecting(8)), workers=2).train_dataloader(), 2)
        assert not freed.exists()
        gc.collect()
    finally:
        gc.enable()
    assert freed.read_text() == f"{os.getpid()}\n"


def test_an_empty_stream_is_refused():
    with pytest.raises(ConfigError, match="the stream is empty"):
        list(small_module(Given(CountingStream(0))).train_dataloader())
    with pytest.raises(ConfigError, match="the stream is empty"):
        list(small_module(Given(CountingStream(0))).val_dataloader())
