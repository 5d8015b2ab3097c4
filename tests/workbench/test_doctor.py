"""``ovdiff doctor``: what it says is here can be loaded, what it says is missing cannot, and nothing makes it stumble."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from ovdiff_lib import features, masks
from ovdiff_lib.cli.main import main
from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.features import build_extractors
from ovdiff_lib.files import size_text
from ovdiff_lib.networks import loading
from ovdiff_lib.networks.published import FILES, PUBLISHED, how_to_get
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.registry import Part
from ovdiff_lib.workbench import doctor
from ovdiff_lib.workbench.data.datasets import DATASETS, load_dataset
from ovdiff_lib.workbench.data.readers import MINI_DATA
from ovdiff_lib.workbench.doctor import inspect, uses

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


def by_field(report):
    return {m.field: m for m in report.models}


def test_the_mini_profile_is_ready(capsys, tmp_path):
    assert main(["doctor"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "Everything needed is here." in said.out and "Missing" not in said.out
    report = inspect(load_profile("mini"))
    rows = by_field(report)
    for name in ("diffusion", "clip"):
        folder = Path(rows[name].where)
        assert rows[name].state == "package" and rows[name].here and rows[name].needed
        assert rows[name].size == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) > 10**6
    assert report.problems == () and report.machine["memory"] > 10**9 and report.machine["library_free"] > 0
    assert not (tmp_path / "home").exists() and not (tmp_path / "hub").exists()  # looking leaves no trace


def test_the_paper_profile_on_a_machine_with_none_of_the_weights(tmp_path):
    """In a process of its own, with an empty HF_HOME: a table, no traceback, and the exit code says that something is missing."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-m", "ovdiff_lib.cli.main", "doctor", "--profile", "paper"], capture_output=True, text=True,
                         env=environment)
    assert run.returncode == 1 and run.stderr == "", run.stderr
    assert str(tmp_path / "hf" / "hub") in run.stdout
    for identifier in (SD, CLIP, "facebook/dino-vitb8"):
        assert f"hf download {identifier}" in run.stdout
    cutler = tmp_path / "home" / ".cache" / "ovdiff" / "weights" / "cutler_cascade_final.pth"
    assert f"curl -L --create-dirs -o {cutler} http://dl.fbaipublicfiles.com/cutler/" in run.stdout
    for words in ("CreativeML OpenRAIL-M", "CC BY-NC-SA 4.0", "~4.26 GB", "detectron2", "110 s a class", "3.99 MB (sd) + 399 kB (dino)"):
        assert words in run.stdout, words
    assert not (tmp_path / "hf").exists() and not (tmp_path / "home").exists()


@pytest.mark.parametrize("name", ["paper", "official"])
def test_what_is_needed_and_what_is_not(name):
    report = inspect(load_profile(name))
    rows, problems = by_field(report), "\n".join(report.problems)
    assert {f for f, m in rows.items() if m.needed} == {"diffusion", "clip", "dino", "cutler"}
    assert {m.state for m in report.models} == {"missing"} and all(m.get and m.licence for m in report.models)
    assert {"mae", "sam", "grounding", "open_clip", "groupvit"} <= set(rows)
    assert rows["clip"].used_by == ("extractor clip-keys", "category filter")
    assert all(m.identifier in problems for m in report.models if m.needed) and "vit-mae" not in problems and "sam-vit" not in problems
    assert str(report).count("Missing:") == 1


