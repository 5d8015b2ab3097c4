"""Step 3a: the category pre-filter against plain CLIP calls, the "stuff" filter against a loop."""

import itertools

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.filters.category import CLIP_MEAN, CLIP_STD, CategoryFilter, square_image
from ovdiff_lib.filters.stuff import bare, filter_stuff, without_background
from ovdiff_lib.networks import clip_text
from ovdiff_lib.networks.clip_text import TextEncoder, pack
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.types import PrototypeBank, Prototypes

NAMES = ("cat", "sofa bed", "grass", "boat", "red car")
LENGTH = 20
BOS, EOS = 0, 99


class WordTokenizer:
    """One id a word, between start and end token; the end token has the largest id, as in CLIP."""

    model_max_length = LENGTH

    def __call__(self, texts, **settings):
        return {"input_ids": [[BOS, *(1 + sum(word.encode()) % 97 for word in text.split()), EOS] for text in texts]}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    text = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": LENGTH, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
              "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    with torch.no_grad():  # further apart than the usual small initialisation puts them
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pictures(image):
    return [image, *np.random.default_rng(1).integers(0, 256, (5, 17, 24, 3), dtype=np.uint8), np.full((9, 30, 3), 200, np.uint8)]


@pytest.fixture(scope="module")
def shipped_clip():
    return load_clip(load_profile("mini"))


def make_filter(clip, **overrides):
    return CategoryFilter(clip, WordTokenizer(), load_profile("mini", {f"filters.{k}": v for k, v in overrides.items()}))


@torch.inference_mode()
def plain_text(clip, texts):
    """CLIP's own text embeddings: every prompt alone, padded to the model's length."""
    ids = [tokens + [EOS] * (LENGTH - len(tokens)) for tokens in WordTokenizer()(texts)["input_ids"]]
    return F.normalize(clip.get_text_features(input_ids=torch.tensor(ids)).pooler_output, dim=-1)


@torch.inference_mode()
def plain_image(clip, image):
    pixels = np.array(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) / 255
    pixels = torch.tensor((pixels - CLIP_MEAN) / CLIP_STD, dtype=torch.float32).permute(2, 0, 1)[None]
    return F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)[0]


def plain_filter(clip, image, names, scale, top, article=""):
    """The paper's words, one step after another."""
    embedding, names = plain_image(clip, image), [article + name for name in names]
    probabilities = torch.softmax(scale * plain_text(clip, names) @ embedding, 0).numpy()
    above = [i for i in range(len(names)) if probabilities[i] > 1 / len(names)]
    above = sorted(sorted(above, key=lambda i: -probabilities[i])[:top])
    subsets = [s for k in range(1, len(above) + 1) for s in itertools.combinations(above, k)]
    joined = plain_text(clip, [" and ".join(names[i] for i in s) for s in subsets]) @ embedding
    return subsets[int(joined.argmax())], probabilities


def joined_prompts(names):
    return [" and ".join(s) for k in range(1, len(names) + 1) for s in itertools.combinations(names, k)]


SUBSETS = [s for k in range(1, 6) for s in itertools.combinations(range(5), k)]


WORDS = st.one_of(st.text(max_size=8), st.sampled_from(["dog's", "it's", "a", "and", "don't", "naïve", "<|endoftext|>", "10,5"]))


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(text=st.lists(WORDS, max_size=6).map(" ".join))
def test_words_looked_up_alone_give_the_tokens_of_the_whole_text(shipped_clip, text):
    clip, tokenizer = shipped_clip
    whole = tokenizer([text])["input_ids"][0]
    assert TextEncoder(clip, tokenizer)._tokens(text) == tuple(whole[: whole.index(tokenizer.eos_token_id) + 1])  # where CLIP reads it


def test_rows_longer_than_a_text_and_padding_change_no_embedding(shipped_clip, monkeypatch):
    """CLIP that ships, rows of several widths, the last of a pass shorter than others."""
    clip, tokenizer = shipped_clip
    texts = [text for text in joined_prompts(("cat", "red dog", "boat", "zebra crossing", "car", "house")) if len(text) < 40]
    texts += ["<|endoftext|> cat", "a<|endoftext|>b", ""]
    with torch.inference_mode():
        expected = torch.cat([clip.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output for text in texts])
    for width in (0, 50, 96, 500):
        monkeypatch.setattr("ovdiff_lib.networks.clip_text.WIDTH", width)
        torch.testing.assert_close(TextEncoder(clip, tokenizer)(texts), F.normalize(expected, dim=-1), atol=1e-5, rtol=0)


