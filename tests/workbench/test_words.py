"""What CLIP makes of a word, against the text encoder and the filter's own probabilities."""

import numpy as np
import pytest
import torch

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.workbench.vocabulary.words import report_word


@pytest.fixture(scope="module")
def category_filter(tiny_profile):
    return CategoryFilter(*load_clip(tiny_profile), tiny_profile)


def drawings(count=9):
    noise = np.random.default_rng(3).integers(0, 85, (count, 40, 56, 3), dtype=np.uint8)
    return noise + 17 * np.arange(count, dtype=np.uint8)[:, None, None, None]


def test_a_known_word_is_one_piece_and_others_fall_apart(category_filter):
    found = {word: report_word(category_filter, word, drawings(2), ["sofa"]) for word in ("cat", "chest of drawers", "corgi")}
    assert {word: report.pieces for word, report in found.items()} == {"cat": 1, "chest of drawers": 3, "corgi": 5}
    assert found["cat"].nearest == "sofa"


def test_the_nearest_word_and_what_the_drawings_are_read_as(category_filter):
    others, images = ["dog", "sofa", "boat", "water"], drawings()
    found = report_word(category_filter, "cat", images, others)
    clip, tokenizer = category_filter.clip, category_filter.text.tokenizer
    tokens = tokenizer(["cat", *others], padding=True, return_tensors="pt")
    with torch.no_grad():
        text = torch.nn.functional.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)
    cosine = (text[1:] @ text[0]).numpy()
    assert found.nearest == others[int(cosine.argmax())] and found.cosine == pytest.approx(float(cosine.max()), abs=1e-5)
    read = [int((text @ category_filter.embed_image(image)).argmax()) for image in images]
    assert found.recognised == pytest.approx(np.mean([r == 0 for r in read]))
    assert found.read_as == ["cat", *others][max(sorted(set(read)), key=read.count)]
    # The word may stand among the others, in any case; it is then not compared with itself.
    assert report_word(category_filter, "cat", images, ["Cat", *others]) == found


def test_what_cannot_be_compared(category_filter):
    with pytest.raises(InputError, match="one drawing and one other word"):
        report_word(category_filter, "cat", drawings(2), ["CAT"])
    with pytest.raises(InputError, match="one drawing and one other word"):
        report_word(category_filter, "cat", drawings(0), ["dog"])
    with pytest.raises(InputError, match="empty"):
        report_word(category_filter, " ", drawings(1), ["dog"])
    assert len(Vocabulary.of("cat, dog")) == 2
