"""The loader's contract: sample i is a pure function of (seed, i), and nothing is lost or seen twice in an epoch."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data import split
from weft.data.blend import BLOCK, Blend
from weft.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from weft.data.loader import IGNORED, Batch, Loader
from weft.data.order import Permutation, key, shuffle

VOCAB = 60000


def corpus(prefix: Path, lengths: list[int], first: int = 0) -> str:
    """Documents of the given lengths; every token of the corpus is another number, so that each can be followed."""
    with IndexedWriter(prefix, token_dtype(VOCAB)) as writer:
        for length in lengths:
            writer.add(np.arange(first, first + length))
            first += length
    return str(prefix)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    lengths = np.random.default_rng(0).integers(0, 40, 300).tolist()
    return corpus(tmp_path_factory.mktemp("d") / "x", lengths)


def loader(path: str, **changed: object) -> Loader:
    options = {"seq": 16, "global_batch": 8, "seed": 3, "vocab": VOCAB} | changed
    return Loader.open([path], **options)  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, n), getattr(b, n)) for n in ("tokens", "targets", "positions", "documents", "samples")]
    return all(x is y is None or np.array_equal(x, y) for x, y in pairs)


# --- order ---------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_one(n: int, seed: int) -> None:
    for order in (Permutation(n, seed)(np.arange(n)), shuffle(n, seed)):
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(n))


def test_a_permutation_is_well_shuffled_and_never_changes() -> None:
    # every thing in every place about equally often: chi-square of 10x10 cells over 1,000 keys, 81 degrees of freedom
    counts = np.zeros((10, 10))
    for k in range(1000):
        counts[np.arange(10), Permutation(10, key("test", k))(np.arange(10))] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 150
    steps = np.diff(Permutation(10**6, 7)(np.arange(10**4)))
    assert abs(np.mean(steps > 0) - 0.5) < 0.02
    # no new version, of numpy or of weft, may change the order of a run
    assert Permutation(10, 1)(np.arange(10)).tolist() == [5, 4, 9, 6, 3, 1, 0, 7, 2, 8]
    assert shuffle(10, 1).tolist() == [9, 0, 5, 4, 8, 1, 2, 6, 7, 3]
    ends = Permutation(10**12, 1)(np.array([0, 1, 10**12 - 1]))
    assert ends.tolist() == [588289212942, 627976155267, 371319176694]


# --- the contract --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
def test_an_epoch_loses_nothing_and_repeats_nothing(path: str, mask: bool) -> None:
    data = loader(path, document_mask=mask)
    tokens = IndexedDataset(path).num_tokens
    epoch = data.samples_per_epoch
    assert epoch == (tokens - 1) // 16
    for e in range(3):
        rows = loader(path, document_mask=False, global_batch=epoch).batch(e * epoch)
        seen = Counter(rows.targets.ravel().tolist())
        assert max(seen.values()) == 1  # no token predicted twice in an epoch
        assert len(seen) == epoch * 16
        assert len(set(rows.tokens.ravel().tolist())) == epoch * 16
    one, two = (loader(path, global_batch=epoch).batch(e * epoch).tokens for e in (0, 1))
    assert not np.array_equal(one, two)
    assert not np.array_equal(np.sort(one, axis=0), np.sort(two, axis=0))  # packed anew, not only shuffled anew


@settings(max_examples=40, deadline=None)
@given(
    position=st.integers(0, 2000), batch=st.integers(1, 12), world=st.integers(1, 5), mask=st.booleans(), data=st.data()
)
def test_samples_do_not_depend_on_layout_or_resume(
    path: str, position: int, batch: int, world: int, mask: bool, data: st.DataObject
) -> None:
    whole = loader(path, global_batch=batch, document_mask=mask).batch(position)
    one_by_one = loader(path, global_batch=1, document_mask=mask)
    for row in range(batch):
        one = one_by_one.batch(position + row)
        assert np.array_equal(one.tokens[0], whole.tokens[row])
        assert np.array_equal(one.targets[0], whole.targets[row])
    edges = sorted(data.draw(st.lists(st.integers(0, batch), min_size=world, max_size=world)))
    resumed = loader(path, global_batch=batch, document_mask=mask)
    ranks = [resumed.batch(position, range(a, b)) for a, b in zip([0, *edges], [*edges, batch], strict=True)]
    names = ["tokens", "targets", "samples"] + ["positions", "documents"] * mask
    joined = {name: np.concatenate([getattr(r, name) for r in ranks]) for name in names}
    assert all(np.array_equal(joined[name], getattr(whole, name)) for name in names)
    assert whole.samples.tolist() == list(range(position, position + batch))
    assert whole.tokens.dtype == whole.targets.dtype == whole.samples.dtype == np.int64


def test_seed_and_state(path: str) -> None:
    data = loader(path)
    assert same(data.batch(40), loader(path).batch(40))
    assert not np.array_equal(data.batch(40).tokens, loader(path, seed=4).batch(40).tokens)
    assert data.state(40) == {"seed": 3, "samples": 40, "global_batch": 8}
    with pytest.raises(ValueError, match=r"rows range\(4, 9\) at position 0 are not rows of a global batch of 8"):
        data.batch(0, range(4, 9))
    with pytest.raises(ValueError, match="at position -1"):
        data.batch(-1)
    assert data.batch(0, range(0)).tokens.shape == (0, 16)


def test_windows_follow_the_text(path: str) -> None:
    """Inputs and targets are one token apart, and every document is read forward from start to end."""
    batch = loader(path, global_batch=50).batch(0)
    assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    data = IndexedDataset(path)
    starts = set(data.document_starts().tolist())
    jumps = batch.targets[batch.targets != batch.tokens + 1]
    assert set(jumps.tolist()) <= starts
    assert batch.positions is None
    assert batch.documents is None


def test_document_mask_against_brute_force(path: str) -> None:
    data = IndexedDataset(path)
    starts = data.document_starts()
    plain, masked = loader(path, global_batch=200).batch(7), loader(path, global_batch=200, document_mask=True).batch(7)
    assert masked.positions is not None
    assert masked.documents is not None
    assert np.array_equal(plain.tokens, masked.tokens)
    for row in range(200):
        place = number = 0
        home = None
        for t in range(16):
            token, target = plain.tokens[row, t], plain.targets[row, t]
            document = int(np.searchsorted(starts, token, side="right"))
            if home is not None and document != home:
                place, number = 0, number + 1
            home = document
            assert (masked.positions[row, t], masked.documents[row, t]) == (place, number)
            place += 1
            crosses = int(np.searchsorted(starts, target, side="right")) != document
            assert masked.targets[row, t] == (IGNORED if crosses else target)


def test_one_document_longer_than_many_rows(tmp_path: Path) -> None:
    data = loader(corpus(tmp_path / "x", [1000]), document_mask=True, global_batch=62)
    batch = data.batch(0)
    assert (batch.targets == batch.tokens + 1).all()
    assert batch.positions is not None
    assert (batch.positions == np.arange(16)).all()
    assert sorted(batch.tokens[:, 0].tolist()) == list(range(0, 62 * 16, 16))


# --- blend ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_a_blend_keeps_proportions_and_uses_each_index_once(weights: list[float], seed: int) -> None:
    blend = Blend(weights, [f"d{k}" for k in range(len(weights))], seed)
    sets, indices = blend.locate(np.arange(2 * BLOCK))
    for d, weight in enumerate(weights):
        counts = [int((sets[k * BLOCK : (k + 1) * BLOCK] == d).sum()) for k in (0, 1)]
        assert counts[0] == counts[1] == blend.quotas[d]
        assert abs(counts[0] - weight / sum(weights) * BLOCK) <= 1
        assert np.array_equal(np.sort(indices[sets == d]), np.arange(sum(counts)))
    some = np.array([5000, 3, 4095, 4096])
    for a, b in zip(blend.locate(some), (sets, indices), strict=True):
        assert np.array_equal(a, b[some])
    assert not np.array_equal(sets[:BLOCK], sets[BLOCK:])


def test_blended_loader(tmp_path: Path) -> None:
    a, b = corpus(tmp_path / "a", [50] * 40), corpus(tmp_path / "b", [30] * 20, first=10000)
    data = Loader.open([a, b + ".bin"], [3, 1], seq=8, global_batch=400, seed=1, vocab=VOCAB)
    batch = data.batch(1000)
    assert (batch.tokens >= 10000).any(axis=1).mean() == pytest.approx(0.25, abs=0.08)
    assert [round(s.share, 3) for s in data.sources] == [0.75, 0.25]
    assert [(s.documents, s.tokens, s.samples_per_epoch) for s in data.sources] == [(40, 2000, 249), (20, 600, 74)]
    one = Loader.open([a, b], [3, 1], seq=8, global_batch=1, seed=1, vocab=VOCAB).batch(1234)
    assert np.array_equal(one.tokens[0], batch.tokens[234])
    by_size = Loader.open([a, b], seq=8, global_batch=400, seed=1, vocab=VOCAB)
    assert by_size.sources[0].share == pytest.approx(249 / 323, abs=1e-3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 data paths"),
        ([1.0, 0.0], r"the weight of .*b is 0.0; it must be above 0"),
        ([1.0, -1.0], "must be above 0"),
        ([1.0, float("nan")], "must be above 0"),
        ([1.0, 1e-6], r"the weight of .*b, 1e-06 of 1, is less than one sample in 4096: raise it"),
    ],
)
def test_wrong_weights(tmp_path: Path, weights: list[float], message: str) -> None:
    paths = [corpus(tmp_path / name, [50]) for name in "ab"]
    with pytest.raises(ValueError, match=message):
        Loader.open(paths, weights, seq=8, global_batch=1, seed=1, vocab=VOCAB)


# --- split ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 5000), numbers=st.tuples(*[st.floats(0, 1000)] * 3).filter(lambda t: sum(t) > 1e-9))
def test_parts_cover_everything_once(n: int, numbers: tuple[float, float, float]) -> None:
    ranges = [split.bounds(n, numbers, part) for part in split.PARTS]
    assert [i for lo, hi in ranges for i in range(lo, hi)] == list(range(n))


def test_split_forms() -> None:
    assert split.parse("969,30,1") == (0.969, 0.03, 0.001)
    assert split.parse("1") == (1, 0, 0)
    assert [split.bounds(1000, (969, 30, 1), part) for part in split.PARTS] == [(0, 969), (969, 999), (999, 1000)]
    for text, message in (("a,b", "not a list of numbers"), ("1,2,3,4", "has 4 numbers"), ("0,0,0", "not all zero")):
        with pytest.raises(ValueError, match=message):
            split.parse(text)
    for numbers in ((1.0, -1.0, 0.0), (1.0,), (float("inf"), 0.0, 0.0)):
        with pytest.raises(ValueError, match="must be three numbers"):
            split.normalise(numbers)
    with pytest.raises(ValueError, match="part 'dev' is none of train, valid, test"):
        split.bounds(9, (1, 0, 0), "dev")


def test_parts_share_no_token(path: str) -> None:
    seen: list[set[int]] = []
    for part in split.PARTS:
        data = loader(path, split=(8, 1, 1), part=part)
        rows = loader(path, split=(8, 1, 1), part=part, global_batch=data.samples_per_epoch).batch(0)
        seen.append(set(rows.tokens.ravel().tolist()) | set(rows.targets.ravel().tolist()))
    assert sum(map(len, seen)) == len(set.union(*seen))


# --- refusals ------------------------------------------------------------------------------------------------------


def test_everything_is_checked_when_it_opens(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the valid part \(split 1, 0, 0\) of .* has no document .*larger share"):
        loader(path, part="valid")
    few = corpus(tmp_path / "few", [8, 8])
    assert loader(few, seq=15).samples_per_epoch == 1
    with pytest.raises(
        ValueError, match=r"has 16 tokens; one sample of seq 16 needs 17\. .* shorten seq, or prepare more"
    ):
        loader(few)
    with pytest.raises(ValueError, match="outside the vocabulary of 12"):
        loader(few, seq=4, vocab=12)
    with pytest.raises(ValueError, match=r"token id \d+ in .* is outside the vocabulary of 12"):
        loader(few, seq=4, vocab=12, check_tokens=False).batch(0)
    with pytest.raises(ValueError, match=r"data.paths is empty"):
        Loader.open([], seq=1, global_batch=1, seed=0, vocab=9)
    for name in ("seq", "global_batch", "vocab"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, not 0"):
            loader(path, **{name: 0})
    with pytest.raises(ValueError, match="does not exist"):
        loader(str(tmp_path / "nowhere"))


def test_fingerprint_says_whether_samples_are_the_same(path: str, tmp_path: Path) -> None:
    base = loader(path).fingerprint()
    assert loader(path, global_batch=3, document_mask=True).fingerprint() == base
    assert len({base, *(loader(path, **c).fingerprint() for c in ({"seq": 8}, {"split": (9, 1, 0)}))}) == 3
    for end in (".bin", ".idx"):
        (tmp_path / f"moved{end}").write_bytes(Path(path + end).read_bytes())
    assert loader(str(tmp_path / "moved")).fingerprint() == base
