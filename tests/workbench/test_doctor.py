"""``ovdiff doctor``: what it says is here can be loaded, what it says is missing cannot, and nothing makes it stumble."""

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch

from ovdiff_lib import features, masks
from ovdiff_lib.cli.main import main
from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.networks import loading
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.registry import Part
from ovdiff_lib.workbench import doctor
from ovdiff_lib.workbench.data.datasets import MINI_DATA, load_dataset
from ovdiff_lib.workbench.doctor import FILES, PUBLISHED, how_to_get, inspect, published, trials, uses

SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CLIP = "openai/clip-vit-base-patch16"


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, an empty home."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OVDIFF_LIBRARY", raising=False)
    return tmp_path / "hub"


def put(hub: Path, hub_id: str, source: Path) -> Path:
    """``source`` in a hub cache as downloads leave it: blobs, and a snapshot of links to them. The snapshot's folder."""
    folder = hub / f"models--{hub_id.replace('/', '--')}"
    revision = hashlib.sha1(hub_id.encode()).hexdigest()
    snapshot = folder / "snapshots" / revision
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        blob = folder / "blobs" / hashlib.sha1(str(path).encode()).hexdigest()
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def found(report):
    """The checks by name."""
    return {check.what: check for check in report.checks}


def test_the_mini_profile_is_ready(capsys, tmp_path):
    assert main(["doctor"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "Everything needed is here." in said.out and "Missing" not in said.out
    rows = found(inspect(load_profile("mini")))
    for name in ("models.diffusion", "models.clip"):
        folder = Path(rows[name].where)
        assert rows[name].state == "package" and rows[name].used_by and rows[name].problem == ""
        assert rows[name].size == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) > 10**6
        assert any(line.startswith(name) and line.rstrip().endswith(str(folder)) for line in said.out.splitlines())
    assert rows["memory"].size > 10**9 and rows["library"].size > 0
    assert not (tmp_path / "home").exists() and not (tmp_path / "hub").exists()  # looking leaves no trace


@pytest.mark.parametrize("name", ["paper", "official"])
def test_what_is_needed_and_what_is_not(name, capsys, tmp_path):
    report = inspect(load_profile(name))
    rows, problems = {c.what: c for c in report.checks if c.what.startswith("models.")}, "\n".join(report.problems)
    needed = {what: c for what, c in rows.items() if c.used_by}
    assert set(needed) == {"models.diffusion", "models.clip", "models.dino", "models.cutler"} and len(rows) > len(needed)
    assert all(c.state == "missing" and c.get and c.licence and (c.named in problems) == (c in needed.values()) for c in rows.values())
    assert rows["models.clip"].used_by == ("extractor clip-keys", "category filter")
    assert main(["doctor", "--profile", name]) == 1
    out, err = capsys.readouterr()
    assert err == "" and out.count("Missing:") == 1 and all(f"{'    ' if c.used_by else ': '}{c.get}\n" in out for c in rows.values())
    for words in (str(tmp_path / "hub"), f"curl -L --create-dirs -o {tmp_path / 'home' / '.cache' / 'ovdiff' / 'weights'}",
                  "CreativeML OpenRAIL-M", "CC BY-NC-SA 4.0", "4.26GB", "detectron2"):
        assert words in out, words
    assert not (tmp_path / "home").exists() and not (tmp_path / "hub").exists()


def test_models_in_the_hub_cache_are_found_and_do_load(hub, tiny_models, monkeypatch):
    snapshot = put(hub, SD, tiny_models / "stable-diffusion")
    put(hub, CLIP, tiny_models / "clip")
    profile = load_profile("mini", {"models.diffusion": SD, "models.clip": CLIP})
    report = inspect(profile)
    row = found(report)["models.diffusion"]
    size = sum(p.stat().st_size for p in (tiny_models / "stable-diffusion").rglob("*") if p.is_file())
    assert report.problems == () and row.where == str(snapshot) and row.size == size and row.licence.startswith("CreativeML")
    assert row.state == found(report)["models.clip"].state == "hub cache" and row.get == ""
    monkeypatch.setattr(loading, "_loaded", {})
    assert loading.load_diffusion(profile).unet is not None and loading.load_clip(profile)
    # A cache whose reference is gone or broken holds no model.
    reference = snapshot.parents[1] / "refs" / "main"
    for content in ("", "0" * 40, "\x00" * 3, None):
        reference.unlink() if content is None else reference.write_text(content)
        assert found(inspect(profile))["models.diffusion"].problem


@pytest.mark.parametrize("removed", ["unet/diffusion_pytorch_model.safetensors", "model_index.json", "text_encoder/model.safetensors",
                                     "scheduler/scheduler_config.json"])
def test_half_a_download_is_called_incomplete(hub, tiny_models, removed, monkeypatch):
    snapshot = put(hub, SD, tiny_models / "stable-diffusion")
    (snapshot / removed).resolve().unlink()  # the link stays and leads nowhere
    profile = load_profile("mini", {"models.diffusion": SD})
    report = inspect(profile)
    row, (problem,) = found(report)["models.diffusion"], report.problems
    assert row.state == "incomplete" and row.get.startswith(f"hf download {SD}") and removed in problem and row.get in problem
    monkeypatch.setattr(loading, "_loaded", {})
    with pytest.raises(ModelNotAvailable):
        loading.load_diffusion(profile)


def look(field, identifier, **fields):
    """The check of a model, and the problems of the profile that has it."""
    report = inspect(load_profile("mini", {f"models.{field}": str(identifier), **fields}))
    return found(report)[f"models.{field}"], "\n".join(report.problems)


def test_folders_and_files(tmp_path, tiny_models):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"x")
    for identifier, state, said, get in (
            (tiny_models / "clip", "folder", "", ""), (tmp_path / "none", "missing", "no such file", ""),
            ("package:none", "missing", "make mini-world", "make mini-world"), ("a b", "missing", "'a b'", "hf download a b"),
            (tmp_path / "empty", "incomplete", "config.json, model.safetensors", ""),
            (tmp_path / "weights.pth", "incomplete", "a folder", "")):
        row, problems = look("clip", identifier)
        assert row.state == state and said in problems and row.get.startswith(get) and bool(problems) == (state != "folder")
    assert look("clip", tiny_models / "clip")[0].licence == "see its card"
    row, problems = look("dino", "", **{"features.extractors": ["dino"]})
    assert "models.dino" in problems and row.state == "missing"


