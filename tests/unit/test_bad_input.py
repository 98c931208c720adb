"""What a newcomer gets wrong, typed at the command line: exit code 2, one clear message, nothing half-written."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quietvit.backbones import make_backbone
from quietvit.weights import save_teacher
from quietvit_launch.cli import main

RECIPE = """
model: {size: nano, embed_dim: 16, depth: 1, num_heads: 2, patch_size: 4, num_registers: 1, layer_scale: 0.0}
data: {workers: 0}
crops: {global_size: 16, local_size: 8, num_local: 1, blur: none}
objective: {head: {num_prototypes: 8, hidden_dim: 8, bottleneck_dim: 4}}
train: {steps: 3, batch_size: 4, threads: 1, device: cpu, precision: fp32}
health: {images: 2, bank: 2, every: 2}
checkpoint: {every: 2}
"""


def jpeg(seed: int, size: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


class Shell:
    """Types commands in an empty folder with a recipe and twelve images, and looks at what comes back."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.images, self.run, self.recipe = folder / "images", folder / "run", folder / "nano.yaml"
        self.recipe.write_text(RECIPE)
        self.images.mkdir()
        for i in range(12):
            (self.images / f"{i:02d}.jpg").write_bytes(jpeg(i))

    def __call__(self, *words: object) -> tuple[int, str]:
        self.capsys.readouterr()
        try:
            code = main([str(w) for w in words])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        return code, self.capsys.readouterr().err

    def train(self, *settings: str, out: Path | None = None) -> tuple[int, str]:
        return self("train", self.recipe, f"data.path={self.images}", *settings, "--out", out or self.run)

    def refused(self, answer: tuple[int, str], *words: str) -> str:
        """Exit code 2 and one message, which says all of `words`."""
        code, message = answer
        assert code == 2
        assert "Traceback" not in message
        assert message.count("quietvit: ") == 1
        assert [w for w in words if w not in message] == []
        return message

    def files(self) -> list[str]:
        """Files other than the recipe and the images. (The cache of indices lies elsewhere.)"""
        found = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        return sorted(p for p in found if p != self.recipe.name and not p.startswith("images/"))


@pytest.fixture
def shell(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Shell:  # fmt: skip
    monkeypatch.setenv("QUIETVIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    return Shell(tmp_path, capsys)


@pytest.fixture
def model(shell: Shell) -> Path:
    torch.manual_seed(0)
    backbone = make_backbone("vit", embed_dim=8, depth=2, num_heads=2, patch_size=4, image_size=16)
    folder = shell.folder.parent / f"{shell.folder.name}-model"
    save_teacher(folder, backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=16, provenance={})
    return folder


# ---- settings


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.stepz=1", ["unknown setting 'train.stepz'", "Did you mean 'train.steps'?"]),
        ("steps=1", ["unknown setting 'steps'", "Did you mean 'train.steps'?"]),
        ("trian.steps=1", ["unknown setting 'trian'", "Did you mean 'train'?"]),
        ("1000", ["'1000' is not a setting", "key=value"]),
        ("train.steps=many", ["'train.steps' takes", "'many'"]),
        ("train.steps=[1", ["not valid YAML"]),
        ("crops.local_size=10", ["crops.local_size=10 is not a multiple of the patch (4 px)", "8 or 12"]),
        ("train.batch_size=64", ["holds 12 images, fewer than one batch of 64", "train.batch_size=8"]),
        ("data.path=nowhere", ["nowhere does not exist"]),
        ("data.path=null", ["needs a path"]),
        ("data.source=foldr", ["unknown data source 'foldr'", "did you mean 'folder'?"]),
        ("data.split=val", ["no images for split 'val'", "found no sub-folders"]),
        ("train.device=tpu", ["'tpu'", "cpu, cuda or mps"]),
        ("model.size=enormous", ["enormous", "nano"]),
        ("objective.method=dino9", ["dino9", "dinov2"]),
        ("train.steps=0", ["train.steps=0", "at least one step"]),
    ],
)
@pytest.mark.parametrize("behind_out", [False, True])
def test_settings(shell: Shell, setting: str, words: list[str], behind_out: bool) -> None:
    settings = [f"data.path={shell.images}", setting]
    out = ["--out", shell.run]
    shell.refused(shell("train", shell.recipe, *(out + settings if behind_out else settings + out)), *words)
    assert not shell.run.exists()