def test_texts_are_encoded_once_and_the_cache_is_bounded(clip, monkeypatch):
    """Against an encoder that forgets nothing, in many small calls of changing texts."""
    small, large, rng = TextEncoder(clip, WordTokenizer(), cached=7), TextEncoder(clip, WordTokenizer()), np.random.default_rng(0)
    texts, packed = joined_prompts(NAMES), []
    for _ in range(40):
        chosen = [texts[i] for i in rng.integers(0, len(texts), rng.integers(0, 12))]
        torch.testing.assert_close(small(chosen), large(chosen), atol=1e-5, rtol=0)
        assert len(small._known) <= 11  # of one call more than are kept
    assert len(large._known) == len(texts) > 30 and large([]).shape == (0, 12)
    monkeypatch.setattr(clip_text, "pack", lambda sequences, width: packed.append(len(sequences)) or pack(sequences, width))
    encoder = TextEncoder(clip, WordTokenizer(), cached=4)
    first = encoder(["cat", "boat", "cat"])
    assert torch.equal(first[[1, 0]], encoder(["boat", "cat"])) and torch.equal(first[0], first[2]) and packed == [2]
    encoder(["a", "b", "c", "boat"])  # one too many: it begins again
    assert torch.allclose(encoder(["cat"])[0], first[0], atol=1e-6) and packed == [2, 4, 1] and list(encoder._known) == ["cat"]


@pytest.mark.filterwarnings("error")  # that prompts were left out is said only where they were
@pytest.mark.parametrize(("scale", "top"), [(3.0, 10), (1.0, 2), (0.1, 3), (None, 10)])
def test_filter_follows_the_paper(clip, pictures, scale, top):
    chosen, seen = make_filter(clip, category_logit_scale=scale, category_top=top), set()
    scale = float(clip.logit_scale.detach().exp()) if scale is None else scale  # the model's own
    for picture in pictures:
        kept, probabilities = chosen(picture, Vocabulary.of(NAMES))
        expected, scores = plain_filter(clip, picture, NAMES, scale, top)
        assert kept == expected and len(kept) <= top
        assert probabilities.dtype == np.float32 and np.allclose(probabilities, scores, atol=1e-4)
        seen.add(kept)
    assert len(seen) > 1  # the image matters


def test_one_class_and_equal_classes_pass(clip, image):
    assert make_filter(clip)(image, Vocabulary.of("cat"))[0] == (0,)
    kept, probabilities = make_filter(clip, category_logit_scale=1e-6)(image, Vocabulary.of(NAMES))
    assert kept == SUBSETS[int((plain_text(clip, joined_prompts(NAMES)) @ plain_image(clip, image)).argmax())]  # nobody is below 1/C
    assert np.allclose(probabilities, 0.2)


def test_prompts_and_templates_are_used(clip, image):
    vocabulary = Vocabulary((Category("mouse", "computer mouse"), Category("cat")))
    made = make_filter(clip, category_prompt="a photo of {names}", category_joiner=" with ", category_logit_scale=1e-6)
    texts = ["a photo of computer mouse", "a photo of cat", "a photo of computer mouse with cat"]
    assert made(image, vocabulary)[0] == ((0,), (1,), (0, 1))[int((plain_text(clip, texts) @ plain_image(clip, image)).argmax())]
    assert set(made.text._known) == set(texts)


def test_the_released_codes_settings_can_be_expressed(clip, pictures):
    """"a x and a y", things only, no logit scale, squashed: all by fields. Stuff stays, with probability 1."""
    made = make_filter(clip, category_prompt="a {names}", category_joiner=" and a ", category_logit_scale=1.0, category_keep_stuff=True,
                       category_crop="squash", category_top=2)
    things = [n for n in NAMES if n != "grass"]
    for picture in pictures:
        kept, probabilities = made(picture, Vocabulary.of(NAMES, stuff=["grass"]))
        expected, scores = plain_filter(clip, picture, things, 1.0, 2, article="a ")
        assert kept == tuple(sorted([2, *(NAMES.index(things[i]) for i in expected)]))
        assert probabilities[2] == 1 and np.allclose(np.delete(probabilities, 2), scores, atol=1e-5)
    assert any(" and a " in text for text in made.text._known)
    assert made(pictures[0], Vocabulary.of(["sky", "grass"], stuff=["sky", "grass"]))[0] == (0, 1)