def test_the_cutler_checkpoint_and_its_library(tmp_path, monkeypatch):
    path, real = tmp_path / "cutler_cascade_final.pth", importlib.util.find_spec
    path.write_bytes(b"weights")
    for installed in (True, False):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, here=installed or None: here if name == "detectron2" else real(name))
        row, problems = look("cutler", path, **{"masks.segmenter": "cutler"})
        assert (row.state, row.get) == ("file", "") and ("conda install -c conda-forge detectron2" in problems) != installed
        assert "detectron2" not in "".join(inspect(load_profile("mini")).problems)
    assert look("cutler", tmp_path, **{"masks.segmenter": "cutler"})[0].state == "incomplete"


def test_a_model_library_of_another_version(monkeypatch):
    known = loading._version
    monkeypatch.setattr(loading, "_version", lambda name: "0.39.0" if name == "diffusers" else known(name))
    (problem,) = inspect(load_profile("mini")).problems
    assert "diffusers 0.39.0 is installed" in problem and ">=0.40" in problem
    assert problem in str(inspect(load_profile("mini")))


def test_weights_of_open_clip(hub, tmp_path, tiny_models):
    repository, chosen = "timm/vit_base_patch16_clip_224.openai", {"features.extractors": ["open-clip-keys"]}
    missing = look("open_clip", repository, **chosen)[0]
    assert missing.state == "missing" and missing.get.startswith(f"hf download {repository}")
    assert missing.used_by == ("extractor open-clip-keys",)
    put(hub, repository, tiny_models / "open_clip")
    for source, state in ((repository, "hub cache"), (tiny_models / "open_clip", "folder"), (tiny_models / "clip", "incomplete")):
        assert look("open_clip", source, **chosen)[0].state == state  # the last: the same network in transformers' format


def test_uses_follow_the_registries(monkeypatch):
    profile = load_profile("mini", {"features.extractors": ["dino", "clip-keys"], "masks.segmenter": "threshold",
                                    "filters.category": False})
    assert uses(profile) == {"diffusion": ["support images"], "dino": ["extractor dino"], "clip": ["extractor clip-keys"]}
    monkeypatch.setitem(features.EXTRACTORS, "own", Part(lambda profile: None))
    monkeypatch.setitem(masks.SEGMENTERS, "own", Part(lambda profile: None, models=("sam",)))
    own = load_profile("mini", {"features.extractors": ["own"], "masks.segmenter": "own", "filters.category": False, "models.mae": "a/b",
                                "models.dino": "", "models.detector": "", "models.open_clip": ""})
    assert uses(own) == {"diffusion": ["support images"], "sam": ["segmenter own"]}  # of the extractor it is not known
    assert not any("extractor own" in check.used_by for check in inspect(own).checks)
    for bad in ({"features.extractors": ["none"]}, {"features.extractors": []}, {"masks.segmenter": "none"}):
        with pytest.raises(ProfileError):
            uses(load_profile("mini", bad))


def test_data_sets(tmp_path, capsys):
    shown = found(inspect(load_profile("mini"), [f"mini-voc:{MINI_DATA}", f"voc:{tmp_path}"]))
    assert shown["data mini-voc"].state == f"{len(load_dataset('mini-voc'))} images" and shown["data mini-voc"].problem == ""
    assert main(["doctor", "--data", f"voc:{tmp_path}"]) == 1
    said = capsys.readouterr().out
    assert shown[f"data voc:{tmp_path}"].problem in said and str(tmp_path) in said.split("Missing:")[1]


