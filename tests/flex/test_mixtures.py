"""Splits that are drawn: sizes and shares by hand, the same on every machine, and beside flwr-datasets."""

import hashlib
import math
import random
import statistics
import warnings
from collections import Counter

import pytest

from flex.data.mixtures import deal, dirichlet, draw_dirichlet, iid, pathological, rounded, shuffled
from flex.errors import FlexError

LABELS = [f"label {'abcde'[i % 5]}" for i in range(200)] + ["label a"] * 50  # a: 90, the others 40 each


def rng(seed: int = 0) -> random.Random:
    return random.Random(f"split {seed}")


def counts(labels: list[str], dealt: list[list[int]]) -> list[Counter]:
    return [Counter(labels[i] for i in own) for own in dealt]


def test_iid_is_equal_shares_of_everything():
    dealt = deal(LABELS, iid(LABELS, 7), rng())
    assert sorted(map(len, dealt)) == [35, 35, 36, 36, 36, 36, 36]
    assert sorted(i for own in dealt for i in own) == list(range(250))
    assert all(12 * 0.3 <= own["label a"] <= 12 * 2 for own in counts(LABELS, dealt))


@pytest.mark.parametrize(("clients", "classes"), [(5, 2), (10, 1), (4, 5), (3, 2)])
def test_pathological_clients_have_so_many_labels_and_share_them_evenly(clients, classes):
    dealt = deal(LABELS, pathological(LABELS, clients, classes, rng()), rng(1))
    found = counts(LABELS, dealt)
    assert [len(own) for own in found] == [classes] * clients
    owners = Counter(label for own in found for label in own)
    assert max(owners.values()) - min(owners.values()) <= 1
    for label, number in owners.items():
        have = [own[label] for own in found if label in own]
        assert sum(have) == LABELS.count(label)
        assert max(have) - min(have) <= 1
        assert len(have) == number


def test_more_classes_than_there_are_is_refused():
    with pytest.raises(FlexError, match=r"classes_per_client is 6; expected at most 5"):
        pathological(LABELS, 3, 6, rng())


def test_dirichlet_gives_every_record_to_one_client():
    for alpha in (0.1, 1.0, 100.0):
        dealt = deal(LABELS, dirichlet(LABELS, 6, alpha, 2, False, rng()), rng(1))
        assert sorted(i for own in dealt for i in own) == list(range(250))
        assert min(map(len, dealt)) >= 2


def test_alpha_says_how_far_clients_are_apart():
    """The variance of a share is (1/K)(1 - 1/K) / (K alpha + 1)."""
    for alpha, clients in ((0.3, 5), (2.0, 4)):
        drawn = [draw_dirichlet([alpha] * clients, rng(seed)) for seed in range(3000)]
        first = [shares[0] for shares in drawn]
        assert statistics.fmean(first) == pytest.approx(1 / clients, abs=0.02)
        wanted = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
        assert statistics.pvariance(first) == pytest.approx(wanted, rel=0.1)
        assert all(sum(shares) == pytest.approx(1, abs=1e-8) for shares in drawn)


def test_a_tiny_alpha_gives_all_to_one():
    shares = draw_dirichlet([1e-3] * 4, rng())
    assert all(math.isfinite(share) for share in shares)
    assert max(shares) == pytest.approx(1, abs=1e-6)


def test_with_replacement_clients_are_of_one_size_and_have_no_record_twice():
    mixture = dirichlet(LABELS, 10, 0.2, 25, True, rng())
    dealt = deal(LABELS, mixture, rng(1))
    assert set(map(len, dealt)) == {25}
    assert all(len(set(own)) == 25 for own in dealt)
    assert len({i for own in dealt for i in own}) < 250  # some are had by several
    test = deal(LABELS[:50], mixture, rng(2))  # another part by the same mixture
    for own, of_test in zip(counts(LABELS, dealt), counts(LABELS[:50], test), strict=True):
        assert own.most_common(1)[0][0] == of_test.most_common(1)[0][0] or own.most_common(1)[0][1] < 18


def test_an_alpha_that_leaves_a_client_empty_is_refused():
    with pytest.raises(FlexError, match=r"data\.alpha = 0\.001 leaves a client with no examples in each of 100 draws"):
        dirichlet(LABELS, 30, 1e-3, 1, False, rng())


