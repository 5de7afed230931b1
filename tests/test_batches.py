import collections
import dataclasses

import pytest
import torch
from torch import Tensor

from lit_scale.batches import count_samples, take_samples

pytestmark = [pytest.mark.filterwarnings("ignore")]


Pair = collections.namedtuple("Pair", ["ids", "labels"])


@dataclasses.dataclass
class Parts:
    ids: Tensor
    name: str


def test_samples_are_taken_out_of_batches_of_every_form() -> None:
    from transformers import BatchEncoding

    ids, labels, index = torch.arange(12).view(4, 3), torch.arange(4), torch.tensor([3, 0, 3])
    boxes = [torch.zeros(n, 4) for n in (2, 5, 1, 7)]
    nested = {"x": (ids, [labels]), "texts": ["a", "b", "c", "d"], "boxes": boxes, "mask": torch.ones(1, 3), "n": 5}
    found = take_samples(nested, index)
    assert torch.equal(found["x"][0], ids[[3, 0, 3]])
    assert found["x"][1][0].tolist() == [3, 0, 3]
    assert found["texts"] == ["d", "a", "d"]
    assert [len(box) for box in found["boxes"]] == [7, 2, 7]
    assert found["mask"] is nested["mask"]
    assert found["n"] == 5
    assert torch.equal(take_samples(ids, index), ids[[3, 0, 3]])
    pair = take_samples(Pair(ids, labels), slice(0, 2))
    assert type(pair) is Pair
    assert pair.labels.tolist() == [0, 1]
    parts = take_samples(Parts(ids, "n"), index)
    assert torch.equal(parts.ids, ids[index])
    assert parts.name == "n"
    encoding = take_samples(BatchEncoding({"input_ids": ids}), index)
    assert type(encoding) is BatchEncoding
    assert torch.equal(encoding["input_ids"], ids[index])
    two = take_samples([ids[:2], torch.tensor(0.5)], torch.tensor([1]))  # a pair of two samples, not one item each
    assert two[0].tolist() == [[3, 4, 5]]


def test_what_is_no_axis_of_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 4\), whose first axis is not its 4 samples"):
        take_samples((torch.zeros(4, 3), torch.zeros(3, 4)), slice(0, 1))
    with pytest.raises(ValueError, match="holds no tensor"):
        count_samples({"text": ["a"]})
