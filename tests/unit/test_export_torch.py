"""torch.export archives: the model's features for any number of images, in a process without quietvit."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

import quietvit
from exported import KINDS, assert_same, extractor_of, run_without_quietvit
from quietvit.weights.export.target import ExportOptions
from quietvit.weights.export.to_torch import TARGET


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_models(kind: str, tmp_path: Path) -> None:
    e = extractor_of(kind) if kind == "dense" else extractor_of(kind, depth=1)
    options = ExportOptions(sizes=((16, 24),))
    assert TARGET.refusal(e, options) is None
    TARGET.write(e, tmp_path, options)
    assert [f.name for f in tmp_path.iterdir()] == ["model_16x24.pt2"]
    assert_same(e, TARGET.reopen(tmp_path, options), (16, 24), TARGET.tolerance)


def test_several_sizes_lie_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    e = extractor_of("vit")
    options = ExportOptions(sizes=((16, 16), (32, 32)))
    TARGET.write(e, tmp_path, options)
    opened = TARGET.reopen(tmp_path, options)
    assert capfd.readouterr() == ("", "")
    assert TARGET.sizes(e, options) == options.sizes
    for size in options.sizes:
        assert_same(e, opened, size, TARGET.tolerance)
    with pytest.raises(ValueError, match="no graph for 24x24 pixels here; there are some for 16x16, 32x32"):
        opened(torch.randn(1, 3, 24, 24))


def test_the_card_code_runs_without_quietvit(tmp_path: Path) -> None:
    e = extractor_of("vit")
    TARGET.write(e, tmp_path, ExportOptions())
    images = torch.randn(3, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    usage = TARGET.usage(e, ExportOptions())
    code = f"""{usage}
print(*(f"{{name}} {{list(globals()[name].shape)}}" for name in ("cls", "registers", "patches", "logits")), sep="; ")
torch.save(dict(model(torch.load("images.pt", weights_only=True))), "outputs.pt")
assert not any(name.startswith("quietvit") for name in sys.modules)
"""
    printed = run_without_quietvit(code, tmp_path)
    assert printed == "cls [2, 24]; registers [2, 3, 24]; patches [2, 4, 4, 24]; logits [2, 5]\n"
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    ours = e(images)
    for name, value in (("cls", ours.cls), ("registers", ours.registers), ("patches", ours.patches)):
        torch.testing.assert_close(outputs[name], value, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(outputs["logits"], e.logits(images), atol=1e-5, rtol=0.0)


def test_an_archive_describes_itself_and_not_this_machine(tmp_path: Path) -> None:
    e = extractor_of("t2t")
    TARGET.write(e, tmp_path, ExportOptions())
    extra = {"quietvit.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    about = json.loads(extra["quietvit.json"])
    assert (about["size"], about["mean"], about["provenance"]) == ([16, 16], [0.5, 0.4, 0.3], e.meta["provenance"])
    assert not any(p.requires_grad for p in program.parameters())
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            for root in (Path(quietvit.__file__).parent, Path(torch.__file__).parent, Path(__file__).parents[2]):
                assert str(root).encode() not in content, name


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    e = extractor_of("vit", depth=1)
    with pytest.raises(FileNotFoundError, match=r"no model.pt2"):
        TARGET.reopen(tmp_path, ExportOptions())
    TARGET.write(e, tmp_path, ExportOptions())
    whole = (tmp_path / "model.pt2").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-30], b"", b"a text"):
        (tmp_path / "model.pt2").write_bytes(content)
        with pytest.raises(ValueError, match=rf"model.pt2 \({len(content)} bytes\) is truncated or no archive"):
            TARGET.reopen(tmp_path, ExportOptions())
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("archive/notes.txt", "another archive")
    with pytest.raises(ValueError, match="no archive of quietvit: export the model again"):
        TARGET.reopen(tmp_path, ExportOptions())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        TARGET.write(extractor_of("vit", depth=1), tmp_path, ExportOptions())


def test_what_opening_an_archive_means_is_said() -> None:
    e = extractor_of("vit")
    assert "open only" in TARGET.usage(e, ExportOptions())
    assert "hidden in an archive" in TARGET.remarks(e, ExportOptions())
    assert "16 x 16 pixels" in TARGET.remarks(e, ExportOptions())
    assert "use 16 or 20" in str(TARGET.refusal(e, ExportOptions(sizes=((17, 16),))))