def test_two_parts_dealt_by_one_mixture_have_its_shares():
    mixture = dirichlet(LABELS, 4, 0.5, 1, False, rng())
    big, small = deal(LABELS, mixture, rng(1)), deal(LABELS[:100], mixture, rng(2))
    for label, shares in mixture.shares.items():
        for client, share in enumerate(shares):
            for labels, dealt in ((LABELS, big), (LABELS[:100], small)):
                assert abs(counts(labels, dealt)[client][label] - share * labels.count(label)) < 1
    assert deal(["never seen"] * 3, mixture, rng(1)) == [[]] * 4


def test_counts_add_up():
    assert rounded(10, [1 / 3, 1 / 3, 1 / 3]) == [4, 3, 3]
    assert rounded(7, [0.5, 0.25, 0.25]) == [3, 2, 2]
    assert rounded(0, [0.5, 0.5]) == [0, 0]
    assert sum(rounded(1000, draw_dirichlet([0.1] * 50, rng()))) == 1000


def test_a_seed_is_one_split_everywhere():
    """The digest was made on Linux, x86-64, Python 3.11; nothing but Python's own twister goes into it."""
    mixture = dirichlet(LABELS, 6, 0.4, 3, False, rng(5))
    dealt = [
        deal(LABELS, mixture, rng(6)),
        deal(LABELS, dirichlet(LABELS, 6, 0.4, 3, True, rng(5)), rng(6)),
        deal(LABELS, pathological(LABELS, 5, 2, rng(5)), rng(6)),
        deal(LABELS, iid(LABELS, 3), rng(6)),
    ]
    assert hashlib.sha256(repr(dealt).encode()).hexdigest()[:16] == "0259db91c6cfdb29"
    assert shuffled(range(6), rng(1)) != list(range(6))
    assert deal(LABELS, mixture, rng(6)) != deal(LABELS, mixture, rng(7))


def test_sizes_and_shares_are_those_of_flwr_datasets():
    """Another implementation draws other numbers; over many draws the spread of sizes and labels is the same."""
    pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")
    from datasets import Dataset
    from flwr_datasets import partitioner as flower

    data = Dataset.from_dict({"label": LABELS})

    def theirs(make) -> list[list[Counter]]:
        found = []
        for seed in range(30):
            partitioner = make(seed)
            partitioner.dataset = data
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it draws again where a client got too little, and says so
                found.append([Counter(partitioner.load_partition(i)["label"]) for i in range(5)])
        return found

    def spread(splits: list[list[Counter]]) -> tuple[float, float]:
        """Deviation of the clients' sizes, and the mean share of a client's most frequent label."""
        sizes = [own.total() for split in splits for own in split]
        return statistics.pstdev(sizes), statistics.fmean(max(o.values()) / o.total() for s in splits for o in s)

    for alpha in (0.3, 1.0, 10.0):
        ours = [
            counts(LABELS, deal(LABELS, dirichlet(LABELS, 5, alpha, 5, False, rng(s)), rng(s + 1000)))
            for s in range(30)
        ]
        other = theirs(
            lambda seed, a=alpha: flower.DirichletPartitioner(
                5, "label", alpha=a, min_partition_size=5, self_balancing=False, seed=seed
            )
        )
        for mine, yours in zip(spread(ours), spread(other), strict=True):
            assert mine == pytest.approx(yours, rel=0.2)
    ours = [sorted(c.total() for c in counts(LABELS, deal(LABELS, iid(LABELS, 5), rng(s)))) for s in range(2)]
    assert ours[0] == sorted(c.total() for c in theirs(lambda _: flower.IidPartitioner(5))[0])
    known = theirs(lambda s: flower.PathologicalPartitioner(5, "label", 2, "deterministic", seed=s))
    ours = [counts(LABELS, deal(LABELS, pathological(LABELS, 5, 2, rng(s)), rng(s))) for s in range(30)]
    assert {len(own) for split in known for own in split} == {len(own) for split in ours for own in split} == {2}
    assert {own.total() for split in ours for own in split} == {own.total() for split in known for own in split}