def test_too_long_names_and_joined_prompts(clip, image):
    with pytest.raises(InputError, match="20 tokens"):
        make_filter(clip)(image, Vocabulary.of(["cat", " ".join("abcdefghijklmnopqrs")]))
    long = [f"{a} b c d e f g h" for a in "xyz"]  # two fit into 20 tokens with "and", three do not
    with pytest.warns(UserWarning, match="1 of 7"):
        kept, _ = make_filter(clip, category_logit_scale=1e-6)(image, Vocabulary.of(long))
    assert len(kept) <= 2


def test_square_image():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    image[:, :10, 0] = 90
    squashed, centre = square_image(image, 12, "squash"), square_image(image, 12, "centre")
    assert squashed.shape == centre.shape == (12, 12, 3)
    assert (centre[:, 1:-1] == 255).all() and squashed[5, 1].tolist() == [90, 0, 0] and squashed[5, 10].tolist() == [0, 0, 0]
    assert (square_image(image.transpose(1, 0, 2), 12, "centre") == centre.transpose(1, 0, 2)).all()


def test_broken_weights_are_reported(clip, image, monkeypatch):
    monkeypatch.setattr(clip.visual_projection.weight, "data", clip.visual_projection.weight * torch.nan)
    with pytest.raises(InputError, match="not finite"):
        make_filter(clip)(image, Vocabulary.of(NAMES))


# ------------------------------------------------------------------ "stuff"

PARTS = np.array([1, 2, 3, 4, -1, -2, -3, -4, -5, -6])


def make_bank(kinds, seed=0):
    """Two extractors of three channels; each category has 4 parts of the foreground and 6 of the background."""
    rng, region = np.random.default_rng(seed), np.array(["foreground"] * 4 + ["background"] * 6)

    def made():
        return Prototypes((rng.normal(size=(10, 3)) * 5).astype(np.float32), np.array(["part"] * 10), region, np.full(10, -1, np.int32),
                          PARTS.astype(np.int32), np.zeros((2, 2, 3), np.int16))

    vocabulary = Vocabulary(tuple(Category(f"c{i}", kind=kind) for i, kind in enumerate(kinds)))
    return PrototypeBank(vocabulary, {name: tuple(made() for _ in kinds) for name in ("sd", "clip")})


def settings(**fields):
    return load_profile("mini", {f"filters.{k}": v for k, v in {"stuff_threshold": 0.85, **fields}.items()}).filters


def slow_filter(bank, judges, threshold):
    """Part codes that stay, by extractor and category: no background row that is alike a foreground row of a category in ``judges(i)``."""
    found = {}
    for name, rows in bank.prototypes.items():
        units = [p.vectors / np.linalg.norm(p.vectors, axis=1, keepdims=True) for p in rows]
        for i, prototypes in enumerate(rows):
            others = [v for j in judges(i) for v, region in zip(units[j], rows[j].region, strict=True) if region == "foreground"]
            found[name, i] = [PARTS[row] for row, vector in enumerate(units[i])
                              if prototypes.region[row] == "foreground" or not any(vector @ other > threshold for other in others)]
    return found


def clusters(bank):
    return {(name, i): p.cluster.tolist() for name, rows in bank.prototypes.items() for i, p in enumerate(rows)}


def test_stuff_filter_drops_what_the_definition_says():
    bank = make_bank(["thing", "stuff", "thing", "stuff"])
    expected = slow_filter(bank, lambda i: (1, 3) if i in (0, 2) else (), 0.85)
    assert clusters(filter_stuff(bank, settings(stuff_background=True))) == expected  # where stuff keeps its background
    expected |= {(name, i): [1, 2, 3, 4] for name in bank.extractors for i in (1, 3)}
    assert clusters(filter_stuff(bank, settings())) == expected
    assert {4 < len(kept) < 10 for (_, i), kept in expected.items() if i in (0, 2)} == {True}


def test_each_extractor_has_its_own_threshold():
    bank = make_bank(["thing", "stuff"])
    found = clusters(filter_stuff(bank, settings(stuff_threshold={"sd": 1.0, "clip": -1.0})))
    assert [len(found[name, 0]) for name in ("sd", "clip")] == [10, 4]
    with pytest.raises(ProfileError, match=r"filters\.stuff_threshold names sd but not 'clip'"):
        filter_stuff(bank, settings(stuff_threshold={"sd": 0.5}))