def test_models_in_the_hub_cache_are_found_and_do_load(hub, tiny_models, monkeypatch):
    snapshot = put(hub, SD, tiny_models / "stable-diffusion")
    put(hub, CLIP, tiny_models / "clip")
    profile = load_profile("mini", {"models.diffusion": SD, "models.clip": CLIP})
    report = inspect(profile)
    rows = by_field(report)
    assert report.problems == () and rows["diffusion"].where == str(snapshot)
    size = sum(p.stat().st_size for p in (tiny_models / "stable-diffusion").rglob("*") if p.is_file())
    assert rows["diffusion"].state == rows["clip"].state == "hub cache" and rows["diffusion"].size == size
    assert rows["diffusion"].licence.startswith("CreativeML") and rows["diffusion"].get == ""
    monkeypatch.setattr(loading, "_loaded", {})
    assert loading.load_diffusion(profile).unet is not None and loading.load_clip(profile)
    # A cache whose reference is gone or broken holds no model.
    reference = snapshot.parents[1] / "refs" / "main"
    for content in ("", "0" * 40, "\x00" * 3, None):
        reference.unlink() if content is None else reference.write_text(content)
        assert by_field(inspect(profile))["diffusion"].state == "missing"


@pytest.mark.parametrize("removed", ["unet/diffusion_pytorch_model.safetensors", "model_index.json", "text_encoder/model.safetensors",
                                     "scheduler/scheduler_config.json"])
def test_half_a_download_is_called_incomplete(hub, tiny_models, removed, monkeypatch):
    snapshot = put(hub, SD, tiny_models / "stable-diffusion")
    (snapshot / removed).resolve().unlink()  # the link stays and leads nowhere
    profile = load_profile("mini", {"models.diffusion": SD})
    report = inspect(profile)
    model = by_field(report)["diffusion"]
    assert model.state == "incomplete" and removed in model.detail and model.get.startswith(f"hf download {SD}")
    assert len(report.problems) == 1 and removed in report.problems[0]
    monkeypatch.setattr(loading, "_loaded", {})
    with pytest.raises(ModelNotAvailable):
        loading.load_diffusion(profile)


def test_folders_and_files(tmp_path, tiny_models):
    def look(field, identifier, **fields):
        report = inspect(load_profile("mini", {f"models.{field}": str(identifier), **fields}))
        return by_field(report)[field], report.problems

    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"x")
    for identifier, state, detail, get in (
            (tiny_models / "clip", "folder", "", ""), (tmp_path / "none", "missing", "no such file", ""),
            ("package:none", "missing", "reinstall", "make mini-world"),
            (tmp_path / "empty", "incomplete", "config.json, model.safetensors", ""),
            (tmp_path / "weights.pth", "incomplete", "a folder", "")):
        model, _ = look("clip", identifier)
        assert model.state == state and detail in model.detail and model.get == get
    assert look("clip", tiny_models / "clip")[0].licence == "see its card"
    model, problems = look("mae", tmp_path / "weights.pth", **{"features.extractors": ["mae"]})
    assert model.state == "incomplete" and "a folder of the model is wanted" in problems[0]
    model, problems = look("dino", "", **{"features.extractors": ["dino"]})
    assert "models.dino" in problems[0] and model.state == "missing"


def test_the_cutler_checkpoint_and_its_library(tmp_path, monkeypatch):
    path = tmp_path / "cutler_cascade_final.pth"
    path.write_bytes(b"weights")

    def cutler(where):
        report = inspect(load_profile("mini", {"models.cutler": str(where), "masks.segmenter": "cutler"}))
        return by_field(report)["cutler"], report.problems

    monkeypatch.setattr(doctor, "_version", lambda module, name: "")
    model, (library,) = cutler(path)
    assert (model.state, model.get) == ("file", "") and "detectron2" in library and "conda" in library
    monkeypatch.setattr(doctor, "_version", lambda module, name: "0.6")
    assert cutler(path)[1] == ()
    assert cutler(tmp_path)[0].state == "incomplete"


@pytest.mark.parametrize(("field", "wrong", "extractor"), [
    ("mae", "dino", "mae"), ("dino", "mae", "dino"), ("clip", "groupvit", "clip-keys")])
def test_a_model_of_another_architecture_is_called_wrong(field, wrong, extractor):
    report = inspect(load_profile("mini", {f"models.{field}": f"package:{wrong}", "features.extractors": [extractor]}))
    row = by_field(report)[field]
    assert (row.state, row.here, row.get) == ("wrong model", False, "") and "model_type" in row.detail
    assert any(f"is a wrong model ({row.detail})" in problem and f"models.{field}" in problem for problem in report.problems)


