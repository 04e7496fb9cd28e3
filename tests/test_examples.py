"""Examples: rows under stable ids, and digests that see every change of content."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from retrograd import Examples
from retrograd.errors import InputError, UnknownExample

X, Y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])


class Rows:
    """A map-style data set of nested examples."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


PAIRS = Rows([(X[row], Y[row]) for row in range(6)])


@pytest.mark.parametrize("data", [(X, Y), [X, Y], TensorDataset(X, Y), PAIRS], ids=["tuple", "list", "dataset", "rows"])
@pytest.mark.parametrize("ids", [None, [40, 7, 12, -3, 99, 5]])
def test_batches_are_picked_by_id_in_the_order_asked(data, ids):
    examples = Examples(data, ids)
    assert len(examples) == 6
    asked = examples.ids[[4, 0, 4]]
    assert examples.rows(asked).tolist() == [4, 0, 4]
    inputs, labels = examples.batch(asked)
    assert torch.equal(inputs, X[[4, 0, 4]])
    assert torch.equal(labels, Y[[4, 0, 4]])


def test_a_tensor_a_dict_and_a_collate_function():
    assert torch.equal(Examples(X).batch(torch.tensor([2])), X[2:3])
    batch = Examples({"x": X, "y": Y}).batch(torch.tensor([3, 1]))
    assert batch.keys() == {"x", "y"}
    assert torch.equal(batch["x"], X[[3, 1]])
    ragged = Rows([torch.ones(length) for length in (1, 3, 2)])
    padded = Examples(ragged, collate=lambda items: torch.nn.utils.rnn.pad_sequence(items, batch_first=True))
    assert padded.batch(torch.tensor([0, 1])).tolist() == [[1, 0, 0], [1, 1, 1]]


def test_examples_of_examples_are_themselves():
    examples = Examples((X, Y), [5, 4, 3, 2, 1, 0])
    assert Examples.of(examples) is examples
    assert Examples.of((X, Y)).ids.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("ids", [None, [40, 7, 12, -3, 99, 5]])
@pytest.mark.parametrize("unknown", [6, -1, 10**12])
def test_unknown_ids_are_named(ids, unknown):
    examples = Examples((X, Y), ids)
    with pytest.raises(UnknownExample, match=rf"no example has the id \[{unknown}\].*6 examples with ids from"):
        examples.batch(torch.tensor([int(examples.ids[1]), unknown]))


@given(st.lists(st.integers(-(2**62), 2**62), unique=True, min_size=6, max_size=6), st.integers(-(2**62), 2**62))
def test_rows_are_the_positions_of_ids(ids, other):
    examples = Examples(X, ids)
    assert [int(examples.rows(torch.tensor([number]))) for number in ids] == list(range(6))
    if other not in ids:
        with pytest.raises(UnknownExample):
            examples.rows(torch.tensor([other]))


@pytest.mark.parametrize(
    ("data", "ids", "message"),
    [
        ((X, Y[:5]), None, r"equally many rows, got \[6, 5\]"),
        (X, [1, 2, 3], "6 examples need 6 distinct ids, got 3"),
        (X, [1, 2, 3, 4, 5, 1], "6 distinct ids"),
        (17, None, "a data set of type int has no rows"),
        (iter([1, 2]), None, "has no rows"),
        (torch.tensor(1.0), None, "rows"),
    ],
    ids=["rows", "few ids", "same ids", "number", "iterator", "scalar"],
)
def test_what_is_no_data_set(data, ids, message):
    with pytest.raises(InputError, match=message):
        Examples(data, ids)


# ---------------------------------------------------------------------------------------------------------------------
# Digests


def changed(column, row):
    column = column.clone()
    column[row] += 1
    return column


@pytest.mark.parametrize(
    "kind", [lambda x, y: (x, y), lambda x, y: {"x": x, "y": y}, lambda x, y: Rows(list(zip(x, y, strict=True)))]
)
@pytest.mark.parametrize("row", [0, 5])
def test_a_change_moves_the_digest_of_that_example_alone(kind, row):
    plain = Examples(kind(X, Y))
    for other in (kind(changed(X, row), Y), kind(X, changed(Y, row))):
        digests = Examples(other).digests()
        assert [place for place in range(6) if digests[place] != plain.digests()[place]] == [row]
        assert Examples(other).root() != plain.root()
    assert Examples(kind(X.clone(), Y.clone())).root() == plain.root()


@pytest.mark.parametrize(
    "other",
    [
        Examples((X.flip(0), Y.flip(0))),
        Examples((X, Y), [1, 0, 2, 3, 4, 5]),
        Examples((X[:5], Y[:5])),
        Examples((X.double(), Y)),
        Examples((X.reshape(6, 1, 2), Y)),
        Examples((Y, X)),
        Examples((X.view(torch.int32), Y)),
    ],
    ids=["order", "ids", "count", "type", "shape", "columns", "bits of another type"],
)
def test_the_root_sees(other):
    assert other.root() != Examples((X, Y)).root()


def test_names_of_columns_are_content():
    left = Examples({"image": X, "mask": X + 1})
    assert Examples({"mask": X + 1, "image": X}).batch(torch.tensor([0])).keys() == {"image", "mask"}
    assert Examples({"mask": X, "image": X + 1}).root() != left.root()


def test_storage_and_views_are_no_content():
    wide = torch.stack([X, X + 1], dim=2)
    assert Examples((wide[:, :, 0], Y)).root() == Examples((X, Y)).root()
    assert Examples(X.clone().requires_grad_()).root() == Examples(X).root()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.complex64])
def test_every_type_of_tensor_has_a_digest(dtype):
    columns, rows = Examples((X > 2).to(dtype)), Examples(Rows(list((X > 2).to(dtype))))
    for examples in (columns, rows):
        assert len(set(examples.digests())) == 3  # (0, 0), (0, 1) and (1, 1)
    assert columns.root() != Examples((X > 2).float()).root()


ITEMS = [
    1,
    1.0,
    True,
    None,
    "1",
    b"1",
    (1,),
    (1, 2),
    {"a": 1},
    {"b": 1},
    np.ones(2),
    np.ones((2, 1)),
    np.ones(2, np.float32),
    torch.ones(3),
    np.int64(1),
    [1, [2]],
    [[1], 2],
]


def test_items_of_other_kinds_have_other_digests():
    assert len(set(Examples(Rows(ITEMS)).digests())) == len(ITEMS)
    assert Examples(Rows([{"a": 1, "b": 2}])).root() == Examples(Rows([{"b": 2, "a": 1}])).root()


def test_items_without_a_digest_are_refused():
    with pytest.raises(InputError, match="contains a object, which has no content digest"):
        Examples(Rows([(1, object())])).digests()


def test_examples_that_change_from_one_reading_to_the_next_are_refused():
    class Noise(Rows):
        def __getitem__(self, row):
            return torch.randn(2)

    with pytest.raises(InputError, match=r"different each time it is read.*move random augmentation"):
        Examples(Noise([0, 1])).digests()