@pytest.mark.parametrize("kinds", [["thing", "stuff", "thing", "stuff"], ["thing"] * 4])
def test_all_against_all_needs_no_kinds(kinds):
    bank = make_bank(kinds)
    expected = slow_filter(bank, lambda i: {0, 1, 2, 3} - {i}, 0.9)
    for stuff_background in (False, True):
        chosen = settings(stuff_against="all", stuff_threshold=0.9, stuff_background=stuff_background)
        assert clusters(filter_stuff(bank, chosen)) == expected
    dropped = [10 - len(kept) for kept in expected.values()]
    assert min(dropped) < max(dropped) and expected != slow_filter(bank, lambda i: range(4), 0.9)
    alone = make_bank(["thing"])
    assert clusters(filter_stuff(alone, settings(stuff_against="all", stuff_threshold=-1))) == clusters(alone)


def with_class_prototypes(bank):
    """The bank with a class prototype in front of each region."""
    rng = np.random.default_rng(5)

    def add(extractor, index, p):
        vectors, cluster = np.insert(p.vectors, [0, 4], rng.normal(size=(2, 3)), 0), np.insert(p.cluster, [0, 4], 0)
        region, kind = np.array(["foreground"] * 5 + ["background"] * 7), np.where(cluster == 0, "class", "part")
        return Prototypes(vectors, kind, region, np.full(12, -1, np.int32), cluster, p.assignment)

    return bank.map(add)


def test_stuff_without_parts():
    bank = with_class_prototypes(make_bank(["thing", "stuff", "thing"]))
    found = filter_stuff(bank, settings(stuff_parts=False))
    for name in bank.extractors:
        rows = found.prototypes[name]
        assert rows[1].kind.tolist() == ["class"] and rows[1].region.tolist() == ["foreground"]
        judge = bank.prototypes[name][1].vectors[0]  # its class prototype alone judges the others
        for i in (0, 2):
            p = bank.prototypes[name][i]
            cosine = p.vectors @ judge / np.linalg.norm(p.vectors, axis=1) / np.linalg.norm(judge)
            assert np.array_equal(rows[i].vectors, p.vectors[(p.region == "foreground") | (cosine <= 0.85)])
    kept = filter_stuff(bank, settings(stuff_parts=False, stuff_background=True)).prototypes["sd"][1]
    assert kept.kind.tolist() == ["class", "class"] and kept.region.tolist() == ["foreground", "background"]
    with pytest.raises(InputError, match="'c1'"):
        filter_stuff(make_bank(["thing", "stuff"]), settings(stuff_parts=False))


def test_what_a_filter_left_is_counted_and_a_loss_is_said_once(caplog):
    bank = make_bank(["thing", "stuff", "thing", "thing"])
    assert bank.counts("background") == {"sd": (6,) * 4, "clip": (6,) * 4} and bank.counts("foreground")["sd"] == (4,) * 4
    expected = slow_filter(bank, lambda i: (1,) if i != 1 else (), 0.5)
    left = filter_stuff(bank, settings(stuff_threshold={"sd": 0.5, "clip": -1.0}))
    counts = {(name, i): n for name, row in left.counts("background").items() for i, n in enumerate(row)}
    assert all(counts["sd", i] == len(expected["sd", i]) - 4 for i in (0, 2, 3)) and counts["sd", 1] == 0
    lost = [f"c{i}" for i in (0, 2, 3) if not counts["sd", i]]
    said = [record.getMessage() for record in caplog.records]
    assert said == bare(bank, left, settings()) and len(said) == 1 + bool(lost)
    assert "left none of the 24 background prototypes of clip" in said[-1]
    caplog.clear()
    whole = filter_stuff(bank, settings(stuff_threshold=1.0))
    assert not caplog.records and bare(bank, whole, settings()) == []  # that stuff has none is meant
    one = whole.map(lambda name, i, p: p.select(p.region == "foreground") if (name, i) == ("sd", 2) else p)
    assert bare(bank, one, settings()) == ['The "stuff" filter left 12 of 24 background prototypes of sd; without any: c2.']
    assert without_background(bank, one, settings()) == {"sd": ["c2"], "clip": []}
    assert without_background(bank, one, settings(stuff_against="all")) == {"sd": ["c1", "c2"], "clip": ["c1"]}


def test_stuff_filter_limits():
    bank, mixed = make_bank(["thing", "thing"]), make_bank(["thing", "stuff"])
    assert filter_stuff(bank, settings()) is bank
    for threshold, left in ((1, 10), (-1, 4)):
        assert [len(p) for p in filter_stuff(mixed, settings(stuff_threshold=threshold)).prototypes["sd"]] == [left, 4]
    assert [len(p) for p in mixed.prototypes["sd"]] == [10, 10]  # the bank that came in is as it was
