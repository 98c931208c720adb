"""ONNX graphs: the model's features in onnxruntime for any number of images; nothing is resized in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import quietvit
from exported import assert_same, extractor_of, run_without_quietvit
from quietvit.weights.export import to_onnx
from quietvit.weights.export.target import ExportOptions
from quietvit.weights.export.to_onnx import TARGET

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SIZES = ((16, 16), (32, 32), (16, 24))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    TARGET.write(extractor_of("vit"), folder, ExportOptions(sizes=SIZES))
    return folder


def test_features_and_scores_are_the_models_at_every_size(written: Path) -> None:
    e = extractor_of("vit")
    opened = TARGET.reopen(written, ExportOptions(sizes=SIZES))
    assert TARGET.sizes(e, ExportOptions(sizes=SIZES)) == SIZES
    for size in SIZES:
        assert_same(e, opened, size, TARGET.tolerance)
    with pytest.raises(ValueError, match="no graph for 24x24 pixels here"):
        opened(torch.randn(1, 3, 24, 24))


@pytest.mark.parametrize("kind", ["plain", "clip", "t2t", "official", "transformer"])
def test_other_architectures(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    e = extractor_of(kind, depth=1)
    options = ExportOptions(sizes=((16, 24),))
    assert TARGET.refusal(e, options) is None
    TARGET.write(e, tmp_path, options)
    opened = TARGET.reopen(tmp_path, options)
    assert capfd.readouterr() == ("", "")
    assert_same(e, opened, (16, 24), TARGET.tolerance)
    inside_one_file(tmp_path / "model_16x24.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "gated", "ghost"])
def test_variants_of_the_blocks(kind: str, tmp_path: Path) -> None:
    e = extractor_of(kind)
    TARGET.write(e, tmp_path, ExportOptions())
    assert_same(e, TARGET.reopen(tmp_path, ExportOptions()), (16, 16), TARGET.tolerance)
    inside_one_file(tmp_path / "model.onnx")


def inside_one_file(file: Path) -> None:
    """Standard operators only, none of which resizes, and no weights elsewhere; nothing of this machine."""
    assert [f.name for f in file.parent.iterdir() if f.stem == file.stem] == [file.name]
    model = onnx.load(file, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert not model.functions
    operators = {node.op_type for node in model.graph.node}
    assert {"MatMul", "LayerNormalization", "Softmax"} <= operators
    assert not operators & {"Resize", "Upsample", "GridSample", "If", "Loop", "Scan"}
    assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
    content = file.read_bytes()
    for root in (Path(quietvit.__file__).parent, Path(torch.__file__).parent, Path(__file__).parents[2]):
        assert str(root).encode() not in content


def test_names_shapes_and_metadata(written: Path) -> None:
    assert sorted(f.name for f in written.iterdir()) == ["model_16x16.onnx", "model_16x24.onnx", "model_32x32.onnx"]
    inside_one_file(written / "model_16x24.onnx")
    model = onnx.load(written / "model_16x24.onnx")

    def axes(value: onnx.ValueInfoProto) -> list[str | int]:
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    assert {i.name: axes(i) for i in model.graph.input} == {"images": ["batch", 3, 16, 24]}
    assert {o.name: axes(o) for o in model.graph.output} == {
        "cls": ["batch", 24],
        "registers": ["batch", 3, 24],
        "patches": ["batch", 4, 6, 24],
        "logits": ["batch", 5],
    }
    about = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert (about["mean"], about["std"], about["size"], about["stride"]) == (
        [0.5, 0.4, 0.3],
        [0.2, 0.2, 0.3],
        [16, 24],
        4,
    )
    assert about["provenance"] == {"seed": 0, "data": "pictures"}
    assert about["backbone"]["arguments"]["num_registers"] == 3


def test_the_card_code_runs_without_quietvit(written: Path) -> None:
    e = extractor_of("vit")
    images = torch.randn(3, 3, 16, 24)
    np.save(written / "images.npy", images.numpy())
    usage = TARGET.usage(e, ExportOptions(sizes=((16, 24),)))
    code = f"""{usage}
print(*(f"{{name}} {{globals()[name].shape}}" for name in names), sep="; ")
np.savez("outputs.npz", **dict(zip(names, session.run(names, {{"images": np.load("images.npy")}}))))
assert not any(name.startswith(("quietvit", "torch")) for name in sys.modules)
"""
    try:
        printed = run_without_quietvit(code, written)
        assert printed == "cls (2, 24); registers (2, 3, 24); patches (2, 4, 6, 24); logits (2, 5)\n"
        with np.load(written / "outputs.npz") as outputs:
            ours = e(images)
            for name, value in (("cls", ours.cls), ("registers", ours.registers), ("patches", ours.patches)):
                assert np.abs(outputs[name] - value.numpy()).max() < 1e-4, name
    finally:
        for name in ("images.npy", "outputs.npz"):
            (written / name).unlink(missing_ok=True)


def test_weights_too_great_for_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "ONE_FILE_BYTES", 10_000)
    e = extractor_of("vit", depth=1)
    TARGET.write(e, tmp_path, ExportOptions())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert_same(e, TARGET.reopen(tmp_path, ExportOptions()), (16, 16), TARGET.tolerance)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ValueError, match="truncated or no ONNX for onnxruntime"):
        TARGET.reopen(tmp_path, ExportOptions())


def test_a_damaged_file_is_named(written: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model.onnx"):
        TARGET.reopen(tmp_path, ExportOptions())
    whole = (written / "model_16x16.onnx").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], b"", b"a text"):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(ValueError, match=rf"model.onnx \({len(content)} bytes\) is truncated or no ONNX"):
            TARGET.reopen(tmp_path, ExportOptions())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        TARGET.write(extractor_of("vit", depth=1), tmp_path, ExportOptions())


def test_what_torch_cannot_export_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        print("[torch.onnx] Obtain model graph... fails")
        raise RuntimeError("no decomposition for aten.something")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ValueError, match=r"cannot export this model to ONNX.*\(no decomposition") as failed:
        TARGET.write(extractor_of("vit", depth=1), tmp_path, ExportOptions())
    assert failed.value.__notes__ == ["[torch.onnx] Obtain model graph... fails"]
    assert not list(tmp_path.iterdir())


def test_refusals_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    e = extractor_of("vit")
    assert TARGET.refusal(e, ExportOptions()) is None
    assert "use 16 or 20" in str(TARGET.refusal(e, ExportOptions(sizes=((17, 16),))))
    assert "16 x 16 pixels" in TARGET.remarks(e, ExportOptions())
    monkeypatch.setattr(to_onnx, "find_spec", lambda name: None if name != "onnx" else object())
    assert TARGET.refusal(e, ExportOptions()) == (
        "ONNX needs onnxscript, onnxruntime, not installed here: pip install 'quietvit[onnx]'"
    )
