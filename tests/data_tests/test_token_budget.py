"""Batches by a budget of tokens and samples that are too long: what is in them, what is skipped, resuming anywhere."""

import itertools
import json
import warnings

import pytest
from data_cases import assert_same_batches, small_module, take
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvl.data import loader as loaders
from hybridvl.data.task import Source, StreamSource, Task
from hybridvl.layers import ConfigError


class Lengths(Source):
    """Samples whose answers are so many letters long, each of which is a token."""

    def __init__(self, letters):
        self.letters = letters

    def __len__(self):
        return len(self.letters)

    def sample(self, index, epoch):
        answer = " ".join("9" * self.letters[index])
        return {"messages": [{"role": "user", "content": str(index)}, {"role": "assistant", "content": answer}]}


class LengthStream(StreamSource):
    """The same as a stream."""

    def __init__(self, letters):
        self.source, self.place = Lengths(letters), 0

    def rows(self, epoch, state):
        self.place = 0 if state is None else state["place"]
        while self.place < len(self.source):
            self.place += 1
            yield self.place - 1

    def state_dict(self):
        return {"place": self.place}

    def decode(self, row):
        return self.source.sample(row, 0)


class Given(Task):
    def __init__(self, source):
        self.given = source

    def source(self, split, seed):
        return self.given


def module(letters, stream=False, **options):
    source = LengthStream(letters) if stream else Lengths(letters)
    return small_module(Given(source), **{"system": None, "epoch_batches": 1000, **options})


def order_of(letters, stream=False, answers=False, **options):
    """(number, tokens, with `answers` up to the end of the answer) of the samples in the order of training."""
    made = module(letters, stream, **options)
    encoder, order = made._encoder(), made.train_dataloader()._stream.order
    source = Lengths(letters)
    for key in order:
        number = key[1]
        example = encoder(source.sample(number, 0))
        yield number, (example.labels != -100).nonzero()[0][-1] + 1 if answers else len(example)


def samples_of(made, batches):
    """The numbers of the samples in each batch, read from their questions."""
    return [
        [int(text.split("<|im_end|>")[0]) for text in "".join(rows).split("user\n")[1:]]
        for rows in (made.chat.tokenizer.batch_decode(batch["input_ids"]) for batch in batches)
    ]


def greedy(samples, budget, packing):
    """Batches as lists of (number, tokens): each as long as one more sample fits."""
    batch = []
    for sample in samples:
        tokens = [size for _, size in (*batch, sample)]
        cost = sum(tokens) if packing else len(tokens) * max(tokens)
        if batch and cost > budget:
            yield batch
            batch = []
        batch.append(sample)


LETTERS = st.lists(st.integers(1, 25), min_size=3, max_size=12)


