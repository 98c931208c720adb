"""Test-time registers on models whose outliers are planted: the units that make them and all effects are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from planted import ANTI_MARK, MARK, SLOPE, STRENGTH, TARGET, expected_norms, planted_vit
from quietvit.backbones import Trunk, make_backbone
from quietvit.backbones.cost import count_macs, count_parameters
from quietvit.config.adopt import adopt
from quietvit.config.load import ConfigError, load_config
from quietvit.nn.register_neurons import move_to_registers, neurons_text, parse_neurons
from quietvit.weights import BackboneExtractor, load, random_like, save_teacher
from quietvit.weights.export import export_model
from quietvit.weights.export.plain_code import needs_quietvit
from quietvit.weights.export.plain_vit import not_a_plain_vit
from quietvit.weights.retrofit import add_test_time_registers, find_register_neurons

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
AMOUNT, BLOCK = 60.0, 2
MARKED = (5, 11)


def extractor_of(backbone: torch.nn.Module, name: str = "vit") -> BackboneExtractor:
    meta = {
        "backbone": {"name": name, "arguments": backbone.arguments},
        "normalisation": {"mean": MEAN, "std": STD},
        "image_size": 32,
        "provenance": {"seed": 3},
    }
    return BackboneExtractor(backbone, meta, device=torch.device("cpu"))


def images(batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 32, 32, generator=generator) for _ in range(batches)]


@torch.no_grad()
def planted_swiglu(num_registers: int = 0) -> torch.nn.Module:
    """As planted_vit, with silu(z) - silu(z - 1) for the step: gates 0 and 1, whose values are 1."""
    mlp = planted_vit(positions=MARKED, num_registers=num_registers)
    backbone = make_backbone("vit", **{**mlp.arguments, "ffn": "swiglu"}).eval()
    backbone.load_state_dict({k: v for k, v in mlp.state_dict().items() if ".mlp." not in k}, strict=False)
    for block in backbone.blocks:
        block.mlp.w3.weight.zero_()
    net = backbone.blocks[BLOCK].mlp
    width = net.w3.in_features
    for rows in (slice(0, 2), slice(width, width + 2)):
        net.w12.weight[rows] = 0
    net.w12.weight[:2, MARK] = SLOPE
    net.w12.bias[:2] = torch.tensor([0.0, -1.0])
    net.w12.bias[width : width + 2] = 1
    net.w3.weight[TARGET, :2] = torch.tensor([AMOUNT, -AMOUNT])
    return backbone


@torch.no_grad()
def planted_t2t() -> torch.nn.Module:
    """Marks in the positions of a T2T-ViT, whose stem leaves the three channels alone."""
    torch.manual_seed(0)
    backbone = make_backbone(
        "t2t_vit", patch_size=8, token_dim=16, embed_dim=48, depth=4, num_heads=4, image_size=32, num_registers=0,
        layer_scale=0.0,
    ).eval()  # fmt: skip
    for block in backbone.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.zero_()
    project = backbone.tokens_to_token.project
    project.weight[: TARGET + 1], project.bias[: TARGET + 1] = 0, 0
    for table in (backbone.cls_token, backbone.pos_embed):
        table[..., TARGET] = 0
    sign = torch.full((backbone.pos_embed.shape[1],), -STRENGTH)
    sign[1 + torch.tensor(MARKED)] = STRENGTH
    backbone.pos_embed[0, :, MARK], backbone.pos_embed[0, :, ANTI_MARK] = sign, -sign
    fc1, fc2 = backbone.blocks[BLOCK].mlp.fc1, backbone.blocks[BLOCK].mlp.fc2
    fc1.weight[:2] = 0
    fc1.weight[:2, MARK] = SLOPE
    fc1.bias[:2] = torch.tensor([0.0, -1.0])
    fc2.weight[TARGET, :2] = torch.tensor([AMOUNT, -AMOUNT])
    return backbone


def planted(kind: str) -> BackboneExtractor:
    if kind == "t2t":
        return extractor_of(planted_t2t(), "t2t_vit")
    registers = 2 if kind.endswith("registers") else 0
    if kind.startswith("swiglu"):
        return extractor_of(planted_swiglu(registers))
    return extractor_of(planted_vit(positions=MARKED, num_registers=registers))


KINDS = ("mlp", "mlp, registers", "swiglu", "swiglu, registers", "t2t")


@pytest.mark.parametrize("kind", KINDS)
def test_planted_neurons_are_found_and_moved(kind: str) -> None:
    model, batches = planted(kind), images()
    found = find_register_neurons(model, batches)
    assert (found.block, found.begins, found.images) == (3, BLOCK, 32)
    assert found.outliers == 32 * len(MARKED)
    assert found.top(2) == {BLOCK: (0, 1)}
    first, second, third = found.ranked(3)
    assert second.score > 20 * third.score  # nothing else comes near
    assert first.elsewhere == pytest.approx(0, abs=1e-6)

    before = model.blocks(batches[0], range(4), norm=False)
    moved = add_test_time_registers(model, found.top(2))
    after = moved.blocks(batches[0], range(4), norm=False)
    trained = before[0].registers.shape[1]
    normal = torch.ones(before[0].patches[0, ..., 0].numel(), dtype=torch.bool)
    normal[list(MARKED)] = False
    for block, (a, b) in enumerate(zip(before, after, strict=True)):
        kept = [f.patches.flatten(1, 2)[:, normal] for f in (a, b)]
        torch.testing.assert_close(*kept, atol=1e-12, rtol=0)  # silu is not quite 0 at -80
        assert torch.equal(a.cls, b.cls)
        assert torch.equal(a.registers, b.registers[:, :trained])
        assert b.registers.shape[1] == trained + 1
        # The planted step is all that happens to a token, so that the added one is `amount` in one channel, as
        # exactly as fp32 has the difference of two activations of about 200.
        expected = torch.zeros(48)
        expected[TARGET] = AMOUNT if block >= BLOCK else 0
        torch.testing.assert_close(b.registers[:, trained], expected.expand(8, -1), atol=5e-3, rtol=0)
        torch.testing.assert_close(b.patches, before[0].patches, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="has test-time registers already"):
        find_register_neurons(moved, batches)
    with pytest.raises(ValueError, match="has test-time registers already"):
        add_test_time_registers(moved, found.top(2))


def test_norms_are_those_the_construction_predicts() -> None:
    backbone = planted_vit(positions=MARKED)
    batch = images(1)[0]
    clean = expected_norms(backbone, batch, (), block=BLOCK, amount=AMOUNT)
    moved = add_test_time_registers(extractor_of(backbone), {BLOCK: (0, 1)})
    for block, features in enumerate(moved.blocks(batch, range(4), norm=False)):
        norms = features.patches.flatten(1, 2).double().norm(dim=-1)
        torch.testing.assert_close(norms, clean[block], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "swiglu", "t2t"])
def test_means_against_a_direct_sum(kind: str) -> None:
    model, batches = planted({"vit": "mlp, registers"}.get(kind, kind)), images(2)
    found = find_register_neurons(model, batches, last=3)
    inputs: dict[int, list[Tensor]] = {i: [] for i in range(4)}
    handles = [
        block.mlp.register_forward_pre_hook(lambda module, args, i=i: inputs[i].append(args[0]))
        for i, block in enumerate(model.backbone.blocks)
    ]
    norms = [model.blocks(batch, [3], norm=False)[0].patches.flatten(1, 2).norm(dim=-1) for batch in batches]
    for handle in handles:
        handle.remove()
    high = torch.cat([n > found.verdict.cutoff for n in norms]).flatten()
    for i, block in enumerate(model.backbone.blocks):
        x = torch.cat([v.unflatten(0, (8, -1))[:, 1 + model.backbone.num_registers :] for v in inputs[i]])
        x = x.flatten(0, 1).double()
        if kind == "swiglu":
            a, b = F.linear(x, block.mlp.w12.weight.double(), block.mlp.w12.bias.double()).chunk(2, -1)
            hidden = a * torch.sigmoid(a) * b
        else:
            hidden = F.gelu(F.linear(x, block.mlp.fc1.weight.double(), block.mlp.fc1.bias.double()))
        torch.testing.assert_close(found.at_outliers[i], hidden[high].abs().mean(0).float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.elsewhere[i], hidden[~high].abs().mean(0).float(), rtol=1e-4, atol=1e-6)


def moved_by_loops(hidden: Tensor, groups: Any, units: Any, first: int, added: int) -> Tensor:
    out, row = hidden.clone(), 0
    for count, tokens in groups:
        for _ in range(count):
            for unit in units:
                ranked = sorted(hidden[row + first + added : row + tokens, unit].tolist(), key=abs, reverse=True)
                for t in range(tokens - first):
                    out[row + first + t, unit] = ranked[t] if t < min(added, len(ranked)) else 0.0
            row += tokens
    return out


@pytest.mark.parametrize(("first", "added"), [(1, 1), (3, 1), (2, 3), (1, 6)])
def test_moving_against_loops(first: int, added: int) -> None:
    groups = ((2, first + added + 9), (3, first + added + 4))
    rows = sum(a * b for a, b in groups)
    hidden = torch.randn(rows, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(first + 10 * added))
    found = move_to_registers(hidden, groups, (4, 1), slice(first, first + added))
    assert torch.equal(found, moved_by_loops(hidden, groups, (4, 1), first, added))
    assert torch.equal(found[:, [0, 2, 3, 5, 6]], hidden[:, [0, 2, 3, 5, 6]])


@pytest.mark.parametrize("ffn", ["mlp", "swiglu", "ghost"])
def test_any_model_against_hooks(ffn: str) -> None:
    """Two added registers in a model in which everything acts on everything, a second image size, and gradients."""
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 8, "image_size": 32, "ffn": ffn}
    options |= {"mlp_ratio": 3.0}
    source = make_backbone("vit", num_registers=1, **options).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    neurons = {0: (2, 7), 2: (1,)}
    moved = add_test_time_registers(extractor_of(source), neurons, 2)
    assert isinstance(moved.backbone, Trunk)
    plain = make_backbone("vit", num_registers=3, **options).eval()
    zeros = torch.zeros(1, 2, 24)
    plain.load_state_dict({**source.state_dict(), "register_tokens": torch.cat((source.register_tokens, zeros), 1)})
    for size in (32, 16):
        batch = torch.randn(2, 3, size, size)
        tokens = 4 + (size // 8) ** 2
        handles = [
            plain.blocks[i].mlp.out_layer.register_forward_pre_hook(
                lambda module, args, units=units, n=tokens: moved_by_loops(args[0], ((2, n),), units, 2, 2)
            )
            for i, units in neurons.items()
        ]
        with torch.no_grad():
            expected, found = plain(batch), moved(batch)
        for handle in handles:
            handle.remove()
        for a, b in ((expected.cls, found.cls), (expected.registers, found.registers)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(expected.patches, found.patches, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            assert (plain(batch).patches - found.patches).abs().max() > 1e-3
    moved.backbone.requires_grad_(True)
    both = moved.backbone([torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)])
    sum(f.patches.square().sum() for f in both).backward()
    assert moved.backbone.patch_embed.proj.weight.grad.isfinite().all()


def test_a_file_gives_the_same_model(tmp_path: Path) -> None:
    model, batch = planted("swiglu, registers"), images(1)[0]
    moved = add_test_time_registers(model, {BLOCK: (0, 1)}, 2)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    save_teacher(tmp_path, moved.backbone, mean=MEAN, std=STD, image_size=32, provenance=moved.meta["provenance"])
    again = load(tmp_path, "cpu")
    a, b = moved(batch), again(batch)
    assert torch.equal(a.patches, b.patches)
    assert torch.equal(a.registers, b.registers)
    assert a.registers.shape == (8, 4, 48)
    assert again.identity()["hash"] == moved.identity()["hash"]
    assert again.meta["provenance"]["retrofit"] == {
        "method": "test-time registers (arXiv 2506.08010)",
        "of": model.identity()["hash"],
        "added": 2,
        "neurons": "2:0,1",
    }
    others = add_test_time_registers(model, {BLOCK: (0, 1, 5)}, 2)
    assert len({m.identity()["hash"] for m in (model, moved, others)}) == 3
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    changed = {k for k, v in moved.backbone.state_dict().items() if k not in before or not torch.equal(v, before[k])}
    assert changed == {"register_tokens"}
    assert random_like(moved)(batch).registers.shape == (8, 4, 48)
    arguments = moved.backbone.arguments
    registers = {**arguments, "test_time_registers": 0, "register_neurons": ""}
    assert count_macs("vit", **arguments) == count_macs("vit", **registers)
    assert count_parameters("vit", **arguments) == sum(v.numel() for v in moved.backbone.state_dict().values())


def test_other_formats_refuse_or_keep_it(tmp_path: Path) -> None:
    moved = add_test_time_registers(planted("mlp"), {BLOCK: (0, 1)})
    assert "register_neurons" in str(not_a_plain_vit(moved, "timm"))
    assert needs_quietvit(moved.backbone) == "it has test-time registers"
    report = export_model(moved, tmp_path / "out")
    assert report.max_difference == 0


def test_training_does_not_begin_with_it() -> None:
    moved = add_test_time_registers(planted("mlp"), {BLOCK: (0, 1)})
    config = load_config("continue_dinov2", ["init.from=model", "data.path=x"])
    with pytest.raises(ConfigError, match="added without training"):
        adopt(config, name="vit", arguments=moved.backbone.arguments, mean=MEAN, std=STD, sizes={})


def test_nothing_to_move() -> None:
    torch.manual_seed(0)
    clean = make_backbone(
        "vit", embed_dim=48, depth=3, num_heads=4, patch_size=4, image_size=32, num_registers=0, init="xavier"
    )
    with pytest.raises(ValueError, match="nothing to move after block 2: one mode"):
        find_register_neurons(extractor_of(clean), images())
    with pytest.raises(ValueError, match="nothing to move after block 1: "):
        find_register_neurons(planted("mlp"), images(), block=1)
    low = extractor_of(planted_vit(positions=MARKED, amount=17.0))
    with pytest.raises(ValueError, match="suspicious"):
        find_register_neurons(low, images())
    with torch.no_grad():
        clean.blocks[2].mlp.fc2.bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        find_register_neurons(extractor_of(clean), images())


def test_the_first_block_with_outliers_is_the_last_looked_into() -> None:
    backbone = planted_vit(positions=MARKED, depth=5, block=1)
    found = find_register_neurons(extractor_of(backbone), images())
    assert (found.begins, found.block, len(found.at_outliers)) == (1, 4, 2)
    assert len(find_register_neurons(extractor_of(backbone), images(), block=-2, last=3).at_outliers) == 4


def test_what_cannot_be() -> None:
    model = planted("mlp")
    with pytest.raises(ValueError, match="there is no block 4"):
        find_register_neurons(model, images(), block=4)
    with pytest.raises(ValueError, match="there is no block -5"):
        find_register_neurons(model, images(), last=-5)
    with pytest.raises(ValueError, match="no images"):
        find_register_neurons(model, [])
    with pytest.raises(ValueError, match="fewer than those of the first"):
        find_register_neurons(model, iter(images()))
    for neurons, num in (({}, 1), ({1: ()}, 1), ({1: (3,)}, 0)):
        with pytest.raises(ValueError, match="one or more of both"):
            add_test_time_registers(model, neurons, num)
    with pytest.raises(ValueError, match=r"hidden unit 192: there are 192"):
        add_test_time_registers(model, {1: (192,)})
    with pytest.raises(ValueError, match="of block 4: there are 4 blocks"):
        add_test_time_registers(model, {4: (0,)})
    dense = make_backbone(
        "t2t_vit", embed_dim=24, depth=5, num_heads=3, dense_groups="2-2", growth=6, token_dim=16, image_size=32
    )
    with pytest.raises(ValueError, match="dense trunk"):
        find_register_neurons(extractor_of(dense, "t2t_vit"), images())


def test_options_of_a_backbone() -> None:
    assert parse_neurons("2:0,1;5:17") == {2: (0, 1), 5: (17,)}
    assert parse_neurons("") == {}
    assert neurons_text({5: (17, 3), 2: (1, 0), 3: ()}) == "2:0,1;5:3,17"
    small = {"embed_dim": 24, "depth": 2, "num_heads": 3, "image_size": 28}
    for text in ("2", "a:1", "1:", "1:2;", "1:2,,3", "-1:2"):
        with pytest.raises(ValueError, match="write block:unit"):
            make_backbone("vit", **small, register_neurons=text, test_time_registers=1)
    for text in ("1:2;1:3", "1:2,2"):
        with pytest.raises(ValueError, match="twice"):
            make_backbone("vit", **small, register_neurons=text, test_time_registers=1)
    with pytest.raises(ValueError, match="either there are both"):
        make_backbone("vit", **small, register_neurons="1:2")
    with pytest.raises(ValueError, match="either there are both"):
        make_backbone("vit", **small, test_time_registers=1)
    with pytest.raises(ValueError, match="they are the last of num_registers, which is 4"):
        make_backbone("vit", **small, register_neurons="1:2", test_time_registers=5)