def test_optional_libraries(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda module, name: "")
    plain = {lib["name"]: lib for lib in inspect(load_profile("mini")).libraries}
    assert set(plain) == {"detectron2", "open_clip", "accelerate", "ray"}
    assert not any(lib["needed_by"] for lib in plain.values()) and all(lib["get"] and lib["serves"] for lib in plain.values())
    monkeypatch.undo()
    assert torch.__version__.startswith(doctor._version("torch", "torch")) and doctor._version("torch", "torch")
    assert doctor._version("no_such_module", "x") == ""
    assert doctor._version("json", "no-such-distribution") == "installed"


def test_a_model_library_of_another_version(monkeypatch):
    known = loading._version
    monkeypatch.setattr(loading, "_version", lambda name: "0.39.0" if name == "diffusers" else known(name))
    (problem,) = inspect(load_profile("mini")).problems
    assert "diffusers 0.39.0 is installed" in problem and ">=0.40" in problem
    assert problem in str(inspect(load_profile("mini")))


def test_weights_of_open_clip(hub, tmp_path, tiny_models):
    repository = "timm/vit_base_patch16_clip_224.openai"

    def found(source):
        chosen = {"features.extractors": ["open-clip-keys"], "models.open_clip": str(source)}
        return by_field(inspect(load_profile("mini", chosen)))["open_clip"]

    missing = found(repository)
    assert missing.state == "missing" and missing.get == f"hf download {repository}" and missing.used_by == ("extractor open-clip-keys",)
    put(hub, repository, tiny_models / "open_clip")
    assert found(repository).state == "hub cache" and found(tiny_models / "open_clip").state == "folder"
    assert found(tiny_models / "clip").state == "incomplete"  # the same network in transformers' format


def test_uses_follow_the_registries(monkeypatch):
    profile = load_profile("mini", {"features.extractors": ["dino", "clip-keys"], "masks.segmenter": "threshold",
                                    "filters.category": False})
    assert uses(profile) == {"diffusion": ["support images"], "dino": ["extractor dino"], "clip": ["extractor clip-keys"]}
    monkeypatch.setitem(features.EXTRACTORS, "own", Part(lambda profile: None))
    monkeypatch.setitem(masks.SEGMENTERS, "own", Part(lambda profile: None, models=("sam",)))
    own = load_profile("mini", {"features.extractors": ["own"], "masks.segmenter": "own", "filters.category": False, "models.mae": "a/b",
                                "models.dino": "", "models.detector": "", "models.open_clip": ""})
    assert uses(own) == {"diffusion": ["support images"], "sam": ["segmenter own"]}  # of the extractor it is not known
    assert not any("extractor own" in m.used_by for m in inspect(own).models)
    for bad in ({"features.extractors": ["none"]}, {"features.extractors": []}, {"masks.segmenter": "none"}):
        with pytest.raises(ProfileError):
            uses(load_profile("mini", bad))


@pytest.mark.parametrize("arguments, words", [
    (["--profile", "big"], "'big'"), (["--set", "masks.segmenter=none"], "'none'"), (["--set", "support.sise=1"], "support.size"),
    (["--data", "no-set=folder"], "no-set=folder")])