@given(LETTERS, st.integers(70, 300), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_batch_is_as_many_samples_as_fit(letters, budget, packing, stream):
    made = module(letters, stream, max_tokens=70, tokens_per_batch=budget, packing=packing, batch_size=1)
    batches = take(made.train_dataloader(), 5)
    expected = list(itertools.islice(greedy(order_of(letters, stream), budget, packing), 5))
    assert samples_of(made, batches) == [[number for number, _ in batch] for batch in expected]
    for batch, samples in zip(batches, expected, strict=True):
        assert batch["input_ids"].numel() <= budget
        sizes = [size for _, size in samples]
        found = batch["cu_seqlens"].diff() if packing else batch["attention_mask"].sum(1)
        assert found.tolist() == sizes


@given(LETTERS, st.integers(20, 60), st.integers(0, 6), st.sampled_from(["rows", "budget", "packed"]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_what_is_too_long_is_skipped_and_resumes_anywhere(letters, context, done, kind, stream):
    options = {"rows": {"batch_size": 3}, "budget": {"tokens_per_batch": 150}, "packed": {"packing": True}}[kind]
    options |= {"max_tokens": context, "too_long": "skip", "shuffle_block": 4}
    fitting = [size <= context for _, size in itertools.islice(order_of(letters, answers=True), len(letters))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not any(fitting) and not stream:
            with pytest.raises(ConfigError, match=f"so it is with {2 * len(letters)} samples in a row, none is left"):
                next(iter(module(letters, stream, **options).train_dataloader()))
        if not any(fitting):
            return
        made = module(letters, stream, **options)
        loader = made.train_dataloader()
        iterator = iter(loader)
        first = [next(iterator) for _ in range(done)]
        state = json.loads(json.dumps(loader.state_dict()))
        rest = [next(iterator) for _ in range(4)]
        # In the order of all samples, with what does not fit left out.
        order = order_of(letters, stream, answers=True, shuffle_block=4)
        numbers = [number for batch in samples_of(made, first + rest) for number in batch]
        read = itertools.islice((sample for sample in order if sample[1] <= context), len(numbers))
        assert numbers == [number for number, _ in read]
        assert made.skipped().get("train", 0) == loader.skipped
        resumed_module = module(letters, stream, **options)
        resumed = resumed_module.train_dataloader()
        resumed.load_state_dict(state)
        assert_same_batches(take(resumed, 4), rest)
        assert resumed.skipped == loader.skipped


def test_skipped_samples_are_counted_and_told_once():
    letters = [3, 40, 3, 50, 3, 3]
    made = module(letters, max_tokens=40, too_long="skip", batch_size=2, workers=1)
    with pytest.warns(UserWarning, match="which does not fit the context data.max_tokens = 40; it is skipped") as told:
        take(made.train_dataloader(), 6)  # twelve samples: three epochs of four
    assert len([warning for warning in told if "it is skipped" in str(warning.message)]) == 1
    assert 4 <= made.skipped()["train"] <= 6
    with pytest.warns(UserWarning, match="^val sample 1: its last answer ends at"):
        passes = [samples_of(made, list(made.val_dataloader())) for _ in range(2)]
    assert passes == [[[0, 2], [4, 5]]] * 2
    assert made.skipped()["val"] == 2
    with pytest.raises(TypeError, match="not known beforehand"):
        len(made.val_dataloader())


def test_without_skipping_it_is_an_error():
    with pytest.raises(ConfigError, match="which does not fit the context"):
        take(module([3, 40, 3], max_tokens=40, tokens_per_batch=100).train_dataloader(), 3)


def test_a_stream_of_nothing_that_fits_ends(monkeypatch):
    monkeypatch.setattr(loaders, "_HOPELESS", 20)
    with (
        pytest.warns(UserWarning, match="it is skipped"),
        pytest.raises(ConfigError, match="so it is with 20 samples in a row"),
    ):
        next(iter(module([40] * 6, stream=True, max_tokens=40, too_long="skip").train_dataloader()))


@pytest.mark.parametrize("options", [{"tokens_per_batch": 300}, {"tokens_per_batch": 300, "packing": True}])
def test_budgets_do_not_depend_on_workers(options):
    def batches(workers):
        return take(small_module(max_tokens=300, workers=workers, **options).train_dataloader(), 6)

    assert_same_batches(batches(2), batches(0))


@given(LETTERS, st.integers(2, 4), st.integers(1, 5), st.booleans())
@settings(max_examples=15, deadline=None)
def test_each_of_several_processes_goes_on_where_it_was(letters, world, done, packing):
    """Processes read different numbers of samples for their budgets."""

    def loader(rank):
        made = module(letters, max_tokens=70, tokens_per_batch=140, packing=packing)
        made._share = lambda: {"rank": rank, "world": world}
        return made.train_dataloader()

    with pytest.MonkeyPatch.context() as patch:
        running = [loader(rank) for rank in range(world)]
        iterators = [iter(one) for one in running]
        for iterator in iterators:
            list(itertools.islice(iterator, done))
        owns = [one._own_state() for one in running]
        patch.setattr(loaders, "gathered", lambda own: owns)
        states = [json.loads(json.dumps(one.state_dict())) for one in running]
        patch.setattr(loaders, "processes", lambda: world)
        for rank, iterator in enumerate(iterators):
            patch.setattr(loaders, "process_rank", lambda rank=rank: rank)
            resumed = loader(rank)
            resumed.load_state_dict(states[0])  # of the first process, as in a checkpoint
            assert_same_batches(take(resumed, 3), [next(iterator) for _ in range(3)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tokens_per_batch": 99, "max_tokens": 100},
            "data.tokens_per_batch: 99; expected at least data.max_tokens = 100",
        ),
        ({"tokens_per_batch": 0}, "data.tokens_per_batch: 0; expected at least 1"),
        ({"too_long": "cut"}, "data.too_long: 'cut'; expected one of error, skip"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        small_module(**options)
    assert str(caught.value).startswith(message)