def test_a_setting_written_as_an_option(shell: Shell) -> None:
    code, message = shell("train", "quickstart", "--steps", "5", "--out", shell.run)
    assert code == 2
    assert "unrecognized arguments: --steps" in message
    assert "key=value" in message


def test_unknown_recipes(shell: Shell) -> None:
    shell.refused(shell("train", "quickstrat", "--out", shell.run), "Did you mean 'quickstart'?", "Recipes: ")
    shell.refused(shell("train", "mine.yaml", "--out", shell.run), "there is no recipe file 'mine.yaml'")
    shell.refused(shell("recipes", "quickstrat"), "Did you mean 'quickstart'?")
    shell.recipe.write_text("just words")
    shell.refused(shell.train(), "unknown setting 'just words'", "Settings here: ")
    assert shell.files() == []


# ---- data


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder.mkdir(), ["no images in", "there are no files at all", ".jpg"]),
        (
            lambda folder: [folder.mkdir(), (folder / "a.txt").write_text("x"), (folder / "b.raw").write_text("x")],
            ["no images in", "found 2 other files (1 x .raw, 1 x .txt)"],
        ),
        (lambda file: file.write_bytes(jpeg(0)), ["is a file of kind (none)", "a folder of images"]),
    ],
    ids=["empty", "no images", "one file"],
)
def test_folders_without_images(shell: Shell, make: Callable[[Path], object], words: list[str]) -> None:
    make(shell.folder / "mine")
    shell.refused(shell.train(f"data.path={shell.folder / 'mine'}"), *words)
    assert not shell.run.exists()


def make_tar(shell: Shell) -> bytes:
    with tarfile.open(shell.folder / "whole.tar", "w") as archive:
        archive.add(shell.images, "images")
    return (shell.folder / "whole.tar").read_bytes()