def test_a_device_that_is_not_here_and_folders_to_be(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = inspect(load_profile("mini", {"models.device": "cuda"}), library=tmp_path / "not" / "yet")
    rows = found(report)
    assert "models.device" in report.problems[0] and rows["device"].state == "missing"
    assert rows["library"].where == str(tmp_path / "not" / "yet") and not (tmp_path / "not").exists()
    assert rows["library"].size == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_commands_fetch_what_the_loaders_read():
    for identifier in PUBLISHED.index:
        words = shlex.split(how_to_get(identifier))
        assert words[:3] == ["hf", "download", identifier] or (words[0] == "curl" and words[-1].endswith(identifier))
    words = shlex.split(how_to_get(SD))
    patterns = [words[i + 1] for i, word in enumerate(words) if word == "--include"]
    for names in FILES["diffusion"].str.split():
        assert any(fnmatch(name, pattern) for name in names for pattern in patterns), names
    for identifier, files in {"facebook/dino-vitb8": FILES["dino"], "timm/vit_base_patch16_clip_224.openai": FILES["open_clip"]}.items():
        left_out = shlex.split(how_to_get(identifier))[4::2]  # one format of two
        assert [[any(fnmatch(name, one) for one in left_out) for name in names if name.endswith((".safetensors", ".bin"))]
                for names in files.str.split()] == [[], [False, True]]
    assert not any(fnmatch(name, pattern) for pattern in patterns for name in (
        "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"))
    assert how_to_get("someone/model").startswith("hf download someone/model") and how_to_get("/a/folder") == how_to_get("./x") == ""
    for name in ("paper", "official"):
        table = load_profile(name).to_dict()["models"]
        for field in ("diffusion", "clip", "dino", "mae", "cutler", "sam", "grounding", "groupvit"):
            assert published(table[field]) is not None, field


CODE = [{"cell_type": "code", "metadata": {"tags": tags}, "source": source} for tags, source in (
    (["parameters"], "dataset = 'mini-voc'"), ([], "data.without_background; 'groupvit'; 'mae'"))]


def test_what_reproduce_needs_and_one_step_of_every_network(tmp_path, tiny_profile, monkeypatch, capsys):
    notebook = tmp_path / "00_a.ipynb"
    notebook.write_text(json.dumps({"cells": CODE}))
    profile = tiny_profile.override({"evaluation.without_background": {"A": "voc20", "B": "mini-voc20"}})
    report = inspect(profile, notebooks=[notebook])
    tried = [*trials(profile, report.checks)]
    rows = found(report) | {check.what: check for check in tried}
    assert report.problems == () and not any(check.problem for check in tried)
    assert "so its published numbers" in rows["data voc20"].state and rows["class names"].state == "20 fit"
    assert rows["all weights in memory"].size == sum(c.size for c in report.checks if c.what.startswith("models.") and c.used_by)
    side = profile.support.image_size
    assert rows["step of support images"].state == str((1, side // 4, side // 4)) and rows["step of category filter"].state == "(2,)"
    assert rows["step of baseline groupvit"].state == str((2, side, side)) and rows["step of extractor mae"].state.startswith("(1, ")
    for words, fields in {"(evaluation.voc)": {"evaluation.voc": "voc"}, "tokens": {"support.prompt": "a " * 40 + "{name}"},
                          "does not exist": {"evaluation.without_background": {"A": f"voc20:{tmp_path}/none"}}}.items():
        (problem,) = inspect(profile.override(fields), notebooks=[notebook]).problems
        assert words in problem, problem
    # A network that computes otherwise than the published one, and one that does not compute.
    dino = "facebook/dino-vitb8"
    monkeypatch.setattr(doctor, "PUBLISHED", PUBLISHED.loc[[dino]].rename(index={dino: "mae"}))
    broken = Part(lambda profile: lambda images, seeds: np.full((1, 2, 2, 8), np.nan), models=("mae",))
    monkeypatch.setitem(features.EXTRACTORS, "mae", broken)
    problems = [check.problem for check in trials(profile, report.checks) if check.problem]
    assert len(problems) == 3 and "not finite" in problems[0] and "hidden_size of models.mae is 32, and 768" in problems[1]
    assert main(["doctor", "--reproduce", str(tmp_path), "--set", "evaluation.voc=voc"]) == 1
    assert "(evaluation.voc)" in capsys.readouterr().out


def test_what_is_missing_is_said_before_the_first_drawing(tmp_path, tiny, capsys):
    for options, words in ((["--set", "masks.segmenter=cutler"], "cutler"), (["--set", "features.extractors=[sd, dino]", "--set",
                           "models.dino=a/b"], "'a/b'"), (["--set", f"support.prompt={'a ' * 29}{{name}}"], "tokens")):
        assert main(["build", "--classes", "cat, dog sofa boat water", *tiny, *options]) == 2
        said = capsys.readouterr().err
        assert words in said and "drawing" not in said and said.count("\n") == 1, said
    assert not (tmp_path / "library" / "support").exists()
    arguments = ["reproduce", "--workers", "1", "--notebooks", str(tmp_path), "--out", str(tmp_path), "--set", "evaluation.voc=voc"]
    (tmp_path / "00_a.ipynb").write_text(json.dumps({"cells": CODE}))
    assert main(arguments) == 2
    problem, said = capsys.readouterr().err.splitlines()
    assert "(evaluation.voc)" in problem and "Nothing was begun" in said and not (tmp_path / "mini").exists()
