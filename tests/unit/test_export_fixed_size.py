"""What the exports of fixed size share: sizes and file names, refusals, the traced copy, and quiet."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch

from exported import KINDS, extractor_of
from quietvit.weights.export.fixed_size import (
    FixedSize,
    OpenedGraphs,
    description,
    graph_files,
    output_shapes,
    quietly,
    size_refusal,
    sizes_as_text,
    written_files,
    written_sizes,
)
from quietvit.weights.export.target import ExportOptions
from quietvit.weights.native import weights_hash


def test_the_own_size_alone_has_the_plain_name() -> None:
    e = extractor_of("vit")
    assert graph_files(e, ExportOptions(), ".onnx") == {"model.onnx": (16, 16)}
    assert graph_files(e, ExportOptions(sizes=((16, 16),)), ".pt2") == {"model.pt2": (16, 16)}
    assert graph_files(e, ExportOptions(sizes=((24, 16),)), ".onnx") == {"model_24x16.onnx": (24, 16)}
    both = ExportOptions(sizes=((16, 16), (16, 24), (16, 16)))
    assert graph_files(e, both, ".onnx") == {"model_16x16.onnx": (16, 16), "model_16x24.onnx": (16, 24)}
    assert written_sizes(e, both) == ((16, 16), (16, 24))
    assert "16 x 16 or 16 x 24 pixels" in sizes_as_text(e, both)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((18, 16), "size 18x16: the height is no multiple of 4; use 16 or 20"),
        ((16, 3), "size 16x3: the width is no multiple of 4; use 4"),
        ((0, 16), "size 0x16: the height is no multiple of 4; use 4"),
        ((-8, 16), "size -8x16: the height is no multiple of 4; use 4"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_the_nearest(size: tuple[int, int], said: str) -> None:
    assert size_refusal(extractor_of("vit"), ExportOptions(sizes=((16, 16), size))) == said


def test_a_grid_that_the_position_table_cannot_be_resized_to_is_refused() -> None:
    e = extractor_of("vit", pos_interpolation="offset", pos_offset=0.0, image_size=148)
    said = size_refusal(e, ExportOptions(sizes=((156, 156),)))  # 37 -> 39: DINOv2's pull request 378
    assert said is not None
    assert "size 156x156: pos_interpolation" in said
    assert "use pos_offset: 0.1" in said
    assert size_refusal(e, ExportOptions(sizes=((148, 148),))) is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_traced_copy_computes_what_the_model_does(kind: str) -> None:
    e = extractor_of(kind)
    for size in ((16, 16), (32, 32), (16, 24)):
        images = torch.randn(2, 3, *size)
        outputs, ours = FixedSize(e, size)(images), e(images)
        expected = {"cls": ours.cls, "registers": ours.registers, "patches": ours.patches}
        if e.num_classes:
            expected["logits"] = e.logits(images)
        if not expected["registers"].numel():
            del expected["registers"]
        assert list(outputs) == list(expected) == list(output_shapes(e, size))
        for name, value in expected.items():
            assert torch.equal(outputs[name], value), (kind, size, name)
            assert value.shape[1:] == output_shapes(e, size)[name]


def test_the_model_itself_stays_as_it_is() -> None:
    e = extractor_of("vit")
    before, grid, options = weights_hash(e.backbone), e.backbone.native_grid, copy.copy(e.backbone.options)
    model = FixedSize(e, (24, 32))
    assert model.backbone.native_grid == (6, 8)
    assert (weights_hash(e.backbone), e.backbone.native_grid, e.backbone.options) == (before, grid, options)
    assert not any(p.requires_grad for p in model.parameters())


def test_attention_is_pytorchs_own_whatever_the_model_was_made_with() -> None:
    images = torch.randn(2, 3, 16, 16)
    foreign = extractor_of("vit", attention="varlen")  # CUDA only
    with pytest.raises(ValueError, match="attention 'varlen' cannot run here"):
        foreign(images)
    assert torch.equal(FixedSize(foreign, (16, 16))(images)["cls"], extractor_of("vit")(images).cls)


def test_half_precision_weights_are_exported_in_single_precision() -> None:
    e = extractor_of("vit")
    e.backbone.bfloat16()
    model = FixedSize(e, (24, 24))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.backbone.blocks[0].norm1.weight, e.backbone.blocks[0].norm1.weight.float())


def test_the_description_names_size_and_normalisation() -> None:
    about = description(extractor_of("vit"), (24, 16))
    assert (about["size"], about["stride"], about["mean"], about["std"]) == (
        [24, 16],
        4,
        [0.5, 0.4, 0.3],
        [0.2, 0.2, 0.3],
    )
    assert about["provenance"]["data"] == "pictures"
    assert about["backbone"]["name"] == "vit"


def test_opened_graphs_are_told_by_size() -> None:
    opened = OpenedGraphs({(8, 8): lambda x: {"cls": x[:, :, 0, 0], "patches": x.permute(0, 2, 3, 1)}})
    images = torch.randn(2, 3, 8, 8)
    features = opened(images)
    assert features.registers.shape == (2, 0, 3)
    assert torch.equal(features.cls, images[:, :, 0, 0])
    with pytest.raises(ValueError, match="no graph for 8x12 pixels here; there are some for 8x8"):
        opened(torch.randn(1, 3, 8, 12))
    with pytest.raises(ValueError, match="no output 'logits'"):
        opened.logits(images)


def test_only_graphs_are_taken_for_graphs(tmp_path: Path) -> None:
    for name in ("model_8x16.onnx", "model.onnx.data", "other.onnx", "model_8.onnx", "model.pt2"):
        (tmp_path / name).touch()
    assert [f.name for f in written_files(tmp_path, ".onnx")] == ["model_8x16.onnx"]
    for folder in (tmp_path / "nowhere", tmp_path / "model.pt2"):
        with pytest.raises(FileNotFoundError, match=r"no model.pt2 or model_HEIGHTxWIDTH.pt2 in"):
            written_files(folder, ".pt2")


def chatter() -> None:
    print("step 1")
    print("step 2", file=sys.stderr)
    warnings.warn("careful", stacklevel=1)
    logging.getLogger("exporter").error("logged")


def test_chatter_goes_nowhere(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as seen, quietly("the export failed"):
        chatter()
    assert capfd.readouterr() == ("", "")
    assert not seen
    assert not caplog.records
    logging.getLogger("exporter").error("heard again")
    assert len(caplog.records) == 1


def fail_with_chatter() -> None:
    with quietly("the export failed"):
        chatter()
        raise RuntimeError("no such operator\nand a long story")


def test_chatter_is_noted_when_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="the export failed") as failed:
        fail_with_chatter()
    assert str(failed.value) == "the export failed (no such operator)"
    assert failed.value.__notes__ == ["step 1\nstep 2"]
    assert isinstance(failed.value.__cause__, RuntimeError)
    logging.getLogger("exporter").error("heard again")
    assert len(caplog.records) == 1


def test_a_full_disk_is_not_the_exporters_fault() -> None:
    with pytest.raises(OSError, match="No space left"), quietly("the export failed"):
        raise OSError(28, "No space left on device")