def test_mistakes_are_one_sentence(arguments, words, capsys):
    assert main(["doctor", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("ovdiff: ") and said.err.count("\n") == 1 and words in said.err


def test_data_sets(tmp_path, capsys):
    profile = load_profile("mini")
    report = inspect(profile, [str(MINI_DATA)])
    assert {row["name"]: row["images"] for row in report.data} == {n: len(load_dataset(n)) for n in DATASETS if n.startswith("mini-")}
    assert report.problems == ()
    named = inspect(profile, [f"mini-voc={MINI_DATA}", f"voc={tmp_path}"])
    assert named.data[0]["images"] == len(load_dataset("mini-voc")) and named.data[1]["problem"] in named.problems
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert all(str(folder) in inspect(profile, [str(folder)]).problems[0] for folder in (odd, tmp_path / "none"))
    assert main(["doctor", "--data", str(MINI_DATA)]) == 0 and "mini-context" in capsys.readouterr().out
    assert main(["doctor", "--data", str(odd)]) == 1 and "holds no data set" in capsys.readouterr().out


def test_a_device_that_is_not_here_and_folders_to_be(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = inspect(load_profile("mini", {"models.device": "cuda"}), library=tmp_path / "not" / "yet")
    assert "models.device" in report.problems[0] and report.machine["device"] == "" and "not here" in str(report)
    assert report.machine["library"] == str(tmp_path / "not" / "yet") and not (tmp_path / "not").exists()
    assert report.machine["library_free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


# ------------------------------------------------------------------ costs and published weights

def test_channels_are_those_of_the_extractors(tiny_profile):
    for profile in (tiny_profile, load_profile("mini")):
        profile = profile.override({"features.extractors": ["sd", "clip-keys"]})
        models = inspect(profile).models
        for name, extractor in build_extractors(profile).items():
            assert doctor.channels(profile, name, models) == extractor.channels


def test_costs_of_the_paper():
    paper = load_profile("paper")
    models = inspect(paper).models
    assert [doctor.channels(paper, n, models) for n in ("sd", "dino", "clip-keys")] == [7680, 768, 768]
    # Table A.5: without the first or the last layer, the mid block, Up-1, Up-2.
    for gone, left in (("down_blocks.0", 7360), ("up_blocks.3", 7360), ("mid_block", 6400), ("up_blocks.1", 3840), ("up_blocks.2", 5760)):
        layers = [layer for layer in paper.features.sd_layers if not layer.startswith(gone)]
        assert doctor.channels(paper.override({"features.sd_layers": layers}), "sd", models) == left
    table = doctor.expected(paper, models)
    assert "130 float32 vectors" in table["prototypes on disk"] and size_text(130 * 7680 * 4) in table["prototypes on disk"]
    assert size_text(32 * 64 * 64 * 7680 * 4) in table["memory"] and "about 110 s a class" in table["time to build"]
    fewer = {"support.size": 16, "prototypes.kinds": ["class", "part"], "prototypes.background": False}
    half = doctor.expected(paper.override(fewer), models)
    assert "about 55 s a class" in half["time to build"] and "33 float32 vectors" in half["prototypes on disk"]
    assert "time to build" not in doctor.expected(load_profile("mini"), inspect(load_profile("mini")).models)
    odd = paper.override({"features.sd_layers": ["strange", "up_blocks.9.attentions.0", "up_blocks.3.attentions.2"]})
    assert doctor.channels(odd, "sd", models) == 320


def test_commands_fetch_what_the_loaders_read():
    for identifier in PUBLISHED:
        words = shlex.split(how_to_get(identifier))
        assert words[:3] == ["hf", "download", identifier] or (words[0] == "curl" and words[-1].endswith(identifier))
    words = shlex.split(how_to_get(SD))
    patterns = [words[i + 1] for i, word in enumerate(words) if word == "--include"]
    for names in FILES["diffusion"]:
        assert any(fnmatch(name, pattern) for name in names for pattern in patterns), names
    assert not any(fnmatch(name, pattern) for pattern in patterns for name in (
        "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"))
    assert how_to_get("someone/model").startswith("hf download someone/model") and how_to_get("/a/folder") == how_to_get("./x") == ""
    for name in ("paper", "official"):
        table = load_profile(name).to_dict()["models"]
        for field in ("diffusion", "clip", "dino", "mae", "cutler", "sam", "grounding", "groupvit"):
            assert doctor.published(table[field]) is not None, field


def test_sizes_as_text():
    assert [size_text(n) for n in (None, 0, 999, 1000, 12_345, 399_360, 3_993_600, 25_165_824, 4_265_000_000, 123 * 10**9)] == [
        "?", "0 B", "999 B", "1.00 kB", "12.3 kB", "399 kB", "3.99 MB", "25.2 MB", "4.26 GB", "123 GB"]