def test_a_tar_cut_in_the_middle(shell: Shell) -> None:
    whole = make_tar(shell)
    cut = shell.folder / "cut.tar"
    cut.write_bytes(whole[: len(whole) // 2])
    shell.refused(shell.train(f"data.path={cut}"), "cut.tar: cut at byte", "allow_truncated=true")
    assert not shell.run.exists()
    assert shell.train(f"data.path={cut}", "data.options.allow_truncated=true") == (0, "")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_listed_and_training_goes_on(shell: Shell, workers: int) -> None:
    (shell.images / "05.jpg").write_bytes(jpeg(5)[:300])
    assert shell.train(f"data.workers={workers}", "data.ram_cache_mb=0") == (0, "")
    name, reason = (shell.run / "unreadable.txt").read_text().rstrip("\n").split("\t")
    assert name == "05.jpg"
    assert "truncated" in reason
    assert (shell.run / "teacher.safetensors").is_file()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_end_the_run(shell: Shell, workers: int) -> None:
    for i in range(12, 24):
        (shell.images / f"{i:02d}.jpg").write_bytes(jpeg(i))
    # Ten are never too many, whatever their share; a batch of 24 meets all of them.
    for i in range(11):
        (shell.images / f"{i:02d}.jpg").write_bytes(b"no image")
    settings = ["train.batch_size=24", f"data.workers={workers}"]
    shell.refused(shell.train(*settings), "11 of 24 images cannot be read", "unreadable.txt", "data.max_bad_share")
    assert len((shell.run / "unreadable.txt").read_text().splitlines()) == 11
    assert not (shell.run / "checkpoints").exists()
    for i in range(11):  # as the message asks: repaired, and the same command again
        (shell.images / f"{i:02d}.jpg").write_bytes(jpeg(i))
    (shell.images / "11.jpg").write_bytes(b"no image")
    assert shell.train(*settings) == (0, "")


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_image_at_all(shell: Shell, workers: int) -> None:
    # With one worker the error comes from another process; the message is the same.
    for file in shell.images.iterdir():
        file.write_bytes(b"no image")
    message = shell.refused(shell.train(f"data.workers={workers}"), "cannot be read", ".jpg: ")
    assert "worker" not in message
    assert len(message.splitlines()) == 1


# ---- the run folder


@pytest.mark.parametrize("below", ["", "deeper/run"])
def test_a_file_in_the_place_of_the_run_folder(shell: Shell, below: str) -> None:
    shell.run.write_text("my notes")
    shell.refused(shell.train(out=shell.run / below), "cannot write the run folder")
    assert shell.run.read_text() == "my notes"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(shell: Shell) -> None:
    shell.run.mkdir(mode=0o500)
    shell.refused(shell.train(), "cannot write the run folder", "Permission denied")
    shell.refused(shell.train(out=shell.run / "deeper"), "cannot write the run folder", "Permission denied")


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """All flushes to the disk after the first `after` fail as they do on a full one."""
    count = 0

    def fsync(_: int) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fsync)


def test_a_disk_that_is_full_from_the_start(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_the_disk(monkeypatch, 0)
    shell.refused(shell.train(out=shell.folder / "new" / "run"), "cannot write the run folder", "No space left")
    assert not (shell.folder / "new").exists()


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_a_disk_that_fills_up_later(shell: Shell, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    with monkeypatch.context() as full:
        fill_the_disk(full, after)
        shell.refused(shell.train(), "the disk is full")
    left = [p.name for p in shell.run.rglob("*")] if shell.run.exists() else []
    assert [name for name in left if name.startswith((".", "step_"))] == []
    assert shell.train() == (0, "")  # the same command, once there is space
    assert (shell.run / "checkpoints" / "step_00000003").is_dir()


def test_a_first_attempt_that_failed_does_not_spoil_the_folder(shell: Shell) -> None:
    shell.refused(shell.train("train.device=tpu"), "tpu")
    shell.refused(shell.train("train.batch_size=64"), "fewer than one batch")
    assert shell.train("train.batch_size=6") == (0, "")
    shell.refused(shell.train("optim.lr=1"), "holds a run with other settings", "optim.lr: 0.004 -> 1.0", "--out")


def test_a_checkpoint_of_another_architecture(shell: Shell) -> None:
    assert shell.train() == (0, "")
    other = shell.folder / "other"
    shutil.copytree(shell.run / "checkpoints", other / "checkpoints")  # as if from elsewhere: without its config.yaml
    told = "the checkpoint is of another architecture"
    shapes = "student.backbone.register_tokens: (1, 1, 16) in the checkpoint, (1, 2, 16) in the model"
    shell.refused(shell.train("model.num_registers=2", out=other), told, shapes)
    shell.refused(shell.train("model.depth=2", out=other), told, "missing student.backbone.blocks.1.", "and ")
    assert shell.train(out=other) == (0, "")
    shell.refused(shell.train("model.depth=2"), "holds a run with other settings", "model.depth: 1 -> 2")


def test_a_damaged_checkpoint(shell: Shell) -> None:
    assert shell.train() == (0, "")
    [state] = (shell.run / "checkpoints" / "step_00000003" / "state").glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:1000])
    shell.refused(shell.train(), "damaged", "Remove it to resume from step_00000002")


# ---- eval, embed, export


def test_a_model_that_is_not_there(shell: Shell, model: Path) -> None:
    data, out = ("--data", "scenes"), ("--out", shell.folder / "out.npz")
    for place, words in {
        "nowhere": "there is no model at",
        str(shell.images): "looked for teacher.safetensors and checkpoints/step_*/teacher.safetensors, found 00.jpg",
        str(shell.recipe): "a model is a run folder, a teacher.safetensors, or weights of DINOv2, T2T-ViT, open_clip",
    }.items():
        shell.refused(shell("eval", "knn", "--model", place, *data), words)
        shell.refused(shell("embed", shell.images, "--model", place, *out), words)
        shell.refused(shell("export", place, "--out", shell.folder / "exported"), words)
    for words in (["eval", "knn", *data], ["embed", shell.images, *out]):
        code, message = shell(*words)
        assert code == 2
        assert "the following arguments are required: --model" in message
    short = shell.folder / "short.safetensors"
    short.write_bytes((model / "teacher.safetensors").read_bytes()[:-100])
    shell.refused(shell("export", short, "--out", shell.folder / "exported"), "is truncated", "copy it again")
    assert shell.files() == ["short.safetensors"]


def test_evaluation(shell: Shell, model: Path) -> None:
    def eval_(*words: object, tasks: str = "knn") -> tuple[int, str]:
        return shell("eval", tasks, "--model", model, "--out", shell.folder / "cards", "--device", "cpu", *words)

    split = ("--test-split", "train")
    shell.refused(eval_("--data", "scenes", tasks="knm"), "unknown task 'knm'", "knn, linear")
    shell.refused(eval_("--data", "nowhere"), "nowhere does not exist")
    shell.refused(eval_("--data", shell.images), "no images for split 'val'")
    shell.refused(eval_("--data", shell.images, *split), "has no label set 'class'; its label sets: none")
    shell.refused(eval_("--data", "scenes", "--label", "colour"), "no label set 'colour'", "background")
    shell.refused(eval_("--data", "scenes", "--size", "18"), "18 is no multiple of 4", "use 16 or 20")
    for option in ("--size", "--limit-train", "--limit-test"):
        code, message = eval_("--data", "scenes", option, "0")
        assert code == 2
        assert f"{option}: '0' is not a whole number of at least 1" in message
    assert shell.files() == []
    assert eval_("--data", "scenes", "--limit-train", "20", "--limit-test", "10") == (0, "")
    assert len(list((shell.folder / "cards").glob("knn_class_model_*.json"))) == 1


def test_evaluation_into_a_file(shell: Shell, model: Path) -> None:
    (shell.folder / "cards").write_text("my notes")
    words = ("eval", "knn", "--model", model, "--data", "scenes", "--out", shell.folder / "cards")
    shell.refused(shell(*words), "cards: ", "File exists")
    assert (shell.folder / "cards").read_text() == "my notes"


def test_embedding(shell: Shell, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(out: Path, *words: object, images: Path = shell.images) -> tuple[int, str]:
        return shell("embed", images, "--model", model, "--out", out, "--device", "cpu", *words)

    out = shell.folder / "out.npz"
    shell.refused(embed(shell.folder / "out.csv"), "out.csv", "ends in .npz or .parquet")
    shell.refused(embed(out, images=shell.folder / "nowhere"), "nowhere does not exist")
    shell.refused(embed(out, "--size", "18"), "18 is no multiple of 4")
    shell.refused(embed(shell.recipe / "out.npz"), "nano.yaml")
    code, message = embed(out, "--batch-size", "0")
    assert code == 2
    assert "--batch-size: '0'" in message
    with monkeypatch.context() as full:
        fill_the_disk(full, 0)
        shell.refused(embed(out), "the disk is full")
    assert shell.files() == []
    assert embed(out) == (0, "")
    assert shell.files() == ["out.npz"]


def test_exporting_over_something(shell: Shell, model: Path) -> None:
    shell.refused(shell("export", model, "--out", shell.images), "is not empty: choose a new folder")
    shell.refused(shell("export", model, "--out", shell.recipe / "new"), "nano.yaml")
    assert shell.files() == []
